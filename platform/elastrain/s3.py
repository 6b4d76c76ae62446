"""Files on S3 and what speaks its language, by Arrow: credentials and endpoint from the environment, never from a URL.

A file is there whole or not at all. What may pass is tried again, what cannot is one sentence at once.
"""

import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from elastrain import s3_errors
from elastrain.errors import StorageError
from elastrain.urls import REMEDY, holds_credentials, redacted

T = TypeVar("T")
FIRST_S = 5.0  # for an endpoint that this process has never heard of: more likely a wrong address than an outage
OUTAGE_S = 120.0  # for one that has answered before, from the first failure on
RAY_WORKER = "RAY_RAYLET_PID"  # in the environment of what Ray has started: there the command has had its answer
STALL_S, STALL_BYTES_PER_S = 30.0, 100_000.0  # a read that takes longer than both is given up and tried again
CREDENTIALS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_CONFIG_FILE"),
    *("AWS_SHARED_CREDENTIALS_FILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE"),
)
LONGEST_KEY = 1024  # bytes
VERSIONS = 100  # of a file that is replaced while it is read

_answered: set[str] = set()
_failing: dict[int, float] = {}  # by thread: since when what it does fails
_buckets: set[tuple[str, str]] = set()


def waiting_s() -> float:
    """Return for how long this process has been trying again what failed, 0 where nothing fails; for any thread."""
    return max((time.monotonic() - since for since in list(_failing.values())), default=0.0)


def is_s3(url: str) -> bool:
    """Say whether a URL is one of ours."""
    return url.startswith("s3://")


def place(url: str) -> str:
    """Return bucket and key as Arrow wants them; raises StorageError for a secret, no bucket, or parts such as `..`."""
    if holds_credentials(url):
        raise StorageError(f"{redacted(url)}: {REMEDY}")
    path = url.removeprefix("s3://").rstrip("/")
    parts = path.split("/")
    if not parts[0]:
        raise StorageError(f"{url}: no bucket; write s3://bucket/path")
    if any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"{url}: a part of the path is empty, `.` or `..`, which not every store has; rename it")
    if len(path.partition("/")[2].encode()) > LONGEST_KEY:
        raise StorageError(
            f"{url}: longer than the {LONGEST_KEY} bytes that a key on S3 may have; choose a shorter name"
        )
    return path


