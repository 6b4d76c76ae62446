"""A run from its spec to its result: lock, resume, start the actors, watch them, and say what it came to."""

import contextlib
import platform
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastrain import storage
from elastrain.cluster.package import places
from elastrain.data.blocks import FeedSpec
from elastrain.data.cache import Cache, cache_of
from elastrain.data.dataset import Dataset
from elastrain.data.feed import FeederLogic
from elastrain.data.plan import Plan
from elastrain.data.quarantine import Note, events, left_out, opened, without
from elastrain.data.transforms import check_transforms
from elastrain.elastic.config import LEASE_S, WorkerConfig
from elastrain.elastic.fleet import Fleet
from elastrain.elastic.history import SPEC, Resume, begin, is_same, prepare, resumable
from elastrain.elastic.holder import end_holder, recall
from elastrain.elastic.host import RECORDS, Host
from elastrain.elastic.protocol import Roster
from elastrain.elastic.ray_inner import actor_id
from elastrain.elastic.script import Script
from elastrain.elastic.session import embedded_cpus, find_room, fitting, ray_session, reading_resources, stopping
from elastrain.elastic.watch import POLL_S, Watch, WorkerLost
from elastrain.errors import DivergedError, Interrupted, ResourceError, ours
from elastrain.keys import check_key
from elastrain.lease import Hold
from elastrain.lock import locked
from elastrain.observe import actions
from elastrain.observe.ledger import Ledger
from elastrain.observe.progress import LiveLine, Status
from elastrain.observe.report import TRAIN_KEYS, read_report, write_html
from elastrain.spec.document import resolve
from elastrain.spec.train import TrainSpec
from elastrain.training.manifests import revoke
from elastrain.uploads import abort

