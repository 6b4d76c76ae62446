"""Rows out of Parquet: only the row groups that hold them, each read once, verified, in the order asked for.

Each time that a row group is read, its bytes are verified: by the hash that the dataset noted, where all of them are
read; else by page checksums, where the file has them, or the tags of pages that are encrypted. pyarrow computes those
checksums slowly, and is told not to where the hash was right. The footer is held against the hash that the dataset
noted. Open files are kept by the process, so that a footer is read once a process. Of remote files, row groups come
ahead of their use; what the cache holds is verified like all else, and read from storage if it is not good.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from elastrain import storage
from elastrain.data.cache import Cache
from elastrain.data.columns import Array, Column, decode, describe
from elastrain.data.dataset import Dataset, read_footer
from elastrain.data.plan import Ints
from elastrain.data.remote import Pieces, RangeFile, ReadAhead, Verified, range_of, ranges_of
from elastrain.errors import DataError

OPEN_FILES = 64
REMOTE_FILES = 1024  # of which only the footer is held


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One row group: its file with size and hashes, the group in it, its rows and hash; the cache if it is remote."""

    url: str
    size_bytes: int
    footer: str
    sha256: str | None
    group: int
    first_row: int
    num_rows: int
    xxh3: str | None = None
    cache: Cache | None = None
    encrypted: bool = False


def sources_of(dataset: Dataset, groups: Ints, cache: Cache | None = None) -> list[Source]:
    """Return where these row groups of a dataset lie, in the order of their rows."""
    starts = np.cumsum(dataset.group_rows) - dataset.group_rows
    found = []
    for group in np.unique(groups).tolist():
        index, inner = dataset.group_address(group)
        shard = dataset.shards[index]
        url = storage.join(dataset.url, shard.path)
        found.append(
            Source(
                url=url,
                size_bytes=shard.size_bytes,
                footer=shard.footer,
                sha256=shard.sha256,
                group=inner,
                first_row=int(starts[group]),
                num_rows=int(dataset.group_rows[group]),
                xxh3=shard.group_hash(inner),
                cache=None if storage.is_local(url) else cache,
                encrypted=dataset.key is not None,
            )
        )
    return found


def read_ahead(columns: Sequence[Column], sources: Sequence[Source]) -> ReadAhead[Source]:
    """Return what fetches the remote ones of these row groups, in this order, before `read_rows` comes to them."""
    names = tuple(column.name for column in columns)
    remote = [source for source in sources if not storage.is_local(source.url)]

    def is_near(source: Source) -> bool:
        opened = _remote.get(_file_of(source))  # to open one takes requests
        return opened is not None and opened.file.has(opened.wanted(source.group, names)[0])

    return ReadAhead(remote, lambda source: _fetched(_opened(source), source, names), is_near)


def read_rows(
    columns: Sequence[Column], sources: Sequence[Source], rows: Ints, ahead: ReadAhead[Source] | None = None
) -> dict[str, Array]:
    """Return the named columns of dataset rows `rows`, in that order: arrays of shape (len(rows), *shape).

    Raises DataError, naming the file, for whatever is missing, corrupted or of another shape than the manifest says;
    StorageError if the rows are encrypted and the key is not there.
    """
    order = np.argsort(rows)
    ascending = rows[order]
    result: dict[str, Array] = {}
    for source in sources:
        low, high = np.searchsorted(ascending, [source.first_row, source.first_row + source.num_rows])
        if low == high:
            continue
        offsets = ascending[low:high] - source.first_row
        for name, values in read_group(columns, source, ahead=ahead).items():
            if name not in result:
                result[name] = np.empty((len(rows), *values.shape[1:]), values.dtype)
            _scatter(result[name], order[low:high], values, offsets)
    return result


def read_first(dataset: Dataset, most: int) -> dict[str, Array]:
    """Return the first rows of a dataset, at most `most` of them; raises DataError as `read_rows` does."""
    source = sources_of(dataset, np.flatnonzero(dataset.group_rows)[:1])[0]
    return read_group(dataset.columns, source, most=most)


def read_group(
    columns: Sequence[Column], source: Source, *, most: int | None = None, ahead: ReadAhead[Source] | None = None
) -> dict[str, Array]:
    """Return a whole row group, or its first `most` rows; what comes from the cache and is no good is read once more.

    Raises DataError, naming the file, if it is not what the manifest says.
    """
    names = tuple(column.name for column in columns)
    try:
        return _read(columns, source, most, ahead)
    except DataError as error:
        if not _forget(source, names):
            raise
        logging.getLogger(__name__).warning("%s; this was the cached copy, now it is read from storage", error)
    try:
        return _read(columns, source, most, None)
    except DataError:
        _forget(source, names)
        raise


