"""The shipped search over the digits, and the shipped setting trained with the same seeds, steps and schedule."""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.script import finish, options

import elastrain
from elastrain.elastic.session import ray_session
from elastrain.spec.document import read_train
from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.document import read_sweep
from elastrain.sweeps.stats import first_reached
from elastrain.sweeps.trials import Trial

PIPELINE = ROOT / "pipelines" / "digits_mlp"
SMALL = (
    "objective={metric: val_loss, every: 23, max_steps: 69, target: 2.0}",
    "early_stop={method: asha, grace: 23, factor: 3}",
    "budget.per_arm=2",
    "confirm.seeds=2",
)


def shipped(name: str, folder: Path, data: str) -> list[str]:
    """Return what makes a shipped sweep one of this name with data and results elsewhere; nothing that it compares."""
    where = [f"set.data.{split}={data}/{part}" for split, part in (("train", "train"), ("eval", "test"))]
    return [f"name={name}", f"storage={folder}", *where]


def setting(spec: SweepSpec, folder: Path, data: str, *, small: bool) -> SweepSpec:
    """Return a sweep whose only point is the shipped setting, confirmed with the seeds of `spec`."""
    base = read_train(PIPELINE / "train.yaml")
    values: dict[str, Any] = {"optimizer.lr": base.optimizer.lr, "task_args.hidden": base.task_args["hidden"]}
    space = ", ".join(f"{field}: {{grid: [{value!r}]}}" for field, value in values.items())
    assert set(values) | {"task_args.dropout"} == set(spec.space), "the search varies something else by now"
    changes = ["early_stop=null", f"space={{{space}}}", "search={method: grid}", "budget.per_arm=1"]
    few = [change for change in SMALL if not change.startswith(("early_stop", "budget"))] if small else []
    return read_sweep(PIPELINE / "sweep.yaml", [*shipped("shipped", folder, data), *few, *changes])


def confirmed(found: elastrain.Sweep) -> list[Trial]:
    """Return the runs that confirm a sweep's best point, by seed."""
    runs = [trial for trial in found.trials() if trial.phase == "confirm" and trial.outcome == "finished"]
    return sorted((run for run in runs if run.id.startswith(found.result["best_trial"])), key=lambda run: run.seed)


def measures(runs: list[Trial], spec: SweepSpec, name: str) -> dict[str, float]:
    """Return mean loss and median steps to the target."""
    aim, most = spec.objective, 2.0 * spec.objective.max_steps  # a miss counts as twice the steps there are
    assert aim.target is not None
    reached = [first_reached(run, aim.target, aim.goal) for run in runs]
    losses = [run.value for run in runs if run.value is not None]
    print(
        f"{name}: {runs[0].point}, losses {losses}, steps {[told and told.step for told in reached]}", file=sys.stderr
    )
    steps = statistics.median(told.step if told else most for told in reached)
    return {f"{name}_loss": statistics.fmean(losses), f"{name}_steps": steps}


def main() -> None:
    """Search, train the shipped setting, report both."""
    given = options()
    small, data = bool(given["small"]), given["data"]
    with tempfile.TemporaryDirectory() as name, ray_session(None, cpus=2):
        folder = Path(name)
        spec = read_sweep(PIPELINE / "sweep.yaml", [*shipped("search", folder, data), *(SMALL if small else ())])
        best = confirmed(elastrain.sweep(spec))
        plain = confirmed(elastrain.sweep(setting(spec, folder, data, small=small)))
    if [run.seed for run in best] != [run.seed for run in plain]:
        raise SystemExit(f"not the same seeds: {[run.seed for run in best]}, {[run.seed for run in plain]}")
    finish({**measures(best, spec, "best"), **measures(plain, spec, "shipped")}, {"seeds": len(best)})


if __name__ == "__main__":
    main()
