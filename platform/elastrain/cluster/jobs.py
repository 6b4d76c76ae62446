"""Runs as jobs of a cluster: packaged, sent to Ray's job server, followed, stopped; sent again if machines were lost.

A job is `elastrain train` on the cluster's head, so it does what the same command does anywhere: it resumes, it keeps
its run locked, it stops after a commit. All jobs of one run share its directory; one of them at a time.
"""

import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus

from elastrain import storage
from elastrain.cluster.folders import refuse_unseen
from elastrain.cluster.job_server import JobServer, ended
from elastrain.cluster.package import ENVIRONMENT, RUN_KEY, STOP_S, entrypoint, places, stage
from elastrain.errors import ConflictError, ElastrainError, Interrupted, ResourceError, SpecError, StorageError
from elastrain.observe import actions
from elastrain.observe.progress import LiveLine, Status, status_in
from elastrain.spec.document import resolve
from elastrain.spec.train import TrainSpec

RETRIES = 3
PAUSE_S = 35.0  # a dead writer's lease of a run on S3 has ended by then
POLL_S = 0.3
NOT_FOUND = (126, 127)  # a shell's exit codes
OURS, ERROR = "elastrain: ", "elastrain: error: "  # how the line begins by which a driver says why it ends
SETUP = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_SUPERVISOR_ACTOR_START", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE", "START_ERROR")


class _Lost(Exception):  # noqa: N818 -- an event
    """The machines under a job went away; the run itself may go on."""


@dataclass(slots=True)
class Job:
    """A run as a job of a cluster; made by `submit`. `id` names the latest attempt."""

    id: str
    run: str
    address: str
    spec: TrainSpec | None = field(default=None, repr=False)
    shared: tuple[str, ...] = ()  # folders that all machines have mounted

    def status(self) -> dict[str, Any]:
        """Return what `elastrain status JOB --json` prints; raises SpecError, ResourceError."""
        return described(JobServer(self.address).info(self.id))

    def logs(self) -> str:
        """Return all that the job has written so far; raises SpecError, ResourceError."""
        return JobServer(self.address).log(self.id)

    def stop(self) -> dict[str, Any]:
        """End the job after a last checkpoint, wait for that, and return its status; raises SpecError, ResourceError.

        One that has ended already is left alone. One that has not after STOP_S seconds is killed by Ray: ResourceError.
        """
        return stop_job(self.id, address=self.address)

    def result(self, show: Callable[[Status], None] = lambda _: None) -> dict[str, Any]:
        """Wait for the end and return what `elastrain train --json` prints, and `job`; `show` is given each status.

        A job whose machines were lost is submitted again, RETRIES times, and goes on from the last checkpoint. One that
        lives is followed on, however often the way to it breaks.

        Raises what training raises, by its exit code; Interrupted if somebody stopped the job; ResourceError.
        """
        left = RETRIES
        while True:
            try:
                return {**_followed(self, show), "job": self.id}
            except _Lost as loss:
                show(Status(phase="starting", message=f"{loss}; looking for the job"))
                found = _again(self, loss, left)
                left -= found != self.id  # else only the way to it was lost
                self.id = found
                time.sleep(POLL_S)


def submit(spec: TrainSpec, *, address: str | None = None, shared: Sequence[str] = ()) -> Job:
    """Send a run to the cluster whose dashboard is at `address` (http://HOST:8265) and return it as a job.

    Data and storage are URLs, or folders under one of `shared`, which all machines have mounted, or the cluster is this
    machine alone. `RAY_API_SERVER_ADDRESS` and `RAY_ADDRESS` stand in for `address`.

    Raises SpecError, also for folders that other machines cannot see and for too much code; ConflictError while a job
    of the run is not at its end; ResourceError where the cluster does not answer. Then nothing was started.
    """
    spec = resolve(spec, base=Path.cwd(), cwd=Path.cwd())
    server = JobServer(address)
    shared = tuple(storage.absolute(folder) for folder in shared)
    refuse_unseen(places(spec), server.more_machines(), shared)
    run = storage.absolute(storage.join(spec.storage, spec.name))
    return Job(_sent(server, spec, run, shared), run, server.url, spec, shared)


