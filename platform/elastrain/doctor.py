"""What a machine and a storage can do, each tried and not guessed: it passes, is doubtful, or would fail a run.

Everything is tried, whatever failed before it, but for storage that takes no file at all.
"""

import contextlib
import hashlib
import http.client
import importlib
import os
import platform
import resource
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from elastrain import conditional, s3, storage
from elastrain.errors import ConflictError, ElastrainError, ResourceError, StorageError
from elastrain.lock import locked

GIB = 1 << 30
FILE, LARGE = 1 << 20, 12 << 20  # bytes; the large one goes in parts
RACERS = 16
SKEW_S, REFUSED_S = 60.0, 900.0  # S3 refuses signatures that are a quarter of an hour off
FILES = 4096  # open files: what a Ray node with a few workers comes to
SHM_BYTES, DISK_BYTES, LEAST_BYTES = 2 * GIB, 5 * GIB, GIB // 2
LIBRARIES = ("ray", "torch", "pyarrow", "obstore")

Check = tuple[str, str, str, int]
"""Name, `ok`, `warn` or `fail`, what was found, and the exit code that a failure stands for."""


class Doubt(Exception):  # noqa: N818 -- it fails nothing
    """What a run may get along with."""


def examine(url: str | None = None) -> dict[str, Any]:
    """Try this machine and, where there is a URL, the storage there; return `ok`, `checks` and `exit_code`.

    The storage is left as it was found. Raises StorageError if there is a secret in the URL.
    """
    url = None if url is None else storage.absolute(url)
    found = [_tried(name, look) for name, look in _machine()]
    if url is not None:
        found += _storage(url)
    codes = [code for _, state, _, code in found if state == "fail"]
    checks = [{"name": name, "state": state, "found": text} for name, state, text, _ in found]
    return {"ok": not codes, "storage": url, "checks": checks, "exit_code": next(iter(codes), 0)}


def examine_cluster(address: str | None = None) -> dict[str, Any]:
    """Try how closed the running cluster at `address` (HOST:PORT, auto) is; return what `examine` does.

    Raises SpecError for an address of another form, ResourceError if no Ray answers there that lets us in.
    """
    from elastrain.cluster.security import findings  # noqa: PLC0415 -- Ray, which is to be tried by whoever has a storage

    checks = [{"name": name, "state": state, "found": text} for name, state, text in findings(address)]
    ok = all(check["state"] != "fail" for check in checks)
    return {"ok": ok, "storage": None, "checks": checks, "exit_code": 0 if ok else ResourceError.exit_code}


def as_text(found: dict[str, Any]) -> str:
    """Return the checks as a table for people."""
    rows = [(check["state"], check["name"], check["found"]) for check in found["checks"]]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{state:<{widths[0]}}  {name:<{widths[1]}}  {text}" for state, name, text in rows)


def failure(found: dict[str, Any]) -> ElastrainError | None:
    """Return the error that the first failed check stands for, None if all went well."""
    failed = [check["name"] for check in found["checks"] if check["state"] == "fail"]
    if not failed:
        return None
    kind = {error.exit_code: error for error in (StorageError, ResourceError)}[found["exit_code"]]
    return kind(f"{len(failed)} of {len(found['checks'])} checks failed ({', '.join(failed)}): see the table")


def _tried(name: str, look: Callable[[], str]) -> Check:
    try:
        return name, "ok", look(), 0
    except Doubt as error:
        return name, "warn", str(error), 0
    except ElastrainError as error:
        code = error.exit_code if isinstance(error, ResourceError) else StorageError.exit_code
        return name, "fail", str(error), code
    except OSError as error:
        return name, "fail", f"{error}; see to that first", StorageError.exit_code


# --- the machine


def _machine() -> Iterator[tuple[str, Callable[[], str]]]:
    yield "python", lambda: f"{platform.python_version()} on {platform.system()} {platform.release()}"
    for name in LIBRARIES:
        yield name, lambda name=name: _library(name)  # type: ignore[misc] # mypy knows no default of a lambda
    yield "cpus", _cpus
    yield "open files", _open_files
    yield "shared memory", lambda: _shared_memory("/dev/shm")  # noqa: S108 -- where Ray's object store lies
    yield "disk", lambda: _disk(tempfile.gettempdir())


