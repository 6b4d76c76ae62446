"""One way to read, list, put, move and remove files: local paths directly, S3 by Arrow, other URLs through fsspec.

A put is atomic: a reader sees the old bytes or the new ones. Nothing here knows what the files mean.
"""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from elastrain import listing, s3
from elastrain.errors import StorageError
from elastrain.scratch import scratch_folder
from elastrain.urls import REMEDY, holds_credentials, redacted

T = TypeVar("T")
ATTEMPTS = 4
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """A file below a folder: its path relative to the folder, with forward slashes, and its size."""

    path: str
    size_bytes: int


def is_local(url: str) -> bool:
    """Say whether `url` names a file of this machine (a plain path or `file://`)."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """Return the plain path of a local URL."""
    return Path(url.removeprefix("file://"))


def join(url: str, *parts: str) -> str:
    """Join path parts to a URL or path with single slashes."""
    return "/".join([url.rstrip("/") if url != "/" else "", *parts])


def absolute(url: str) -> str:
    """Return a local URL as an absolute plain path, any other as it is; raises StorageError if a secret is in it."""
    _refuse_credentials(url)
    return str(local_path(url).absolute()) if is_local(url) else url


def read_bytes(url: str) -> bytes:
    """Return the bytes of a file; raises FileNotFoundError where there is none, else StorageError."""
    if is_local(url):
        return _tried("read", url, local_path(url).read_bytes)
    if s3.is_s3(url):
        return s3.read(url)
    return bytes(_tried("read", url, lambda: _remote(url)[0].cat_file(_remote(url)[1])))


def read_json(url: str) -> Any:
    """Return the JSON document at `url`; raises FileNotFoundError, or StorageError if it is not JSON."""
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise StorageError(f"{url}: not a JSON document ({error})") from error


def put(url: str, data: bytes) -> None:
    """Write a file whole or not at all; raises StorageError (a full disk included)."""
    if s3.is_s3(url):
        s3.write(url, data)
        return
    if not is_local(url):
        _tried("write", url, lambda: _remote(url)[0].pipe_file(_remote(url)[1], data))
        return
    with staged(url) as temporary, named("write", url):
        temporary.write_bytes(data)


def create_local(url: str, data: bytes) -> bool:
    """Write a local file whole where there is none; say whether there was none. Raises StorageError.

    A file system without hard links (FAT, some network shares) lets everybody win. On S3 see `conditional`.
    """
    path = local_path(url)
    put(str(new := path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")), data)
    try:
        os.link(new, path)
    except FileExistsError:
        return False
    except OSError:
        move(str(new), url)
    finally:
        new.unlink(missing_ok=True)
    return True


def put_json(url: str, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; raises StorageError."""
    put(url, (json.dumps(value, indent=1) + "\n").encode())


@contextlib.contextmanager
def staged(url: str) -> Iterator[Path]:
    """Yield a local path to write to; on a clean exit it is flushed and appears at `url` at once.

    Raises StorageError if it cannot be written there; after any error nothing is left behind.
    """
    _refuse_credentials(url)
    local = is_local(url)
    with named("write", url):
        target = local_path(url) if local else scratch_folder() / url.rsplit("/", 1)[-1]
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        with named("write", url):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with named("write", url):
            if local:
                _flush(temporary)
                temporary.replace(target)
            elif s3.is_s3(url):
                s3.write_file(url, temporary)
            else:
                _tried("write", url, lambda: _remote(url)[0].put_file(str(temporary), _remote(url)[1]))
    finally:
        # A path that cannot be written cannot be cleaned either: the first error is the one that tells.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_staged(url: str) -> None:
    """Remove what killed writers were staging in a local folder; only for who knows that nobody else writes there."""
    if is_local(url):
        for left in local_path(url).glob(".*.tmp"):
            with contextlib.suppress(OSError):
                left.unlink()


def exists(url: str) -> bool:
    """Say whether a file or folder is there; raises StorageError if storage does not answer."""
    if is_local(url):
        with named("look up", url):
            return local_path(url).exists()
    if s3.is_s3(url):
        return s3.exists(url)
    return bool(_tried("look up", url, lambda: _remote(url)[0].exists(_remote(url)[1])))


