"""Attempts at one job that others start again whatever it failed of, as KubeRay does with a RayJob: told apart by why.

What the run itself ends with (a wrong spec, bad data, divergence, an error in the task) would come again: it is noted
beside the run, and the next attempt at the same job ends with it at once. An attempt that was killed or interrupted,
whose machines went away or whose storage did not answer leaves no note, and the next one goes on.
"""

import contextlib
from collections.abc import Iterator

from ray.exceptions import RayError

from elastrain import storage
from elastrain.elastic.watch import WorkerLost
from elastrain.errors import ConflictError, ElastrainError, Interrupted, ResourceError, StorageError, error_named
from elastrain.spec.train import TrainSpec

NOTE = "ended.json"


@contextlib.contextmanager
def attempt_of(job: str | None, spec: TrainSpec) -> Iterator[None]:
    """Make what is done within one attempt at `job`; of none, with no effect, where that is None.

    Raises what an earlier attempt at the same job ended with.
    """
    if job is None:
        yield
        return
    note = storage.join(spec.storage, spec.name, NOTE)
    with contextlib.suppress(FileNotFoundError):
        found = storage.read_json(note)
        if found["job"] == job:
            raise error_named(found["error"], found["message"])
    try:
        yield
    except Exception as error:
        if not _passes(error):
            with contextlib.suppress(ElastrainError):  # where nothing can be written, another attempt may be better off
                storage.put_json(note, {"job": job, "error": type(error).__name__, "message": str(error)})
        raise


def _passes(error: Exception) -> bool:
    """Say whether another attempt may do better: machines come back, and the lease of a lost attempt ends."""
    lost = isinstance(error, ResourceError) and isinstance(error.__cause__, WorkerLost | RayError)
    return lost or isinstance(error, ConflictError | Interrupted | StorageError | WorkerLost | RayError)
