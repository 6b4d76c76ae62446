"""Ray's job server at an address: its client with time limits, tokens where there are some, and errors as sentences.

Stands on Ray's inner `authentication_token_setup` (a client of an address turns token authentication on by that only)
and on `JobSubmissionClient._do_request`, which knows no time limit by itself.
"""

import asyncio
import contextlib
import http.client
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import wait
from typing import Any

from ray._private.authentication import authentication_token_setup as token
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from elastrain.cluster.folders import more_machines
from elastrain.errors import ConflictError, ResourceError, SpecError

CONNECT_S = 5.0
REQUEST_S = 60.0
QUIET_S = 10.0  # without a line of the log, whether the server still answers is looked at
POLL_S = 0.3
TALKERS = (  # what they say, our own line and errors say
    *(token.__name__, "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)
JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


_ONE_AT_A_TIME = threading.Lock()  # of a process's threads: the environment is all of theirs


class JobServer(JobSubmissionClient):
    """The job server of a cluster; every method raises ResourceError where it cannot be reached."""

    def __init__(self, address: str | None) -> None:
        """Connect to `address`, else to what `RAY_API_SERVER_ADDRESS` or `RAY_ADDRESS` say.

        Raises SpecError where there is no address, ResourceError within seconds where no job server answers at it.
        """
        self.url = _url(address)
        _listens(self.url)
        for name in TALKERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        token.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        with _told(self.url), _address_is(self.url):
            super().__init__(self.url)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": REQUEST_S, **options})

    def more_machines(self) -> str | None:
        """Say which machines beside this one the cluster has or may have, as `folders.more_machines` does."""
        with _told(self.url):
            summary = self._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
            nodes = [node["raylet"] for node in summary if node["raylet"].get("state") == "ALIVE"]
            hosts, ids = ({node[key] for node in nodes} for key in ("nodeManagerHostname", "nodeId"))
            return more_machines(hosts, ids, managed=any(node["instanceId"] for node in nodes))

    def send(self, *, job: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        """Upload what is not there yet and start a job; raises ConflictError if there is one of this name."""
        with _told(self.url):
            try:
                self.submit_job(
                    entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env, metadata=dict(metadata)
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                raise ConflictError(f"{job}: somebody has just submitted this run; look at it: elastrain status") from (
                    error
                )

    def jobs(self) -> list[JobDetails]:
        """Return the jobs that were submitted since the cluster's head started."""
        with _told(self.url):
            return [job for job in self.list_jobs() if job.submission_id]

    def all_jobs(self) -> list[JobDetails]:
        """Return the submitted jobs and the drivers that connected by themselves."""
        with _told(self.url):
            return list(self.list_jobs())

    def known(self, job: str) -> JobDetails | None:
        """Return what is known of a job; None where the server knows none of this name."""
        return next((found for found in self.jobs() if found.submission_id == job), None)

    def info(self, job: str) -> JobDetails:
        """Return what is known of a job; raises SpecError if there is none of this name."""
        with _told(self.url, job):
            return self.get_job_info(job)

    def log(self, job: str) -> str:
        """Return all that a job has written; raises SpecError if there is none of this name."""
        with _told(self.url, job):
            return str(self.get_job_logs(job))

    def end(self, job: str) -> bool:
        """Ask a job to end and say whether it goes on still; raises SpecError if there is none of this name."""
        with _told(self.url, job):
            return bool(self.stop_job(job))

    def lines(self, job: str) -> Iterator[str]:
        """Yield the lines that a job has written and writes, until it has ended."""
        seen, rest = 0, ""
        while True:
            skip = seen
            for text in self._chunks(job):
                fresh = text[skip:]
                skip = max(0, skip - len(text))
                seen += len(fresh)
                *whole, rest = (rest + fresh).split("\n")
                yield from whole
            if ended(self.info(job)):
                break
            time.sleep(POLL_S)  # not begun yet, or the server has closed the stream
        yield from [rest] if rest else []

    def _chunks(self, job: str) -> Iterator[str]:
        """Yield what one stream of the log brings; a stream that breaks off just ends."""
        stream = self.tail_job_logs(job)
        with _loop() as loop:
            while True:
                coming = asyncio.run_coroutine_threadsafe(_next(stream), loop)
                try:
                    while not wait([coming], timeout=QUIET_S).done:
                        self.info(job)
                finally:
                    coming.cancel()
                with contextlib.suppress(Exception):  # whatever it was: asking for the job again tells it better
                    if (text := coming.result()) is not None:
                        yield text
                        continue
                return


@contextlib.contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Hold an event loop in a thread of its own: in a notebook the caller's runs one already."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="job-log")
    thread.start()
    try:
        yield loop
    finally:
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop).result(QUIET_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _next(stream: AsyncIterator[str]) -> str | None:
    """Return what comes next, None at the end."""
    return await anext(stream, None)


def ended(job: JobDetails) -> bool:
    """Say whether a job has ended, in whatever way."""
    return JobStatus(job.status).is_terminal()


@contextlib.contextmanager
def _address_is(url: str) -> Iterator[None]:
    """Have Ray's client take this address: the environment's goes before its argument."""
    name = ENVIRONMENT[0]
    with _ONE_AT_A_TIME:
        before = os.environ.get(name)
        os.environ[name] = url
        try:
            yield
        finally:
            del os.environ[name]
            os.environ.update({name: before} if before is not None else {})


def _url(address: str | None) -> str:
    given = address or next((os.environ[name] for name in ENVIRONMENT if os.environ.get(name)), None)
    if given is None:
        raise SpecError("no cluster is named: give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS to it")
    if not given.startswith(("http://", "https://")):
        raise SpecError(
            f"{given}: a job is sent to the cluster's dashboard, http://HOST:8265; where it listens on loopback, as it "
            "should, make a tunnel: ssh -L 8265:127.0.0.1:8265 HOST, and give http://127.0.0.1:8265"
        )
    return given.rstrip("/")


def _listens(url: str) -> None:
    """Raise ResourceError within seconds unless something speaks HTTP at the URL."""
    try:
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}/api/version", timeout=CONNECT_S).close()  # noqa: S310 -- http(s) only
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ResourceError(_silent(url, reason)) from error


def _silent(url: str, reason: object) -> str:
    return f"no Ray cluster answers at {url} ({reason}); is it up, and the tunnel to it?"


@contextlib.contextmanager
def _told(url: str, job: str | None = None) -> Iterator[None]:
    """Turn what Ray's client raises into one sentence. A job's name becomes part of a path; what is none is unknown."""
    unknown = f"{url} knows no job {job}; the jobs that it knows: elastrain status"
    if job is not None and not JOB.fullmatch(job):
        raise SpecError(unknown)
    try:
        yield
    except AuthenticationError as error:
        raise ResourceError(
            f"{url} lets in only who has the cluster's token; put it into ~/.ray/auth_token, or name its file in "
            "RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"
        ) from error
    except OSError as error:  # ConnectionError and what requests raises among them
        raise ResourceError(_silent(url, type(error).__name__)) from error
    except (RuntimeError, ValueError, KeyError) as error:
        text = str(error)
        if job is not None and ("404" in text or "does not exist" in text):
            raise SpecError(unknown) from error
        raise ResourceError(f"{url}: {text.strip().splitlines()[0][:300] if text.strip() else error!r}") from error
