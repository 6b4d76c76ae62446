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
from elastrain.data.cache import cache_of
from elastrain.data.dataset import Dataset
from elastrain.elastic.run import versions
from elastrain.elastic.session import ray_session, stopping
from elastrain.errors import ConflictError, Interrupted, error_named
from elastrain.lease import Hold
from elastrain.lock import locked
from elastrain.observe import actions
from elastrain.observe.ledger import Ledger, read_ledger
from elastrain.spec.document import dump
from elastrain.spec.sweep import SweepSpec
from elastrain.spec.train import WorkersSpec
from elastrain.sweeps.agenda import Agenda, Proposal
from elastrain.sweeps.desk import Desk
from elastrain.sweeps.document import base_of, parse_sweep, resolve_sweep
from elastrain.sweeps.forecast import local_cpus, workers_of
from elastrain.sweeps.leaderboard import Leaderboard
from elastrain.sweeps.live import LiveView
from elastrain.sweeps.orders import Blueprint, CellConfig, Objective
from elastrain.sweeps.outcome import conclude, scoring_of
from elastrain.sweeps.pool import Pool, check_room
from elastrain.sweeps.results import as_table, as_text, curve_rows, trial_rows
from elastrain.sweeps.rungs import decisions
from elastrain.sweeps.schedulers import scheduler_of
from elastrain.sweeps.space import Arm, arms_of, explore
from elastrain.sweeps.trials import Trial, trials_of
from elastrain.sweeps.tuning import WORST, PerStudy, tune_trials
from elastrain.training.manifests import newest_whole, read_manifests

SPEC, TRIALS = "spec.yaml", "trials"
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

    @property
    def folder(self) -> str:
        """Where the trials' runs are."""
        return storage.join(self.url, TRIALS)


def sweep(spec: SweepSpec, *, address: str | None = None, fresh: bool = False) -> Sweep:
    """Run a sweep, or go on with it where it was, unless `fresh`.

    `address` is a Ray to use; without it `RAY_ADDRESS` is honoured, and without either a local Ray starts and ends with
    the call. Raises SpecError, ConflictError, DataError, StorageError, ResourceError; DivergedError if no trial came to
    an end; Interrupted if the user stopped it (SIGINT or SIGTERM): the same call goes on.
    """
    spec = resolve_sweep(spec, base=Path.cwd())
    arms = arms_of(spec, base_of(spec))
    workers = workers_of(arms)
    for arm in arms:
        data = arm.base.data
        cache_of(data.cache, *(Dataset.open(str(url)) for url in (data.train, data.eval)))
    steps, saves = decisions(spec)
    url = storage.absolute(storage.join(spec.storage, spec.name))
    start = time.monotonic()
    scoring = scoring_of(spec, arms)
    with locked(url, remedy="give this sweep another name") as hold, LiveView(scoring) as view:
        if fresh and storage.exists(storage.join(url, SPEC)):
            actions.note(url, "delete")
        before = _begin(url, spec, fresh=fresh)
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
        if not _is_over(before, spec):
            with ray_session(address, cpus=local_cpus(workers)), stopping(job.stop):
                check_room(workers, job.size)
                goal = spec.objective.goal
                actions.note(url, "resume" if before else "start", attempt=Ledger.next_attempt(url))
                _run(job, Objective(metric=spec.objective.metric, goal=goal, decisions=steps, saves=saves))
        hold.check()
        return Sweep(url, *conclude(url, spec, arms, read_ledger(url), wall_s=time.monotonic() - start))


def _begin(url: str, spec: SweepSpec, *, fresh: bool) -> list[dict[str, Any]]:
    """Store what the sweep is and return the events so far. Raises ConflictError if another one is there."""
    if fresh:
        for part in (TRIALS, "ledger", SPEC):
            storage.remove(storage.join(url, part))
    place = storage.join(url, SPEC)
    try:
        stored = parse_sweep(storage.read_bytes(place).decode(), name=place)
    except FileNotFoundError:
        stored = None
    if stored is not None and (differs := _changed(stored, spec)):
        raise ConflictError(
            f"{url} holds a sweep that was begun with other settings ({', '.join(differs)}); undo that, give this "
            f"sweep another name, or start over with --fresh"
        )
    storage.put(place, dump(spec).encode())
    return read_ledger(url)


def _changed(old: SweepSpec, new: SweepSpec) -> list[str]:
    """Return the fields that differ and decide what comes out; a larger budget goes on with what there is."""
    one, other = old.model_dump(), new.model_dump()
    free = ("storage", "budget", "max_concurrent", "base")
    return [key for key in one if key not in free and one[key] != other[key]]


def _is_over(before: Sequence[Mapping[str, Any]], spec: SweepSpec) -> bool:
    """Say whether the sweep was brought to its end, with this budget."""
    ends = [event for event in before if event["kind"] in ("start", "end")]
    return bool(ends) and ends[-1].get("outcome") == "done" and ends[-1].get("budget") == spec.budget.per_arm


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
            lambda trial, outcome: ray.get(desk.leave.remote(trial, outcome)),
        )
        tune_trials(
            job.agenda,
            scheduler,
            lambda proposal: _given(job, proposal, name, desk),
            capacity=lambda: pool.capacity,
            pauses=job.pauses,
            look=lambda: _look(job, pool, desk),
        )
        outcome = {"outcome": "interrupted" if job.stop.is_set() else "done", "budget": job.spec.budget.per_arm}
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
    begin: dict[str, Any] = {"resume": None, "spent_s": 0.0, "recorded": []}
    if known is None:
        # Before anything that the trial itself reports: calls of an actor of many may overtake others.
        ray.get(desk.event.remote("trial", {"trial": proposal.trial, "number": proposal.number, **told}))
        return {**given, **begin}
    decides = job.decisions if proposal.phase == "tune" and not job.pauses else frozenset()
    return {**given, **begin, **_recorded(job, known, decides)}


def _recorded(job: _Job, known: Trial, decides: frozenset[int]) -> dict[str, Any]:
    """Return what earlier attempts left of a trial: its decisions again, and its end or from where it goes on."""
    run = storage.join(job.folder, known.id)
    source = None if known.outcome != "running" else _source(job, known.id, run)
    upto = known.step if known.outcome != "running" else (source or ("", 0))[1]
    before = [entry for entry in known.evaluations if entry.step <= upto]
    messages: list[dict[str, Any]] = [
        {"run": run, "step": e.step, "device_s": e.device_s, "value": e.value, "outcome": ""}
        for e in before
        if e.step in decides
    ]
    if known.outcome != "running":
        end = {"step": known.step, "device_s": known.device_s, "value": known.value, "outcome": known.outcome}
        return {"recorded": [*messages, {"run": run, **end}]}
    return {"recorded": messages, "resume": source, "spent_s": before[-1].device_s if source and before else 0.0}


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
