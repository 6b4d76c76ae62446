"""Recorded learning curves through the scheduler of a sweep: how many epochs it takes, and what it finds.

No training: each trial's evaluations are read from its curve, so many trials at a time, each at a pace of its own, and
that in several orders, since an early trial is compared with few.
"""

import heapq
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from benchmarks.script import finish, options
from benchmarks.sweep.case import AT_ONCE
from benchmarks.sweep.work import RECORDED_EVERY, RECORDED_STEPS
from ray.tune.schedulers import TrialScheduler

from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.document import sweep_spec
from elastrain.sweeps.rungs import decisions
from elastrain.sweeps.schedulers import scheduler_of

GRACE = 2 * RECORDED_EVERY
ORDERS = 20
NOBODY: Any = None  # these schedulers ask nothing of Tune's controller


def spec_of(trials: int, grace: int) -> SweepSpec:
    """Return a spec that stops early as the shipped ones do: one in three goes on after `grace` steps, and so on."""
    return sweep_spec(
        {
            "kind": "sweep",
            "name": "recorded",
            "base": "none.yaml",
            "objective": {"metric": "val_loss", "every": RECORDED_EVERY, "max_steps": RECORDED_STEPS},
            "space": {"optimizer.lr": {"log": [1e-4, 1e-1]}},
            "budget": {"unit": "trials", "per_arm": trials},
            "early_stop": {"method": "asha", "grace": grace, "factor": 3},
        }
    )


def replay(curves: Sequence[Sequence[float]], at_once: int, *, grace: int = GRACE) -> tuple[float, float]:
    """Return the share of all evaluations that were made, and the best loss of the trials that went to the end."""
    spec = spec_of(len(curves), grace)
    scheduler, (decided, _) = scheduler_of(spec, lambda config: config), decisions(spec)
    pace = np.random.default_rng(0).uniform(0.7, 1.3, len(curves))
    waiting, running = list(range(len(curves))), list[tuple[float, int, int]]()
    now, made, best = 0.0, 0, np.inf
    while waiting or running:
        while waiting and len(running) < at_once:
            place = waiting.pop(0)
            scheduler.on_trial_add(NOBODY, _trial(place))
            heapq.heappush(running, (now + pace[place], place, 1))
        now, place, evaluation = heapq.heappop(running)
        made += 1
        step, loss = evaluation * RECORDED_EVERY, curves[place][evaluation - 1]
        result = {"step": step, "objective": loss}
        if step >= RECORDED_STEPS:
            best = min(best, loss)
            scheduler.on_trial_complete(NOBODY, _trial(place), result)
        elif step in decided and scheduler.on_trial_result(NOBODY, _trial(place), result) == TrialScheduler.STOP:
            scheduler.on_trial_complete(NOBODY, _trial(place), result)
        else:
            heapq.heappush(running, (now + pace[place], place, evaluation + 1))
    return made / sum(len(curve) for curve in curves), float(best)


def _trial(place: int) -> Any:
    return SimpleNamespace(trial_id=str(place))


def shares(curves: np.ndarray[Any, Any]) -> Mapping[str, float]:
    """Return share and best loss with so many trials at once, means over orders, and what all to the end come to."""
    found = {"whole_share": 1.0, "whole_loss": float(np.nanmin(curves[:, -1]))}
    orders = [np.random.default_rng(order).permutation(len(curves)) for order in range(ORDERS)]
    for trials in AT_ONCE:
        runs = np.array([replay(curves[order].tolist(), trials) for order in orders])
        found[f"share_{trials}"], found[f"loss_{trials}"] = map(float, runs.mean(axis=0))
    return found


def main() -> None:
    """Replay; report."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- what Tune's schedulers draw from
    with np.load(options()["rows"]) as held:
        curves = held["curves"]
    finish(shares(curves), {"trials": len(curves)})


if __name__ == "__main__":
    main()