def _library(name: str) -> str:
    try:
        version = str(importlib.import_module(name).__version__)
    except Exception as error:  # noqa: BLE001 -- a broken installation may raise anything
        raise ResourceError(
            f"cannot be imported ({error!r:.200}); install Elastrain anew with its constraints"
        ) from None
    if name != "torch":
        return version
    import torch  # noqa: PLC0415 -- loaded by now

    return f"{version}, {torch.cuda.device_count()} GPUs"


def _cpus() -> str:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{len(os.sched_getaffinity(0))} for this process; {free / GIB:.1f} of {total / GIB:.1f} GiB memory are free"


def _open_files() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "any number" if hard == resource.RLIM_INFINITY else str(hard)
    if hard != resource.RLIM_INFINITY and hard < FILES:
        raise Doubt(f"at most {most}: few for a Ray node; raise it with `ulimit -Hn 65536`")
    return f"{soft}, and {most} if asked for"


def _shared_memory(path: str) -> str:
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        raise Doubt(f"not there ({error.strerror}): Ray puts its object store on the disk, which is slow") from None
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free"
    if usage.free < SHM_BYTES:
        raise Doubt(f"{text}: Ray puts a larger object store on the disk; give a container more by --shm-size")
    return text


def _disk(path: str) -> str:
    usage = shutil.disk_usage(path)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free in {path}"
    if usage.free < LEAST_BYTES:
        raise ResourceError(f"{text}: no room for a run; free some")
    if usage.free < DISK_BYTES:
        raise Doubt(f"{text}: little for what Ray spills and for checkpoints on their way")
    return text


# --- the storage


def _storage(url: str) -> list[Check]:
    found = [_tried("clock", _clock)] if s3.is_s3(url) else []
    was_there = storage.is_local(url) and storage.local_path(url).exists()
    folder = storage.join(url, f".doctor-{secrets.token_hex(6)}")
    data = secrets.token_bytes(FILE)
    try:
        found.append(_tried("put", lambda: _put(folder, data)))
        if found[-1][1] == "ok":
            found += [_tried(name, look) for name, look in _looks(url, folder, data)]
    finally:
        if found and found[-1][0] != "put":
            found.append(_tried("remove", lambda: _removed(folder)))
        if storage.is_local(url) and not was_there:
            with contextlib.suppress(OSError):  # somebody else has written there meanwhile, or nobody could
                storage.local_path(url).rmdir()
    return found


def _looks(url: str, folder: str, data: bytes) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "get", lambda: _get(folder, data)
    yield "range", lambda: _range(folder, data)
    yield "list", lambda: _list(folder)
    yield "large file", lambda: _large(folder)
    if s3.is_s3(url):
        yield "create-only", lambda: _create_only(folder)
        yield "compare-and-swap", lambda: _compare_and_swap(folder)
    else:
        yield "lock", lambda: _lock(folder)
    if storage.is_local(url):
        yield "disk there", lambda: _disk(str(storage.local_path(url)))