BACK_OFF_S = 2.0
END_S = 15.0
MAX_RESTARTS_WITHOUT_PROGRESS = 3
RELEASE_S = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: `result` holds what `elastrain train --json` prints."""

    url: str
    result: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last evaluation: `val_loss` and what the task names."""
        found: Mapping[str, float] = self.result["metrics"]
        return found

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.result["step"])

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights: equal for equal runs."""
        return str(self.result["weights_sha256"])

    def report(self) -> dict[str, Any]:
        """Return what `elastrain report --json` prints."""
        return read_report(self.url)


@dataclass(kw_only=True)
class Job:
    """What all attempts of one command share."""

    spec: TrainSpec
    run_url: str
    hold: Hold
    plan: Plan
    train: Dataset
    evaluation: Dataset | None
    num_steps: int
    line: LiveLine
    script: Script | None = None
    left_out: list[dict[str, Any]] = field(default_factory=list)  # shards that cannot be read
    stop: threading.Event = field(default_factory=threading.Event)
    losses: list[tuple[float, int]] = field(default_factory=list)  # not recovered from: when, and the step reached
    tripped: frozenset[int] = frozenset()
    size: int = 0  # workers of the attempt before

    def warn(self, message: str) -> None:
        """Show a message above the live line."""
        self.line.show(Status(phase="starting", message=message))


def train(
    spec: TrainSpec,
    *,
    address: str | None = None,
    fresh: bool = False,
    shared: Sequence[str] = (),
    script: Script | None = None,
) -> Run:
    """Train as the spec says, going on from the newest whole checkpoint of the run unless `fresh`.

    `address` is a Ray to use, else `RAY_ADDRESS` is, else a local one starts and ends with the call. Several machines
    need URLs, or folders under one that is `shared`. A `script` decides how many workers train; `workers.max` start.

    Raises SpecError, ConflictError, DataError, StorageError, ResourceError, DivergedError; Interrupted
    after a commit if the user stopped it (SIGINT or SIGTERM).
    """
    spec = resolve(spec, base=Path.cwd(), cwd=Path.cwd())
    if spec.checkpoint.encrypt is not None:
        check_key(spec.checkpoint.encrypt)
    run_url = storage.absolute(storage.join(spec.storage, spec.name))
    train_data, evaluation = opened(spec.data)
    cache = cache_of(spec.data.cache, train_data, evaluation)
    with locked(run_url, remedy="give this run another name") as hold, LiveLine() as line:
        revoke(run_url)
        abort(storage.join(run_url, name) for name in ("checkpoints", "audit", "metrics"))
        data = {"train": train_data} | ({"eval": evaluation} if evaluation else {})
        bad: dict[str, Note] = {}
        if spec.data.on_bad_shard == "quarantine":
            line.show(Status(phase="checking the data"))
            bad = left_out(data, run_url, fresh=fresh)
            kept = {name: without(data[name], note) for name, note in bad.items()}
            train_data, evaluation = kept["train"], kept.get("eval")
        check_transforms(spec.data.transforms, train_data, evaluation)
        asked, seen = spec.workers.max, places(spec)
        spec, plan = prepare(spec, train_data, run_url, fresh=fresh)
        steps = spec.budget.steps or (spec.budget.epochs or 0) * plan.steps_per_epoch
        job = Job(
            spec=spec,
            run_url=run_url,
            hold=hold,
            plan=plan,
            train=train_data,
            evaluation=evaluation,
            num_steps=steps,
            line=line,
            script=script,
            left_out=events(data, bad),
        )
        _doubts(job, [cache, *data.values()], asked)
        resume = None if fresh else resumable(run_url, warn=job.warn)
        if resume is not None and resume.step >= steps and _is_end(resume, evaluation):
            return _finished(job, resume)
        # Ray takes SIGTERM for itself when it starts, so ours comes after it
        with ray_session(address, cpus=embedded_cpus(spec.workers), seen=seen, shared=shared), stopping(job.stop):
            _placed(job)  # what cannot be placed removes nothing
            _begun(job, resume, bad, fresh=fresh)
            return _attempts(job)


def _doubts(job: Job, sources: Sequence[Cache | Dataset | None], asked: int) -> None:
    """Warn of what the cache and the data cannot do, and of workers `asked` for that the plan has no use for."""
    for doubt in [source.doubt() for source in sources if source is not None]:
        if doubt is not None:
            job.warn(doubt)
    if asked > job.plan.slots:
        job.warn(f"the run was begun with {job.plan.slots} slots, so no more than that many workers can be used")


def _begun(job: Job, resume: Resume | None, bad: Mapping[str, Note], *, fresh: bool) -> None:
    """Take over what snapshots there are, or end who holds them, and write the run as it is begun."""
    job.hold.check()
    if fresh or not is_same(job.run_url, job.spec, job.plan):
        end_holder(job.run_url)
    else:
        recall(job.run_url, job.plan.identity(), warn=job.warn, settle=job.hold.check)
    _note(job.run_url, resume, fresh=fresh)
    begin(job.run_url, job.spec, job.plan, bad, fresh=fresh)


def _note(run: str, resume: Resume | None, *, fresh: bool) -> None:
    """Say in the storage's actions who begins or goes on with the run, and who removes what was there."""
    if fresh and storage.exists(storage.join(run, SPEC)):
        actions.note(run, "delete")
    attempt = 0 if fresh else Ledger.next_attempt(run)
    actions.note(run, "resume" if resume else "start", attempt=attempt, step=resume.step if resume else 0)


def _attempts(job: Job) -> Run:
    """Try until the run ends; a lost worker costs a restart from the last checkpoint, a bounded number of times."""
    idle, before = 0, -1
    while True:
        resume = resumable(job.run_url, warn=job.warn)
        step = resume.step if resume else 0
        idle, before = (idle + 1, before) if step <= before else (0, step)
        try:
            result = _attempt(job, resume.step if resume else None)
        except (WorkerLost, ray.exceptions.RayError) as error:
            if idle + 1 >= MAX_RESTARTS_WITHOUT_PROGRESS:
                raise ResourceError(f"{error}; {idle + 1} tries from step {step} came to nothing") from error
            if isinstance(error, WorkerLost):
                job.losses.append((time.time(), error.step))
                job.tripped |= error.tripped
            job.losses = job.losses or [(time.time(), step)]
            job.warn(f"{error}; starting again from the last checkpoint")
            time.sleep(BACK_OFF_S * idle)
            job.hold.check()
            recall(job.run_url, job.plan.identity(), warn=job.warn, settle=job.hold.check)
            continue
        job.hold.check()
        end_holder(job.run_url)
        if result["stopped"]:
            actions.note(job.run_url, "stop", step=result["step"])
            raise Interrupted(f"stopped at step {result['step']} after a commit; the same command goes on from there")
        return _finished(job, resume)