def _read(
    columns: Sequence[Column], source: Source, most: int | None, ahead: ReadAhead[Source] | None
) -> dict[str, Array]:
    names = tuple(column.name for column in columns)
    try:
        opened = _opened(source)
        table = _decoded(opened, source, names, most, ahead)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{source.url}: row group {source.group} cannot be read ({_reason(error)}); "
            f"restore the file, or pack the data again"
        ) from error
    where = f"{source.url} row group {source.group}"
    expected = source.num_rows if most is None else min(most, source.num_rows)
    if table.num_rows != expected:
        raise DataError(f"{where}: {table.num_rows} rows where the manifest says {expected}; restore the file")
    opened.check_kinds(tuple(columns), where)
    return {column.name: decode(table.column(column.name), column, where=where) for column in columns}


def _decoded(
    opened: "Opened", source: Source, names: tuple[str, ...], most: int | None, ahead: ReadAhead[Source] | None
) -> pa.Table:
    """Return the columns of a row group, decoded without page checksums where its hash was right."""
    remote = not storage.is_local(source.url)
    hashed = opened.is_hashed(source, names)
    pieces: Pieces = {}  # of a local file that has no hashes, pyarrow reads one column after the other
    if remote or hashed:
        pieces = ahead.take(source) if remote and ahead is not None else _fetched(opened, source, names)
    if hashed:
        ((start, data),) = pieces.items()
        opened.verified.hold(start, data)
    else:
        opened.file.hold(pieces)
    try:
        return _table(opened.trusting if hashed else opened.verifying, source, names, most)
    finally:
        opened.verified.hold(0, b"")
        opened.file.hold({})


def _table(file: pq.ParquetFile, source: Source, names: tuple[str, ...], most: int | None) -> pa.Table:
    if most is None:
        return file.read_row_group(source.group, columns=list(names), use_threads=False)
    batches = file.iter_batches(most, row_groups=[source.group], columns=list(names), use_threads=False)
    return pa.Table.from_batches([next(batches)])


def _fetched(opened: "Opened", source: Source, names: tuple[str, ...]) -> Pieces:
    """Return the bytes of a row group, their hash verified if it is known; threads may call this side by side."""
    ranges, _ = opened.wanted(source.group, names)
    pieces = {start: opened.file.read_at(length, start) for start, length in ranges}
    if opened.is_hashed(source, names) and xxhash.xxh3_64_hexdigest(pieces[ranges[0][0]]) != source.xxh3:
        raise DataError(
            f"{source.url}: row group {source.group} cannot be read (hash mismatch: the file is corrupted); "
            f"restore the file, or pack the data again"
        )
    return pieces


def _forget(source: Source, names: tuple[str, ...]) -> bool:
    """Open a file anew; say whether the row group was in the cache, from which it is removed."""
    if storage.is_local(source.url):
        _open_local.cache_clear()
        return False
    opened = _opened(source)
    cached = opened.file.forget(opened.wanted(source.group, names)[0])
    _remote.clear()
    return cached