def list_files(url: str, *, suffix: str | tuple[str, ...] = "") -> list[FileInfo]:
    """List the files below a folder (any depth) in path order; hidden names are left out.

    Links are followed; a folder that several names lead to is listed once, under its own name where it has one here.
    Raises FileNotFoundError if the folder does not exist, StorageError if any of it cannot be read.
    """
    if is_local(url):
        found = _local_files(local_path(url), suffix)
    else:
        found = _remote_files(url, lambda path: path.endswith(suffix) and not _hidden(path))
    return sorted(found, key=lambda file: file.path)


def list_folders(url: str) -> list[str]:
    """List the names of the folders directly inside `url`, sorted; empty where it does not exist."""
    if is_local(url):
        root = local_path(url)
        with named("list", url):
            return sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    if s3.is_s3(url):
        return sorted(s3.folders(url))
    names = (
        {file.path.split("/", 1)[0] for file in _remote_files(url, lambda path: "/" in path)} if exists(url) else set()
    )
    return sorted(names)


def remove(url: str) -> None:
    """Remove a file or a folder with all that is in it; nothing happens where there is none."""
    if s3.is_s3(url):
        s3.remove(url)
        return
    if not exists(url):
        return
    if not is_local(url):
        _tried("remove", url, lambda: _remote(url)[0].rm(_remote(url)[1], recursive=True))
        return
    path = local_path(url)
    with named("remove", url):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def move(url: str, target: str) -> None:
    """Move a file to another place of the same store, over what is there; raises StorageError."""
    if is_local(url):
        with named("write", target):
            local_path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(local_path(url), local_path(target))
        return
    if s3.is_s3(url):
        s3.move(url, target)
        return
    _tried("write", target, lambda: _remote(url)[0].copy(_remote(url)[1], _remote(target)[1]))
    remove(url)


def open_arrow(url: str) -> Any:
    """Open a file for random reads by pyarrow; raises FileNotFoundError or StorageError."""
    if s3.is_s3(url):
        return s3.open_ranges(url)
    import pyarrow as pa  # noqa: PLC0415 -- 0.3 s that a plan or report of nothing need not pay
    import pyarrow.fs  # noqa: PLC0415

    if is_local(url):
        return _tried("open", url, lambda: pa.OSFile(str(local_path(url)), "rb"))
    filesystem, path = _remote(url)
    return _tried(
        "open", url, lambda: pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)).open_input_file(path)
    )


def open_ranges(url: str) -> Any:
    """Return a file with `size()` and `read_at(length, start)`, which threads may call side by side.

    Raises FileNotFoundError or StorageError, also while it is read; of a local file OSError while it is read.
    """
    if is_local(url):
        return _LocalRanges(url)
    return s3.ranges(url) if s3.is_s3(url) else _Ranges(url)


class _LocalRanges:
    """A local file, read without a position into Arrow's memory, whose pages are used again."""

    def __init__(self, url: str) -> None:
        self._file = open_arrow(url)

    def size(self) -> int:
        """Return the bytes of the file."""
        return int(self._file.size())

    def read_at(self, length: int, start: int) -> Any:
        """Return a range as a buffer."""
        return self._file.get_stream(start, length).read_buffer(length)


class _Ranges:
    """A file of fsspec, read without a position."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._size = int(_tried("open", url, lambda: _remote(url)[0].size(_remote(url)[1])))

    def size(self) -> int:
        """Return the bytes of the file when it was opened."""
        return self._size

    def read_at(self, length: int, start: int) -> bytes:
        """Return a range."""
        filesystem, path = _remote(self._url)
        return bytes(_tried("read", self._url, lambda: filesystem.cat_file(path, start=start, end=start + length)))


def _flush(path: Path) -> None:
    """Bring a finished file to the disk, so that a rename never shows an empty one after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _local_files(root: Path, suffix: str | tuple[str, ...]) -> Iterator[FileInfo]:
    if not exists(str(root)):
        raise FileNotFoundError(str(root))
    for folder, names in _local_folders(root):
        for path in (folder / name for name in names if name.endswith(suffix) and not _hidden(name)):
            size = _size(path)
            if size is not None:
                yield FileInfo(path=path.relative_to(root).as_posix(), size_bytes=size)


