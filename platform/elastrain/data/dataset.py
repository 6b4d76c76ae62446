"""A dataset: Parquet shards plus a manifest that names them, their rows and what they hold.

```
train/part-00000.parquet …      the rows
train/_manifest.json            written last: the dataset exists if and only if this file does
train/_packing.json             there only while `pack` runs or after it was killed
```
A plain Parquet folder has no manifest; one is built from the footers. Neither torch nor Ray is known here.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from elastrain import storage
from elastrain.errors import DataError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


MANIFEST, PACKING = "_manifest.json", "_packing.json"
FORMAT = 1
FOOTER_READERS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """What a column holds: numpy dtype name, shape of one row, and for integers how many values there are.

    `num_values` is 1 + the largest value (classes, vocabulary), None where unknown. `mean` and `std` are over all
    elements of the column. An encoded image has dtype `image` and an unknown shape ().
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_values: int | None = None
    mean: float | None = None
    std: float | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory; an encoded image counts as 64 KiB."""
        if self.dtype == "image":
            return 65536
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One Parquet file: path relative to the dataset, size, rows of each row group, hashes of footer and content.

    `sha256` is over the whole file and known for packed shards only; `footer` is over the footer's bytes.
    """

    path: str
    size_bytes: int
    row_groups: tuple[int, ...]
    footer: str
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What `Dataset.open` found: columns that can be read, shards in order, and a fingerprint over what they hold.

    `unusable` says for each other column why it cannot be read; `info` holds what `pack` noted (source, counts).
    """

    url: str
    columns: tuple[Column, ...]
    shards: tuple[Shard, ...]
    fingerprint: str
    packed: bool
    unusable: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, url: str) -> Self:
        """Return the dataset at `url`: a packed one, a folder of Parquet files, or one Parquet file.

        Raises DataError if there is nothing to read, a pack was cut off, or the files do not fit together;
        StorageError if storage does not answer.
        """
        try:
            return cls.from_manifest(url, storage.read_json(storage.join(url, MANIFEST)))
        except FileNotFoundError:
            pass
        except StorageError:
            if storage.exists(storage.join(url, MANIFEST)):
                raise
        if storage.exists(storage.join(url, PACKING)):
            raise DataError(
                f"{url}: a pack of this dataset was cut off; run the same `elastrain pack` again to finish it"
            )
        return cls(**_from_footers(url))

    @classmethod
    def from_manifest(cls, url: str, manifest: Mapping[str, Any]) -> Self:
        """Return the dataset that a manifest describes; raises DataError if it is no manifest of ours."""
        try:
            if manifest["format"] != FORMAT:
                raise DataError(f"{url}: manifest format {manifest['format']}, this version reads {FORMAT}; pack again")
            return cls(
                url=url,
                columns=tuple(Column(**{**c, "shape": tuple(c["shape"])}) for c in manifest["columns"]),
                shards=tuple(_shard(entry) for entry in manifest["shards"]),
                fingerprint=manifest["fingerprint"],
                packed=manifest["packed"],
                unusable=manifest.get("unusable", {}),
                info=manifest.get("info", {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{url}/{MANIFEST}: not a manifest of Elastrain ({error!r}); pack the data again"
            ) from error

    def manifest(self) -> dict[str, Any]:
        """Return the JSON document that `from_manifest` reads."""
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "packed": self.packed,
            "columns": [_plain(column) for column in self.columns],
            "shards": [_plain(shard) for shard in self.shards],
            "unusable": dict(self.unusable),
            "info": dict(self.info),
        }

    @cached_property
    def group_rows(self) -> npt.NDArray[np.int64]:
        """Rows of each row group, over all shards in order."""
        return np.fromiter(itertools.chain.from_iterable(shard.row_groups for shard in self.shards), dtype=np.int64)

    @cached_property
    def num_rows(self) -> int:
        """Samples of the dataset."""
        return int(self.group_rows.sum())

    @property
    def row_bytes(self) -> int:
        """Bytes of one decoded row, all columns together."""
        return sum(column.row_bytes for column in self.columns)

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards in storage."""
        return sum(shard.size_bytes for shard in self.shards)

    def group_address(self, group: int) -> tuple[int, int]:
        """Return (shard index, row group in that shard) of the dataset's row group `group`."""
        shard = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        return shard, int(group - self._first_groups[shard])

    @cached_property
    def _first_groups(self) -> npt.NDArray[np.int64]:
        counts = np.fromiter((len(shard.row_groups) for shard in self.shards), dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)])[:-1]

    def select(self, names: Sequence[str] | None) -> Self:
        """Return the dataset with only these columns; raises DataError, naming what there is, if one is missing."""
        if names is None:
            return self
        held = {column.name: column for column in self.columns}
        for name in names:
            if name not in held:
                raise DataError(f"{self.url}: {self.why_missing(name)}")
        return replace(self, columns=tuple(held[name] for name in names))

    def why_missing(self, name: str) -> str:
        """Say in a sentence why column `name` cannot be read and which columns can."""
        why = self.unusable.get(name)
        there = ", ".join(column.name for column in self.columns) or "none"
        return f"column {name!r} cannot be read: {why}" if why else f"no column {name!r}; the dataset has {there}"


