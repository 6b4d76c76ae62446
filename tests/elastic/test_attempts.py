"""Attempts at one job: what the run itself ended with is final, what machines and people did is not."""

from pathlib import Path

import pytest
from ray.exceptions import RayError

from elastrain.elastic.attempts import NOTE, attempt_of
from elastrain.elastic.watch import WorkerLost
from elastrain.errors import ConflictError, DataError, ElastrainError, Interrupted, ResourceError, StorageError
from elastrain.spec.document import train_spec
from elastrain.spec.train import TrainSpec


@pytest.fixture
def spec(tmp_path: Path) -> TrainSpec:
    return train_spec(
        {
            "name": "tried",
            "task": "package.module:Task",
            "data": {"train": "data", "global_batch": 8},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "budget": {"steps": 1},
            "storage": str(tmp_path / "runs"),
        }
    )


def end_with(job: str | None, spec: TrainSpec, error: BaseException) -> None:
    with attempt_of(job, spec):
        raise error


@pytest.mark.parametrize(
    ("first", "kind", "text"),
    [
        (DataError("data: nothing there"), DataError, "data: nothing there"),
        (ZeroDivisionError("in the task"), ElastrainError, "in the task"),
        (ResourceError("no node can ever hold a worker"), ResourceError, "no node can ever"),
    ],
)
def test_what_the_run_ended_with_ends_the_next_attempt_at_the_same_job(
    spec: TrainSpec, first: Exception, kind: type[Exception], text: str
) -> None:
    with pytest.raises(type(first)):
        end_with("job-1", spec, first)
    with pytest.raises(kind, match=text) as again, attempt_of("job-1", spec):
        pytest.fail("a second try at what would come again")
    assert type(again.value) is kind
    with attempt_of("job-2", spec):
        pass  # the job of another command
    with attempt_of(None, spec):
        pass  # a person


def of(cause: Exception) -> ResourceError:
    """What the run says when try after try came to nothing."""
    error = ResourceError(f"{cause}; 3 tries from step 7 came to nothing")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        *(Interrupted("stopped"), ConflictError("a lease runs on"), KeyboardInterrupt()),
        *(StorageError("s3://bucket: it does not answer"), of(WorkerLost("nobody is left")), of(RayError("no head"))),
    ],
)
def test_who_was_interrupted_met_a_lease_or_lost_machines_or_storage_may_go_on(
    spec: TrainSpec, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        end_with("job-1", spec, error)
    assert not (Path(spec.storage) / "tried" / NOTE).exists()
    with attempt_of("job-1", spec):
        pass


def test_where_no_note_can_be_written_the_error_is_what_it_was(spec: TrainSpec) -> None:
    def full() -> None:
        with attempt_of("job-1", spec):
            Path(spec.storage).write_text("a file, not a folder")
            raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        full()


def test_without_a_job_nothing_is_noted(spec: TrainSpec) -> None:
    with pytest.raises(DataError):
        end_with(None, spec, DataError("broken"))
    assert not Path(spec.storage).exists()
