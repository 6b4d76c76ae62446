"""Rows out of Parquet: only the row groups that hold them, each read once, verified, in the order asked for.

Page checksums are verified where the file has them, and the footer against the hash that the dataset noted. Open files
are kept by the process, so that a footer is read once a process and not once a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastrain import storage
from elastrain.data.columns import Array, Column, decode, describe
from elastrain.data.dataset import Dataset, read_footer
from elastrain.data.plan import Ints
from elastrain.errors import DataError

OPEN_FILES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One row group: the file with its size and footer hash, the group in it, and the dataset rows that it holds."""

    url: str
    size_bytes: int
    footer: str
    group: int
    first_row: int
    num_rows: int


def sources_of(dataset: Dataset, groups: Ints) -> list[Source]:
    """Return where these row groups of a dataset lie, in the order of their rows."""
    starts = np.cumsum(dataset.group_rows) - dataset.group_rows
    found = []
    for group in np.unique(groups).tolist():
        index, inner = dataset.group_address(group)
        shard = dataset.shards[index]
        found.append(
            Source(
                url=storage.join(dataset.url, shard.path),
                size_bytes=shard.size_bytes,
                footer=shard.footer,
                group=inner,
                first_row=int(starts[group]),
                num_rows=int(dataset.group_rows[group]),
            )
        )
    return found


def read_rows(columns: Sequence[Column], sources: Sequence[Source], rows: Ints) -> dict[str, Array]:
    """Return the named columns of dataset rows `rows`, in that order: arrays of shape (len(rows), *shape).

    Raises DataError, naming the file, for whatever is missing, corrupted or of another shape than the manifest says.
    """
    order = np.argsort(rows)
    ascending = rows[order]
    result: dict[str, Array] = {}
    for source in sources:
        low, high = np.searchsorted(ascending, [source.first_row, source.first_row + source.num_rows])
        if low == high:
            continue
        offsets = ascending[low:high] - source.first_row
        for name, values in read_group(columns, source).items():
            if name not in result:
                result[name] = np.empty((len(rows), *values.shape[1:]), values.dtype)
            _scatter(result[name], order[low:high], values, offsets)
    return result


def read_first(dataset: Dataset, most: int) -> dict[str, Array]:
    """Return the first rows of a dataset, at most `most` of them; raises DataError as `read_rows` does."""
    source = sources_of(dataset, np.flatnonzero(dataset.group_rows)[:1])[0]
    return read_group(dataset.columns, source, most=most)


def read_group(columns: Sequence[Column], source: Source, *, most: int | None = None) -> dict[str, Array]:
    """Return a whole row group, or its first `most` rows.

    Raises DataError, naming the file, if it is not what the manifest says.
    """
    names = [column.name for column in columns]
    try:
        file = _opened(source.url, source.size_bytes, source.footer)
        if most is None:
            table = file.read_row_group(source.group, columns=names, use_threads=False)
        else:
            batches = file.iter_batches(most, row_groups=[source.group], columns=names, use_threads=False)
            table = pa.Table.from_batches([next(batches)])
    except (pa.ArrowException, OSError) as error:
        _opened.cache_clear()
        raise DataError(
            f"{source.url}: row group {source.group} cannot be read ({_reason(error)}); "
            f"restore the file, or pack the data again"
        ) from error
    where = f"{source.url} row group {source.group}"
    expected = source.num_rows if most is None else min(most, source.num_rows)
    if table.num_rows != expected:
        raise DataError(f"{where}: {table.num_rows} rows where the manifest says {expected}; restore the file")
    for column in columns:
        _check_kind(table.schema, column, where)
    return {column.name: decode(table.column(column.name), column, where=where) for column in columns}


def forget_files() -> None:
    """Close the files that are kept open, so that they are looked at anew."""
    _opened.cache_clear()


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


@lru_cache(maxsize=OPEN_FILES)
def _opened(url: str, size_bytes: int, footer: str) -> pq.ParquetFile:
    metadata, found = read_footer(url, size_bytes)
    if found != footer:
        raise DataError(
            f"{url}: the footer is not the one that the manifest names: changed or corrupted; restore the file"
        )
    return pq.ParquetFile(storage.open_arrow(url), metadata=metadata, page_checksum_verification=True, pre_buffer=False)


def _scatter(target: Array, places: Ints, values: Array, offsets: Ints) -> None:
    """Set target[places] = values[offsets]; a run of offsets is taken as a view, and a row moves as one item."""
    first, last = int(offsets[0]), int(offsets[-1])
    picked = values[first : last + 1] if last - first + 1 == len(offsets) else values[offsets]
    if picked.ndim > 1 and picked.flags.c_contiguous and picked[0].nbytes:
        width = picked[0].nbytes
        target.view(np.uint8).reshape(len(target), width).view(f"V{width}")[places, 0] = (
            picked.view(np.uint8).reshape(len(picked), width).view(f"V{width}")[:, 0]
        )
    else:
        target[places] = picked


def _reason(error: BaseException) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return "page checksum mismatch: the file is corrupted" if "CRC checksum" in text else text[:200]
