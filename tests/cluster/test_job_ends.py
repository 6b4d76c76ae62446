"""What the end of a job means, from what Ray's job server and the job's log say of it."""

from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from elastrain.cluster.jobs import _failure, _is_lost, _Lost, _result, job_id
from elastrain.errors import DataError, ElastrainError, Interrupted, ResourceError


def ended(status: str = "FAILED", code: int | None = None, kind: str | None = None, message: str = "") -> JobDetails:
    known: dict[str, Any] = {"driver_exit_code": code, "error_type": kind, "message": message, "entrypoint": ""}
    return JobDetails(type=JobType.SUBMISSION, status=JobStatus(status), **known)


@pytest.mark.parametrize(
    ("job", "kind"),
    [
        (ended(code=4), DataError),
        (ended(code=6), ResourceError),
        (ended(code=130), Interrupted),
        (ended("STOPPED"), Interrupted),
        (ended(code=-9), _Lost),
        (ended(code=137), _Lost),
        (ended(kind="JOB_SUPERVISOR_ACTOR_DIED"), _Lost),
        (ended(kind="RUNTIME_ENV_SETUP_FAILURE"), ResourceError),
        (ended(kind="JOB_SUPERVISOR_ACTOR_START_TIMEOUT"), ResourceError),
        (ended(kind="JOB_ENTRYPOINT_COMMAND_START_ERROR"), ResourceError),
        (ended(code=1), ElastrainError),
        (ended(code=127), ResourceError),
        (ended("SUCCEEDED", code=0), ElastrainError),
    ],
)
def test_only_machines_that_were_lost_are_worth_another_job(job: JobDetails, kind: type[Exception]) -> None:
    assert type(_failure("job-1", job, "what it said", "")) is kind
    assert _is_lost(job) is (kind is _Lost)


def test_an_interpreter_without_what_is_needed_is_told_as_such() -> None:
    error = _failure("job-1", ended(code=1), "", "ModuleNotFoundError: No module named 'torch'\n")
    assert isinstance(error, ResourceError)
    assert "No module named 'torch'" in str(error)


def test_a_result_is_the_line_that_train_prints_and_no_other() -> None:
    assert _result('{"run": "runs/a", "weights_sha256": "00"}') == {"run": "runs/a", "weights_sha256": "00"}
    for line in ('{"run": "runs/a"}', '{"run": ', "training · step 1/2", ""):
        assert _result(line) is None


def test_names_of_jobs_are_safe_in_paths_and_differ_by_storage_and_attempt() -> None:
    names = [job_id("A" * 128, run, attempt) for run in ("s3://a/x", "s3://b/x") for attempt in (1, 2)]
    assert len(set(names)) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(name) < 63 for name in names)
