"""Shards by ranges: from a local file, from the cache or by one request each, those of remote ones ahead of their use.

How many requests are under way is measured: as many as row groups are decoded while one request lasts, so that decoding
does not wait for the store, and not many more.
"""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from elastrain import storage
from elastrain.data.cache import Cache, key_of
from elastrain.errors import DataError

T = TypeVar("T")
Pieces = dict[int, Any]  # buffers of a file's bytes, by where they begin
HOLE_BYTES = 1 << 20  # that are fetched too rather than asked for around: what a connection brings in some 10 ms
FIRST_FETCHES, MOST_FETCHES = 8, 32
AHEAD_BYTES = 64 << 20  # of what a read task has fetched and not decoded
MEASURED = 32


class Verified(threading.local):
    """What a thread has verified of a shard, for `pyarrow.PythonFile`: nothing else can be read from it.

    One call a column chunk, while a row group is decoded: short ones.
    """

    closed = False

    def __init__(self, url: str, size_bytes: int) -> None:
        self._url, self._size, self._at = url, size_bytes, 0
        self.hold(0, b"")

    def hold(self, start: int, data: Any) -> None:
        """Let this thread read these bytes of the file, which begin at `start`."""
        self._start, self._data = start, memoryview(data)

    def size(self) -> int:
        """Return the bytes that the manifest names."""
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place."""
        self._at = offset if whence == os.SEEK_SET else _place(offset, whence, self._at, self._size)
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def read(self, size: int = -1) -> memoryview:
        """Return the next bytes; raises DataError if they are not among those that were verified."""
        first = self._at - self._start
        data = self._data[first : first + size] if first >= 0 else self._data[:0]
        if len(data) != size:
            raise DataError(
                f"{self._url}: {size} bytes at {self._at} belong to no row group that was verified; restore it"
            )
        self._at += size
        return data

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class _Hand(threading.local):
    """What a thread has fetched of the row group that it decodes: buffers by where they begin."""

    pieces: Mapping[int, Any] = MappingProxyType({})


class RangeFile:
    """A shard for `pyarrow.PythonFile`: what was fetched for the row group at hand, else what `read_at` gives.

    Threads may decode from one side by side: each sees what it holds itself.
    """

    def __init__(self, url: str, size_bytes: int, sha256: str | None, cache: Cache | None) -> None:
        self._hand = _Hand()
        self._url, self._size, self._at, self._closed = url, size_bytes, 0, False
        self._sha256, self._cache = sha256, cache
        self._opening = threading.Lock()
        self._ranges: Any = None
        self.asked: set[tuple[int, int]] = set()  # ranges

    def size(self) -> int:
        """Return the bytes that the manifest names."""
        return self._size

    def read_at(self, length: int, start: int) -> Any:
        """Return a range as a buffer, from the cache where it holds it; threads may call this side by side.

        Raises DataError if the file has not the size that the manifest names, FileNotFoundError or StorageError.
        """
        if self._cache is None or self._sha256 is None:
            return self._fetched(length, start)
        self.asked.add((start, length))
        key = key_of(self._url, self._sha256, start, length)
        return self._cache.read(key, length, lambda: self._fetched(length, start))

    def has(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Say whether the cache holds all of these ranges (start, length)."""
        if self._cache is None or self._sha256 is None:
            return False
        return all(self._cache.has(key_of(self._url, self._sha256, start, length)) for start, length in ranges)

    def forget(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Remove ranges (start, length) from the cache, and say whether any of them was there."""
        if self._cache is None or self._sha256 is None:
            return False
        dropped = [self._cache.drop(key_of(self._url, self._sha256, start, length)) for start, length in ranges]
        return any(dropped)

    def hold(self, pieces: Pieces) -> None:
        """Let this thread read from these pieces first."""
        self._hand.pieces = pieces

    def read(self, size: int = -1) -> Any:
        """Return the next bytes."""
        stop = self._size if size < 0 else min(self._size, self._at + size)
        pieces = []
        while self._at < stop:
            piece = self._from_hand(stop) or self.read_at(stop - self._at, self._at)
            pieces.append(piece)
            self._at += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place."""
        self._at = _place(offset, whence, self._at, self._size)
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def close(self) -> None:
        """Note that nobody reads it any more."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def _from_hand(self, stop: int) -> memoryview | None:
        for start, data in self._hand.pieces.items():
            if start <= self._at < start + len(data):
                return memoryview(data)[self._at - start : stop - start]
        return None

    def _fetched(self, length: int, start: int) -> Any:
        with self._opening:
            if self._ranges is None:
                opened = storage.open_ranges(self._url)
                if opened.size() != self._size:
                    raise DataError(
                        f"{self._url}: {opened.size()} bytes where {self._size} are expected: truncated or replaced; "
                        f"restore it"
                    )
                self._ranges = opened
        data = self._ranges.read_at(length, start)
        if len(data) != length:
            raise DataError(f"{self._url}: truncated or replaced while it was read; restore it")
        return data


def _place(offset: int, whence: int, at: int, size: int) -> int:
    return offset + {os.SEEK_SET: 0, os.SEEK_CUR: at, os.SEEK_END: size}[whence]


def ranges_of(group: Any, names: Sequence[str]) -> list[tuple[int, int]]:
    """Return the ranges (start, length) that hold these columns of a row group (`RowGroupMetaData`)."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(_extent(chunk) for name, chunk in _chunks(group) if name in names):
        near = bool(joined) and start - sum(joined[-1]) <= HOLE_BYTES
        first = joined.pop()[0] if near else start
        joined.append((first, stop - first))
    return joined


def range_of(group: Any) -> tuple[int, int]:
    """Return the range (start, length) of a whole row group, from its first column chunk to the end of its last."""
    starts, stops = zip(*(_extent(chunk) for _, chunk in _chunks(group)), strict=True)
    return min(starts), max(stops) - min(starts)


def _chunks(group: Any) -> Iterator[tuple[str, Any]]:
    """Yield the chunks of a row group with the names of their columns."""
    for index in range(group.num_columns):
        chunk = group.column(index)
        yield chunk.path_in_schema.partition(".")[0], chunk


def _extent(chunk: Any) -> tuple[int, int]:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


class Pace:
    """How long requests and decoding lately took, and what follows from it."""

    def __init__(self) -> None:
        self._fetch_s: deque[float] = deque(maxlen=MEASURED)
        self._decode_s: deque[float] = deque(maxlen=MEASURED)
        self._bytes: deque[int] = deque(maxlen=MEASURED)

    def fetched(self, seconds: float, size: int) -> None:
        """Note what a row group took to come."""
        self._fetch_s.append(seconds)
        self._bytes.append(size)

    def decoded(self, seconds: float) -> None:
        """Note what a row group took between its coming and the next one's being asked for."""
        self._decode_s.append(seconds)

    def fetches(self) -> int:
        """Return how many row groups should be under way.

        Of decoding the median counts, since a pause between blocks says nothing of it; of fetching the mean.
        """
        if not self._fetch_s or not self._decode_s:
            return FIRST_FETCHES
        fetch_s = sum(self._fetch_s) / len(self._fetch_s)
        decode_s = max(1e-6, sorted(self._decode_s)[len(self._decode_s) // 2])
        room = AHEAD_BYTES * len(self._bytes) // max(1, sum(self._bytes))
        return max(2, min(1 + math.ceil(fetch_s / decode_s), MOST_FETCHES, room))


_pace = Pace()  # of this process: a read task lasts too short to learn it anew


class ReadAhead(Generic[T]):
    """Fetches things in threads in the order in which they will be asked for; use it in a `with` block.

    What `is_near`, in the cache, is left to who asks for it: a thread would cost more than it brings, and read each
    into memory of its own where one who reads them all uses the same again.
    """

    def __init__(self, order: Iterable[T], fetch: Callable[[T], Pieces], is_near: Callable[[T], bool]) -> None:
        self._order, self._fetch, self._is_near = deque(order), fetch, is_near
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: deque[tuple[T, Future[Pieces] | None]] = deque()  # None: near
        self._given = 0.0

    def __enter__(self) -> "ReadAhead[T]":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def take(self, thing: T) -> Pieces:
        """Return what was fetched of a thing, those before it left out; raises what fetching it raised."""
        if self._given:
            _pace.decoded(time.monotonic() - self._given)
        coming = None
        while self._fill():
            first, fetched = self._under_way.popleft()
            if first == thing:
                coming = fetched
                break
        pieces = self._fetch(thing) if coming is None else coming.result()
        self._given = time.monotonic()
        return pieces

    def _fill(self) -> bool:
        """Start as many fetches as the pace asks for; say whether anything is to come."""
        room = _pace.fetches() - sum(coming is not None for _, coming in self._under_way)
        while self._order and room > 0:
            thing = self._order.popleft()
            self._under_way.append((thing, None if self._is_near(thing) else self._begin(thing)))
            room -= self._under_way[-1][1] is not None
        return bool(self._under_way)

    def _begin(self, thing: T) -> Future[Pieces]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(MOST_FETCHES, thread_name_prefix="ahead")
        return self._pool.submit(self._timed, thing)

    def _timed(self, thing: T) -> Pieces:
        start = time.monotonic()
        pieces = self._fetch(thing)
        _pace.fetched(time.monotonic() - start, sum(map(len, pieces.values())))
        return pieces
