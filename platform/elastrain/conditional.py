"""Writes to S3 that only one of several writers can win: create if nothing is there, replace if nobody has since.

By obstore, since Arrow has no such writes; endpoint, region and credentials are those of `s3`. What they are worth
depends on the store: some that speak S3 ignore the condition and let everybody win, which `probe` finds out.

An answer may be lost and the write tried again, which then loses against itself. So whoever loses looks at what is
there, and has won if it is what it wrote: what is written here has to be unlike what anybody else writes.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from elastrain.credentials import find_keys, for_obstore
from elastrain.errors import StorageError
from elastrain.s3 import CREDENTIALS, endpoint, place, tried

T = TypeVar("T")
CONNECT_S, ANSWER_S = 3.0, 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """An object as it was at one moment: its bytes, what tells it from other versions, when it was written.

    `written` is in seconds since 1970 by the store's clock, to a second.
    """

    data: bytes
    etag: str
    written: float


def create(url: str, data: bytes, *, patient: bool = True) -> str | None:
    """Write an object where there is none; return its ETag, None if there is one. Raises StorageError.

    Whatever may pass is tried again, as in `s3`, unless not `patient`.
    """
    return _put(url, data, "create", patient)


def replace(url: str, data: bytes, etag: str, *, patient: bool = True) -> str | None:
    """Write an object over its version `etag`; return its new ETag, None if it is another one by now, or gone.

    Raises StorageError; `patient` is as in `create`.
    """
    return _put(url, data, {"e_tag": etag}, patient)


def read(url: str, *, patient: bool = True) -> Version:
    """Return an object as it is now; raises FileNotFoundError, or StorageError; `patient` is as in `create`."""

    def once() -> Version:
        with spoken(url):
            found = store_of(url).get(key_of(url))
            data, meta = bytes(found.bytes()), found.meta
        return Version(data=data, etag=str(meta["e_tag"]), written=meta["last_modified"].timestamp())

    return _asked("read", url, once, patient)


def delete(url: str) -> None:
    """Remove an object, whatever version it is; raises StorageError."""

    def once() -> None:
        with spoken(url):
            store_of(url).delete(key_of(url))

    with contextlib.suppress(FileNotFoundError):
        tried("remove", url, once)


def probe(folder: str) -> float:
    """Return the store's time, in seconds since 1970 to a second, after a look whether it honours conditions.

    Writes a small object into the folder and removes it. Raises StorageError if the store lets everybody win.
    """
    url = f"{folder.rstrip('/')}/.probe-{secrets.token_hex(8)}"
    one, two, three = (secrets.token_bytes(16) for _ in range(3))
    try:
        first = create(url, one)
        if first is None or create(url, two) is not None:
            raise StorageError(_lax(folder, "If-None-Match"))
        second = replace(url, two, first)
        if second is None or replace(url, three, first) is not None:
            raise StorageError(_lax(folder, "If-Match"))
        return read(url).written
    except FileNotFoundError as error:
        raise StorageError(f"{folder}: what was just written is not there; choose another storage") from error
    finally:
        with contextlib.suppress(StorageError):  # what went wrong before tells more
            delete(url)


def _lax(folder: str, header: str) -> str:
    return (
        f"{folder}: the store does not honour conditional writes ({header}), so it cannot keep two writers apart; "
        f"choose another storage, or a folder of this machine"
    )


def _put(url: str, data: bytes, mode: Any, patient: bool) -> str | None:  # noqa: FBT001 -- given on by name above
    from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415 -- only runs on S3 need it

    def once() -> str | None:
        with spoken(url):
            try:
                return str(store_of(url).put(key_of(url), data, mode=mode, use_multipart=False)["e_tag"])
            except (AlreadyExistsError, PreconditionError):
                return None

    try:
        etag = _asked("write", url, once, patient)
        if etag is None:
            there = read(url, patient=patient)
            etag = there.etag if there.data == data else None
    except FileNotFoundError:  # some stores say so of a version that is gone
        return None
    return etag


def _asked(operation: str, url: str, once: Callable[[], T], patient: bool) -> T:  # noqa: FBT001 -- given on
    if patient:
        return tried(operation, url, once)
    try:
        return once()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot {operation} {url}: {error}") from None


@contextlib.contextmanager
def spoken(url: str) -> Iterator[None]:
    """Bring what obstore says into the words of Arrow's errors, which `s3` knows how to judge."""
    from obstore.exceptions import BaseError, InvalidPathError  # noqa: PLC0415 -- only runs on S3 need it

    try:
        yield
    except BaseError as error:
        text = str(error).split("\n\nDebug source", 1)[0]
        if isinstance(error, InvalidPathError):
            raise StorageError(
                f"{url}: an object below it has a name with an empty part, `.` or `..`, which cannot be listed "
                f"({text}); rename that object"
            ) from None
        status, code = re.search(r"status code: (\d+)", text), re.search(r"<Code>(\w+)</Code>", text)
        if (status and status[1] == "501") or "NotSupported" in type(error).__name__:
            raise StorageError(f"cannot write {url}: the store has no conditional writes; choose another one") from None
        # 409: somebody else writes at the same moment, and who it is will be seen the next time
        number = f" (HTTP status {status[1]})" if status and status[1] != "409" else ""
        word = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", code[1]).upper() if code else "UNKNOWN"
        if status is None:
            word = "PERMANENT_REDIRECT" if "redirect" in text else "NETWORK_CONNECTION"
        said = re.search(r"<Message>([^<]*)", text) or re.search(r" - (.*)", text)
        raise OSError(f"AWS Error {word}{number}: {said[1] if said else text}") from None


def key_of(url: str) -> str:
    """Return a URL's key in its bucket."""
    return place(url).partition("/")[2]


def store_of(url: str) -> Any:
    """Return obstore's client for a URL's bucket and the endpoint, region and credentials of now."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    bucket = place(url).partition("/")[0]
    return _client(bucket, endpoint(), region, tuple(os.environ.get(name) for name in CREDENTIALS))


@lru_cache(maxsize=4)
def _client(bucket: str, where: str, region: str, credentials: tuple[str | None, ...]) -> Any:  # noqa: ARG001 -- a key
    from obstore.store import S3Store  # noqa: PLC0415 -- only runs on S3 need it

    in_files = not os.environ.get("AWS_ACCESS_KEY_ID") and find_keys() is not None  # where obstore does not look
    own: dict[str, Any] = {"credential_provider": for_obstore} if in_files else {}
    return S3Store(
        bucket,
        config={"region": region, "conditional_put": "etag", **({"endpoint": where} if where else {})},
        client_options={
            "allow_http": where.startswith("http://"),  # `endpoint` has refused what is not allowed
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "timeout": timedelta(seconds=ANSWER_S),
        },
        retry_config={"max_retries": 0},  # `s3` tries again, and says so
        **own,
    )
