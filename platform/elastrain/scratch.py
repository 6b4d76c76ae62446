"""A folder of this process for files on their way to storage; what killed processes have left in theirs is removed.

A process holds a lock on its folder, which the kernel drops when it ends, however it ends.
"""

import atexit
import fcntl
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path


def scratch_folder() -> Path:
    """Return the folder, which only this process writes to; raises OSError if none can be made."""
    return _made(os.getpid())  # a fork has one of its own


@lru_cache(maxsize=1)
def _made(pid: int) -> Path:
    base = Path(tempfile.gettempdir(), f"elastrain-scratch-{os.getuid()}")
    base.mkdir(mode=0o700, exist_ok=True)
    for left in base.iterdir():
        if (lock := _locked(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    while True:
        mine = Path(tempfile.mkdtemp(dir=base))
        if _locked(mine) is not None and mine.exists():  # else another process took it for one that was left
            atexit.register(_remove, mine, pid)
            return mine


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # and no fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path) -> int | None:
    """Lock a folder, for as long as this process lives or closes what is returned; None if another one holds it."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    return held