def endpoint() -> str:
    """Return where requests go as a URL, empty for AWS itself; raises StorageError if it may not be used."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if holds_credentials(url):
        raise StorageError(f"AWS_ENDPOINT_URL is {redacted(url)}: {REMEDY}")
    if url and not re.fullmatch(r"https?://[^/\s]+/?", url):
        raise StorageError(f"AWS_ENDPOINT_URL is {url!r}: write https://host or http://host:port")
    if url.startswith("http://") and os.environ.get("AWS_ALLOW_HTTP", "").lower() not in ("1", "true", "yes"):
        raise StorageError(
            f"AWS_ENDPOINT_URL is {url}: unencrypted; use https, or set AWS_ALLOW_HTTP=true in a network that you trust"
        )
    return url.rstrip("/")


def read(url: str) -> bytes:
    """Return the bytes of one version of a file; raises FileNotFoundError, or StorageError."""
    path = place(url)

    def once() -> bytes:
        file = client().open_input_file(path)
        for _ in range(VERSIONS):
            data = _unstalled(file, file.size(), 0)
            # Arrow asks for the size first and for so many bytes second; in between a writer may have put another one.
            newest = client().open_input_file(path)
            if newest.metadata().get("ETag") == file.metadata().get("ETag"):
                return data
            file = newest
        raise OSError("the object was replaced again and again while it was read")

    return tried("read", url, once)


def write(url: str, data: Any) -> None:
    """Write bytes, or any buffer, as one file, in several parts if it is large; raises StorageError.

    All goes in one call: a stream that an interrupt leaves half written would be completed when it is collected.
    """
    path = place(url)

    def once() -> None:
        stream = client().open_output_stream(path)
        stream.write(data)
        stream.close()

    tried("write", url, once)


def write_file(url: str, source: Path) -> None:
    """Write a local file, which need not fit into memory; raises StorageError."""
    import pyarrow as pa  # noqa: PLC0415 -- 0.3 s that local runs need not pay

    if not source.stat().st_size:  # nothing to map
        write(url, b"")
        return
    with pa.memory_map(str(source)) as mapped:
        write(url, mapped.read_buffer())


def exists(url: str) -> bool:
    """Say whether a file or folder is there; raises StorageError, also where there is no such bucket."""
    return _kind(url) is not None


def size_of(url: str) -> int:
    """Return the size of a file, raises FileNotFoundError where there is none, or StorageError."""
    from pyarrow import fs  # noqa: PLC0415 -- 0.3 s that local runs need not pay

    path = place(url)

    def once() -> Any:
        info = client().get_file_info(path)
        if info.type != fs.FileType.File:
            raise FileNotFoundError(url)
        return info

    return int(tried("list", url, once).size)


def folders_among(url: str, paths: Sequence[str]) -> set[str]:
    """Return which of these paths below `url` are folders, and no files; raises StorageError."""
    from pyarrow import fs  # noqa: PLC0415 -- 0.3 s that local runs need not pay

    root = place(url)
    places = [f"{root}/{path}" for path in paths]
    found = tried("list", url, lambda: client().get_file_info(places)) if places else []
    return {path for path, info in zip(paths, found, strict=True) if info.type == fs.FileType.Directory}


def folders(url: str) -> list[str]:
    """Return the names of the folders directly inside `url`, none where it does not exist; raises StorageError."""
    from pyarrow import fs  # noqa: PLC0415 -- 0.3 s that local runs need not pay

    root = place(url)
    try:
        found = tried("list", url, lambda: client().get_file_info(fs.FileSelector(root)))
    except FileNotFoundError:
        return []
    return [info.base_name for info in found if info.type == fs.FileType.Directory]


def remove(url: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens where there is none. Raises StorageError."""
    path = place(url)
    with contextlib.suppress(FileNotFoundError):
        if _kind(url) == "file":
            tried("remove", url, lambda: client().delete_file(path))
        else:
            tried("remove", url, lambda: client().delete_dir(path))


def move(url: str, target: str) -> None:
    """Copy a file over what is at `target`, then remove it; raises FileNotFoundError, or StorageError."""
    source, destination = place(url), place(target)
    tried("write", target, lambda: client().copy_file(source, destination))
    remove(url)


def open_ranges(url: str) -> Any:
    """Return a file of Arrow for random reads; raises FileNotFoundError, or StorageError, also while it is read."""
    import pyarrow as pa  # noqa: PLC0415 -- 0.3 s that local runs need not pay

    return pa.PythonFile(ranges(url), mode="r")


def ranges(url: str) -> Any:
    """Return a file with `size()` and `read_at(length, start)`, one request each, which threads may call side by side.

    Raises FileNotFoundError, or StorageError, also while it is read.
    """
    path = place(url)
    return _Ranges(url, tried("open", url, lambda: client().open_input_file(path)))


class _Ranges:
    """What `pyarrow.PythonFile` wants of a file, and ranges of it."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file, self._at, self._size = url, file, 0, int(file.size())

    def size(self) -> int:
        return self._size

    def read_at(self, length: int, start: int) -> bytes:
        """Return a range, with one request; raises FileNotFoundError, or StorageError."""
        return tried("read", self._url, lambda: self._fetch(length, start))

    def read(self, size: int = -1) -> bytes:
        most = self._size - self._at
        wanted = most if size < 0 else min(size, most)
        data = self.read_at(wanted, self._at) if wanted > 0 else b""
        self._at += len(data)
        return data

    def _fetch(self, length: int, start: int) -> bytes:
        try:
            return _unstalled(self._file, length, start)
        except OSError as error:
            if "HTTP status 416" in str(error) or "INVALID_RANGE" in str(error):
                raise ValueError("the file was replaced by a shorter one while it was read") from error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)


def client() -> Any:
    """Return Arrow's client for the endpoint, region and credentials of now; raises StorageError."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _client(endpoint(), region, tuple(os.environ.get(name) for name in CREDENTIALS))


