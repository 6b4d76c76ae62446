"""Iceberg tables: the Parquet files of one snapshot, read through `storage`, as no catalog is asked.

A file's columns have to be those of the snapshot, by Iceberg's field numbers and by name: after a column was renamed or
dropped in the table, old files hold it as it was, under a name that may mean another column now.
"""

import io
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import pyarrow as pa
from pyiceberg.catalog.noop import NoopCatalog
from pyiceberg.exceptions import ValidationError
from pyiceberg.io import FileIO, InputFile, InputStream, OutputFile
from pyiceberg.serializers import FromInputFile
from pyiceberg.table import StaticTable

from elastrain import storage
from elastrain.data.chunks import first_line
from elastrain.data.dataset import read_footer
from elastrain.data.lakes import PLAIN, inside
from elastrain.errors import DataError

METADATA = re.compile(r"v?(\d+)(?:-.*)?(?:\.gz)?\.metadata\.json")
HINT = "version-hint.text"
FIELD = b"PARQUET:field_id"
READERS = 8


def newest_snapshot(source: str, path: str) -> int:
    """Return the current snapshot of a table.

    Raises DataError if there is none, if nobody can tell which one it is, or if the columns were changed after it;
    StorageError if storage does not answer.
    """
    names = _metadata(source, path)
    if len(names) > 1:
        raise DataError(
            f"{source}: {' and '.join(name.rpartition('/')[2] for name in names)} are both the newest, and only the "
            f"catalog knows which one counts; name that file in place of the table's folder"
        )
    table = _opened(source, names[0])
    snapshot = table.current_snapshot()
    if snapshot is None:
        raise DataError(f"{source}: the table has no snapshot yet")
    held, now = (
        _columns(schema) for schema in (table.scan(snapshot_id=snapshot.snapshot_id).projection(), table.schema())
    )
    if held != now:
        raise DataError(
            f"{source}: its columns were changed after its newest snapshot, whose files have "
            f"{', '.join(held.values())}; write that into a new snapshot, or name it: {path}@{snapshot.snapshot_id}"
        )
    return int(snapshot.snapshot_id)


@lru_cache(maxsize=4)  # a snapshot never changes, and is asked for several times
def snapshot_files(source: str, path: str, version: int) -> tuple[str, tuple[storage.FileInfo, ...]]:
    """Return the folder of a table and the files of one snapshot, relative to it.

    Raises DataError if there is no such snapshot, or its files alone do not tell its rows; StorageError if storage does
    not answer.
    """
    tables = [_opened(source, name) for name in _metadata(source, path)]
    table = next((table for table in tables if table.snapshot_by_id(version) is not None), None)
    if table is None:
        there = ", ".join(str(snapshot.snapshot_id) for snapshot in tables[0].metadata.snapshots) or "none"
        raise DataError(f"{source}: no such snapshot; the table has {there}")
    root, scan = _plain(table.location()).rstrip("/"), table.scan(snapshot_id=version)
    try:
        files = tuple(tasks_files(source, root, scan.plan_files()))
    except FileNotFoundError as error:
        raise DataError(f"{source}: {error} is gone: the snapshot has expired; name a newer one") from error
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(f"{source}: its list of files cannot be read ({first_line(error)})") from error
    many = len({tuple(_columns(schema).items()) for schema in table.metadata.schemas}) > 1
    with ThreadPoolExecutor(READERS) as pool:
        held = pool.map(lambda file: _columns_of(storage.join(root, file.path), file.size_bytes), files)
        for file, columns in zip(files, held, strict=True):
            _refuse_others(source, storage.join(root, file.path), columns, _columns(scan.projection()), many=many)
    return root, files


def tasks_files(source: str, root: str, tasks: Any) -> Iterator[storage.FileInfo]:
    """Yield the files that a scan would read; raises DataError for those that lack rows, or lie elsewhere."""
    for task in tasks:
        if task.delete_files:
            raise DataError(f"{source}: it has rows that are deleted but still in the files; {PLAIN} them")
        if str(task.file.file_format.value).upper() != "PARQUET":
            raise DataError(f"{source}: {task.file.file_path} is no Parquet file; {PLAIN} such files")
        yield inside(source, root, _plain(task.file.file_path).removeprefix(f"{root}/"), task.file.file_size_in_bytes)


