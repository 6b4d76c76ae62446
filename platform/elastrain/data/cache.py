"""A cache of ranges of remote files on a node's disk: bounded, shared by all processes of a user, filled once each.

```
<folder>/entries/<key>    a range, whole: renamed to here when its last byte has been written
<folder>/parts/<key>      one that is being filled; who fills it holds a lock on it, which the kernel drops if it dies
<folder>/usage, .lock     bytes of all of them, never too few; and the lock under which room is made
```
The least recently used entries go when room is needed. Whatever the disk refuses costs a fetch and nothing else.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from elastrain import storage
from elastrain.data.dataset import Dataset
from elastrain.errors import DataError
from elastrain.spec.train import CacheSpec

WAIT_S = 10.0  # for a process that fills the same entry; then its waiters fetch for themselves
POLL_S = 0.005
SPARE = 0.05  # of the bound is freed at once, since finding the oldest looks at every entry


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """Where a node keeps what it has fetched, and how many bytes of it at most."""

    folder: str
    max_bytes: int

    def has(self, key: str) -> bool:
        """Say whether an entry is there."""
        return os.path.exists(f"{self.folder}/entries/{key}")  # noqa: PTH110 -- a Path costs more than the look

    def read(self, key: str, size: int, fetch: Callable[[], bytes]) -> Any:
        """Return the `size` bytes of an entry as a buffer; if it is missing, one of the processes that want it fetches.

        Raises what `fetch` raises; what goes wrong here is said once a process, and then `fetch` is called, too.
        """
        try:
            data = self._held(key, size)
            part = self._claimed(key) if data is None and size <= self.max_bytes else None
            if data is None and part is None:
                data = self._held(key, size)  # filled while we waited
        except OSError as error:
            _say_once(self.folder, str(error))
            return fetch()
        if part is None:
            return fetch() if data is None else data
        try:
            data = fetch()
            try:
                self._keep(part, key, data)
            except OSError as error:
                _say_once(self.folder, error.strerror or str(error))
            return data
        finally:
            self._abandon(part, key)

    def doubt(self) -> str | None:
        """Return in a sentence why this machine will not keep all that it may, None where nothing stands against it."""
        try:
            self._prepare()
            held = self._usage() or 0
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"data.cache.folder {self.folder}: {error.strerror}; nothing is cached, data are read from storage"
        if held + free < self.max_bytes:
            return (
                f"data.cache.folder {self.folder}: {free / 1e9:.1f} GB free and {held / 1e9:.1f} GB held are less than "
                f"data.cache.max_bytes, {self.max_bytes / 1e9:.1f} GB; what has no room is read from storage"
            )
        return None

    def drop(self, key: str) -> bool:
        """Remove an entry that turned out to be corrupted; say whether there was one."""
        with contextlib.suppress(OSError):
            self._entry(key).unlink()
            return True
        return False

    def _entry(self, key: str) -> Path:
        return Path(self.folder, "entries", key)

    def _part(self, key: str) -> Path:
        return Path(self.folder, "parts", key)

    def _held(self, key: str, size: int) -> Any:
        """Return an entry and note that it was used; one of another size than it should have is removed."""
        path = f"{self.folder}/entries/{key}"
        try:
            with pa.OSFile(path) as file:  # into Arrow's memory: fresh pages for each entry would cost more
                data = file.read_buffer()
            os.utime(path)
        except FileNotFoundError:
            return None
        if len(data) != size:
            self.drop(key)
            return None
        return data

    def _claimed(self, key: str) -> int | None:
        """Return the locked file in which the entry is to be filled; None if it is there by now, or takes too long."""
        self._prepare()
        deadline = time.monotonic() + WAIT_S
        while not self.has(key):
            part = os.open(self._part(key), os.O_RDWR | os.O_CREAT, 0o600)
            if not _lock(part, deadline):
                os.close(part)
                return None
            if _lies_at(part, self._part(key)) and not self.has(key):
                return part
            self._abandon(part, key)  # it was filled, or collected, between our opening and our locking it
        return None

    def _keep(self, part: int, key: str, data: bytes) -> None:
        """Make room, write, and let the entry appear; raises OSError if the disk has no room for it."""
        with self._room() as room:
            if not room:
                return
            held = self._usage()
            if held is None or held + len(data) > self.max_bytes:
                held = self._evicted(int((1.0 - SPARE) * self.max_bytes) - len(data))
            if held + len(data) > self.max_bytes:  # others are filling so much at this moment
                return
            os.posix_fallocate(part, 0, len(data))
            self._set_usage(held + len(data))
        left = memoryview(data)
        while left:
            left = left[os.pwrite(part, left, len(data) - len(left)) :]
        self._part(key).rename(self._entry(key))

    def _abandon(self, part: int, key: str) -> None:
        """Close a part; remove it if it is still one. Its bytes stay counted until the next look at all entries."""
        if _lies_at(part, self._part(key)):
            with contextlib.suppress(OSError):
                self._part(key).unlink()
        os.close(part)

    def _evicted(self, most: int) -> int:
        """Remove what dead processes were filling, then the oldest entries until at most `most` bytes are left.

        Return the bytes that are left. Parts are counted first: one that becomes an entry meanwhile is counted twice.
        """
        self._collect()
        parts = sum(status.st_size for _, status in _files(Path(self.folder, "parts")))
        entries = sorted(_files(Path(self.folder, "entries")), key=lambda entry: entry[1].st_mtime_ns)
        total = parts + sum(status.st_size for _, status in entries)
        for path, status in entries:
            if total <= max(0, most):
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            total -= status.st_size
        return total

    def _collect(self) -> None:
        """Remove parts that nobody fills: their lock is free."""
        for path, _ in _files(Path(self.folder, "parts")):
            with contextlib.suppress(FileNotFoundError):
                part = os.open(path, os.O_RDWR)
                if _lock(part, 0.0) and _lies_at(part, path):
                    path.unlink()
                os.close(part)

    def _prepare(self) -> None:
        if not self._part("").is_dir() or not self._entry("").is_dir():
            for folder in (self._part(""), self._entry("")):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _swept(self)

    @contextlib.contextmanager
    def _room(self) -> Iterator[bool]:
        """Hold the lock under which bytes are counted; False if somebody else holds it for too long."""
        lock = os.open(Path(self.folder, ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield _lock(lock, time.monotonic() + WAIT_S)
        finally:
            os.close(lock)

    def _usage(self) -> int | None:
        """Return the bytes of all entries and parts, or more; None where nobody has counted them."""
        with contextlib.suppress(OSError, ValueError):
            return int(Path(self.folder, "usage").read_text())
        return None

    def _set_usage(self, held: int) -> None:
        Path(self.folder, "usage").write_text(str(held))


def cache_of(spec: CacheSpec | None, *datasets: Dataset | None) -> Cache | None:
    """Return the cache that a spec asks for; None where it asks for none, or all data are in local folders.

    Raises DataError if the remote data are not packed: nothing then tells one content from another.
    """
    remote = [data for data in datasets if data is not None and not storage.is_local(data.url)]
    if spec is None or not remote:
        return None
    for data in remote:
        if not all(shard.sha256 for shard in data.shards):
            raise DataError(
                f"{data.url}: not packed, so that data.cache could not tell its files from other ones; pack it, or "
                f"leave data.cache out"
            )
    return Cache(folder=spec.folder, max_bytes=spec.max_bytes)


def key_of(url: str, sha256: str, start: int, length: int) -> str:
    """Return the key of a range of a file; a file of other content has other keys, and so has one elsewhere."""
    return hashlib.sha256(f"{url}\n{sha256}\n{start}\n{length}".encode()).hexdigest()


def _lock(descriptor: int, deadline: float) -> bool:
    """Lock a file, trying until the deadline: whoever holds it may be stopped, and must not stop others."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        else:
            return True


def _lies_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                found.append((Path(entry.path), entry.stat()))
    return found


@lru_cache(maxsize=8)
def _swept(cache: Cache) -> None:
    """Collect, once a process, what killed processes have left."""
    cache._collect()  # noqa: SLF001 -- of the same module


@lru_cache(maxsize=8)
def _say_once(folder: str, reason: str) -> None:
    logging.getLogger(__name__).warning("%s: nothing is cached there (%s); data are read from storage", folder, reason)
