"""A sweep from its spec to its result: lock, desk, cells, Tune's controller beside them, and what it all came to."""

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastrain import storage
from elastrain.cluster.package import places
from elastrain.data.cache import cache_of
from elastrain.data.dataset import Dataset
from elastrain.elastic.run import versions
from elastrain.elastic.session import ray_session, stopping
from elastrain.errors import Interrupted, error_named
from elastrain.lease import Hold
from elastrain.lock import locked
from elastrain.observe import actions
from elastrain.observe.ledger import Ledger, read_ledger
from elastrain.spec.sweep import SweepSpec
from elastrain.spec.train import WorkersSpec
from elastrain.sweeps.agenda import Agenda, Proposal
from elastrain.sweeps.begun import SPEC, TRIALS, events_of, extent_of, identity_of, is_over, store
from elastrain.sweeps.desk import Desk
from elastrain.sweeps.document import base_of, resolve_sweep
from elastrain.sweeps.forecast import local_cpus, workers_of
from elastrain.sweeps.leaderboard import Leaderboard
from elastrain.sweeps.live import LiveView
from elastrain.sweeps.orders import Blueprint, CellConfig, Objective
from elastrain.sweeps.outcome import conclude, losers, scoring_of
from elastrain.sweeps.pool import Pool, check_room
from elastrain.sweeps.results import as_table, as_text, curve_rows, trial_rows
from elastrain.sweeps.rungs import decisions
from elastrain.sweeps.schedulers import scheduler_of
from elastrain.sweeps.space import Arm, arms_of, explore
from elastrain.sweeps.trials import Trial, trials_of
from elastrain.sweeps.tuning import WORST, PerStudy, tune_trials
from elastrain.training.manifests import newest_whole, read_manifests

END_S = 15.0
SHOW_S = 0.5
MOST_CALLS = 100_000  # at the desk: each worker has one that waits, and so has each trial


@dataclass(frozen=True, slots=True)
class Sweep:
    """A finished sweep: `result` holds what `elastrain sweep --json` prints."""

    url: str
    result: Mapping[str, Any]
    board: Leaderboard

    @property
    def best(self) -> str:
        """The spec of the best trial as a run: path or URL of a YAML file."""
        return str(self.result["best"])

    def trials(self) -> list[Trial]:
        """Return all trials, in the order in which they began."""
        return trials_of(read_ledger(self.url))

    def table(self) -> pa.Table:
        """Return a row a trial as an Arrow table; `.to_pandas()` makes it a data frame."""
        return as_table(trial_rows(self.trials()))

    def curves(self) -> pa.Table:
        """Return a row an evaluation as an Arrow table."""
        return as_table(curve_rows(self.trials()))

    def as_text(self) -> str:
        """Return what `elastrain sweep` prints."""
        files = f"best: {self.best}\nreport: {self.result['report']}"
        return f"{as_text(self.board)}\n{files}"


@dataclass(kw_only=True)
class _Job:
    """What the parts of a sweep that runs share."""

    spec: SweepSpec
    url: str
    hold: Hold
    arms: Mapping[str, Arm]
    agenda: Agenda
    workers: WorkersSpec
    size: int
    view: LiveView
    before: Sequence[Mapping[str, Any]]  # the events of attempts before this one
    decisions: frozenset[int]
    pauses: bool
    stop: threading.Event
    shown: float = 0.0
    events: list[Mapping[str, Any]] = field(default_factory=list)
    undecided: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # trials, each with where it stood

    @property
    def folder(self) -> str:
        """Where the trials' runs are."""
        return storage.join(self.url, TRIALS)


