"""What the end of a job means, from what Ray's job server and the job's log say of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType
from typer.testing import CliRunner

from elastrain.__main__ import app
from elastrain.cluster import jobs
from elastrain.cluster.jobs import Job, _failure, _is_lost, _Lost, _result, job_id, stop_job
from elastrain.cluster.package import RUN_KEY
from elastrain.errors import DataError, ElastrainError, Interrupted, ResourceError
from elastrain.observe.actions import read_actions

RUN = str(Path(__file__).parents[2] / "pipelines" / "digits_mlp" / "train.yaml")


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


def follow(monkeypatch: pytest.MonkeyPatch, *states: JobDetails | None) -> tuple[list[str], dict[str, Any]]:
    """Follow job-1 over a connection that breaks once for each of `states`, which is what the job is then.

    Returns the jobs that were sent anew, and the result.
    """
    breaks, sent = list(states), list[str]()

    def lines(_: str) -> Iterator[str]:
        yield "training · step 1/2"
        if breaks:
            raise ResourceError("no Ray cluster answers")
        yield '{"run": "runs/a", "weights_sha256": "00"}'

    def again(*_: Any) -> str:
        sent.append(f"job-{2 + len(sent)}")
        return sent[-1]

    server = SimpleNamespace(lines=lines, known=lambda _: breaks.pop(0), info=lambda _: ended("SUCCEEDED", code=0))
    monkeypatch.setattr(jobs, "JobServer", lambda _: server)
    monkeypatch.setattr(jobs, "_sent", again)
    monkeypatch.setattr("time.sleep", lambda _: None)
    spec: Any = object()
    return sent, Job("job-1", "runs/a", "http://127.0.0.1:8265", spec).result()


STEP, COMMIT = "training · step 1/2", "elastrain: stopped at step 1 after a commit; the same command goes on"


def job_server(monkeypatch: pytest.MonkeyPatch, run: Path, *states: JobDetails, log: Sequence[str]) -> list[str]:
    """Have a job be in `states` one after the other, with `log` in the end; return which jobs were told to end."""
    left, told = [each.model_copy(update={"metadata": {RUN_KEY: str(run)}}) for each in states], list[str]()

    def end(job: str) -> bool:
        told.append(job)
        return True

    server = SimpleNamespace(
        info=lambda _: left.pop(0) if len(left) > 1 else left[0],
        end=end,
        log=lambda _: "\n".join(log),
        lines=lambda _: iter(log),
    )
    monkeypatch.setattr(jobs, "JobServer", lambda _: server)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return told


def test_stopping_a_job_that_has_ended_does_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = job_server(monkeypatch, tmp_path / "a", ended("SUCCEEDED", code=0), log=[])
    found = stop_job("job-1")
    assert (found["status"], found["message"]) == ("succeeded", "it had ended before.")
    assert not told
    assert not read_actions(str(tmp_path))


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        (["Running entrypoint"], "ended"),  # nothing was started, so nothing is lost
        ([STEP, COMMIT], "ended"),
        ([STEP, "elastrain: error: the disk is full"], "ended"),
        ([STEP, '{"run": "runs/a", "weights_sha256": "00"}'], "ended"),
        ([STEP], "cut"),
        ([STEP, "Traceback (most recent call last):"], "cut"),
    ],
)
def test_a_job_that_was_killed_before_its_last_checkpoint_is_not_called_stopped(
    log: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = job_server(monkeypatch, tmp_path / "a", ended("RUNNING"), ended("STOPPED"), log=log)
    if kind == "cut":
        with pytest.raises(ResourceError, match="job-1 was killed before it could make a last checkpoint"):
            stop_job("job-1")
        with pytest.raises(ResourceError, match="job-1 was killed before"):
            Job("job-1", "runs/a", "http://127.0.0.1:8265").result()
    else:
        assert stop_job("job-1")["status"] == "stopped"
    assert told == ["job-1"]
    assert [(each["action"], each["job"]) for each in read_actions(str(tmp_path))] == [("stop", "job-1")]


def test_a_job_that_dies_in_set_up_gives_its_exit_code_and_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = ended(kind="RUNTIME_ENV_SETUP_FAILURE", message="runtime_env setup failed\nno space left")
    job_server(monkeypatch, tmp_path / "a", dead, log=[])
    monkeypatch.setattr(jobs, "submit", lambda *_, **__: Job("job-1", str(tmp_path / "a"), "http://127.0.0.1:8265"))
    done = CliRunner().invoke(app, ["submit", RUN, "--follow"])
    assert isinstance(done.exception, ResourceError), done.output
    assert str(done.exception) == "job-1 died in set-up: runtime_env setup failed (no space left)"
    assert done.exception.exit_code == 6


def test_a_way_that_breaks_often_costs_a_job_that_lives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, found = follow(monkeypatch, *[ended("RUNNING")] * 5)
    assert found["job"] == "job-1"
    assert not sent


def test_only_jobs_that_were_sent_anew_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ended(code=-9)
    sent, found = follow(monkeypatch, lost, ended("RUNNING"), None, ended("RUNNING"), lost)
    assert found["job"] == "job-4"
    assert sent == ["job-2", "job-3", "job-4"]
    with pytest.raises(ResourceError, match=r"job-4: .*submit it again"):
        follow(monkeypatch, *[lost] * 4)
