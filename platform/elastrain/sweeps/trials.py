"""Trials as data: what each was given, what it reported and how it ended, as events of the sweep's ledger say.

A sweep's ledger holds, besides `start` and `end` of each attempt, these kinds of events:

- `trial`: `trial` (its id), `arm`, `phase`, `number`, `point` (dotted field → value), `seed`
- `eval`: `trial`, `step`, `samples`, `value` (of the objective; None: not finite), `metrics`, `device_s`
- `cell`: `cell`, `node`, `workers` (started) · `lost`: `trial`, `cell`, `reason`: it goes on elsewhere
- `go_on`: `trial`, `step`, `device_s`, `value`: it was decided on after that evaluation, and not stopped
- `exploit`: `trial`, `donor`, `step`, `point`: it goes on with another one's weights, from that step, at this point
- `ended`: `trial`, `outcome`, `step`, `device_s`, `error`, `error_kind` (the class of an error of ours)
- `gave_up`: `arm`: too many of its trials in a row came to no evaluation
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Outcome = Literal["running", "finished", "pruned", "diverged", "failed"]
TrialPhase = Literal["tune", "defaults", "confirm"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation: `value` is the objective's (None: not finite), `device_s` the seconds of training before it.

    `device_s` sums over the trial's workers what they spent on data, forwards, backwards and sums: neither the start
    nor evaluations nor checkpoints.
    """

    step: int
    samples: int
    value: float | None
    metrics: Mapping[str, float]
    device_s: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep; `evaluations` are in the order of their steps, each step once."""

    id: str
    arm: str
    phase: TrialPhase
    number: int
    point: Mapping[str, Any]
    seed: int
    outcome: Outcome = "running"
    step: int = 0
    device_s: float = 0.0
    error: str = ""
    evaluations: tuple[Evaluation, ...] = field(default=())
    error_kind: str = ""

    @property
    def value(self) -> float | None:
        """The objective at the last evaluation; None without one, or where it was not finite."""
        return self.evaluations[-1].value if self.evaluations else None


class Told:
    """The trials that a ledger's events tell of, `take` by `take`, in the order in which they began.

    An evaluation of a step that was there before, as after a lost worker, takes the place of the one before and of all
    that followed it.
    """

    def __init__(self) -> None:
        self._found: dict[str, Trial] = {}

    def trials(self) -> list[Trial]:
        """Return the trials as they are by what was taken."""
        return list(self._found.values())

    def take(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take what follows."""
        found = self._found
        for event in events:
            match event["kind"]:
                case "trial":
                    given = {key: event[key] for key in ("arm", "phase", "number", "point", "seed")}
                    found.setdefault(event["trial"], Trial(id=event["trial"], **given))
                case "eval":
                    trial = found[event["trial"]]
                    told = Evaluation(*(event[key] for key in ("step", "samples", "value", "metrics", "device_s")))
                    before = tuple(entry for entry in trial.evaluations if entry.step < told.step)
                    found[trial.id] = replace(
                        trial, evaluations=(*before, told), step=max(trial.step, told.step), device_s=told.device_s
                    )
                case "exploit":
                    found[event["trial"]] = replace(found[event["trial"]], point=event["point"])
                case "ended":
                    ended = {key: event[key] for key in ("outcome", "step", "device_s", "error", "error_kind")}
                    found[event["trial"]] = replace(found[event["trial"]], **ended)


def trials_of(events: Iterable[Mapping[str, Any]]) -> list[Trial]:
    """Return the trials that a ledger's events tell of; see `Told`."""
    told = Told()
    told.take(events)
    return told.trials()