def _local_folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each visible folder once, with the names of its files; what links lead to comes last."""
    seen: set[tuple[int, int]] = set()
    starts = [root]
    for start in starts:  # grows by the links that are found, and ends where all that they lead to is seen
        for folder, inner, names in os.walk(start, onerror=_unreadable):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                inner.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            inner[:] = sorted(name for name in inner if not _hidden(name))
            starts += [path for path in (Path(folder, name) for name in inner) if path.is_symlink()]
            yield Path(folder), names


def _unreadable(error: OSError) -> None:
    """Raise what `os.walk` would pass over, but for a folder that has been removed since it was listed."""
    with named("list", str(error.filename)):
        if not isinstance(error, FileNotFoundError):
            raise error


def _size(path: Path) -> int | None:
    """Return the size of a file that was listed, None if it has been removed since."""
    with named("list", str(path)):
        try:
            return path.stat().st_size
        except FileNotFoundError:
            if path.is_symlink():
                raise StorageError(
                    f"cannot list {path}: a link that leads nowhere; restore what it leads to, or remove it"
                ) from None
            return None


def _remote_files(url: str, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[FileInfo]:
    if s3.is_s3(url):
        yield from (FileInfo(path=path, size_bytes=size) for path, size in listing.files(url, wanted))
        return
    filesystem, root = _remote(url)
    found: dict[str, Any] = _tried("list", url, lambda: filesystem.find(root, detail=True))
    if not found:
        raise FileNotFoundError(url)
    for place, info in found.items():
        path = place[len(root.rstrip("/")) + 1 :]
        if wanted(path):
            yield FileInfo(path=path, size_bytes=int(info["size"]))


def _remote(url: str) -> tuple[Any, str]:
    import fsspec  # noqa: PLC0415 -- 0.2 s that local runs need not pay

    _refuse_credentials(url)
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise StorageError(f"{url}: no file system for this kind of URL ({error})") from error
    except Exception as error:  # each package has errors of its own for credentials that are missing or wrong
        raise StorageError(f"cannot open {url}: {_first_line(error)}; check what its package needs to know") from error
    return filesystem, str(path)


def _refuse_credentials(url: str) -> None:
    if holds_credentials(url):
        raise StorageError(f"{redacted(url)}: {REMEDY}")


@contextlib.contextmanager
def named(operation: str, url: str) -> Iterator[None]:
    """Turn an operating system error into a sentence that names operation, place and remedy."""
    try:
        yield
    except OSError as error:
        remedy = {
            errno.ENOSPC: "the disk is full: free space or choose another storage",
            errno.EACCES: "permission denied: check the owner and mode",
            errno.EROFS: "the file system is read-only: choose another storage",
            errno.ENOTDIR: "a part of the path is a file: choose another storage",
            errno.EEXIST: "a part of the path is a file: choose another storage",
            errno.ENAMETOOLONG: "a name in the path is too long: choose a shorter one",
        }.get(error.errno or 0, str(error))
        raise StorageError(f"cannot {operation} {url}: {remedy}") from error


def _tried(operation: str, url: str, action: Callable[[], T]) -> T:
    """Run `action`, again after a pause if a remote store failed in a way that may pass."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            if is_local(url) or isinstance(error, FINAL_ERRORS) or attempt == ATTEMPTS - 1:
                with named(operation, url):
                    raise
        except StorageError:
            raise
        except Exception as error:  # fsspec's packages have errors of their own, and try again themselves
            if is_local(url):
                raise
            remedy = "check the store's address, its credentials and the network"
            raise StorageError(f"cannot {operation} {url}: {_first_line(error)}; {remedy}") from error
        time.sleep(0.2 * 4**attempt)
    raise AssertionError("unreachable")


def _first_line(error: Exception) -> str:
    """Return what an error says in a line, without credentials of URLs in it; some say nothing but their name."""
    return redacted(str(error).strip().partition("\n")[0].rstrip(".")) or type(error).__name__