def sweep(spec: SweepSpec, *, address: str | None = None, fresh: bool = False, shared: Sequence[str] = ()) -> Sweep:
    """Run a sweep, or go on with it where it was, unless `fresh`.

    `address` is a Ray to use; without it `RAY_ADDRESS` is honoured, and without either a local Ray starts and ends with
    the call. Several machines need URLs, or folders under one that is `shared`. Raises SpecError, ConflictError,
    DataError, StorageError, ResourceError; DivergedError if no trial came to an end; Interrupted if the user stopped it
    (SIGINT or SIGTERM): the same call goes on.
    """
    spec = resolve_sweep(spec, base=Path.cwd())
    arms = arms_of(spec, base_of(spec))
    workers = workers_of(arms)
    identity = identity_of(arms)
    for arm in arms:
        data = arm.base.data
        cache_of(data.cache, *(Dataset.open(str(url)) for url in (data.train, data.eval) if data.cache))
    steps, saves = decisions(spec)
    url = storage.absolute(storage.join(spec.storage, spec.name))
    start = time.monotonic()
    scoring = scoring_of(spec, arms)
    with locked(url, remedy="give this sweep another name") as hold, LiveView(scoring) as view:
        before = [] if fresh else events_of(url, spec, identity)
        known = trials_of(before)
        job = _Job(
            spec=spec,
            url=url,
            hold=hold,
            arms={arm.name: arm for arm in arms},
            agenda=Agenda(spec, arms, known),
            workers=workers,
            size=workers.min,
            view=view,
            before=before,
            decisions=steps,
            pauses=saves,
            stop=threading.Event(),
        )
        runs = not is_over(before, spec)
        if runs:
            seen = {url, *(place for arm in arms for place in places(arm.base) if place != arm.base.storage)}
            with ray_session(address, cpus=local_cpus(workers), seen=seen, shared=shared), stopping(job.stop):
                check_room(workers, job.size)
                if fresh and storage.exists(storage.join(url, SPEC)):
                    actions.note(url, "delete")
                store(url, spec, identity, fresh=fresh)
                goal = spec.objective.goal
                actions.note(url, "resume" if before else "start", attempt=Ledger.next_attempt(url))
                _run(job, Objective(metric=spec.objective.metric, goal=goal, decisions=steps, saves=saves))
        else:
            store(url, spec, identity, fresh=False)  # with another target, perhaps
        hold.check()
        events = read_ledger(url)
        done = Sweep(url, *conclude(url, spec, arms, events, wall_s=time.monotonic() - start))
        for trial in losers(spec, trials_of(events)) if runs else ():
            storage.remove(storage.join(url, TRIALS, trial, "checkpoints"))
        return done


def _run(job: _Job, objective: Objective) -> None:
    """Start desk and cells, let Tune run the agenda, and end it all whatever happens."""
    blueprint = Blueprint(arms=job.arms, objective=objective, folder=job.folder)
    name = f"elastrain-desk-{uuid.uuid4().hex[:8]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote
    kind = remote(num_cpus=0, max_concurrency=MOST_CALLS, scheduling_strategy=here, name=name)(Desk)
    desk = kind.remote(job.hold, Ledger.next_attempt(job.url), blueprint, _newest)
    config = CellConfig(
        desk=desk,
        cell="",
        size=job.size,
        cpus=job.workers.cpus,
        gpus=job.workers.gpus,
        timeout_s=job.workers.timeout_s,
        info={"versions": versions(), "threads": max(1, int(job.workers.cpus))},
    )
    most = job.spec.max_concurrent or 1 << 20
    pool = Pool(config, job.workers, most=most, left=job.agenda.left, say=job.view.say)
    outcome: dict[str, Any] = {"outcome": "failed", "error": "the driver broke off"}
    try:
        begun = [desk.open.remote(), desk.event.remote("start", {"versions": versions()})]
        pool.start()
        ray.get(begun)
        scheduler = PerStudy(
            lambda: scheduler_of(job.spec, _explorer(job)),
            lambda trial, outcome: _leave(job, desk, trial, outcome),
            lambda trial, result: _went_on(job, desk, trial, result),
        )
        tune_trials(
            job.agenda,
            scheduler,
            lambda proposal: _given(job, proposal, name, desk),
            capacity=lambda: pool.capacity,
            pauses=job.pauses,
            look=lambda: _look(job, pool, desk),
        )
        ray.get([desk.event.remote("gave_up", {"arm": arm}) for arm in job.agenda.given_up])
        outcome = {"outcome": "interrupted" if job.stop.is_set() else "done", "extent": extent_of(job.spec)}
    except BaseException as error:
        outcome = {"outcome": "failed", "error": str(error)}
        raise
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(desk.finish.remote(), timeout=END_S)
        pool.close(grace_s=END_S if outcome["outcome"] != "failed" else 0.0)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(desk.close.remote(outcome.pop("outcome"), outcome), timeout=END_S)
        ray.kill(desk)
    if job.stop.is_set():
        actions.note(job.url, "stop")
        raise Interrupted("stopped; what has ended is kept, and the same command goes on from there")


def _leave(job: _Job, desk: Any, trial: str, outcome: str) -> None:
    """Have the desk stop a trial; note the end of one that has not got as far as the desk."""
    ray.get(desk.leave.remote(trial, outcome))
    if outcome and (stood := job.undecided.pop(trial, None)):
        ended = {"trial": trial, "outcome": outcome, **stood, "error": "", "error_kind": ""}
        ray.get(desk.event.remote("ended", ended))


