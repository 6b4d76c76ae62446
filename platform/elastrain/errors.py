"""The tree of errors: one sentence each, and the exit code that goes with it.

ElastrainError (1)
├── SpecError (2)        usage, a spec, or the task that it names
├── ConflictError (3)    somebody else holds the run, or the run is another one
├── DataError (4)        a dataset is missing, broken or lacks what the task needs
├── StorageError (5)     reading or writing storage failed
├── ResourceError (6)    the cluster cannot hold the run, or lost it
├── DivergedError (7)    the loss is not a number any more
└── Interrupted (130)    stopped by the user after a commit

A caller writes::

    try:
        elastrain.train(spec)
    except elastrain.ElastrainError as error:
        sys.exit(error.exit_code)
"""

from typing import ClassVar


class ElastrainError(Exception):
    """Base of every error that Elastrain raises on purpose; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class SpecError(ElastrainError):
    """The command line, the spec or the task it names is wrong; the message names the line or the field."""

    exit_code = 2


class ConflictError(ElastrainError):
    """The run or dataset already exists in another form, or another process is writing it."""

    exit_code = 3


class DataError(ElastrainError):
    """A dataset is missing, unreadable, corrupted, or lacks a column; the message names the file."""

    exit_code = 4


class StorageError(ElastrainError):
    """Storage could not be read or written; the message names the operation and the path."""

    exit_code = 5


class ResourceError(ElastrainError):
    """The machines at hand cannot hold the run, or a worker was lost."""

    exit_code = 6


class DivergedError(ElastrainError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""

    exit_code = 7


class Interrupted(ElastrainError):  # noqa: N818 -- an event, not a fault
    """The user stopped the run; its state was committed first."""

    exit_code = 130


def error_named(name: str, message: str) -> ElastrainError:
    """Return the error whose class is called `name` with `message`: how errors cross process borders as data."""
    kinds: dict[str, type[ElastrainError]] = {kind.__name__: kind for kind in ElastrainError.__subclasses__()}
    return kinds.get(name, ElastrainError)(message)


def ours(error: BaseException) -> ElastrainError | None:
    """Return the error of ours that `error` wraps (Ray wraps what a task raises), or None."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ElastrainError):
            return type(seen)(*seen.args) if type(seen) in ElastrainError.__subclasses__() else _unmixed(seen)
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None


def _unmixed(error: ElastrainError) -> ElastrainError:
    """Return Ray's mixture of its own and our class as a plain one of ours."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ElastrainError):
        return cause
    name = next((kind.__name__ for kind in ElastrainError.__subclasses__() if isinstance(error, kind)), "")
    return error_named(name, str(error))
