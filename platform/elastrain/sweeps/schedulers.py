"""Who goes on and who is stopped: Ray Tune's schedulers as a sweep's spec asks for them."""

import math
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.rungs import firsts


class Population(PopulationBasedTraining):
    """Tune's PBT in step; where all wait for one that has ended since, they go on without an exchange."""

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Return the paused trial that is furthest behind."""
        chosen = super().choose_trial_to_run(tune_controller)
        live = [trial for trial in tune_controller.get_live_trials() if not trial.is_finished()]
        if chosen is None and live and all(trial.status == TuneTrial.PAUSED for trial in live):
            behind = min(self._trial_state[trial].last_train_time for trial in live)
            self._next_perturbation_sync = behind + self._perturbation_interval
            chosen = super().choose_trial_to_run(tune_controller)
        return chosen


class Brackets(HyperBandScheduler):
    """Tune's HyperBand where it does not fit few, short trials that may end by themselves.

    It begins with the bracket that prunes most (Li et al. 2018), of trials that get `grace` steps at least; Tune's
    begins with those that prune nobody. Who is good enough runs to its end, Tune's up to the last power of `factor`.
    What waited for a trial that ended by itself goes on; in Tune's it waits for ever after a bracket's first round.
    """

    def __init__(self, spec: SweepSpec) -> None:
        assert spec.early_stop is not None
        rounds, factor = spec.objective.max_steps // spec.objective.every, spec.early_stop.factor
        super().__init__(
            time_attr="round",
            metric="objective",
            mode=spec.objective.goal,
            max_t=rounds,
            reduction_factor=factor,
            stop_last_trials=False,
        )
        self._s_max_1 = len(firsts(spec))
        self._get_r0 = lambda s: rounds // factor**s  # in whole numbers: 49 * 7**-2 is less than 1 in floats

    def _create_bracket(self, s: int) -> Any:
        return super()._create_bracket(self._s_max_1 - 1 - s)  # type: ignore[no-untyped-call] # Tune's

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        """Halve, and again where all who are left are past the next milestone, too: those of a sweep that goes on."""
        word = str(TrialScheduler.PAUSE)
        while not bracket.is_being_processed and bracket.current_trials():
            try:
                found = str(super()._process_bracket(tune_controller, bracket))
            finally:
                bracket.is_being_processed = False
            word = word if word == TrialScheduler.STOP else found  # for the one that runs; the others are told already
            if bracket._halves == 0 or not bracket.cur_iter_done():  # noqa: SLF001 -- no public way
                break
        return word


def scheduler_of(spec: SweepSpec, explore: Callable[[dict[str, Any]], dict[str, Any]]) -> TrialScheduler:
    """Return the scheduler of a study. `explore(config)` is what a trial of PBT becomes that takes over another one."""
    objective, early = spec.objective, spec.early_stop
    compared: dict[str, Any] = {"metric": "objective", "mode": objective.goal}
    if spec.search.method == "pbt":
        synch: dict[str, Any] = {"synch": True, "log_config": False, "perturbation_interval": objective.every}
        return Population(time_attr="step", custom_explore_fn=explore, **synch, **compared)
    if early is None:
        return FIFOScheduler()
    match early.method:
        case "asha":
            return AsyncHyperBandScheduler(
                time_attr="step",
                grace_period=early.grace,
                max_t=objective.max_steps,
                reduction_factor=early.factor,
                **compared,
            )
        case "median":
            # It would have trials pause, of which no checkpoint is there, while others wait for their actors.
            never: Any = math.inf
            return MedianStoppingRule(time_attr="step", grace_period=early.grace, min_time_slice=never, **compared)
        case "hyperband":
            return Brackets(spec)
