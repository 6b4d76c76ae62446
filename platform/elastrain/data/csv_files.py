"""CSV files with a header row, streamed: numbers stay scalars, the label's strings become class indices.

The first block of every file decides the types, the same for all files: integers are int64, or float64 if any file
has fractions there; true and false are uint8. Whatever does not fit later is an error that names file and value.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from elastrain import storage
from elastrain.data.chunks import Arrays, Files, PackOptions, Removed, Split, attempt, class_dtype, find, first_line
from elastrain.data.columns import Column
from elastrain.data.tables import Part, as_classes, chosen, class_names, no_numbers, rows_of, split_files
from elastrain.errors import DataError

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
BLOCK_BYTES = 4 << 20
STORED = {"int64": "int64", "double": "float64", "bool": "uint8"}


@dataclass(frozen=True)
class CsvReader:
    """Reads whole files in blocks; a chunk is a path below the root."""

    root: str
    types: Mapping[str, str]
    columns: tuple[Column, ...]
    classes: tuple[str, ...]
    part: Part

    def read(self, chunk: str) -> Iterator[Arrays | Removed]:
        """Yield the split's rows of a file; raises DataError naming file and column of what does not fit."""
        url = storage.join(self.root, chunk)
        types = {**dict.fromkeys(self.part.helpers(self.types), "string"), **self.types}

        def decode(batch: pa.RecordBatch) -> Arrays:
            return {column.name: self._column(batch, column, url) for column in self.columns}

        yield from rows_of(blocks(url, types), self.part, self.columns, decode, url=url, place=(chunk, 0))

    def _column(self, batch: pa.RecordBatch, column: Column, url: str) -> Any:
        values = batch.column(column.name)
        if self.types[column.name] == "string":
            return as_classes(values, self.classes, column, url)
        return values.to_numpy(zero_copy_only=False).astype(np.dtype(column.dtype), copy=False)


def open_csv(source: str, options: PackOptions) -> dict[str, Split]:
    """Return the splits of CSV files (also gzipped, also TSV); one file is one chunk.

    Raises DataError naming file and column if the files differ in columns or types, or hold what is no number.
    """
    files = find(source, SUFFIXES)
    types = _types(files, options)
    label = options.label if options.label is not None and types[options.label] == "string" else None
    classes: tuple[str, ...] = ()
    if label is not None:
        classes = tuple(class_names(_labels(files, label), label))
    columns = tuple(
        Column(name=name, dtype=class_dtype(len(classes)), shape=(), num_values=len(classes))
        if name == label
        else Column(name=name, dtype=STORED[kind], shape=(), num_values=2 if kind == "bool" else None)
        for name, kind in types.items()
    )
    return {
        name: Split(
            columns=columns,
            chunks=tuple(file.path for file in held.files),
            reader=CsvReader(files.root, types, columns, classes, part),
            info={"classes": {label: list(classes)}} if label is not None else {},
        )
        for name, (held, part) in split_files(source, files, options).items()
    }


def _labels(files: Files, label: str) -> Iterator[tuple[str, pa.Array]]:
    for file in files.files:
        for batch in blocks(files.url(file), {label: "string"}):
            yield files.url(file), batch.column(0)


def _types(files: Files, options: PackOptions) -> dict[str, str]:
    """Return the type of each column to pack, decided by the first blocks of all files."""
    first, *others = (files.url(file) for file in files.files)
    types = header(first)
    for other in others:
        found = header(other)
        if list(found) != list(types):
            raise DataError(
                f"{other}: columns {', '.join(found)}, but {', '.join(types)} in {first}; make them the same"
            )
        types = {name: _wider(name, types[name], kind, first, other) for name, kind in found.items()}
    wanted = {name: types[name] for name in chosen(first, types, list(types), options)}
    if not wanted:
        raise DataError(f"{first}: no columns to pack")
    if options.label is not None and types[options.label] not in STORED:
        wanted[options.label] = "string"
    for name, kind in wanted.items():
        if kind == "null":
            raise DataError(f"{first}: column {name!r} has no values; fill it, or leave it out with --columns")
        if kind not in STORED and name != options.label:
            raise no_numbers(first, name, f"{kind} values")
    return wanted


def _wider(name: str, held: str, kind: str, first: str, other: str) -> str:
    if held == kind or kind == "null":
        return held
    if held == "null" or {held, kind} == {"int64", "double"}:
        return "double" if "double" in (held, kind) else kind
    raise DataError(f"{other}: column {name!r} is {kind}, but {held} in {first}; a dataset has one type a column")


def header(url: str) -> dict[str, str]:
    """Return the type of each column, as the first block tells; raises DataError naming the file."""
    with _stream(url) as stream, _named(url):
        schema = _reader(stream, url, {}).schema
        chosen(url, {}, schema.names, PackOptions())
        return {field.name: str(field.type) for field in schema}


def blocks(url: str, types: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    """Yield the blocks of a file, with only these columns and in these types; raises DataError naming the file."""
    kinds = {name: pa.type_for_alias(kind) for name, kind in types.items()}
    with _stream(url) as stream:
        with _named(url):
            reader = _reader(stream, url, kinds)
        while True:
            with _named(url):
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    return
            yield batch


def _reader(stream: Any, url: str, types: Mapping[str, pa.DataType]) -> Any:
    return pyarrow.csv.open_csv(
        stream,
        read_options=pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(delimiter="\t" if ".tsv" in url else ",", newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict(types), include_columns=list(types)),
    )


@contextlib.contextmanager
def _stream(url: str) -> Iterator[Any]:
    with attempt(url, storage.open_arrow) as file:
        yield pa.CompressedInputStream(file, "gzip") if url.endswith(".gz") else file


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{url}: {first_line(error)} (the first {BLOCK_BYTES >> 20} MiB of each file decide a column's type)"
        ) from error
