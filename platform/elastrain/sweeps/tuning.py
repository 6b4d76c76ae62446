"""Ray Tune as the control plane: its controller runs the trials, its schedulers decide which go on.

A trial of Tune is an actor that holds nothing but a place in the line: it speaks with the desk, and the cells compute.
Which trials there are is said by an `Agenda`; Tune's own state is not stored, since the sweep's ledger has it all.

This module and `schedulers` alone stand on Tune's developer interfaces and insides; `tests/sweeps/test_tuning.py` and
`test_tune_histories.py` use them all.
"""

import contextlib
import logging
import os
import random
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.train._internal.storage import StorageContext
from ray.tune import PlacementGroupFactory
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.registry import register_trainable
from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.search_algorithm import SearchAlgorithm

from elastrain.sweeps.agenda import Agenda, Proposal
from elastrain.sweeps.trials import Outcome

NAME = "elastrain-trial"
BEGIN = ("arm", "phase", "point", "seed", "resume", "untold", "decided", "spent_s")  # what the desk is told of a trial
WORST = 1e30  # what counts for a trial that diverged or failed: infinity would spoil Tune's percentiles
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_THRESHOLD_S": "10",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class TrialActor(tune.Trainable):
    """A trial as Tune sees it: each `step` begins it, or lets it go on, and returns what is to be decided next."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin with a trial."""
        logging.getLogger("ray").setLevel(logging.ERROR)  # which tells of each checkpoint
        self._desk = ray.get_actor(config["desk"])
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin with another trial."""
        self._given, self._begun = dict(new_config), False
        self._recorded: deque[dict[str, Any]] = deque(new_config["recorded"])
        self._saved: dict[str, Any] = {}
        return True

    def step(self) -> dict[str, Any]:
        """Return the next result: `step`, `round` (evaluations), `objective`, and `outcome` once it has ended.

        `recorded`: an earlier attempt at the sweep had it and said to go on, and that stands. What it had, and left
        without a word, is decided on before the trial begins.
        """
        if self._recorded:
            return self._result(self._recorded.popleft())
        begin = None if self._begun else {key: self._given[key] for key in BEGIN}
        self._begun = True
        desk: Any = self._desk
        message: dict[str, Any] = ray.get(desk.next.remote(self.trial_id, begin))
        self._saved = {"run": message["run"], "step": message["step"], "spent_s": message["device_s"]}
        return self._result(message) | {"recorded": False}

    def _result(self, message: Mapping[str, Any]) -> dict[str, Any]:
        outcome, value, worst = message["outcome"], message["value"], self._given["worst"]
        counts = value is not None and outcome in ("", "finished", "pruned")
        rounds = message["step"] // self._given["every"]
        told = {"step": message["step"], "round": rounds, "objective": value if counts else worst}
        told["recorded"] = message.get("recorded", True)
        return {**told, "outcome": outcome, "device_s": message["device_s"], "done": bool(outcome)}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Return where the trial's own checkpoint is: it was whole before its step was reported."""
        del checkpoint_dir
        return dict(self._saved)

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on from a checkpoint of a trial: this one, after a pause, or another one that did better."""
        assert checkpoint is not None
        self._given["resume"] = (checkpoint["run"], checkpoint["step"])
        self._given |= {"untold": False, "spent_s": checkpoint["spent_s"]}
        self._begun = False


class Controller(TuneController):
    """Tune's controller without its snapshots, which gives `most()` trials an actor at a time, or hardly more."""

    most: Callable[[], int]

    def _maybe_add_actors(self) -> None:
        """Give actors to trials that wait for one, as long as there are cells for them."""
        if len(self._trial_to_actor) < self.most():
            super()._maybe_add_actors()

    def checkpoint(self, force: bool = False, wait: bool = False) -> None:  # noqa: FBT001, FBT002 -- Tune's signature
        """Store nothing: the ledger tells all, and whoever goes on reads it."""


Begin = Callable[[Proposal], dict[str, Any]]
"""From a proposal to what its `TrialActor` is given; called once for each."""


