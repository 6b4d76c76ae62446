"""Plain Parquet files as a dataset: columns, shards and fingerprint from their footers, which must fit together."""

import contextlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastrain import storage
from elastrain.data.chunks import first_line
from elastrain.data.columns import describe, describe_image, describe_values
from elastrain.data.dataset import MANIFEST, PACKING, Column, Shard, fingerprint, read_footer
from elastrain.data.lakes import find_table
from elastrain.errors import DataError
from elastrain.urls import table_kind

FIRST_SHARD = re.compile(r"/part-00000(-[0-9a-f]+)?\.parquet$")
PARQUET = (".parquet", ".pq")
FOOTER_READERS = 8
PAGE_HEADER = 32  # bytes of a page's header that hold its first fields
CONTINUED, INTEGER = (
    0x80,
    b"\x15",
)  # of Thrift's compact form: a byte that is not a number's last, the next field is one


def read_footers(url: str, *, on_bad_shard: str = "error") -> dict[str, Any]:
    """Return the fields of the `Dataset` that a folder of plain Parquet files is, or a single file.

    With "quarantine" files whose footer cannot be read are left out, unless none is left.
    Raises DataError if there are none, or they do not fit together; StorageError if storage does not answer.
    """
    root, listed = _parquet_files(url)
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        read = list(pool.map(lambda file: _footer(root, file), listed))
    errors = [(file, found) for file, found in zip(listed, read, strict=True) if isinstance(found, DataError)]
    if errors and (on_bad_shard != "quarantine" or len(errors) == len(listed)):
        raise errors[0][1]
    files = [file for file, found in zip(listed, read, strict=True) if not isinstance(found, DataError)]
    footers = [found for found in read if not isinstance(found, DataError)]
    schema = footers[0][0].schema.to_arrow_schema()
    for file, (metadata, _) in zip(files, footers, strict=True):
        same_schema(schema, metadata.schema.to_arrow_schema(), f"{root}/{files[0].path}", f"{root}/{file.path}")
    shards = tuple(
        Shard(
            path=file.path,
            size_bytes=file.size_bytes,
            row_groups=tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)),
            footer=footer,
        )
        for file, (metadata, footer) in zip(files, footers, strict=True)
    )
    columns, unusable = _describe(root, files, schema, [metadata for metadata, _ in footers])
    if sum(sum(shard.row_groups) for shard in shards) == 0:
        raise DataError(f"{url}: the Parquet files hold no rows")
    return {
        "url": root,
        "columns": columns,
        "shards": shards,
        "fingerprint": fingerprint(columns, shards),
        "packed": False,
        "unusable": unusable,
        "verified": _has_checksums(root, files, [metadata for metadata, _ in footers]),
        "broken": tuple({"file": file.path, "rows": 0, "why": str(error)} for file, error in errors),
    }


def _footer(root: str, file: storage.FileInfo) -> tuple[pq.FileMetaData, str] | DataError:
    """Return a file's metadata and the hash of its footer, or what is wrong with them; raises DataError if it is gone.

    It is read once more if it is bad: what the network did to it may pass.
    """
    url = storage.join(root, file.path)
    try:
        return read_footer(url, file.size_bytes)
    except DataError:
        if not storage.exists(url):
            raise
    try:
        return read_footer(url, file.size_bytes)
    except DataError as error:
        return error


def _has_checksums(root: str, files: Sequence[storage.FileInfo], footers: Sequence[pq.FileMetaData]) -> bool:
    """Say whether the first page of the first file with rows has a checksum, which no footer tells."""
    filled = next(i for i, footer in enumerate(footers) if footer.num_rows)
    chunk = footers[filled].row_group(0).column(0)
    offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
    where = storage.join(root, files[filled].path)
    try:
        with storage.open_arrow(where) as source:
            return has_checksum(bytes(source.read_at(PAGE_HEADER, min(offset for offset in offsets if offset))))
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({first_line(error)}); restore it, or leave it out") from error


def has_checksum(header: bytes) -> bool:
    """Say whether the header of a Parquet page holds a CRC: in Thrift's compact form, the field after three integers.

    >>> has_checksum(bytes([21, 0, 21, 0x90, 3, 21, 20, 21, 7])), has_checksum(bytes([21, 0, 21, 2, 21, 2, 44]))
    (True, False)
    """
    at = 0
    for _ in range(3):  # type, size, compressed size
        at = next((i for i in range(at + 1, len(header)) if header[i] < CONTINUED), len(header)) + 1
    return header[at : at + 1] == INTEGER