def _clock() -> str:
    """Compare our clock with what the server says in any answer of its, which takes no credentials."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    where = urlsplit(s3.endpoint() or f"https://s3.{region}.amazonaws.com")
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    connection = kind(where.netloc, timeout=5)
    try:
        before = time.time()
        connection.request("HEAD", "/")
        said = connection.getresponse().getheader("Date")
        here = (before + time.time()) / 2
    except (OSError, http.client.HTTPException) as error:
        raise StorageError(f"no answer from {where.netloc} ({error}); check AWS_ENDPOINT_URL") from None
    finally:
        connection.close()
    if said is None:
        raise Doubt(f"{where.netloc} does not say its time; compare the clocks yourself")
    ahead = here - parsedate_to_datetime(said).timestamp() - 0.5  # it counts whole seconds
    text = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} {where.netloc}"
    if abs(ahead) > REFUSED_S:
        raise StorageError(f"{text}, which refuses all requests for that: set the clock, by NTP for instance")
    if abs(ahead) > SKEW_S:
        raise Doubt(f"{text}: set the clock; from 15 minutes on requests are refused")
    return text


def _put(folder: str, data: bytes) -> str:
    start = time.perf_counter()
    storage.put(storage.join(folder, "file"), data)
    return f"{FILE >> 20} MiB in {1000 * (time.perf_counter() - start):.0f} ms"


def _get(folder: str, data: bytes) -> str:
    start = time.perf_counter()
    back = storage.read_bytes(storage.join(folder, "file"))
    _same("what was put", back, data)
    return f"the same SHA-256 in {1000 * (time.perf_counter() - start):.0f} ms"


def _range(folder: str, data: bytes) -> str:
    with storage.open_arrow(storage.join(folder, "file")) as file:
        back = bytes(file.read_at(1000, FILE // 2))
    _same("a range", back, data[FILE // 2 :][:1000])
    return "1000 bytes out of the middle"


def _list(folder: str) -> str:
    found = [(file.path, file.size_bytes) for file in storage.list_files(folder)]
    if found != [("file", FILE)]:
        raise StorageError(f"{folder}: one file was put, and {found} are listed; choose another storage")
    return "what was put, at once"


def _large(folder: str) -> str:
    data = secrets.token_bytes(LARGE)
    url = storage.join(folder, "large")
    start = time.perf_counter()
    with storage.staged(url) as temporary:
        temporary.write_bytes(data)
    written = time.perf_counter() - start
    _same("a large file", storage.read_bytes(url), data)
    parts = " in parts" if s3.is_s3(url) else ""
    return f"{LARGE >> 20} MiB{parts} at {LARGE / written / 1e6:.0f} MB/s, and the same SHA-256 back"


def _create_only(folder: str) -> str:
    """Let many write where nothing is, all at once: one may win, and nobody later."""
    url, won = storage.join(folder, "created"), []
    ready = threading.Barrier(RACERS)

    def race() -> None:
        mine = secrets.token_bytes(16)
        ready.wait()
        with contextlib.suppress(StorageError):
            if conditional.create(url, mine) is not None:
                won.append(mine)

    racers = [threading.Thread(target=race) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    if conditional.create(url, b"late") is not None:
        won.append(b"late")
    if len(won) != 1 or conditional.read(url).data != won[0]:
        raise StorageError(
            f"{len(won)} of {RACERS + 1} writers won a write that one may win: this store cannot keep two runs on one "
            f"output apart, so a run refuses it; choose another storage"
        )
    return f"1 of {RACERS + 1} writers won"


def _compare_and_swap(folder: str) -> str:
    conditional.probe(folder)
    return "a version that is no more is not replaced"


def _lock(folder: str) -> str:
    if not storage.is_local(folder):
        raise Doubt("none for this kind of URL: see to it yourself that no two commands write one output")
    with locked(folder, remedy="wait"):
        try:
            with locked(folder, remedy="wait"):
                raise StorageError(f"{folder}: two held one lock; choose a file system with flock")
        except ConflictError:
            return "the second one is refused"


def _removed(folder: str) -> str:
    if s3.is_s3(folder):
        for file in storage.list_files(folder):
            conditional.delete(storage.join(folder, file.path))  # Arrow would leave the folder above as an object
    else:
        storage.remove(folder)
    with contextlib.suppress(FileNotFoundError):
        if left := storage.list_files(folder):
            raise StorageError(f"{folder}: {len(left)} files are still there after their removal; remove them")
    return "nothing is left"


def _same(what: str, back: bytes, data: bytes) -> None:
    if hashlib.sha256(back).digest() != hashlib.sha256(data).digest():
        raise StorageError(f"{what} came back as other bytes ({len(back)} of {len(data)}); choose another storage")
