"""Documents that say nearly the same: MinHash signatures, banded on disk; of those that are alike the first stays.

```
documents ─► shingles ─► signature ─► bands ─► 256 files by hash ─► who shares a band is compared ─► groups of alike
```
A document is the set of its runs of five words, and two are as alike as the share of what is in either set that is in
both. A signature estimates that to ±3.5 % (one standard deviation). Memory holds 8 bytes a document and one file at a
time, the disk about 800 bytes a document. No Ray here.
Sources: Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman, Ullman, "Mining of
Massive Datasets", chapter 3.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from elastrain.data.chunks import Arrays, Removed
from elastrain.data.documents import LEFT_OUT, Chunk, Documents
from elastrain.data.duplicates import (
    HASH,
    LABEL,
    Parts,
    RowHashes,
    as_words,
    close,
    disk_named,
    hashes_of,
    unnamed_file,
)
from elastrain.data.plan import mix64
from elastrain.errors import DataError

if TYPE_CHECKING:
    from datasketch import MinHash

SIGNATURE, CHUNK = "signature", "chunk"
VALUES = 128  # of a signature: 512 bytes
SHINGLE = 5  # words
SEED = 1
WEIGHTS = (0.02, 0.98)  # a pair too many is compared and rejected, a pair missed is never seen again
AT_ONCE = 1024  # documents
HASHED_AT_ONCE = 4096  # shingles; 128 hashes of each
COMPARED_AT_ONCE = 8192  # pairs
LEADERS = 16  # of what shares a band, that many are compared with the others
# A word is a run of letters and digits; Han and kana, which no space separates, are words one by one.
IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(f"[{IDEOGRAPHS}]|[^\\W{IDEOGRAPHS}]+")
RECORD = np.dtype([("band", "<u8"), ("row", "<i8")])
DISK = ("the signatures of the documents", "about 800 bytes a document")
Mask = npt.NDArray[np.bool_]


def shingles(text: str) -> npt.NDArray[np.uint64]:
    """Return the different hashes of all runs of five words of a text, of all its words if they are fewer; sorted.

    Case, punctuation and white space make no difference.
    """
    words = WORD.findall(text.lower()) or [text.strip()]
    hashes = np.array([_word_hash(word) for word in words], np.uint64)
    found = np.zeros(max(1, len(hashes) - SHINGLE + 1), np.uint64)
    for place in range(min(SHINGLE, len(hashes))):
        found = mix64(found ^ hashes[place : place + len(found)])
    return np.unique(found)


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashes_of([word.encode("utf-8", "replace")])[:8], "little")


@dataclass(frozen=True)
class SignatureReader:
    """Reads documents and yields what tells whether they are alike; `near` is whether signatures are wanted."""

    documents: Documents
    near: bool

    def read(self, numbered: tuple[int, Chunk]) -> Iterator[Arrays | Removed]:
        """Yield hash, label, number of the chunk and signature of the documents; raises what reading them raises."""
        number, chunk = numbered
        held: list[bytes] = []
        signatures: list[npt.NDArray[np.uint32]] = []
        for document in self.documents.read(chunk):
            if isinstance(document, Removed):
                continue
            data = document.data or b""
            held.append(hashes_of([data]))
            if self.near:
                signatures.append(self._signature(data.decode(errors="replace")))
            if len(held) == AT_ONCE:
                yield _piece(number, held, signatures)
                held, signatures = [], []
        if held:
            yield _piece(number, held, signatures)

    def _signature(self, text: str) -> npt.NDArray[np.uint32]:
        self._minhash.clear()
        values = (shingles(text) >> np.uint64(32)).tolist()
        for start in range(0, len(values), HASHED_AT_ONCE):
            self._minhash.update_batch(values[start : start + HASHED_AT_ONCE])
        found: npt.NDArray[np.uint32] = self._minhash.digest()
        return found

    @cached_property
    def _minhash(self) -> "MinHash":
        from datasketch import MinHash  # noqa: PLC0415 -- an extra

        return MinHash(num_perm=VALUES, seed=SEED, hashfunc=int, scheme="affine32")


def _piece(number: int, hashes: Sequence[bytes], signatures: Sequence[npt.NDArray[np.uint32]]) -> Arrays:
    words = as_words(b"".join(hashes))
    rows = len(words)
    arrays: Arrays = {HASH: words, LABEL: np.zeros(rows, np.int64), CHUNK: np.full(rows, number, np.int64)}
    return {**arrays, SIGNATURE: np.stack(signatures)} if signatures else arrays


def bands_of(near: float) -> tuple[int, int]:
    """Return how many bands a signature has, and the values of each, so that next to no pair at `near` is missed.

    Raises DataError if the `datasketch` package is missing.
    """
    try:
        from datasketch import MinHashLSH  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise DataError("--near needs the datasketch package: pip install 'elastrain[text]'") from error
    found = MinHashLSH(threshold=near, num_perm=VALUES, weights=WEIGHTS)
    return found.b, found.r


class Alike:
    """Takes what `SignatureReader` yields, in order, then knows which documents are there twice or nearly so.

    Use it in a `with` block. `near` is the least share of shingles that two have in common; None finds equals only.
    """

    def __init__(self, near: float | None) -> None:
        self.near, self.bands = near, (0, 0) if near is None else bands_of(near)
        self.near_duplicates = 0
        self._counts: dict[str, dict[int, int]] = {}
        self._starts: dict[str, int] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._hashes = self._stack.enter_context(RowHashes(by_key=True))
        self._parts = self._stack.enter_context(Parts(RECORD, bits=6))
        with disk_named(*DISK):
            self._file = unnamed_file()
        self._stack.callback(close, self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def documents(self) -> int:
        """How many documents were added."""
        return self._hashes.rows

    def add(self, split: str, arrays: Arrays) -> None:
        """Take the next documents of a split; raises StorageError if the disk is full."""
        first = self._hashes.rows
        self._starts.setdefault(split, first)
        counts = self._counts.setdefault(split, {})
        numbers, times = np.unique(arrays[CHUNK], return_counts=True)
        for number, count in zip(numbers.tolist(), times.tolist(), strict=True):
            counts[number] = counts.get(number, 0) + count
        self._hashes.add(arrays)
        if SIGNATURE in arrays:
            with disk_named(*DISK):
                self._add_signatures(arrays[SIGNATURE], first)

    def _add_signatures(self, signatures: npt.NDArray[np.uint32], first: int) -> None:
        self._file.write(np.ascontiguousarray(signatures).data)
        bands, width = self.bands
        records = np.empty((bands, len(signatures)), RECORD)
        for band in range(bands):
            hashes = np.full(len(signatures), band, np.uint64)
            for value in range(band * width, (band + 1) * width):
                hashes = mix64(hashes ^ signatures[:, value].astype(np.uint64))
            records["band"][band] = hashes
        records["row"] = np.arange(first, first + len(signatures))
        self._parts.add(records.reshape(-1), records["band"].reshape(-1))

    def finish(self) -> None:
        """Find who is alike; raises StorageError if the disk is full."""
        self._hashes.finish()
        self._first = np.arange(self.documents, dtype=np.int64)
        if self.near is None or not self.documents:
            return
        with disk_named(*DISK):
            self._file.flush()
            signatures = np.memmap(self._file, np.uint32, "r", shape=(self.documents, VALUES))
            for records in self._parts.taken():
                firsts = records[~self._hashes.are_twice(records["row"])]  # they stand for those equal to them
                for one, other in _alike(firsts, signatures, self.near):
                    self._join(one, other)
        self.near_duplicates = sum(int(self._near(at, AT_ONCE).sum()) for at in range(0, self.documents, AT_ONCE))

    def _join(self, one: int, other: int) -> None:
        """Put two documents, with all that are alike to them, into one group, whose number is that of its first."""
        low, high = sorted((self._root(one), self._root(other)))
        self._first[high] = low

    def _root(self, row: int) -> int:
        while (above := int(self._first[row])) != row:
            self._first[row] = self._first[above]
            row = above
        return row

    def _near(self, first: int, rows: int) -> Mask:
        """Say which of the documents [first, first + rows) are alike to an earlier one and equal to none."""
        numbers = np.arange(first, min(first + rows, self.documents))
        found: Mask = self._first[numbers] != numbers
        return found & ~self._hashes.twice(first, len(numbers))

    def marked(self, split: str, chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
        """Return the chunks of a split with marks of the documents to leave out: all but the first of those alike."""
        first, counts, marked = self._starts.get(split, 0), self._counts.get(split, {}), []
        for number, chunk in enumerate(chunks):
            rows = counts.get(number, 0)
            marks = np.zeros(rows, np.uint8)
            if rows:
                marks[self._near(first, rows)] = LEFT_OUT.index("near-duplicates")
                marks[self._hashes.twice(first, rows)] = LEFT_OUT.index("duplicates")
            marked.append(replace(chunk, marks=marks.tobytes()))
            first += rows
        return tuple(marked)

    def facts(self) -> dict[str, Any]:
        """Return what a card says of them, in all splits together."""
        found: dict[str, Any] = {"duplicates": self._hashes.duplicates}
        if self.near is not None:
            found |= {"near_duplicates": self.near_duplicates, "near": self.near}
        return found


def _alike(records: npt.NDArray[Any], signatures: npt.NDArray[np.uint32], near: float) -> Iterator[tuple[int, int]]:
    """Yield pairs of documents that share a band and whose signatures agree in a share `near` of their values.

    Of those that share a band the first is compared with all others, then the first of what is left, and so on.
    """
    records = records[np.lexsort([records["row"], records["band"]])]
    for _ in range(LEADERS):
        begins = np.flatnonzero(np.diff(records["band"], prepend=~records["band"][:1]) != 0)
        leaders = np.repeat(records["row"][begins], np.diff(begins, append=len(records)))
        others = np.ones(len(records), np.bool_)
        others[begins] = False
        records, leaders = records[others], leaders[others]
        if not len(records):
            return
        alike = np.empty(len(records), np.bool_)
        for at in range(0, len(records), COMPARED_AT_ONCE):
            part = slice(at, at + COMPARED_AT_ONCE)
            same = signatures[leaders[part]] == signatures[records["row"][part]]
            alike[part] = same.sum(axis=1) >= near * VALUES
        yield from zip(leaders[alike].tolist(), records["row"][alike].tolist(), strict=True)
        records = records[~alike]
