"""Rows that are there twice: 128-bit hashes of all rows, sorted on disk a part at a time; the first of equals stays.

```
hashes of pieces, in order ─► 256 files by the first byte ─► each sorted ─► a bit for each row that is not the first
```
Memory holds one file at a time: a 256th of the rows, 32 bytes each, and three times that while it is sorted. The disk
holds 32 bytes a row, in files without a name: nothing is left of them after a kill. No Ray here.
"""

import contextlib
import hashlib
import heapq
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from elastrain.data.chunks import Arrays, Reader, Removed
from elastrain.data.columns import Array
from elastrain.errors import DataError, StorageError

KEY = "\0key"  # the column of pieces that holds the hash of `--key`; no source has one of that name
HASH, LABEL = "hash", "label"
HASH_BYTES = 16
BUFFER_BYTES = 64 << 10  # of each part's file
COUNTED_AT_ONCE = 1 << 20
SHOWN = 20  # contradictions that are listed
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("label", "<i8"), ("row", "<i8")])
Words = npt.NDArray[np.uint64]


def hashes_of(rows: Iterable[Any]) -> bytes:
    """Return the hashes of byte strings, one after the other: BLAKE2b of 128 bits; nobody can make two alike."""
    return b"".join(hashlib.blake2b(row, digest_size=HASH_BYTES).digest() for row in rows)


def as_words(hashes: bytes) -> Words:
    """Return hashes as an array of shape (rows, 2).

    >>> as_words(hashes_of([b"a", b"b"])).shape
    (2, 2)
    """
    return np.frombuffer(hashes, "<u8").reshape(-1, 2)


@dataclass(frozen=True)
class HashReader:
    """Reads what `reader` reads, and yields hashes and labels in place of the rows.

    The hash is of the columns `names`, or what `--key` gave; `label` is None where no column is one.
    """

    reader: Reader
    names: tuple[str, ...]
    label: str | None

    def read(self, chunk: Any) -> Iterator[Arrays | Removed]:
        """Yield `hash` of shape (rows, 2) and `label` for each piece; raises what the reader raises."""
        for arrays in self.reader.read(chunk):
            if isinstance(arrays, Removed):
                continue
            rows = len(next(iter(arrays.values())))
            if not rows:
                continue
            label = np.zeros(rows, np.int64) if self.label is None else arrays[self.label].astype(np.int64)
            hashes = arrays[KEY] if KEY in arrays else as_words(hashes_of(_rows(arrays, self.names)))
            yield {HASH: hashes, LABEL: label}


def _rows(arrays: Mapping[str, Array], names: Sequence[str]) -> Iterator[memoryview]:
    """Yield the bytes of each row, all columns one after the other; their widths are fixed, so none runs over."""
    parts = [np.ascontiguousarray(arrays[name]).reshape(len(arrays[name]), -1).view(np.uint8) for name in names]
    joined = np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))
    view, width = memoryview(joined.reshape(-1).data), joined.shape[1]
    return (view[start : start + width] for start in range(0, joined.size, width))