def _parquet_files(url: str) -> tuple[str, list[storage.FileInfo]]:
    """Return the folder and the Parquet files in it; a single file counts as a folder of one, so does a table."""
    if table_kind(url):
        table = find_table(url)
        return table.root, list(table.files)
    if storage.is_local(url) and storage.local_path(url).is_file():
        path = storage.local_path(url)
        if path.suffix not in PARQUET:
            raise DataError(f"{url}: not a Parquet file; make a dataset with `elastrain pack SOURCE OUT`")
        return str(path.parent), [storage.FileInfo(path=path.name, size_bytes=path.stat().st_size)]
    try:
        files = storage.list_files(url, suffix=PARQUET)
    except FileNotFoundError as error:
        raise DataError(
            f"{url}: no such dataset; check the path, or make it with `elastrain pack SOURCE OUT`"
        ) from error
    if not files:
        raise DataError(f"{url}: no Parquet files in this folder; make a dataset with `elastrain pack SOURCE OUT`")
    _refuse_splits(url, files)
    return url, files


def _refuse_splits(url: str, files: Sequence[storage.FileInfo]) -> None:
    """Raise DataError if packed datasets lie below `url`: it would mix what is trained on with what is held out."""
    folders = [file.path.rpartition("/")[0] for file in files if FIRST_SHARD.search(file.path)]
    packed = [
        folder
        for folder in folders
        if any(storage.exists(storage.join(url, folder, name)) for name in (MANIFEST, PACKING))
    ]
    if packed:
        one = next((folder for folder in packed if folder.endswith("train")), packed[0])
        raise DataError(f"{url} holds the splits {', '.join(packed)}: give {storage.join(url, one)}")


def same_schema(first: pa.Schema, other: pa.Schema, first_url: str, url: str) -> None:
    """Raise DataError, naming both files and the column, if two files do not hold the same columns."""
    if first.equals(other, check_metadata=True):
        return
    held, given = _kinds(first), _kinds(other)
    for name in {**held, **given}:
        if held.get(name) != given.get(name):
            raise DataError(
                f"{url}: column {name!r} is {given.get(name, 'missing')}, but {held.get(name, 'missing')} in "
                f"{first_url}; a dataset has one schema: rewrite or leave out the file"
            )


def _kinds(schema: pa.Schema) -> dict[str, Any]:
    """Return what each column holds: what differs whenever columns do not fit together, and has words for it."""
    found: dict[str, Any] = {item.name: item.type for item in schema}
    for item in schema:
        with contextlib.suppress(DataError):  # a column that cannot be read is an error only where it is wanted
            column = describe(item)
            if column is not None and column.shape:
                found[item.name] = f"{column.dtype} {list(column.shape)}"
    return found


def _describe(
    root: str, files: list[storage.FileInfo], schema: pa.Schema, footers: list[pq.FileMetaData]
) -> tuple[tuple[Column, ...], dict[str, str]]:
    """Return the readable columns of plain Parquet files and, for the others, why not."""
    columns, unusable = [], {}
    filled = next((i for i, footer in enumerate(footers) if footer.num_rows), 0)
    where = storage.join(root, files[filled].path)
    with storage.open_arrow(where) as source:
        file = pq.ParquetFile(source, metadata=footers[filled])
        for item in schema:
            try:
                sample = _sample(file, item.name, where)
                column = describe_values(item, sample, where=where)
                if column.dtype == "image":
                    column = describe_image(column, sample, where=where)
                columns.append(
                    replace(column, num_values=column.num_values or _num_values(item.name, column.dtype, footers))
                )
            except DataError as error:
                unusable[item.name] = str(error)
    return tuple(columns), unusable


def _sample(file: pq.ParquetFile, name: str, where: str) -> pa.ChunkedArray:
    try:
        for batch in file.iter_batches(batch_size=64, columns=[name]):
            if batch.num_rows:
                return pa.Table.from_batches([batch]).column(0)
    except (pa.ArrowException, OSError, IndexError) as error:
        raise DataError(f"{where}: column {name!r} cannot be read ({first_line(error)})") from error
    return pa.chunked_array([], file.schema_arrow.field(name).type)


def _num_values(name: str, dtype: str, footers: list[pq.FileMetaData]) -> int | None:
    """Return 1 + the largest value of an integer column from the footers' statistics, None where they do not tell."""
    if not np.issubdtype(np.dtype(dtype), np.integer):
        return None
    index = next((i for i in range(footers[0].num_columns) if footers[0].schema.column(i).path == name), None)
    if index is None:
        return None
    chunks = (footer.row_group(g).column(index) for footer in footers for g in range(footer.num_row_groups))
    limits = [
        (c.statistics.min, c.statistics.max) if c.statistics and c.statistics.has_min_max else None for c in chunks
    ]
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits) or not known or not isinstance(known[0][0], int) or min(low for low, _ in known) < 0:
        return None
    return int(max(high for _, high in known)) + 1
