"""What Tune's schedulers are told, so that they do what a sweep can follow."""

from types import SimpleNamespace
from typing import Any


class _Trial:
    trial_id = "a"


def test_median_stopping_never_has_a_trial_pause_for_there_is_no_checkpoint_to_go_on_from() -> None:
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler

    from elastrain.spec.sweep import SweepSpec
    from elastrain.sweeps.tuning import decisions, scheduler_of

    spec = SweepSpec.model_validate(
        {
            "name": "median",
            "base": "train.yaml",
            "objective": {"every": 10, "max_steps": 100},
            "space": {"optimizer.lr": {"log": [0.001, 0.1]}},
            "budget": {"per_arm": 4},
            "early_stop": {"method": "median", "grace": 10},
        }
    )
    steps, saves = decisions(spec)
    assert 10 in steps
    assert not saves
    scheduler, trial = scheduler_of(spec, lambda config: config), _Trial()
    waiting: Any = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status=Trial.PENDING)])
    for step in (10, 20):
        told: Any = trial
        assert scheduler.on_trial_result(waiting, told, {"step": step, "objective": 1.0}) == TrialScheduler.CONTINUE
