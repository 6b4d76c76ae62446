"""Rows in, proven Parquet shards out: exact row groups and shards, whatever pieces the rows come in.

A shard is written beside its place, hashed, read back with page checksums verified, and then appears at once. Proving
one shard overlaps with writing the next, so that at most two shards are under way. No Ray here.

An encrypted shard is another one each time, since its keys are random. So the same shard without encryption is written
as well, into a hash: by that the dataset has the fingerprint that it would have without encryption.
"""

import contextlib
import errno
import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from elastrain import storage
from elastrain.data.chunks import Arrays, PackOptions, first_line
from elastrain.data.columns import Column, encode, from_table
from elastrain.data.dataset import Shard, read_footer
from elastrain.data.parquet_encryption import decryption, encryption_of
from elastrain.data.remote import range_of
from elastrain.data.statistics import Sums
from elastrain.errors import DataError, StorageError

PAGE_BYTES = 1 << 20


class HashOnly(io.RawIOBase):
    """A file of which nothing is kept but the hash."""

    def __init__(self) -> None:
        self._hash, self._size = hashlib.sha256(), 0

    def writable(self) -> bool:
        """Say that it is one to write to."""
        return True

    def write(self, data: Any) -> int:
        """Take the next bytes into account."""
        self._hash.update(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        """Return how many bytes have been written."""
        return self._size

    def hexdigest(self) -> str:
        """Return the hash of what was written."""
        return self._hash.hexdigest()


@dataclass
class OpenShard:
    """A shard that is being written: where it will appear, where it is now, and the rows of its row groups.

    `plain` is what it would be without encryption; None where it has none.
    """

    path: str
    url: str
    temporary: Path
    writers: list[Any]
    stack: contextlib.ExitStack
    plain: HashOnly | None
    groups: list[int] = field(default_factory=list)

    def close(self) -> None:
        """End the file; raises OSError or ArrowException."""
        for writer in self.writers:
            writer.close()


class ShardWriter:
    """Cuts rows into row groups and shards below `url`; use it in a `with` block and call `finish` at its end.

    Names of shards end in `mark`; before each one is proven and appears, `check` may raise.
    """

    def __init__(
        self,
        url: str,
        columns: Sequence[Column],
        options: PackOptions,
        *,
        mark: str = "",
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.url, self.columns, self.options, self.mark, self.check = url, tuple(columns), options, mark, check
        row_bytes = sum(column.row_bytes for column in columns)
        self.group_rows = max(1, options.row_group_bytes // row_bytes)
        self.shard_groups = max(1, options.shard_bytes // (self.group_rows * row_bytes))
        self.schema = pa.schema([encode(np.empty((0, *c.shape), c.dtype), c)[0] for c in columns])
        self.rows = 0
        self._pieces: deque[Arrays] = deque()
        self._waiting = 0
        self._open: OpenShard | None = None
        self._count = 0
        self._sums = [Sums(column) for column in columns]
        self._shards: list[Shard] = []
        self._proof: Future[Shard] | None = None
        self._prover = ThreadPoolExecutor(1, thread_name_prefix="prove")

    def write(self, arrays: Arrays) -> None:
        """Take rows; raises DataError if they are not of the columns promised, StorageError if writing fails."""
        for column in self.columns:
            array = arrays[column.name]
            if array.dtype != column.dtype or array.shape[1:] != column.shape:
                given = f"{array.dtype} {list(array.shape[1:])}"
                raise DataError(
                    f"{self.url}: column {column.name!r} gives {given} where {column.dtype} {list(column.shape)} "
                    f"began; a column has one type and shape"
                )
        rows = len(arrays[self.columns[0].name])
        if rows:
            self._pieces.append(arrays)
        self.rows += rows
        self._waiting += rows
        while self._waiting >= self.group_rows:
            self._write_group(self.group_rows)

    def finish(self) -> tuple[tuple[Shard, ...], tuple[Column, ...]]:
        """Write what is left; return all shards and the columns with their statistics. Raises StorageError."""
        if self._waiting:
            self._write_group(self._waiting)
        self._end_shard()
        self._settle()
        return tuple(self._shards), tuple(sums.result() for sums in self._sums)

    def sums(self) -> tuple[Sums, ...]:
        """Return what is known of each column, once all is written."""
        return tuple(self._sums)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prover.shutdown(wait=True)
        if self._open is not None:
            with contextlib.suppress(OSError, pa.ArrowException):
                self._open.close()
            # An error inside the stack is what makes `staged` remove the file instead of showing it.
            with contextlib.suppress(_Abandoned), self._open.stack:
                raise _Abandoned

    def _write_group(self, rows: int) -> None:
        arrays = self._take(rows)
        encoded = [encode(arrays[column.name], column)[1] for column in self.columns]
        shard = self._open or self._new_shard()
        table = pa.table(encoded, schema=self.schema)
        with named_write(shard.url):
            for writer in shard.writers:
                writer.write_table(table, row_group_size=rows)
        shard.groups.append(rows)
        if len(shard.groups) == self.shard_groups:
            self._end_shard()

    def _take(self, rows: int) -> Arrays:
        taken: list[Arrays] = []
        self._waiting -= rows
        while rows:
            piece = self._pieces.popleft()
            held = len(piece[self.columns[0].name])
            if held > rows:
                self._pieces.appendleft({name: array[rows:] for name, array in piece.items()})
                piece = {name: array[:rows] for name, array in piece.items()}
            taken.append(piece)
            rows -= min(held, rows)
        return {c.name: np.concatenate([piece[c.name] for piece in taken]) for c in self.columns}

    def _new_shard(self) -> OpenShard:
        path = f"part-{self._count:05}{self.mark}.parquet"
        self._count += 1
        url = storage.join(self.url, path)
        stack = contextlib.ExitStack()
        temporary = stack.enter_context(storage.staged(url))
        with named_write(url):
            key = self.options.encrypt
            plain = None if key is None else HashOnly()
            writers = [self._writer(temporary, None if key is None else encryption_of(key))]
            writers += [self._writer(plain, None)] if plain is not None else []
        self._open = OpenShard(path, url, temporary, writers, stack, plain)
        return self._open

    def _writer(self, target: Path | HashOnly, encryption: Any) -> Any:
        return pq.ParquetWriter(
            target,
            self.schema,
            compression=self.options.codec,
            use_dictionary=False,
            write_statistics=[c.name for c in self.columns if not c.shape],
            write_page_checksum=True,
            data_page_size=PAGE_BYTES,
            store_schema=True,
            encryption_properties=encryption,
        )

    def _end_shard(self) -> None:
        if self._open is None:
            return
        self._settle()
        self.check()
        with named_write(self._open.url):
            self._open.close()
        self._proof = self._prover.submit(prove, self._open, self._sums)
        self._open = None

    def _settle(self) -> None:
        if self._proof is not None:
            self._shards.append(self._proof.result())
            self._proof = None


def prove(shard: OpenShard, sums: Sequence[Sums]) -> Shard:
    """Hash a written shard, read it back with its page checksums, add up its statistics, and let it appear.

    What is hashed before it is checked cannot have been corrupted in between and yet be called good.
    Raises StorageError if what was written cannot be read back; then nothing appears.
    """
    with shard.stack:
        try:
            xxh3 = None if shard.plain is not None else group_hashes(shard.temporary)
            for arrays in read_back(shard.temporary, encrypted=shard.plain is not None):
                for column in sums:
                    column.add(arrays[column.column.name])
            with shard.temporary.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = shard.temporary.stat().st_size
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"{shard.url}: what was just written cannot be read back ({first_line(error)}); check the disk"
            ) from error
    _, footer = read_footer(shard.url, size, encrypted=shard.plain is not None)
    return Shard(
        path=shard.path,
        size_bytes=size,
        row_groups=tuple(shard.groups),
        footer=footer,
        sha256=sha256,
        content=None if shard.plain is None else shard.plain.hexdigest(),
        xxh3=xxh3,
    )


def group_hashes(path: Path) -> str:
    """Return the hashes of a file's row groups as `Shard.xxh3` holds them."""
    metadata = pq.read_metadata(path)
    ranges = (range_of(metadata.row_group(group)) for group in range(metadata.num_row_groups))
    with pa.OSFile(str(path)) as file:
        return "".join(xxhash.xxh3_64_hexdigest(file.read_at(length, start)) for start, length in ranges)


def read_back(path: Path, *, encrypted: bool = False) -> Iterator[Arrays]:
    """Yield the row groups of a packed shard with page checksums verified; raises OSError where one is wrong."""
    keys = decryption() if encrypted else None
    with pq.ParquetFile(path, page_checksum_verification=True, decryption_properties=keys) as file:
        for group in range(file.num_row_groups):
            yield from_table(file.read_row_group(group, use_threads=False), where=str(path))


@contextlib.contextmanager
def named_write(url: str) -> Iterator[None]:
    """Turn an error of the Parquet writer into a sentence that names the shard and the remedy."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full: free space or choose another place" if full else first_line(error)
        raise StorageError(f"cannot write {url}: {why}") from error


class _Abandoned(Exception):  # noqa: N818 -- an event, not a fault
    """The pack ended before the open shard was whole."""