def _went_on(job: _Job, desk: Any, trial: str, result: Mapping[str, Any]) -> None:
    """Note that a trial was told to go on; nobody waits for that."""
    job.undecided.pop(trial, None)
    told = {"step": result["step"], "device_s": result["device_s"], "value": result["objective"]}
    desk.event.remote("go_on", {"trial": trial, **told})


def _newest(run: str) -> int | None:
    return newest_whole(run, warn=lambda _: None)


def _explorer(job: _Job) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return PBT's way from the settings of a trial that did well to those of the one that takes over its weights."""
    chance = random.Random(job.spec.search.seed)  # noqa: S311 -- no secret

    def found(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "point": explore(job.arms[config["arm"]], config["point"], chance)}

    return found


def _given(job: _Job, proposal: Proposal, desk_name: str, desk: Any) -> dict[str, Any]:
    """Return what a trial's actor is given; what an earlier attempt has recorded comes from there."""
    goal, known = job.spec.objective.goal, proposal.known
    told = {"arm": proposal.arm, "phase": proposal.phase, "point": dict(proposal.point), "seed": proposal.seed}
    given: dict[str, Any] = {
        **told,
        "desk": desk_name,
        "study": proposal.study,
        "every": job.spec.objective.every,
        "worst": WORST if goal == "min" else -WORST,
    }
    begin: dict[str, Any] = {"resume": None, "untold": False, "decided": 0, "spent_s": 0.0, "recorded": []}
    if known is None:
        # Before anything that the trial itself reports: calls of an actor of many may overtake others.
        ray.get(desk.event.remote("trial", {"trial": proposal.trial, "number": proposal.number, **told}))
        return {**given, **begin}
    return {**given, **begin, **_recorded(job, known)}


def _recorded(job: _Job, known: Trial) -> dict[str, Any]:
    """Return what earlier attempts left of a trial: its decisions again, and its end or from where it goes on.

    An evaluation that a checkpoint is there of, and no word, is decided on again: a trial may have been about to stop.
    One that did not get into the ledger is told from the checkpoint.
    """
    run = storage.join(job.folder, known.id)
    words = [] if job.pauses else [e for e in job.before if e["kind"] == "go_on" and e["trial"] == known.id]
    recorded = [_message(run, word) for word in words]
    if known.outcome != "running":
        end = {"step": known.step, "device_s": known.device_s, "value": known.value}
        return {"recorded": [*recorded, _message(run, end, known.outcome)]}
    source = _source(job, known.id, run)
    upto = source[1] if source else 0
    before = [entry for entry in known.evaluations if entry.step <= upto]
    steps = [word["step"] for word in words]
    spent_s = before[-1].device_s if before else 0.0
    decides = known.phase == "tune" and not job.pauses and upto in job.decisions and upto not in steps
    if decides and before and before[-1].step == upto:
        job.undecided[known.id] = stood = {"step": upto, "device_s": spent_s}
        recorded.append({**_message(run, {**stood, "value": before[-1].value}), "recorded": False})
    untold = source == (run, upto) and upto not in {entry.step for entry in known.evaluations}
    decided = max([0 if untold else upto, *steps])
    return {"recorded": recorded, "resume": source, "untold": untold, "decided": decided, "spent_s": spent_s}


def _message(run: str, told: Mapping[str, Any], outcome: str = "") -> dict[str, Any]:
    return {"run": run, **{key: told[key] for key in ("step", "device_s", "value")}, "outcome": outcome}


def _source(job: _Job, trial: str, run: str) -> tuple[str, int] | None:
    """Return the checkpoint that a trial goes on from: its newest one, or the one that it had just taken over."""
    step = _newest(run)
    taken = [event for event in job.before if event["kind"] == "exploit" and event["trial"] == trial]
    if taken and taken[-1]["step"] >= (step or 0):
        donor, at = storage.join(job.folder, taken[-1]["donor"]), int(taken[-1]["step"])
        if at in read_manifests(donor):
            return donor, at
    return None if step is None else (run, step)


def _look(job: _Job, pool: Pool, desk: Any) -> bool:
    """Show how far it is and say whether to break off; raises what went wrong beside Tune."""
    if pool.error is not None:
        raise pool.error
    if pool.view["failure"] is not None:
        raise error_named(*pool.view["failure"])
    now = time.monotonic()
    if now - job.shown > SHOW_S:
        job.shown = now
        job.events += ray.get(desk.events.remote(len(job.events)))
        job.view.show([*job.before, *job.events], pool.busy)
    if job.stop.is_set():
        ray.get(desk.finish.remote())
    return job.stop.is_set()