class Proposals(SearchAlgorithm):
    """Gives Tune the agenda's trials, as many at a time as there are cells to run them."""

    def __init__(
        self,
        agenda: Agenda,
        storage: StorageContext,
        begin: Begin,
        *,
        capacity: Callable[[], int],
        pauses: bool,
        node: str,
    ) -> None:
        self._agenda, self._storage, self._begin, self._capacity = agenda, storage, begin, capacity
        # Trials that pause wait for others to come: all begin, though the controller gives only some an actor.
        self._pauses = pauses
        self._trials: dict[str, TuneTrial] = {}
        # Beside the driver, by the node's id since nodes may share an address: one that goes takes cells, not trials.
        bundle = {f"node:{ray.util.get_node_ip_address()}": 0.001}
        self._resources = PlacementGroupFactory([bundle], bundle_label_selector=[{"ray.io/node-id": node}])

    def next_trial(self) -> TuneTrial | None:
        """Return a trial to begin with, None for now or for ever (`is_finished`)."""
        if not self._pauses and self._agenda.in_flight >= self._capacity():
            return None
        proposal = self._agenda.next()
        if proposal is None:
            return None
        trial = self._trials[proposal.trial] = TuneTrial(
            NAME,
            config=self._begin(proposal),
            trial_id=proposal.trial,
            experiment_tag=proposal.trial,
            storage=self._storage,
            placement_group_factory=self._resources,
        )
        return trial

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001, FBT002 -- Tune's signature
        """Take note of a trial's end; one that ends while it pauses, or with its actor, comes without a result."""
        trial = self._trials[trial_id]
        found = result or trial.last_result or {}
        outcome: Outcome = "failed" if error else found.get("outcome") or "pruned"
        value = found.get("objective") if outcome in ("finished", "pruned") else None
        spent = {"step": found.get("step", 0), "device_s": found.get("device_s", 0.0)}
        # PBT may have changed the point meanwhile.
        self._agenda.ended(trial_id, outcome, value, **spent, point=trial.config.get("point"))

    def is_finished(self) -> bool:
        """Say whether there will be no more trials."""
        return bool(self._finished) or self._agenda.is_finished()


class OfArm:
    """Tune's controller as the scheduler of one arm sees it: with the trials of that arm alone."""

    def __init__(self, controller: Any, is_mine: Callable[[TuneTrial], bool]) -> None:
        self._controller, self._is_mine = controller, is_mine

    def get_trials(self) -> list[TuneTrial]:
        """Return the arm's trials."""
        return [trial for trial in self._controller.get_trials() if self._is_mine(trial)]

    def get_live_trials(self) -> set[TuneTrial]:
        """Return those of them that have not ended."""
        return {trial for trial in self._controller.get_live_trials() if self._is_mine(trial)}

    def __getattr__(self, name: str) -> Any:
        """Return what the controller has of this name."""
        return getattr(self._controller, name)