def stop_job(job: str, *, address: str | None = None) -> dict[str, Any]:
    """End a job after a last checkpoint, wait for that, and return its status.

    One that has ended already is left alone, and `message` says so. Raises SpecError; ResourceError, also for a job
    that was killed before its last checkpoint.
    """
    server = JobServer(address)
    info = server.info(job)
    if ended(info):
        found = described(info)
        return {**found, "message": f"it had ended before. {found['message']}".strip()}
    if server.end(job):
        _note((info.metadata or {}).get(RUN_KEY), "stop", job)
    deadline = time.monotonic() + STOP_S + 30
    while not ended(info := server.info(job)):
        if time.monotonic() > deadline:
            raise ResourceError(f"{job} has not ended within {STOP_S + 30} s; look at it: elastrain logs {job}")
        time.sleep(POLL_S)
    if info.status == JobStatus.STOPPED and _is_cut(server.log(job).splitlines()):
        raise _killed(job)
    return described(info)


def follow_job(job: Job) -> dict[str, Any]:
    """Show a job's progress on stderr until its end and return its result; raises as `Job.result`.

    Ctrl-C ends the following and not the job: Interrupted.
    """
    try:
        with LiveLine() as line:
            return job.result(line.show)
    except KeyboardInterrupt:
        raise Interrupted(f"{job.id} goes on; follow it: elastrain logs {job.id} --follow") from None


def read_status(job: str | None, *, address: str | None = None) -> dict[str, Any]:
    """Return a job's status, or `{"jobs": [...]}` of all runs where none is named; raises SpecError, ResourceError."""
    server = JobServer(address)
    if job is not None:
        return described(server.info(job))
    return {"jobs": [described(found) for found in server.jobs() if RUN_KEY in (found.metadata or {})]}


def read_lines(job: str, *, address: str | None = None, follow: bool = False) -> Iterator[str]:
    """Return the lines of a job's log, with `follow` until the job ends; raises SpecError, ResourceError."""
    server = JobServer(address)
    server.info(job)
    return server.lines(job) if follow else iter(server.log(job).splitlines())


def as_text(status: Mapping[str, Any]) -> str:
    """Return what `status` found as text, a line a job."""
    jobs = status.get("jobs", [status])
    return "\n".join(f"{job['job']}: {job['status']} ({job['run']}) {job['message']}".strip() for job in jobs) or (
        "no run was submitted to this cluster since it started"
    )


def described(job: JobDetails) -> dict[str, Any]:
    """Return what `status --json` prints of a job; times are seconds since 1970."""
    message = (job.message or "").strip().splitlines()
    return {
        "job": job.submission_id,
        "run": (job.metadata or {}).get(RUN_KEY),
        "status": str(JobStatus(job.status).value).lower(),
        "message": message[0] if message else "",
        "exit_code": job.driver_exit_code,
        "started": job.start_time / 1000 if job.start_time else None,
        "ended": job.end_time / 1000 if job.end_time else None,
    }


def _sent(server: JobServer, spec: TrainSpec, run: str, shared: Sequence[str]) -> str:
    """Package a run, start its next job and return its name.

    Raises ConflictError while there is one, SpecError for too much code.
    """
    before = [job for job in server.jobs() if (job.metadata or {}).get(RUN_KEY) == run]
    running = next((str(job.submission_id) for job in before if not ended(job)), None)
    if running:
        raise ConflictError(
            f"{run} is being trained by {running}; follow it: elastrain logs {running} --follow, or stop it: "
            f"elastrain stop {running}"
        )
    # Two who submit at once choose the same name, and Ray takes only one of them.
    name = job_id(spec.name, run, 1 + max((_attempt(str(job.submission_id)) for job in before), default=0))
    with tempfile.TemporaryDirectory(prefix="elastrain-") as scratch:
        folder = Path(scratch).resolve()
        stage(spec, folder)
        told = {**ENVIRONMENT, actions.ASKED_BY: actions.asking(), actions.JOB: name}
        runtime_env = {"working_dir": str(folder), "env_vars": told}
        server.send(job=name, entrypoint=entrypoint(shared), runtime_env=runtime_env, metadata={RUN_KEY: run})
    _note(run, "submit", name)
    return name


def _note(run: str | None, action: str, job: str) -> None:
    """Say in the storage's actions who did it; who may not write there is told, and the job's own entry remains."""
    try:
        if run is not None:
            actions.note(run, action, patient=False, job=job)
    except StorageError as error:
        logging.getLogger(__name__).warning(
            "elastrain: %s of %s is not in its storage's actions: %s", action, job, error
        )