@lru_cache(maxsize=4)
def _client(where: str, region: str | None, credentials: tuple[str | None, ...]) -> Any:  # noqa: ARG001 -- a key only
    from pyarrow import fs  # noqa: PLC0415 -- 0.3 s that local runs need not pay

    scheme, _, host = where.partition("://")
    own = {"endpoint_override": host, "scheme": scheme} if where else {}
    # A file is put in one request where it is small: the stream is opened when its first bytes are there.
    return fs.S3FileSystem(region=region, allow_delayed_open=True, **own)


def _kind(url: str) -> str | None:
    """Return "file" or "folder", None where there is neither."""
    from pyarrow import fs  # noqa: PLC0415 -- 0.3 s that local runs need not pay

    path = place(url)

    def once() -> Any:
        info = client().get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(url)
        return info

    try:
        return "file" if tried("look up", url, once).type == fs.FileType.File else "folder"
    except FileNotFoundError:
        return None


def tried(operation: str, url: str, action: Callable[[], T]) -> T:
    """Run `action`, again and again while what went wrong may pass and there is time.

    Raises FileNotFoundError where there is no such file in its bucket, StorageError for all else.
    """
    pause, where, me = 0.2, endpoint(), threading.get_ident()
    try:
        while True:
            try:
                result = action()
            except (OSError, ValueError) as error:  # Arrow's errors are one of the two
                _consider(error, operation, url)
                text = s3_errors.said(error)
                failing_s = time.monotonic() - _failing.setdefault(me, time.monotonic())
                if failing_s + pause >= _patience_s(text, where):
                    final = s3_errors.outage(text, where, failing_s)
                    raise StorageError(f"cannot {operation} {url}: {final}") from None
                time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 -- workers must not come back all at once
                pause = min(2 * pause, 10.0)
                continue
            _answered.add(where)
            return result
    finally:
        _failing.pop(me, None)


def _consider(error: OSError | ValueError, operation: str, url: str) -> None:
    """Raise FileNotFoundError or StorageError where trying again cannot help."""
    text, where = s3_errors.said(error), endpoint()
    if isinstance(error, FileNotFoundError) or s3_errors.GONE.search(text):
        _answered.add(where)
        _refuse_unknown_bucket(operation, url, where)
        raise FileNotFoundError(url) from error
    why = s3_errors.final(text, url)
    if why or not isinstance(error, OSError):
        raise StorageError(f"cannot {operation} {url}: {why or s3_errors.plain(text, url)}") from None


def _patience_s(text: str, where: str) -> float:
    is_new = where not in _answered and RAY_WORKER not in os.environ
    return FIRST_S if is_new and s3_errors.NO_ANSWER.search(text) else OUTAGE_S


def _unstalled(file: Any, size: int, offset: int) -> bytes:
    """Return bytes of a file; raises OSError if they trickle, which Arrow would wait for without end."""
    found: list[bytes | BaseException] = []

    def fetch() -> None:
        try:
            found.append(bytes(file.read_at(size, offset)))
        except BaseException as error:  # noqa: BLE001 -- it is raised below
            found.append(error)

    thread = threading.Thread(target=fetch, daemon=True)  # who is given up ends with its connection
    thread.start()
    thread.join(STALL_S + size / STALL_BYTES_PER_S)
    if not found:
        raise OSError(f"{size} bytes did not come in {STALL_S + size / STALL_BYTES_PER_S:.0f} s")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _refuse_unknown_bucket(operation: str, url: str, where: str) -> None:
    """Raise StorageError if not only the file but its whole bucket is missing, which Arrow does not tell apart."""
    from pyarrow import fs  # noqa: PLC0415 -- 0.3 s that local runs need not pay

    bucket = place(url).split("/", 1)[0]
    if (where, bucket) in _buckets:
        return
    with contextlib.suppress(OSError):  # who may not look at the bucket is told of the file
        if client().get_file_info(bucket).type == fs.FileType.NotFound:
            raise StorageError(f"cannot {operation} {url}: {s3_errors.final('NO_SUCH_BUCKET', url)}")
    _buckets.add((where, bucket))