def _columns(schema: Any) -> dict[int, str]:
    return {field.field_id: field.name for field in schema.fields}


def _columns_of(url: str, size_bytes: int) -> dict[int | None, str]:
    """Return the columns of a file by their numbers; None is the number of all that have none."""
    schema: pa.Schema = read_footer(url, size_bytes)[0].schema.to_arrow_schema()
    numbers = [(field.metadata or {}).get(FIELD) for field in schema]
    if None in numbers:
        return {None: ", ".join(schema.names)}
    return {int(number): name for number, name in zip(numbers, schema.names, strict=True) if number}


def _refuse_others(
    source: str, url: str, held: Mapping[int | None, str], wanted: Mapping[int, str], *, many: bool
) -> None:
    """Raise DataError unless a file holds the columns that the snapshot says; `many` columns it has had in its life."""
    unnumbered = held.get(None)
    if unnumbered == ", ".join(wanted.values()) and not many:
        return  # of a file that was added to the table as it was
    if unnumbered is None and held == wanted:
        return
    there = unnumbered or ", ".join(held.values())
    raise DataError(
        f"{source}: {url} has other columns ({there}) than the snapshot ({', '.join(wanted.values())}): they were "
        f"renamed, added or dropped in the table only; rewrite its files, or {PLAIN} them"
    )


def _metadata(source: str, path: str) -> list[str]:
    """Return the newest metadata files of a table, several if nobody can tell which; `path` may be one itself."""
    if path.endswith(".metadata.json"):
        return [path]
    folder = storage.join(path, "metadata")
    try:
        names = [file.path for file in storage.list_files(folder, suffix=".metadata.json") if "/" not in file.path]
    except FileNotFoundError:
        names = []
    numbered = {name: int(match[1]) for name in names if (match := METADATA.fullmatch(name))}
    if not numbered:
        raise DataError(f"{source}: no Iceberg table there (no metadata/*.metadata.json); check the path")
    newest = _hinted(folder, set(numbered.values())) or max(numbered.values())
    return [storage.join(folder, name) for name in sorted(numbered) if numbered[name] == newest]


def _hinted(folder: str, numbers: set[int]) -> int | None:
    """Return which number counts where the table says so: it has no catalog then, and others were never committed."""
    try:
        said = storage.read_bytes(storage.join(folder, HINT)).decode().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return int(said) if said.isdecimal() and int(said) in numbers else None


@lru_cache(maxsize=4)  # the newest snapshot and its files are asked for one after the other
def _opened(source: str, metadata: str) -> StaticTable:
    files = _Files()
    try:
        held = FromInputFile.table_metadata(files.new_input(metadata))
    except FileNotFoundError as error:
        raise DataError(f"{source}: no Iceberg table there ({metadata} is missing); check the path") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: {metadata} cannot be read ({first_line(error)})") from error
    name = ("table", metadata)
    return StaticTable(name, metadata=held, metadata_location=metadata, io=files, catalog=NoopCatalog("none"))


def _plain(location: str) -> str:
    """Return a location in metadata as `storage` has it: Spark writes s3a and s3n for what is s3."""
    return re.sub(r"^s3[an]://", "s3://", location.removeprefix("file://"))


class _Files(FileIO):
    """The files of a table by way of `storage`: its endpoint, credentials, patience and errors."""

    def new_input(self, location: str) -> InputFile:
        """Return a file to read."""
        return _Input(location)

    def new_output(self, location: str) -> OutputFile:
        """Refuse: nothing is written to others' tables."""
        raise NotImplementedError(location)

    def delete(self, location: str | InputFile | OutputFile) -> None:
        """Refuse: nothing is removed from others' tables."""
        raise NotImplementedError(location)


class _Input(InputFile):
    """A file of metadata, read whole: the largest have some MB."""

    def __len__(self) -> int:
        return len(self._bytes())

    def exists(self) -> bool:
        """Say whether it is there."""
        return storage.exists(_plain(self.location))

    def open(self, seekable: bool = True) -> InputStream:  # noqa: ARG002, FBT001, FBT002 -- as pyiceberg has it
        """Return its bytes as a stream."""
        return io.BytesIO(self._bytes())

    def _bytes(self) -> bytes:
        return storage.read_bytes(_plain(self.location))
