"""Documents of text: whole files, lines, what blank lines separate, or a column of texts, in chunks of bounded size.

Where a document begins in its file decides its split: it stays there when others are added behind it.
"""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from elastrain import storage
from elastrain.data import csv_files
from elastrain.data.chunks import Files, PackOptions, Removed, attempt, find, first_line, named_splits, read_range
from elastrain.data.chunks import grouped as in_runs
from elastrain.data.dataset import read_footer
from elastrain.data.parquet_files import batches_of, is_text, schema_of
from elastrain.data.tables import Part, split_files
from elastrain.errors import DataError

TEST_FRACTION = 0.1
CHUNK_BYTES = 4 << 20  # about two seconds of one core
DOCUMENT_BYTES = 16 << 20  # a document is held in memory, as words many times its size
LOOK_BYTES = 64 << 10
AT_ONCE = 1024  # rows
SEPARATORS = {"line": re.compile(rb"\n"), "blank": re.compile(rb"\n(?:[ \t\r]*\n)+")}
BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = tuple(f"{name}{end}" for name in (".jsonl", ".ndjson") for end in ("", *COMPRESSED))
LEFT_OUT = ("", "duplicates", "near-duplicates")  # what a chunk's marks stand for
Found = tuple[list[int], list[bytes | None]]  # where documents begin, and their bytes


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes [start, stop) of a file, or row groups [start, stop) of a Parquet file, whose first row is `first`."""

    path: str
    start: int
    stop: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Stretches that are read together; `marks` says of each document why it is left out, None if none is."""

    stretches: tuple[Stretch, ...]
    marks: bytes | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """The bytes of a document, None where a row has none, and where it begins: the byte or row of its file."""

    url: str
    place: str
    data: bytes | None


@dataclass(frozen=True)
class Documents:
    """Reads the documents of a split; `how` is what `--documents` says. Picklable."""

    root: str
    how: str
    part: Part

    def read(self, chunk: Chunk) -> Iterator[Document | Removed]:
        """Yield the documents that the split takes and nothing leaves out, and at the end how many were removed.

        Raises DataError naming the file if it cannot be read, lacks a value, or changed since it was looked at.
        """
        removed: dict[str, Removed] = {}
        number = 0
        for document in self._all(chunk):
            step = self._fault(document)
            if not step:
                if chunk.marks is not None and number == len(chunk.marks):
                    raise self._changed()
                step = "" if chunk.marks is None else LEFT_OUT[chunk.marks[number]]
                number += 1
            if not step:
                yield document
                continue
            before = removed.get(step)
            first = f"{document.url}, {document.place}" if before is None else before.first
            removed[step] = Removed(step, 1 if before is None else before.rows + 1, first)
        if chunk.marks is not None and number != len(chunk.marks):
            raise self._changed()
        yield from removed.values()

    def _changed(self) -> DataError:
        return DataError(f"{self.root}: the files changed while they were packed; pack when they do not")

    def _fault(self, document: Document) -> str:
        if document.data is None:
            if self.part.nulls == "error":
                raise DataError(
                    f"{document.url}: column {self.column!r} has no value in {document.place}; correct it, or leave "
                    f"such rows out with --nulls drop"
                )
            return "nulls"
        return "" if document.data.strip() else "empty"

    @property
    def column(self) -> str:
        """The column that holds the texts; empty if they are not in a column."""
        return self.how.partition(":")[2]

    def _all(self, chunk: Chunk) -> Iterator[Document]:
        for stretch in chunk.stretches:
            url = storage.join(self.root, stretch.path)
            unit = "row" if self.column and not stretch.path.endswith(JSON_LINES) else "byte"
            for places, found in self._found(url, stretch):
                mine = self.part.takes(None, stretch.path, np.array(places, np.int64))
                for place in np.flatnonzero(mine).tolist():
                    yield Document(url, f"{unit} {places[place]}", found[place])

    def _found(self, url: str, stretch: Stretch) -> Iterator[Found]:
        if self.how == "file":
            yield [0], [read_range(url, 0, stretch.stop)]
        elif not self.column:
            yield _between(read_range(url, stretch.start, stretch.stop), self.how, stretch.start)
        elif stretch.path.endswith(JSON_LINES):
            for places, lines in _json_lines(url, stretch):
                yield (
                    places,
                    [_member(line or b"", self.column, url, at) for at, line in zip(places, lines, strict=True)],
                )
        else:
            yield from self._rows(url, stretch)

    def _rows(self, url: str, stretch: Stretch) -> Iterator[Found]:
        first = stretch.first
        if stretch.path.endswith(csv_files.SUFFIXES):
            batches = csv_files.blocks(url, {self.column: "string"})
        else:
            batches = batches_of(url, range(stretch.start, stretch.stop), [self.column], AT_ONCE)
        for batch in batches:
            texts = batch.column(0).cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
            yield list(range(first, first + len(texts))), texts
            first += len(texts)


def find_documents(source: str, options: PackOptions) -> dict[str, tuple[Documents, tuple[Chunk, ...]]]:
    """Return what reads the documents of each split of `source`, and the chunks to read.

    Raises DataError naming a file if nothing separates its documents, or it has no such column of texts.
    """
    how = options.prepare.documents or "file"
    suffixes = ("",) if ":" not in how else (".parquet", *csv_files.SUFFIXES, *JSON_LINES)
    files = find(source, suffixes)
    if options.test_fraction is None and options.prepare.split is None and named_splits(files, options) is None:
        options = replace(options, test_fraction=TEST_FRACTION)
    stretches = {file.path: list(_stretches(files.url(file), file, how)) for file in files.files}
    return {
        name: (Documents(files.root, how, part), _chunks(held, stretches))
        for name, (held, part) in split_files(source, files, options).items()
    }