def _attempt(job: Job, resume: int | None) -> dict[str, Any]:
    """Start feeder, host and cells, watch them to the end, and close the attempt's ledger whatever happens."""
    spec, first = job.spec, resume or 0
    sizes = _placed(job)
    size = sum(sizes.values()) or spec.workers.min
    feed = FeedSpec(
        plan=job.plan,
        train=job.train,
        evaluation=job.evaluation,
        transforms=spec.data.transforms,
        begin=first,
        end=job.num_steps,
        reading=reading_resources(spec.workers, size),
        cache=cache_of(spec.data.cache, job.train, job.evaluation),
    )
    most = spec.workers.max
    feeder, host = _actor(FeederLogic, most, feed), _host(job, size, first)
    config = WorkerConfig(
        host=host,
        feeder=feeder,
        spec=spec,
        feed=feed,
        num_steps=job.num_steps,
        run_url=job.run_url,
        resume=resume,
        info={
            "plan": job.plan.identity(),
            "versions": versions(),
            "threads": max(1, int(spec.workers.cpus)),
            "evaluation": _evaluated(job.evaluation),
        },
        launched=time.time(),
    )
    workers = spec.workers if job.script is None else spec.workers.model_copy(update={"min": most})
    fleet = Fleet(workers, job.plan.slots, config, spec.name)
    outcome: dict[str, Any] = {"outcome": "failed", "error": "the driver broke off"}
    try:
        started = fleet.start(sizes)
        start = {"step": first, "workers": size, "host": socket.gethostname(), "versions": versions()}
        start["id"] = actor_id(host)
        begun = [("start", start), *((event.kind, event.fields) for event in started)]
        left_out = job.left_out if resume is None else []
        for kind, fields in (*begun, *(("quarantine", {"step": 0, **entry}) for entry in left_out)):
            host.event.remote(kind, fields)
        _ready(host)
        result = _watched(job, host, feeder, fleet)
        outcome = {"outcome": "interrupted" if result["stopped"] else "done", "result": result}
    except BaseException as error:
        outcome = {"outcome": "failed", "error": str(error)}
        graceful = isinstance(error, DivergedError)  # all workers end by themselves, after a commit that is under way
        raise
    else:
        graceful = True
    finally:
        fleet.close(grace_s=END_S if graceful else 0.0)
        _close(host, feeder, outcome)
    return result


def _host(job: Job, size: int, first: int) -> Any:
    """Start the host with the roster of an attempt that begins with `size` workers."""
    workers, plan = job.spec.workers, job.plan
    limits = (workers.min, min(workers.max, plan.slots), size)
    if job.script is not None:
        limits = (1, job.script.first, job.script.first)
    roster = Roster(minimum=limits[0], maximum=limits[1], initial=limits[2], lease_s=min(LEASE_S, workers.timeout_s))
    return _actor(
        Host,
        workers.max,
        job.hold,
        Ledger.next_attempt(job.run_url),
        roster,
        first,
        alike=job.spec.consistency == "bitwise",
        timeout_s=workers.timeout_s,
        tripped=job.tripped,
    )


