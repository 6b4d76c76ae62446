"""Tables that others keep, as the Parquet files of one version: `delta:PATH@VERSION` and `iceberg:PATH@SNAPSHOT`.

A version never changes, so its files are as good as a folder that nobody writes to: what reads Parquet reads them. What
a file's own rows do not tell (deleted rows, values that stand in the table's log, renamed columns) is refused, not
guessed.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from elastrain import s3, storage
from elastrain.credentials import find_keys
from elastrain.data.chunks import Files, first_line
from elastrain.errors import DataError, SpecError, StorageError

if TYPE_CHECKING:
    from deltalake import DeltaTable

EXTRA = "pip install 'elastrain[tables]'"
PLAIN = "write a copy of the table without, or export it as Parquet"


def pinned(source: str) -> str:
    """Return the source with an absolute path and its version, the newest where it names none.

    Raises as `find_table` does.
    """
    kind, path, version = _parts(source)
    return f"{kind}:{path}@{KINDS[kind][0](source, path) if version is None else version}"


def find_table(source: str) -> Files:
    """Return the Parquet files of one version of a table, in path order.

    Raises SpecError if the source names no version; DataError if there is no such table or version, it holds what its
    files alone do not tell, or the package that reads it is not installed; StorageError if storage does not answer.
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
    if s3.is_s3(path):
        storage.exists(path)  # who does not answer, or refuses, is told in our words
    try:
        return DeltaTable(path, version=version, storage_options=_delta_options(path))
    except TableNotFoundError as error:
        raise DataError(f"{source}: no Delta table there; check the path") from error
    except DeltaError as error:
        raise DataError(f"{source}: this version cannot be read ({first_line(error)}); name another one") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {_last_words(error)}") from error


def _delta_options(path: str) -> dict[str, str] | None:
    """Return where a table's store is and the keys for it, as far as delta-rs does not look there by itself."""
    if not s3.is_s3(path):
        return None
    where, keys = s3.endpoint(), find_keys()
    found = {"AWS_ENDPOINT_URL": where, "AWS_ALLOW_HTTP": str(where.startswith("http://")).lower()} if where else {}
    if keys is not None:
        found |= {"AWS_ACCESS_KEY_ID": keys.key_id, "AWS_SECRET_ACCESS_KEY": keys.secret}
        found |= {"AWS_SESSION_TOKEN": keys.token} if keys.token else {}
    return found


def _last_words(error: OSError) -> str:
    """Return the innermost cause of an error of delta-rs, which writes one a line, with colours."""
    lines = [re.sub(r"\x1b\[\d+m|↳", "", line).strip() for line in str(error).splitlines()]
    return " ".join((next(filter(None, reversed(lines)), "no reason given")).split())[:300]


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
    return path, [inside(source, path, unquote(name), size) for name, size in rows]


def inside(source: str, root: str, path: str, size: int) -> storage.FileInfo:
    """Return a file of a table; raises DataError unless it lies below the table's folder."""
    if "://" in path or path.startswith("/"):
        raise DataError(f"{source}: {path} lies outside of {root}; {PLAIN} files elsewhere")
    return storage.FileInfo(path=path, size_bytes=int(size))


def _lacks_rows(table: "DeltaTable") -> bool:
    """Say whether some files hold rows that the table has no more."""
    from deltalake.exceptions import DeltaError  # noqa: PLC0415 -- an extra

    try:
        return next(iter(table.deletion_vectors()), None) is not None
    except DeltaError:  # they are there, and cannot be read
        return True


# --- Iceberg


def _newest_iceberg(source: str, path: str) -> int:
    return int(_iceberg(source).newest_snapshot(source, path))


def _iceberg_files(source: str, path: str, version: int) -> tuple[str, list[storage.FileInfo]]:
    root, files = _iceberg(source).snapshot_files(source, path, version)
    return root, list(files)


def _iceberg(source: str) -> Any:
    try:
        from elastrain.data import iceberg  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise DataError(f"{source}: Iceberg tables need the pyiceberg package: {EXTRA}") from error
    return iceberg


KINDS: dict[str, tuple[Callable[[str, str], int], Callable[[str, str, int], tuple[str, list[storage.FileInfo]]]]] = {
    "delta": (_newest_delta, _delta_files),
    "iceberg": (_newest_iceberg, _iceberg_files),
}
"""Of each kind of table, what finds its newest version, and what finds the files of one."""
