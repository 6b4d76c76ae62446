"""One writer a run: an advisory lock on a file of the run, which the kernel drops when its owner dies.

So a dead owner on this machine never stands in the way. Runs on remote storage are not locked yet.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

from elastrain import storage
from elastrain.errors import ConflictError, StorageError


@contextlib.contextmanager
def locked(run: str) -> Iterator[None]:
    """Hold a run for writing; raises ConflictError, naming the owner, if another process holds it."""
    if not storage.is_local(run):
        yield
        return
    path = storage.local_path(run) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write {run}: {error.strerror}; choose another storage") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConflictError(_held(run, os.read(descriptor, 4096))) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_owner()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _owner() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}


def _held(run: str, owner: bytes) -> str:
    try:
        known = json.loads(owner)
        who = f"process {known['pid']} on {known['host']}, for {time.time() - known['since']:.0f} s"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return f"{run}: in use by {who}; wait for it, stop it, or give this run another name"