def fingerprint(columns: Iterable[Column], shards: Iterable[Shard]) -> str:
    """Return one hash over what a dataset holds: column names and types, row groups in order, contents.

    Where the files lie, when they were written and what they are called do not enter. For files that `pack` did not
    write the content is judged by the footer (counts, sizes, offsets and statistics of every column chunk).
    """
    held = {
        "columns": [[c.name, c.dtype, list(c.shape)] for c in columns],
        "shards": [[list(s.row_groups), s.sha256 or s.footer] for s in shards],
    }
    return hashlib.sha256(json.dumps(held, separators=(",", ":")).encode()).hexdigest()


def read_footer(url: str, size_bytes: int) -> tuple["pq.FileMetaData", str]:
    """Return a Parquet file's metadata and the hash of its footer, with one or two reads at its end.

    Raises DataError naming the file if it is missing, truncated or no Parquet file.
    """
    import pyarrow as pa  # noqa: PLC0415 -- 0.3 s that a packed dataset's plan need not pay
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        with storage.open_arrow(url) as file:
            tail = _tail(file, size_bytes, url)
        return pq.read_metadata(pa.BufferReader(b"PAR1" + tail)), hashlib.sha256(tail).hexdigest()
    except FileNotFoundError as error:
        raise DataError(f"{url}: the file is gone; restore it, or pack the data again") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{url}: not a readable Parquet file ({_first_line(error)}); restore it, or leave it out"
        ) from error


def _tail(file: Any, size_bytes: int, url: str) -> bytes:
    """Return the footer with its length and closing mark."""
    if file.size() != size_bytes:
        raise DataError(
            f"{url}: {file.size()} bytes where {size_bytes} are expected: truncated or replaced; restore it"
        )
    guess = min(size_bytes, 65536)
    data: bytes = file.read_at(guess, size_bytes - guess)
    if size_bytes < 12 or data[-4:] != b"PAR1":
        raise DataError(f"{url}: not a Parquet file, or truncated ({size_bytes} bytes); restore it, or leave it out")
    length = int.from_bytes(data[-8:-4], "little") + 8
    if length + 4 > size_bytes:
        raise DataError(f"{url}: a broken Parquet footer; restore the file, or leave it out")
    return data[-length:] if length <= guess else bytes(file.read_at(length, size_bytes - length))


def _from_footers(url: str) -> dict[str, Any]:
    """Return the fields of a dataset of plain Parquet files, read from their footers."""
    root, files = _parquet_files(url)
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        footers = list(pool.map(lambda f: read_footer(storage.join(root, f.path), f.size_bytes), files))
    schema = footers[0][0].schema.to_arrow_schema()
    for file, (metadata, _) in zip(files, footers, strict=True):
        _same_schema(schema, metadata.schema.to_arrow_schema(), f"{root}/{files[0].path}", f"{root}/{file.path}")
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
    }