def _watched(job: Job, host: Any, feeder: Any, fleet: Fleet) -> dict[str, Any]:
    told, most = 0, min(job.spec.workers.max, job.plan.slots)

    def stepped(now: Mapping[str, Any]) -> None:
        nonlocal told
        _note_recovery(job, host, now)
        if len(now["members"]) != told:  # what others that may come will hold is left to them
            told = len(now["members"])
            feeder.read_beside.remote(told, max(0, most - told) * job.spec.workers.cpus)

    return Watch(
        plan=job.plan,
        num_steps=job.num_steps,
        workers=job.spec.workers,
        line=job.line,
        host=host,
        fleet=fleet,
        data=[job.train, *([job.evaluation] if job.evaluation else [])],
        stops=job.stop.is_set,
        stepped=stepped,
        script=job.script,
    ).run()


def _actor(kind: type, size: int, *arguments: Any, **named: Any) -> Any:
    """Start an actor beside the driver, with a thread for each worker that may wait in it, and some more."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote  # its types lack concurrency groups
    made = remote(concurrency_groups={RECORDS: 1})(kind)
    return made.options(num_cpus=0, max_concurrency=2 * size + 8, scheduling_strategy=here).remote(*arguments, **named)


def _close(host: Any, feeder: Any, outcome: dict[str, Any]) -> None:
    """Write the last records and end both actors; what fails here must not hide why the attempt ended."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(host.close.remote(outcome.pop("outcome"), outcome), timeout=END_S)
    for actor in (feeder, host):
        ray.kill(actor)


def _ready(host: Any) -> None:
    """Wait for the host; raises StorageError if the run's records cannot be gone on with."""
    try:
        ray.get(host.open.remote())
    except ray.exceptions.RayTaskError as error:
        raise (ours(error) or error) from error


def _note_recovery(job: Job, host: Any, now: Mapping[str, Any]) -> None:
    """Once a step is done that was not done before, or nothing is left to do, note what each loss has cost."""
    if job.losses and now["last"] and (now["outcome"] or now["step"] > max(step for _, step in job.losses)):
        resumed = now["resume_step"]
        for when, step in job.losses:
            cost = {"recovery_s": time.time() - when, "steps_redone": step - resumed}
            host.event.remote("restart", {"step": resumed, **cost})
        job.losses.clear()


def _placed(job: Job) -> dict[str, int]:
    """Return how many workers to start on which nodes; after a loss, what the lost held is given time to come free."""
    workers = job.spec.workers
    if job.size:
        deadline = time.monotonic() + RELEASE_S
        while fitting(workers, "free") < job.size and time.monotonic() < deadline:
            time.sleep(POLL_S)
    try:
        sizes = find_room(workers, say=job.warn, stop=job.stop.is_set, pause=lambda: time.sleep(1.0))
    except InterruptedError as error:
        raise Interrupted("stopped while waiting for room; nothing was started") from error
    job.size = sum(sizes.values())
    return sizes


def _evaluated(evaluation: Dataset | None) -> str | None:
    return None if evaluation is None else evaluation.fingerprint


def _is_end(resume: Resume, evaluation: Dataset | None) -> bool:
    """Say whether a checkpoint is the end of a run that was evaluated on these data."""
    return bool(resume.info.get("complete")) and resume.info.get("evaluation") == _evaluated(evaluation)


def _finished(job: Job, resume: Resume | None) -> Run:
    """Return the run with its result, and write report.html."""
    report = read_report(job.run_url)
    if resume is not None and resume.step >= job.num_steps and _is_end(resume, job.evaluation):
        # The checkpoint knows, whatever became of the records of the attempt that wrote it or of later ones.
        known = {key: resume.info[key] for key in ("metrics", "weights_sha256", "samples")}
        report = {**report, "step": resume.step, **known}
    result = {key: report.get(key) for key in TRAIN_KEYS}
    result["resumed_from"] = resume.step if resume else 0
    write_html(job.run_url, report)
    return Run(job.run_url, result)


def versions() -> dict[str, str]:
    """Return the versions that decide bits: Python, torch, numpy, pyarrow, ray."""
    return {"python": platform.python_version()} | {n: version(n) for n in ("torch", "numpy", "pyarrow", "ray")}
