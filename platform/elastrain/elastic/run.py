"""A run from its spec to its result: lock, resume, start the actors, watch them, and say what it came to."""

import contextlib
import platform
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastrain import storage
from elastrain.data.blocks import FeedSpec
from elastrain.data.dataset import Dataset
from elastrain.data.feed import FeederLogic
from elastrain.data.plan import Plan
from elastrain.data.transforms import check_transforms
from elastrain.elastic.cells import end_cell, start_cell
from elastrain.elastic.config import WORKER_LOST, WorkerConfig
from elastrain.elastic.history import Resume, begin, prepare, resumable
from elastrain.elastic.host import RECORDS, Host
from elastrain.elastic.session import embedded_cpus, fitting, place_workers, ray_session, reading_resources
from elastrain.errors import Interrupted, ResourceError, error_named, ours
from elastrain.lock import locked
from elastrain.observe.ledger import Ledger
from elastrain.observe.progress import LiveLine, Status
from elastrain.observe.report import TRAIN_KEYS, read_report, write_html
from elastrain.spec.document import resolve
from elastrain.spec.train import TrainSpec

POLL_S = 0.2
END_S = 15.0
MAX_RESTARTS_WITHOUT_PROGRESS = 3
RELEASE_S = 10.0


class WorkerLost(ResourceError):  # noqa: N818 -- an event: the run starts again from its last checkpoint
    """A worker or its cell is gone."""


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
    plan: Plan
    train: Dataset
    evaluation: Dataset | None
    num_steps: int
    line: LiveLine
    stop: threading.Event = field(default_factory=threading.Event)
    losses: list[tuple[float, int]] = field(default_factory=list)  # not recovered from: when, and the step reached
    size: int = 0  # workers of the attempt before

    def warn(self, message: str) -> None:
        """Show a message above the live line."""
        self.line.show(Status(phase="starting", message=message))


def train(spec: TrainSpec, *, address: str | None = None, fresh: bool = False) -> Run:
    """Train as the spec says, going on from the newest whole checkpoint of the run unless `fresh`.

    `address` is a Ray to use; without it `RAY_ADDRESS` is honoured, and without either a local Ray starts and ends
    with the call. Raises SpecError, ConflictError, DataError, StorageError, ResourceError, DivergedError; Interrupted
    after a commit if the user stopped it (SIGINT or SIGTERM).
    """
    spec = resolve(spec, base=Path.cwd(), cwd=Path.cwd())
    run_url = storage.absolute(storage.join(spec.storage, spec.name))
    train_data = Dataset.open(spec.data.train).select(spec.data.columns)
    evaluation = Dataset.open(spec.data.eval).select(spec.data.columns) if spec.data.eval else None
    check_transforms(spec.data.transforms, train_data, evaluation)
    with locked(run_url, remedy="give this run another name"), LiveLine() as line:
        asked = spec.workers.max
        spec, plan = prepare(spec, train_data, run_url, fresh=fresh)
        steps = spec.budget.steps or (spec.budget.epochs or 0) * plan.steps_per_epoch
        job = Job(
            spec=spec, run_url=run_url, plan=plan, train=train_data, evaluation=evaluation, num_steps=steps, line=line
        )
        if asked > plan.slots:
            job.warn(f"the run was begun with {plan.slots} slots, so no more than that many workers can be used")
        resume = None if fresh else resumable(run_url, warn=job.warn)
        if resume is not None and resume.step >= steps and _is_end(resume, evaluation):
            return _finished(job, resume)
        # Ray takes SIGTERM for itself when it starts, so ours comes after it
        with ray_session(address, cpus=embedded_cpus(spec.workers)), _stopping(job):
            _placed(job)  # what cannot be placed removes nothing
            begin(run_url, spec, plan, fresh=fresh)
            return _attempts(job)


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
            job.losses = job.losses or [(time.time(), step)]
            job.warn(f"{error}; starting again from step {step}")
            continue
        if result["stopped"]:
            raise Interrupted(f"stopped at step {result['step']} after a commit; the same command goes on from there")
        return _finished(job, resume)