def _parquet_files(url: str) -> tuple[str, list[storage.FileInfo]]:
    """Return the folder and the Parquet files in it; a single file counts as a folder of one."""
    if url.endswith((".parquet", ".pq")) and storage.is_local(url) and storage.local_path(url).is_file():
        path = storage.local_path(url)
        return str(path.parent), [storage.FileInfo(path=path.name, size_bytes=path.stat().st_size)]
    try:
        files = [file for file in storage.list_files(url) if file.path.endswith((".parquet", ".pq"))]
    except FileNotFoundError as error:
        raise DataError(
            f"{url}: no such dataset; check the path, or make it with `elastrain pack SOURCE OUT`"
        ) from error
    except StorageError as error:
        raise DataError(f"{url}: not a folder of Parquet files ({error})") from error
    if not files:
        raise DataError(f"{url}: no Parquet files in this folder; make a dataset with `elastrain pack SOURCE OUT`")
    return url, files


def _same_schema(first: "pa.Schema", other: "pa.Schema", first_name: str, name: str) -> None:
    if first.equals(other):
        return
    held, given = dict(zip(first.names, first.types, strict=True)), dict(zip(other.names, other.types, strict=True))
    for column in {**held, **given}:
        if held.get(column) != given.get(column):
            raise DataError(
                f"{name}: column {column!r} is {given.get(column, 'missing')}, but {held.get(column, 'missing')} in "
                f"{first_name}; a dataset has one schema: rewrite or leave out the file"
            )


def _describe(
    root: str, files: list[storage.FileInfo], schema: "pa.Schema", footers: list["pq.FileMetaData"]
) -> tuple[tuple[Column, ...], dict[str, str]]:
    """Return the readable columns of plain Parquet files and, for the others, why not."""
    import pyarrow.parquet as pq  # noqa: PLC0415

    from elastrain.data.columns import describe_values  # noqa: PLC0415

    columns, unusable = [], {}
    filled = next((i for i, footer in enumerate(footers) if footer.num_rows), 0)
    where = storage.join(root, files[filled].path)
    with storage.open_arrow(where) as source:
        file = pq.ParquetFile(source, metadata=footers[filled])
        for item in schema:
            try:
                column = describe_values(item, _sample(file, item.name, where), where=where)
                columns.append(
                    replace(column, num_values=column.num_values or _num_values(item.name, column.dtype, footers))
                )
            except DataError as error:
                unusable[item.name] = str(error)
    return tuple(columns), unusable


def _sample(file: "pq.ParquetFile", name: str, where: str) -> "pa.ChunkedArray":
    import pyarrow as pa  # noqa: PLC0415

    try:
        for batch in file.iter_batches(batch_size=64, columns=[name]):
            if batch.num_rows:
                return pa.Table.from_batches([batch]).column(0)
    except (pa.ArrowException, OSError, IndexError) as error:
        raise DataError(f"{where}: column {name!r} cannot be read ({_first_line(error)})") from error
    return pa.chunked_array([], file.schema_arrow.field(name).type)


def _num_values(name: str, dtype: str, footers: list["pq.FileMetaData"]) -> int | None:
    """Return 1 + the largest value of an integer column from the footers' statistics, None where they do not tell."""
    if not np.issubdtype(np.dtype(dtype) if dtype != "image" else np.dtype("O"), np.integer):
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


def _shard(entry: Mapping[str, Any]) -> Shard:
    groups = tuple(entry["row_groups"])
    return Shard(
        path=entry["path"],
        size_bytes=entry["size_bytes"],
        row_groups=groups,
        footer=entry["footer"],
        sha256=entry["sha256"],
    )


def _plain(value: Any) -> dict[str, Any]:
    """Return a slots dataclass as a JSON object."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