def forget_files() -> None:
    """Close the files that are kept open, so that they are looked at anew."""
    _open_local.cache_clear()
    _remote.clear()


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A file that this process has opened: its bytes, and what decodes them with page checksums verified or without.

    What is found out about it is kept: `known` ranges, and `kinds` of columns that are in it.
    """

    file: RangeFile
    verified: Verified
    verifying: pq.ParquetFile
    trusting: pq.ParquetFile
    known: dict[tuple[int, tuple[str, ...]], tuple[list[tuple[int, int]], bool]] = field(default_factory=dict)
    kinds: set[tuple[Column, ...]] = field(default_factory=set)

    def wanted(self, group: int, names: tuple[str, ...]) -> tuple[list[tuple[int, int]], bool]:
        """Return the ranges that hold these columns of a row group, and whether they are the whole row group."""
        key = (group, names)
        if key not in self.known:
            held = self.verifying.metadata.row_group(group)
            ranges = ranges_of(held, names)
            self.known[key] = ranges, ranges == [range_of(held)]
        return self.known[key]

    def is_hashed(self, source: Source, names: tuple[str, ...]) -> bool:
        """Say whether a hash is known that covers the bytes that these columns of a row group need, and no others."""
        return source.xxh3 is not None and self.wanted(source.group, names)[1]

    def check_kinds(self, columns: tuple[Column, ...], where: str) -> None:
        """Raise DataError if a column of the dataset is missing or another one here."""
        if columns not in self.kinds:
            for column in columns:
                _check_kind(self.verifying.schema_arrow, column, where)
            self.kinds.add(columns)


def _check_kind(schema: pa.Schema, column: Column, where: str) -> None:
    """Raise DataError if a file's column is missing or another than the dataset's."""
    if column.name not in schema.names:
        raise DataError(f"{where}: no column {column.name!r}; it has {', '.join(schema.names)}")
    held = describe(schema.field(column.name))
    if held is not None and (held.dtype, held.shape) != (column.dtype, column.shape):
        raise DataError(
            f"{where}: column {column.name!r} holds {held.dtype}{list(held.shape)}, where the dataset has "
            f"{column.dtype}{list(column.shape)}; restore the file, or pack the data again"
        )


def _opened(source: Source) -> Opened:
    """Return a file, opened once a process; threads may call this side by side."""
    file = _file_of(source)
    with _turn(source.url):
        if storage.is_local(source.url):
            return _open_local(*file)
        if file not in _remote:
            if len(_remote) >= REMOTE_FILES:
                _remote.clear()
            _remote[file] = _open(*file)
        return _remote[file]


def _file_of(source: Source) -> tuple[str, int, str, str | None, Cache | None, bool]:
    """Return what tells a file from others, as `_open` takes it."""
    return source.url, source.size_bytes, source.footer, source.sha256, source.cache, source.encrypted


@lru_cache(maxsize=REMOTE_FILES)
def _turn(url: str) -> threading.Lock:  # noqa: ARG001 -- one for each
    return threading.Lock()


def _open(
    url: str,
    size_bytes: int,
    footer: str,
    sha256: str | None,
    cache: Cache | None,
    encrypted: bool,  # noqa: FBT001 -- as `_file_of` gives it
) -> Opened:
    file = RangeFile(url, size_bytes, sha256, cache)
    try:
        metadata, _ = read_footer(url, size_bytes, file, expected=footer, encrypted=encrypted)
    except DataError:
        if not file.forget(file.asked):
            raise
        metadata, _ = read_footer(url, size_bytes, file, expected=footer, encrypted=encrypted)
    straight = storage.open_arrow(url) if storage.is_local(url) else pa.PythonFile(file, mode="r")
    verified = Verified(url, size_bytes)
    return Opened(
        file=file,
        verified=verified,
        verifying=_parquet(straight, metadata, encrypted=encrypted, verify=True),
        trusting=_parquet(pa.PythonFile(verified, mode="r"), metadata, encrypted=encrypted, verify=False),
    )


_open_local = lru_cache(maxsize=OPEN_FILES)(_open)
_remote: dict[tuple[Any, ...], Opened] = {}  # to be looked at without opening; emptied where it grows too large


def _parquet(file: Any, metadata: pq.FileMetaData, *, encrypted: bool, verify: bool) -> pq.ParquetFile:
    if encrypted:
        from elastrain.data.parquet_encryption import decryption  # noqa: PLC0415 -- for encrypted datasets only
    return pq.ParquetFile(
        file,
        metadata=metadata,
        decryption_properties=decryption() if encrypted else None,
        page_checksum_verification=verify and not encrypted,  # the tags of AES-GCM find more, and are looked at anyway
        pre_buffer=False,
    )


def _scatter(target: Array, places: Ints, values: Array, offsets: Ints) -> None:
    """Set target[places] = values[offsets], which ascend; a run is taken as a view, and a row moves as one item.

    A block that spans epochs may ask for a row twice and for another one not at all: as many as a run, and none.
    """
    first, last = int(offsets[0]), int(offsets[-1])
    is_run = last - first + 1 == len(offsets) and bool((np.diff(offsets) == 1).all())
    picked = values[first : last + 1] if is_run else values[offsets]
    if picked.ndim > 1 and picked.flags.c_contiguous and picked[0].nbytes:
        width = picked[0].nbytes
        target.view(np.uint8).reshape(len(target), width).view(f"V{width}")[places, 0] = (
            picked.view(np.uint8).reshape(len(picked), width).view(f"V{width}")[:, 0]
        )
    else:
        target[places] = picked


def _reason(error: BaseException) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if "Failed decryption" in text:
        return "an encrypted page or header is not the one that was written: the file is corrupted"
    return "page checksum mismatch: the file is corrupted" if "CRC checksum" in text else text[:200]