def _chunks(files: Files, stretches: dict[str, list[tuple[Stretch, int]]]) -> tuple[Chunk, ...]:
    weighed = [item for file in files.files for item in stretches[file.path]]
    runs = in_runs(weighed, lambda item: item[1], CHUNK_BYTES)
    return tuple(Chunk(tuple(stretch for stretch, _ in run)) for run in runs)


def _stretches(url: str, file: storage.FileInfo, how: str) -> Iterator[tuple[Stretch, int]]:
    """Yield the stretches of a file, and how many bytes each has."""
    column, size = how.partition(":")[2], file.size_bytes
    whole = Stretch(file.path, 0, size), size
    if column:
        yield from _of_column(url, file, column, whole)
    elif file.path.endswith(tuple(COMPRESSED)):
        raise DataError(f"{url}: the file is compressed; unpack it first")
    elif how != "file":
        yield from _cut(url, file, SEPARATORS[how])
    elif size > DOCUMENT_BYTES:
        raise _endless(url)
    else:
        yield whole


def _of_column(
    url: str, file: storage.FileInfo, column: str, whole: tuple[Stretch, int]
) -> Iterator[tuple[Stretch, int]]:
    if file.path.endswith(".parquet"):
        yield from _row_groups(url, file, column)
    elif file.path.endswith(csv_files.SUFFIXES):
        if column not in csv_files.header(url):
            raise DataError(f"{url}: no column {column!r}; check --documents")
        yield whole
    elif not file.path.endswith(JSON_LINES):
        raise DataError(f"{url}: a column of texts is in .parquet, .csv, .tsv and .jsonl files; choose others")
    elif file.path.endswith(tuple(COMPRESSED)):
        yield whole
    else:
        yield from _cut(url, file, SEPARATORS["line"])


def _row_groups(url: str, file: storage.FileInfo, column: str) -> Iterator[tuple[Stretch, int]]:
    schema = schema_of(url, file.size_bytes)
    if column not in schema.names or not is_text(schema.field(column).type):
        raise DataError(f"{url}: no column {column!r} of texts; the file has {', '.join(schema.names)}")
    footer, _ = read_footer(url, file.size_bytes)
    first = 0
    for group in range(footer.num_row_groups):
        held = footer.row_group(group)
        yield Stretch(file.path, group, group + 1, first), held.total_byte_size
        first += held.num_rows


def _cut(url: str, file: storage.FileInfo, separator: re.Pattern[bytes]) -> Iterator[tuple[Stretch, int]]:
    """Yield stretches of about `CHUNK_BYTES` that end where a document does."""
    start = 0
    while start < file.size_bytes:
        stop = start + CHUNK_BYTES
        stop = _end_after(url, stop, file.size_bytes, separator) if stop < file.size_bytes else file.size_bytes
        yield Stretch(file.path, start, stop), stop - start
        start = stop


def _end_after(url: str, place: int, size: int, separator: re.Pattern[bytes]) -> int:
    look = LOOK_BYTES
    while True:
        found = separator.search(read_range(url, place, min(place + look, size)))
        if found:
            return place + found.end()
        if place + look >= size:
            return size
        if look >= DOCUMENT_BYTES:
            raise _endless(url)
        look *= 4


def _endless(url: str) -> DataError:
    return DataError(
        f"{url}: a document has over {DOCUMENT_BYTES >> 20} MiB, which has to fit in memory; cut the file, or choose "
        f"--documents blank or line"
    )


def _between(data: bytes, how: str, first: int) -> Found:
    """Return what separators leave of bytes that begin at byte `first` of a file; blank lines are no documents."""
    ends = [(found.start(), found.end()) for found in SEPARATORS[how].finditer(data)]
    places: list[int] = []
    texts: list[bytes | None] = []
    begin = 0
    for end, after in [*ends, (len(data), len(data))]:
        blank = BLANK_LINES.match(data, begin, end)
        begin = blank.end() if blank else begin
        text = data[begin:end].rstrip(b"\r\n")
        if text.strip():
            places.append(first + begin)
            texts.append(text)
        begin = after
    return places, texts


def _json_lines(url: str, stretch: Stretch) -> Iterator[Found]:
    end = next((end for end in COMPRESSED if stretch.path.endswith(end)), None)
    if end is None:
        yield _between(read_range(url, stretch.start, stretch.stop), "line", stretch.start)
        return
    with attempt(url, storage.open_arrow) as file, contextlib.ExitStack() as stack:
        try:
            lines = stack.enter_context(io.BufferedReader(pa.CompressedInputStream(file, COMPRESSED[end])))
            first = 0
            while block := b"".join(lines.readlines(CHUNK_BYTES)):
                yield _between(block, "line", first)
                first += len(block)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise DataError(f"{url}: cannot be read ({first_line(error)}); restore it, or leave it out") from error


def _member(line: bytes, name: str, url: str, place: int) -> bytes | None:
    """Return a member of a JSON object as UTF-8; None where it is null or not there."""
    try:
        held: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{url}: byte {place} begins no JSON ({first_line(error)}); correct the line") from error
    text = held.get(name) if isinstance(held, dict) else held
    if text is not None and not isinstance(text, str):
        raise DataError(f"{url}: {name!r} at byte {place} is no text; choose another with --documents column:NAME")
    return None if text is None else text.encode("utf-8", "replace")
