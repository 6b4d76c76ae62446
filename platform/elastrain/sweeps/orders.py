"""What goes between a sweep's driver, its desk and the workers of its cells. No torch here: drivers make it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from elastrain import storage
from elastrain.elastic.protocol import Worker
from elastrain.spec.train import TrainSpec
from elastrain.sweeps.space import Arm, trial_spec


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What trials are compared by, and when: evaluations after the steps `decisions` are decided on before going on.

    `saves`: a checkpoint of that step is whole before the decision, so that the trial can be gone on with from there.
    """

    metric: str
    goal: str
    decisions: frozenset[int]
    saves: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A trial to run, or to go on with.

    `resume` is (run, step) of the checkpoint to start from, `untold` if the desk lacks the evaluation of that step,
    which its manifest has. `decided` is the last step that was decided on before, and `spent_s` the device-seconds
    spent up to there.
    """

    trial: str
    point: Mapping[str, Any]
    spec: TrainSpec
    run_url: str
    objective: Objective
    resume: tuple[str, int] | None = None
    untold: bool = False
    decided: int = 0
    spent_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """From what Tune's side says of a trial to the order for it: `arms` by name, and where the trials' runs are."""

    arms: Mapping[str, Arm]
    objective: Objective
    folder: str

    def order(self, trial: str, begin: Mapping[str, Any]) -> Order:
        """Return the order for a trial; raises SpecError if its run refuses the point's values together."""
        spec = trial_spec(self.arms[begin["arm"]], begin["point"], name=trial, storage=self.folder, seed=begin["seed"])
        resume, untold = tuple(begin["resume"]) if begin["resume"] else None, bool(begin.get("untold"))
        objective = self.objective if begin["phase"] == "tune" else replace(self.objective, decisions=frozenset())
        if objective.saves:
            # Two more are kept for those that take over this trial's weights while it goes on.
            kept = spec.checkpoint.model_copy(update={"every_steps": spec.eval.every_steps, "keep": 3})
            spec = spec.model_copy(update={"checkpoint": kept})
        return Order(
            trial=trial,
            point=begin["point"],
            spec=spec,
            run_url=storage.join(self.folder, trial),
            objective=objective,
            resume=resume,
            untold=untold,
            decided=max(begin.get("decided", 0), resume[1] if resume and not untold else 0),
            spent_s=begin["spent_s"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """An order as one worker of a cell gets it: with whom it runs it. A new generation is a new process group."""

    order: Order
    generation: int
    members: tuple[Worker, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CellConfig:
    """What the workers of a cell are given."""

    desk: Any
    cell: str
    size: int
    cpus: float
    gpus: float
    timeout_s: float
    info: Mapping[str, Any]