class PerStudy(TrialScheduler):
    """A scheduler for each study of each arm: only its trials are compared; what is confirmed is never stopped.

    `leave(trial, outcome)` is called as soon as a trial is to stop ("pruned"), to pause ("") or has lost its actor
    ("failed"): its workers wait. `went_on(trial, result)` is called where it is to go on, for the record. What was
    recorded is compared with, and not decided on again. A trial without a value at its end is not compared with: as a
    very bad one it would raise the mean of those who are left.
    """

    _supports_buffered_results = False

    def __init__(
        self,
        make: Callable[[], TrialScheduler],
        leave: Callable[[str, str], object],
        went_on: Callable[[str, Mapping[str, Any]], object],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # Tune's
        self._make, self._leave, self._went_on = make, leave, went_on
        self._schedulers: dict[tuple[str, int], TrialScheduler] = {}
        self._plain = FIFOScheduler()
        self._metric = "objective"

    def _of(self, trial: TuneTrial) -> TrialScheduler:
        if trial.config["phase"] != "tune":
            return self._plain
        study: tuple[str, int] = trial.config["arm"], trial.config["study"]
        if study not in self._schedulers:
            self._schedulers[study] = self._make()
        return self._schedulers[study]

    def _seen(self, controller: Any, scheduler: TrialScheduler) -> Any:
        return OfArm(controller, lambda trial: self._of(trial) is scheduler)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Hand on."""
        scheduler = self._of(trial)
        scheduler.on_trial_add(self._seen(tune_controller, scheduler), trial)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Hand on, and have the desk end the trial, which nobody else would."""
        scheduler = self._of(trial)
        scheduler.on_trial_error(self._seen(tune_controller, scheduler), trial)
        self._leave(trial.trial_id, "failed")

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Decide, and have the desk tell the workers at once."""
        scheduler = self._of(trial)
        seen = self._seen(tune_controller, scheduler)
        if result["recorded"]:
            if isinstance(scheduler, MedianStoppingRule):
                scheduler.on_trial_complete(seen, trial, result)  # which only takes note of it
            else:
                scheduler.on_trial_result(seen, trial, result)
            return TrialScheduler.CONTINUE
        decision = scheduler.on_trial_result(seen, trial, result)
        if decision == TrialScheduler.PAUSE or trial.status == TuneTrial.PAUSED:
            self._leave(trial.trial_id, "")
        elif decision != TrialScheduler.STOP:  # which Tune follows at once, by `on_trial_complete`
            self._went_on(trial.trial_id, result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Hand on; without a value it counts as one that is no more.

        One that comes without an end has been pruned: by its own result, or by another one's while its pause is not
        complete, for which it counts as running.
        """
        scheduler = self._of(trial)
        seen = self._seen(tune_controller, scheduler)
        if not (outcome := result.get("outcome", "")):
            self._leave(trial.trial_id, "pruned")
        if outcome in ("", "finished", "pruned"):
            scheduler.on_trial_complete(seen, trial, result)
        else:
            scheduler.on_trial_remove(seen, trial)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Hand on; a paused trial that is not taken up again has been pruned."""
        scheduler = self._of(trial)
        scheduler.on_trial_remove(self._seen(tune_controller, scheduler), trial)
        self._leave(trial.trial_id, "pruned")

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Return a paused trial that an arm wants to go on with, if any; Tune starts pending ones by itself."""
        for scheduler in self._schedulers.values():
            chosen = scheduler.choose_trial_to_run(self._seen(tune_controller, scheduler))
            if chosen is not None:
                return chosen
        return None

    def debug_string(self) -> str:
        """Return what Tune would print."""
        return "per study"


@contextlib.contextmanager
def _surroundings(seed: int) -> Iterator[None]:
    """Give Tune what it reads of the process, and take it back: an SDK's caller goes on with what it had."""
    log, names = logging.getLogger("ray.tune"), class_cache.ENV_VARS_TO_PROPAGATE
    before = {name: os.environ.get(name) for name in QUIET}
    level, drawn, drawn_by_numpy = log.level, random.getstate(), np.random.get_state()  # noqa: NPY002 -- Tune's
    os.environ.update(QUIET)
    # To trials' actors, AWS's keys among them: Ray's logs and APIs show them.
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}
    log.setLevel(logging.ERROR)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- what Tune's schedulers draw from
    try:
        yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)  # noqa: NPY002
        log.setLevel(level)
        class_cache.ENV_VARS_TO_PROPAGATE = names
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def tune_trials(
    agenda: Agenda,
    scheduler: TrialScheduler,
    begin: Begin,
    *,
    capacity: Callable[[], int],
    pauses: bool,
    look: Callable[[], bool],
) -> None:
    """Run the agenda's trials to their end; `look()` is called many times a second and says whether to break off."""
    register_trainable(NAME, TrialActor)
    with _surroundings(agenda.seed), tempfile.TemporaryDirectory(prefix="elastrain-tune-") as folder:
        storage = StorageContext(folder, "trials")
        node = ray.get_runtime_context().get_node_id()
        proposals = Proposals(agenda, storage, begin, capacity=capacity, pauses=pauses, node=node)
        controller = Controller(
            search_alg=proposals,
            scheduler=scheduler,
            storage=storage,
            reuse_actors=True,
            callbacks=[],
            metric="objective",
        )
        controller.most = capacity
        try:
            while not controller.is_finished() and not look():  # type: ignore[no-untyped-call] # Tune's
                controller.step()  # type: ignore[no-untyped-call] # Tune's
        finally:
            controller.cleanup()  # type: ignore[no-untyped-call] # Tune's
