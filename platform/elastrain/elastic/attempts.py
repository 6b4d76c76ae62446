"""Attempts at one job that others start again whatever it failed of, as KubeRay does with a RayJob: told apart by why.

What the run itself ends with (a wrong spec, bad data, divergence, an error in the task) would come again: it is noted
beside the run, and the next attempt at the same job ends with it at once. An attempt that was killed or interrupted, or
whose machines went away, leaves no note, and the next one goes on.
"""

import contextlib
from collections.abc import Iterator

from elastrain import storage
from elastrain.errors import ConflictError, ElastrainError, Interrupted, error_named
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
    except (ConflictError, Interrupted):  # the lease of an attempt that was lost runs on for a while
        raise
    except Exception as error:
        with contextlib.suppress(ElastrainError):  # where nothing can be written, another attempt may be better off
            storage.put_json(note, {"job": job, "error": type(error).__name__, "message": str(error)})
        raise