def job_id(name: str, run: str, attempt: int) -> str:
    """Return the name of a job, which Ray uses in paths: small letters, digits and dashes.

    >>> job_id("Digits_MLP.v2", "s3://bucket/Digits_MLP.v2", 1)
    'digits-mlp-v2-2478ad83-1'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")
    return f"{slug}-{hashlib.sha256(run.encode()).hexdigest()[:8]}-{attempt}"


def _attempt(job: str) -> int:
    number = job.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _again(job: Job, loss: _Lost, left: int) -> str:
    """Return the name of the job to go on with: the same if it lives, a new one if its machines were lost.

    A head that does not answer is given time to come back. Raises ResourceError after that, or if none is `left`.
    """
    deadline = time.monotonic() + 2 * PAUSE_S
    while True:
        try:
            server = JobServer(job.address)
            known = server.known(job.id)
            if known is not None and not _is_lost(known):
                return job.id
            if left and job.spec is not None:
                time.sleep(PAUSE_S if not storage.is_local(job.run) else POLL_S)
                return _sent(server, job.spec, job.run, job.shared)
        except ResourceError as error:
            if time.monotonic() > deadline:
                raise ResourceError(f"{error} {job.id} may go on: elastrain logs {job.id} --follow") from error
            time.sleep(POLL_S * 10)
        else:
            raise ResourceError(f"{job.id}: {loss}; submit it again, it goes on from its checkpoint") from loss


def _followed(job: Job, show: Callable[[Status], None]) -> dict[str, Any]:
    """Show what a job tells until its end and return its result; raises _Lost, and what the job ended with."""
    first = status = Status(phase="starting", message="")
    found: dict[str, Any] | None = None
    said = last = ""
    show(status)
    try:
        server = JobServer(job.address)
        for line in server.lines(job.id):
            found = _result(line) or found
            said = line if line.startswith(OURS) else said
            last = line if line.strip() else last
            if (told := status_in(line)) is not None:
                status = told
                show(told)
        info = server.info(job.id)
    except (ResourceError, SpecError) as error:  # a head that has started anew knows no job of before
        raise _Lost(str(error)) from error
    if info.status in (JobStatus.SUCCEEDED, JobStatus.STOPPED) and found is not None:
        return found
    if info.status == JobStatus.STOPPED and status is not first and not said:
        raise _killed(job.id)
    raise _failure(job.id, info, said.removeprefix(ERROR).removeprefix(OURS), last)


def _result(line: str) -> dict[str, Any] | None:
    """Return the result of a run if the line is one."""
    if not line.startswith('{"run"'):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "weights_sha256" in found else None


def _is_cut(lines: Sequence[str]) -> bool:
    """Say whether a driver that had begun ended before it could say what came of it."""
    begun = any(status_in(line) is not None for line in lines)
    return begun and not any(line.startswith(OURS) or _result(line) for line in lines)


def _killed(job: str) -> ResourceError:
    return ResourceError(
        f"{job} was killed before it could make a last checkpoint; submit it again, it goes on from the one before"
    )


def _failure(job: str, info: JobDetails, said: str, last: str) -> Exception:
    """Return what a job that brought no result ended with; _Lost if it was the machines."""
    code = info.driver_exit_code
    kinds: Mapping[int, type[ElastrainError]] = {kind.exit_code: kind for kind in ElastrainError.__subclasses__()}
    told = (info.message or "").strip().splitlines() or ["it brought no result"]
    reason = told[0][:300]
    error: Exception
    if info.status == JobStatus.STOPPED:
        error = Interrupted(f"{job} was stopped; {said or 'nothing was started'}")
    elif code is not None and code in kinds:
        error = kinds[code](said or f"{job} ended with exit code {code}")
    elif _in_set_up(info):
        why = f" ({told[-1].strip()[:300]})" if len(told) > 1 else ""  # the end of a traceback
        error = ResourceError(f"{job} died in set-up: {reason}{why}")
    elif _is_lost(info):
        error = _Lost(f"its driver was lost ({reason})")
    elif code in NOT_FOUND or "No module named" in last:
        error = ResourceError(
            f"{job}: `python` on the PATH of the cluster's head cannot run it ({last.strip()[:200]}); start Ray there "
            "with an environment that has it, or use an image that does"
        )
    else:
        error = ElastrainError(f"{job} ended with code {code}: {said or last.strip()[:300]}; see elastrain logs {job}")
    return error


def _in_set_up(info: JobDetails) -> bool:
    return any(kind in (info.error_type or "") for kind in SETUP)


def _is_lost(info: JobDetails) -> bool:
    """Say whether a job failed since its driver or its machine was taken away: it was killed, or left no exit code."""
    code = info.driver_exit_code
    return info.status == JobStatus.FAILED and not _in_set_up(info) and (code is None or code < 0 or code in (137, 143))