def _attempt(job: Job, resume: int | None) -> dict[str, Any]:
    """Start feeder, host and cell, watch them to the end, and close the attempt's ledger whatever happens."""
    spec, first = job.spec, resume or 0
    size = _placed(job)
    cell = start_cell()
    feed = FeedSpec(
        plan=job.plan,
        train=job.train,
        evaluation=job.evaluation,
        transforms=spec.data.transforms,
        begin=first,
        end=job.num_steps,
        reading=reading_resources(spec.workers, size),
    )
    feeder = _actor(FeederLogic, size, feed)
    attempt, alike = Ledger.next_attempt(job.run_url), spec.consistency == "bitwise"
    host = _actor(Host, size, job.run_url, attempt, size, first, alike=alike)
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
    host.event.remote("start", {"step": first, "workers": size, "host": socket.gethostname(), "versions": versions()})
    ended = cell.run.remote(config, name=spec.name, size=size, cpus=spec.workers.cpus, gpus=spec.workers.gpus)
    outcome: dict[str, Any] = {"outcome": "failed", "error": "the driver broke off"}
    try:
        _ready(host)
        result = _watch(job, host, ended, size)
        outcome = {"outcome": "interrupted" if result["stopped"] else "done", "result": result}
        ray.wait([ended], timeout=END_S)
    except BaseException as error:
        outcome = {"outcome": "failed", "error": str(error)}
        raise
    finally:
        _close(host, feeder, outcome)
        end_cell(cell, ended)
    return result


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


def _watch(job: Job, host: Any, ended: Any, size: int) -> dict[str, Any]:
    """Show how it goes until there is a result; raises what ended the run, WorkerLost if a worker is gone."""
    asked, gone = False, 0.0
    rate = _Rate()
    while True:
        done, _ = ray.wait([ended], timeout=POLL_S)
        now = ray.get(host.poll.remote())
        _note_recovery(job, host, now)
        job.line.show(_status(job, now, size, rate))
        if job.stop.is_set() and not asked:
            asked = True
            host.ask_stop.remote()
        if now["outcome"]:
            found: dict[str, Any] = now["outcome"]
            return found
        if now["failure"]:
            name, message = now["failure"]
            if name == WORKER_LOST:
                job.losses.append((time.time(), now["step"]))
                raise WorkerLost(message)
            raise error_named(name, message)
        gone = gone + POLL_S if done else 0.0
        if gone > 1.0:  # the workers' last words had time to arrive
            job.losses.append((time.time(), now["step"]))
            said = ray.get(ended).strip().splitlines()
            raise WorkerLost("a worker was lost" + (f" ({said[-1][:300]})" if said else ""))


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


class _Rate:
    """Samples a second since the first look."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def of(self, samples: float) -> float | None:
        """Return samples a second, None until a second has passed."""
        now = time.monotonic()
        self._first = self._first or (now, samples)
        moment, before = self._first
        return (samples - before) / (now - moment) if now - moment >= 1.0 else None


def _status(job: Job, now: Mapping[str, Any], size: int, rate: _Rate) -> Status:
    plan, step, last = job.plan, now["step"], now["last"]
    done = step // plan.steps_per_epoch * plan.num_rows + step % plan.steps_per_epoch * plan.global_batch
    running = list(now["spent"].values())
    waited = sum(s["data"] for s in running)
    worked = sum(sum(s.values()) - s["start"] for s in running)
    return Status(
        phase="training" if last else "starting workers",
        epoch=step / plan.steps_per_epoch,
        epochs=job.num_steps / plan.steps_per_epoch,
        step=step,
        steps=job.num_steps,
        loss=last.get("loss"),
        samples_per_s=rate.of(float(done)) if last else None,
        data_share=waited / worked if worked else None,
        workers=now["members"] or size,
        last_checkpoint=now["checkpoint"],
    )


def _placed(job: Job) -> int:
    """Return how many workers to start; after a loss, what the lost ones held is given time to come free."""
    workers = job.spec.workers
    if job.size:
        deadline = time.monotonic() + RELEASE_S
        while fitting(workers, "free") < job.size and time.monotonic() < deadline:
            time.sleep(POLL_S)
    try:
        job.size = place_workers(workers, say=job.warn, stop=job.stop.is_set, pause=lambda: time.sleep(1.0))
    except InterruptedError as error:
        raise Interrupted("stopped while waiting for room; nothing was started") from error
    return job.size


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


@contextlib.contextmanager
def _stopping(job: Job) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a wish to stop; the second one ends the process as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        del frame
        job.stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def versions() -> dict[str, str]:
    """Return the versions that decide bits: Python, torch, numpy, pyarrow, ray."""
    return {"python": platform.python_version()} | {n: version(n) for n in ("torch", "numpy", "pyarrow", "ray")}