class Parts:
    """Records on disk, in files by the first bits of a hash: what has the same hash is in the same file.

    The files have no name, so that nothing of them is left when the process is killed. Use it in a `with` block.
    """

    def __init__(self, kind: "np.dtype[Any]", *, bits: int = 8) -> None:
        self.kind, self.bits = kind, bits
        self._files: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            close(file)

    def add(self, records: npt.NDArray[Any], hashes: npt.NDArray[np.uint64]) -> None:
        """Append each record to the file of its hash; raises OSError."""
        if not self._files:
            self._files = [unnamed_file() for _ in range(1 << self.bits)]
        part = (hashes >> np.uint64(64 - self.bits)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        starts = np.searchsorted(part[order], np.arange(len(self._files) + 1))
        records = records[order]
        for place in np.flatnonzero(np.diff(starts)).tolist():
            self._files[place].write(records[starts[place] : starts[place + 1]].data)

    def taken(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the records of each file in the order they came in, and remove it; raises OSError."""
        for file in self._files:
            file.seek(0)  # which writes what is in the buffer
            yield np.fromfile(file, self.kind)
            file.close()


def unnamed_file() -> Any:
    """Return a new file to write and read, in the folder that TMPDIR names, which its closing removes."""
    return tempfile.TemporaryFile(buffering=BUFFER_BYTES)


def close(file: Any) -> None:
    """Close a file of which nothing is needed any more: a full disk refuses what is in buffers, and was told of."""
    with contextlib.suppress(OSError):
        file.close()


class RowHashes:
    """Takes the hashes of all rows in order, then knows which are there twice; use it in a `with` block.

    `by_key` is whether hashes are of a key: then labels do not make rows different.
    """

    def __init__(self, *, by_key: bool) -> None:
        self.by_key = by_key
        self.rows = self.duplicates = self.num_contradictions = 0
        self.contradictions: list[dict[str, list[int]]] = []
        self._stack = contextlib.ExitStack()
        self._twice: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def __enter__(self) -> Self:
        self._parts = self._stack.enter_context(Parts(RECORD))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, arrays: Arrays) -> None:
        """Take the next rows, as `HashReader` yields them; raises StorageError if the disk is full."""
        records = np.empty(len(arrays[HASH]), RECORD)
        records["high"], records["low"] = arrays[HASH].T
        records["label"] = arrays[LABEL]
        records["row"] = np.arange(self.rows, self.rows + len(records))
        self.rows += len(records)
        with disk_named("the hashes of the rows", "32 bytes a row"):
            self._parts.add(records, records["high"])

    def finish(self) -> None:
        """Find what is there twice; raises StorageError if the disk is full."""
        with disk_named("the hashes of the rows", "32 bytes a row"):
            file = unnamed_file()
            self._stack.callback(close, file)
            self._twice = np.memmap(file, np.uint8, "w+", shape=(self.rows // 8 + 1,))
            for records in self._parts.taken():
                self._look_through(records)
        self.contradictions.sort(key=lambda found: found["rows"])

    def _look_through(self, records: npt.NDArray[Any]) -> None:
        """Note in one part the rows that are not the first of equals, and rows that differ in nothing but the label."""
        fields = ("row", "low", "high") if self.by_key else ("row", "label", "low", "high")
        records = records[np.lexsort([records[name] for name in fields])]
        same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
        other = records["label"][1:] != records["label"][:-1]
        rows = records["row"][1:][same if self.by_key else same & ~other]
        np.bitwise_or.at(self._twice, rows >> 3, (1 << (rows & 7)).astype(np.uint8))
        self.duplicates += len(rows)
        if not self.by_key:
            self._contradict(records, same, other)

    def _contradict(self, records: npt.NDArray[Any], same: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> None:
        """Note the first rows, by row number, whose inputs have more than one label."""
        group = np.concatenate([[0], np.cumsum(~same)])
        places = np.flatnonzero(same & other) + 1
        ids, firsts = np.unique(group[places], return_index=True)
        self.num_contradictions += len(ids)
        found = []
        for begin, second in zip(np.searchsorted(group, ids).tolist(), places[firsts].tolist(), strict=True):
            pair = sorted((int(records["row"][at]), int(records["label"][at])) for at in (begin, second))
            found.append({"rows": [row for row, _ in pair], "labels": [label for _, label in pair]})
        self.contradictions = heapq.nsmallest(SHOWN, [*self.contradictions, *found], key=lambda pair: pair["rows"])

    def count(self, first: int, stop: int) -> int:
        """Return how many of the rows [first, stop) are not the first of equals."""
        steps = range(first, stop, COUNTED_AT_ONCE)
        return sum(int(self.twice(at, min(COUNTED_AT_ONCE, stop - at)).sum()) for at in steps)

    def twice(self, first: int, rows: int) -> npt.NDArray[np.bool_]:
        """Say which of the rows [first, first + rows) are not the first of equals.

        Raises DataError if there were fewer rows when they were hashed.
        """
        if first + rows > self.rows:
            raise DataError("the source has more rows than a moment ago: its files change; pack when they do not")
        bits = np.unpackbits(self._twice[first // 8 : (first + rows) // 8 + 1], bitorder="little")
        return bits[first % 8 : first % 8 + rows].astype(np.bool_)

    def are_twice(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Say which of these rows, in any order, are not the first of equals."""
        found: npt.NDArray[np.bool_] = (self._twice[rows >> 3] >> (rows & 7) & 1).astype(np.bool_)
        return found


@contextlib.contextmanager
def disk_named(what: str, size: str) -> Iterator[None]:
    """Turn an error of the disk into a sentence that tells what is kept there, and how large it is."""
    try:
        yield
    except OSError as error:
        place = tempfile.gettempdir()
        raise StorageError(
            f"cannot keep {what} in {place} ({error.strerror}): {size}; free space there, or "
            f"choose another place with TMPDIR"
        ) from error
