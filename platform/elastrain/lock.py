"""One writer a folder: on this machine by the kernel, on S3 by a lease.

A local folder has an advisory lock on a file in it, which the kernel drops when its owner dies: a dead owner never
stands in the way. What worked for it may outlive it (Ray's processes do, by seconds on one machine, by more on a node
that is cut off): so the file tells the owner's token, which `Hold.check` compares, and `training.manifests.revoke`
makes impossible what such a process has begun to commit. On S3 see `lease`. Folders on other remote storage are not
locked, which is said each time.
"""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from elastrain import lease, storage
from elastrain.errors import ConflictError, StorageError
from elastrain.lease import LOCK, Hold, identity
from elastrain.s3 import is_s3


@contextlib.contextmanager
def locked(folder: str, *, remedy: str) -> Iterator[Hold]:
    """Hold a folder for writing; afterwards it is free again, on S3 as an object `.lock` says.

    What is yielded is to be checked before what makes a thing exist. Raises ConflictError, naming the owner and what to
    do, `remedy` included, if another process holds it; StorageError if the folder cannot be written, or if its store
    cannot keep two writers apart.
    """
    if is_s3(folder):
        held = lease.taken(folder, remedy=remedy)
        try:
            yield held.hold
        finally:
            held.release()
        return
    if not storage.is_local(folder):
        logging.getLogger(__name__).warning(
            "%s: this kind of URL has no lock; see to it yourself that no other command writes there", folder
        )
        yield Hold(folder)
        return
    path = storage.local_path(folder) / LOCK
    descriptor = _taken(path, remedy)
    while not _lies_at(descriptor, path):  # the owner before us removed the file after we had opened it
        os.close(descriptor)
        descriptor = _taken(path, remedy)
    try:
        owner = identity(time.time())
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield Hold(folder, owner["token"])
    finally:
        if _lies_at(descriptor, path):
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _taken(path: Path, remedy: str) -> int:
    """Return the open file, locked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write {path.parent}: {error.strerror}; choose another storage") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(descriptor, 4096)
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise StorageError(f"cannot lock {path}: {error.strerror}; choose another storage") from error
        raise ConflictError(f"{path.parent}: in use by {_who(owner)}; wait for it, stop it, or {remedy}") from error
    return descriptor


def _lies_at(descriptor: int, path: Path) -> bool:
    """Say whether the open file is still the one at `path`."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _who(owner: bytes) -> str:
    try:
        known = json.loads(owner)
        return f"process {known['pid']} on {known['host']}, for {time.time() - known['since']:.0f} s"
    except (ValueError, KeyError, TypeError):
        return "another process"
