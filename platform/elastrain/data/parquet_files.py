"""Parquet files of any layout (scalars, lists, fixed-size lists, Arrow and Ray tensors, images) as packed tensors.

The first file decides the schema, and all others must agree. Strings become class indices in the label's column. Arrow
streams are read alike.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastrain import storage
from elastrain.data.chunks import (
    CHUNK_BYTES,
    PIECE_BYTES,
    Arrays,
    Files,
    PackOptions,
    Removed,
    Split,
    attempt,
    class_dtype,
    find,
    first_line,
    grouped,
)
from elastrain.data.columns import Array, Column, decode, describe_values
from elastrain.data.dataset import read_footer
from elastrain.data.footers import FOOTER_READERS, PARQUET, same_schema
from elastrain.data.images import decode_image
from elastrain.data.tables import Part, as_classes, chosen, class_names, no_numbers, null_rows, rows_of, split_files
from elastrain.errors import DataError

SAMPLED = 64
ARROW = ".arrow"


@dataclass(frozen=True, slots=True)
class Groups:
    """Row groups [start, stop) of a file; `first` is the row of the file that they begin with."""

    path: str
    start: int
    stop: int
    first: int


@dataclass(frozen=True, slots=True)
class Held:
    """A column: what it becomes, and whether its values are encoded images or strings to be made so."""

    column: Column
    kind: str = "numbers"  # or images, classes


@dataclass(frozen=True)
class ParquetReader:
    """Reads row groups with their page checksums verified; a chunk is a `Groups`."""

    root: str
    held: tuple[Held, ...]
    classes: tuple[str, ...]
    image_size: int | None
    part: Part

    def read(self, chunk: Groups) -> Iterator[Arrays | Removed]:
        """Yield the split's rows; raises DataError naming file and column of what is broken or does not fit."""
        url = storage.join(self.root, chunk.path)
        columns = [held.column for held in self.held]
        names = [column.name for column in columns]
        rows = max(1, PIECE_BYTES // sum(column.row_bytes for column in columns))
        batches = batches_of(url, range(chunk.start, chunk.stop), [*names, *self.part.helpers(names)], rows)

        def decode(batch: pa.RecordBatch) -> Arrays:
            return {held.column.name: self._column(batch, held, url) for held in self.held}

        yield from rows_of(batches, self.part, columns, decode, url=url, place=(chunk.path, chunk.first))

    def _column(self, batch: pa.RecordBatch, held: Held, url: str) -> Array:
        values, column = batch.column(held.column.name), held.column
        if held.kind == "classes":
            return as_classes(values, self.classes, column, url)
        if held.kind == "images":
            encoded = _encoded(values, column.name, url)
            where = f"{url}: column {column.name!r}"
            return np.stack([decode_image(v.as_py(), column.shape, self.image_size, where) for v in encoded])
        array = decode(pa.chunked_array([values]), column, where=url)
        return array.astype(column.dtype, copy=False)


def open_parquet(source: str, options: PackOptions) -> dict[str, Split]:
    """Return the splits of Parquet files; a chunk is a run of row groups.

    Raises DataError naming file and column if one cannot be read, or the files do not fit together.
    """
    return open_files(source, find(source, PARQUET), options)


def open_files(source: str, files: Files, options: PackOptions) -> dict[str, Split]:
    """Return the splits of these Parquet files; raises as `open_parquet` does."""
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        layouts = list(pool.map(lambda file: _layout(files.url(file), file.size_bytes), files.files))
    schemas = [schema for schema, _ in layouts]
    for file, schema in zip(files.files, schemas, strict=True):
        same_schema(schemas[0], schema, files.url(files.files[0]), files.url(file))
    filled = next((place for place, (_, rows) in enumerate(layouts) if sum(rows)), None)
    if filled is None:
        raise DataError(f"{source}: the files hold no rows")
    where = files.url(files.files[filled])
    kinds = {field.name: str(field.type) for field in schemas[0]}
    names = chosen(where, kinds, schemas[0].names, options)
    held, classes = _held(files, where, schemas[filled], names, options)
    groups = {file.path: rows for file, (_, rows) in zip(files.files, layouts, strict=True)}
    row_bytes = sum(item.column.row_bytes for item in held)
    return {
        name: Split(
            columns=tuple(item.column for item in held),
            chunks=tuple(chunk for file in part.files for chunk in _chunks(file.path, groups[file.path], row_bytes)),
            reader=ParquetReader(files.root, held, tuple(classes), options.image_size, rows),
            rows=sum(sum(groups[file.path]) for file in part.files)
            if rows.is_whole and not options.prepare.removes
            else None,
            info={"classes": {options.label: classes}} if classes else {},
        )
        for name, (part, rows) in split_files(source, files, options).items()
    }


def schema_of(url: str, size_bytes: int) -> pa.Schema:
    """Return the schema of a Parquet file or Arrow stream; raises DataError naming it if it cannot be read."""
    return _layout(url, size_bytes)[0]


def _layout(url: str, size_bytes: int) -> tuple[pa.Schema, list[int]]:
    """Return a file's schema and the rows of its row groups; an Arrow stream, which is read in one go, is one group."""
    if url.endswith(ARROW):
        with _stream(url) as stream:
            return stream.schema, [sum(batch.num_rows for batch in stream)]
    footer, _ = read_footer(url, size_bytes)
    return footer.schema.to_arrow_schema(), [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]


def _chunks(path: str, groups: Sequence[int], row_bytes: int) -> Iterator[Groups]:
    starts = np.cumsum([0, *groups]).tolist()
    for run in grouped(range(len(groups)), lambda group: groups[group] * row_bytes, CHUNK_BYTES):
        yield Groups(path, run[0], run[-1] + 1, starts[run[0]])


def _held(
    files: Files, where: str, schema: pa.Schema, names: Sequence[str], options: PackOptions
) -> tuple[tuple[Held, ...], list[str]]:
    """Return how each column is read, and the classes if the label's column holds strings."""
    held, classes = [], []
    batch = next(iter(batches_of(where, None, names, SAMPLED)))
    for name in names:
        field = schema.field(name)
        if name == options.label and is_text(field.type):
            classes = class_names(_labels(files, name), name)
            dtype = class_dtype(len(classes))
            held.append(Held(Column(name=name, dtype=dtype, shape=(), num_values=len(classes)), "classes"))
        else:
            values = batch.column(name)  # without nulls, which are refused or removed where rows are read
            held.append(_described(where, field, values.filter(pa.array(~null_rows(values))), options.image_size))
    return tuple(held), classes


def _described(where: str, field: pa.Field, values: pa.Array, image_size: int | None) -> Held:
    if _is_image(field.type):
        field = pa.field(field.name, pa.binary())
        values = _encoded(values, field.name, where)
    elif pa.types.is_struct(field.type) or is_text(field.type):
        raise no_numbers(where, field.name, str(field.type))
    try:
        column = describe_values(field, pa.chunked_array([values]), where=where)
    except DataError:
        if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
            raise
        raise no_numbers(where, field.name, str(field.type)) from None
    if column.dtype != "image":
        return Held(replace(column, dtype="uint8", num_values=2) if column.dtype == "bool" else column)
    images = [decode_image(v.as_py(), None, image_size, f"{where}: column {field.name!r}") for v in values]
    grey = all(image.ndim == 2 for image in images)
    shape = images[0].shape[:2] if grey else (*images[0].shape[:2], 3)
    return Held(Column(name=field.name, dtype="uint8", shape=shape), "images")


def _encoded(values: pa.Array, name: str, where: str) -> pa.Array:
    """Return encoded images, also those that Hugging Face's datasets keep as {bytes, path}."""
    if pa.types.is_struct(values.type):
        values = values.field("bytes")
    if values.null_count:
        raise DataError(f"{where}: column {name!r} has {values.null_count} rows without an image; drop them first")
    return values


def _is_image(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def is_text(kind: pa.DataType) -> bool:
    """Say whether a type holds texts."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _labels(files: Files, label: str) -> Iterator[tuple[str, pa.Array]]:
    for file in files.files:
        for batch in batches_of(files.url(file), None, [label], 65536):
            yield files.url(file), batch.column(0).cast(pa.string())


@contextmanager
def _stream(url: str) -> Iterator[pa.RecordBatchReader]:
    """Yield an Arrow stream; raises DataError naming the file if it is broken."""
    with attempt(url, storage.open_arrow) as source:
        try:
            with pa.ipc.open_stream(source) as stream:
                yield stream
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{url}: cannot be read ({first_line(error)}); restore it, or leave it out") from error


def batches_of(url: str, groups: range | None, names: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield up to `rows` rows at a time of row groups, None: all; raises DataError naming a file that is broken."""
    if url.endswith(ARROW):
        with _stream(url) as stream:
            for batch in stream:
                kept = batch.select(list(names))
                yield from (kept.slice(first, rows) for first in range(0, kept.num_rows, rows))
        return
    with attempt(url, storage.open_arrow) as source:
        try:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            kept = list(range(file.num_row_groups) if groups is None else groups)
            yield from file.iter_batches(rows, row_groups=kept, columns=list(names), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{url}: cannot be read ({first_line(error)}); restore it, or leave it out") from error
