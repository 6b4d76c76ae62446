"""Tables that others keep, as the Parquet files of one version: `delta:PATH@VERSION` and `iceberg:PATH@SNAPSHOT`.

A version never changes, so its files are as good as a folder that nobody writes to: what reads Parquet reads them. What
a file's own rows do not tell (deleted rows, values that stand in the table's log, renamed columns) is refused, not
guessed.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from elastrain import storage
from elastrain.data.chunks import Files, first_line
from elastrain.errors import DataError, SpecError

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from pyiceberg.table import StaticTable

EXTRA = "pip install 'elastrain[tables]'"
PLAIN = "write a copy of the table without, or export it as Parquet"
METADATA = re.compile(r"v?(\d+)(?:-.*)?\.metadata\.json")


def pinned(source: str) -> str:
    """Return the source with an absolute path and its version, the newest where it names none.

    Raises as `find_table` does.
    """
    kind, path, version = _parts(source)
    return f"{kind}:{path}@{KINDS[kind][0](source, path) if version is None else version}"


def find_table(source: str) -> Files:
    """Return the Parquet files of one version of a table, in path order.

    Raises SpecError if the source names no version; DataError if there is no such table or version, it holds what its
    files alone do not tell, or the package that reads it is not installed.
    """
    kind, path, version = _parts(source)
    if version is None:
        example = KINDS[kind][0](source, path)
        raise SpecError(f"{source}: name the version, for the table may change: {kind}:{path}@{example} is the newest")
    root, files = KINDS[kind][1](source, path, version)
    if not files:
        raise DataError(f"{source}: this version of the table has no files")
    return Files(root, tuple(sorted(files, key=lambda file: file.path)))


def _parts(source: str) -> tuple[str, str, int | None]:
    kind, _, rest = source.partition(":")
    path, _, version = rest.rpartition("@")
    if not path or not version.isdecimal():
        path, version = rest, ""
    if not path:
        raise SpecError(f"source {source!r}: write {kind}:PATH or {kind}:PATH@VERSION")
    return kind, storage.absolute(path), int(version) if version else None


# --- Delta


def _open_delta(source: str, path: str, version: int | None) -> "DeltaTable":
    try:
        from deltalake import DeltaTable  # noqa: PLC0415 -- an extra
        from deltalake.exceptions import DeltaError, TableNotFoundError  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{source}: Delta tables need the deltalake package: {EXTRA}") from error
    try:
        return DeltaTable(path, version=version)
    except TableNotFoundError as error:
        raise DataError(f"{source}: no Delta table there; check the path") from error
    except (DeltaError, OSError) as error:
        raise DataError(f"{source}: this version cannot be read ({first_line(error)}); name another one") from error


def _newest_delta(source: str, path: str) -> int:
    return int(_open_delta(source, path, None).version())


def _delta_files(source: str, path: str, version: int) -> tuple[str, list[storage.FileInfo]]:
    import pyarrow as pa  # noqa: PLC0415 -- 0.3 s that local runs of packed data need not pay

    table = _open_delta(source, path, version)
    meta = table.metadata()
    if meta.partition_columns:
        names = ", ".join(meta.partition_columns)
        raise DataError(f"{source}: partitioned by {names}, whose values are not in the files; {PLAIN} partitions")
    if meta.configuration.get("delta.columnMapping.mode", "none") != "none":
        raise DataError(f"{source}: its columns have other names in the files (column mapping); {PLAIN} that")
    if _lacks_rows(table):
        raise DataError(f"{source}: it has rows that are deleted but still in the files; {PLAIN} them")
    held = pa.table(table.get_add_actions())
    rows = zip(held["path"].to_pylist(), held["size_bytes"].to_pylist(), strict=True)
    return path, [_file(source, path, unquote(name), size) for name, size in rows]


def _lacks_rows(table: "DeltaTable") -> bool:
    """Say whether some files hold rows that the table has no more."""
    from deltalake.exceptions import DeltaError  # noqa: PLC0415 -- an extra

    try:
        return next(iter(table.deletion_vectors()), None) is not None
    except DeltaError:  # they are there, and cannot be read
        return True


# --- Iceberg


@lru_cache(maxsize=4)  # the newest version and its files are asked for one after the other
def _open_iceberg(source: str, metadata: str) -> "StaticTable":
    try:
        from pyiceberg.table import StaticTable  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise DataError(f"{source}: Iceberg tables need the pyiceberg package: {EXTRA}") from error
    try:
        return StaticTable.from_metadata(metadata)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: {metadata} cannot be read ({first_line(error)})") from error


def _newest_iceberg(source: str, path: str) -> int:
    snapshot = _open_iceberg(source, _metadata(source, path)).current_snapshot()
    if snapshot is None:
        raise DataError(f"{source}: the table has no snapshot yet")
    return int(snapshot.snapshot_id)


def _iceberg_files(source: str, path: str, version: int) -> tuple[str, list[storage.FileInfo]]:
    table = _open_iceberg(source, _metadata(source, path))
    if table.snapshot_by_id(version) is None:
        there = ", ".join(str(snapshot.snapshot_id) for snapshot in table.metadata.snapshots) or "none"
        raise DataError(f"{source}: no such snapshot; the table has {there}")
    root = table.location().rstrip("/").removeprefix("file://")
    return root, list(_iceberg_tasks(source, root, table.scan(snapshot_id=version).plan_files()))


def _iceberg_tasks(source: str, root: str, tasks: Any) -> Iterator[storage.FileInfo]:
    for task in tasks:
        if task.delete_files:
            raise DataError(f"{source}: it has rows that are deleted but still in the files; {PLAIN} them")
        if str(task.file.file_format.value).upper() != "PARQUET":
            raise DataError(f"{source}: {task.file.file_path} is no Parquet file; {PLAIN} such files")
        path = task.file.file_path.removeprefix("file://")
        yield _file(source, root, path.removeprefix(f"{root}/"), task.file.file_size_in_bytes)


def _metadata(source: str, path: str) -> str:
    """Return the newest metadata file of a table; `path` may be that file itself."""
    if path.endswith(".metadata.json"):
        return path
    folder = storage.join(path, "metadata")
    try:
        names = [file.path for file in storage.list_files(folder, suffix=".metadata.json") if "/" not in file.path]
    except FileNotFoundError:
        names = []
    numbered = [(int(match[1]), name) for name in names if (match := METADATA.fullmatch(name))]
    if not numbered:
        raise DataError(f"{source}: no Iceberg table there (no metadata/*.metadata.json); check the path")
    return storage.join(folder, max(numbered)[1])


def _file(source: str, root: str, path: str, size: int) -> storage.FileInfo:
    if "://" in path or path.startswith("/"):
        raise DataError(f"{source}: {path} lies outside of {root}; {PLAIN} files elsewhere")
    return storage.FileInfo(path=path, size_bytes=int(size))


KINDS: dict[str, tuple[Callable[[str, str], int], Callable[[str, str, int], tuple[str, list[storage.FileInfo]]]]] = {
    "delta": (_newest_delta, _delta_files),
    "iceberg": (_newest_iceberg, _iceberg_files),
}
"""Of each kind of table, what finds its newest version, and what finds the files of one."""
