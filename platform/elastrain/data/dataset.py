"""A dataset: Parquet shards plus a manifest that names them, their rows and what they hold.

```
train/part-00000.parquet …      the rows
train/_manifest.json            written last: the dataset exists if and only if this file does
train/_packing.json             there only while `pack` runs or after it was killed
```
A plain Parquet folder has no manifest; `footers` makes up for it. Of an encrypted dataset's manifest only the
key's name and what `pack` was asked for can be read without the key. Neither torch nor Ray is known here.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from elastrain import storage
from elastrain.encryption import Encryptor, decrypt
from elastrain.errors import DataError, StorageError
from elastrain.urls import table_kind

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MANIFEST, PACKING = "_manifest.json", "_packing.json"
FORMAT = 1
GROUP_HASH = 16  # hexadecimal digits of the hash of a row group
PLAIN, ENCRYPTED = b"PAR1", b"PARE"  # how Parquet files end, and begin
AGAIN = "restore it, or pack the data again with `elastrain pack … --overwrite`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """What a column holds: numpy dtype name, shape of one row, and for integers how many values there are.

    `num_values` is 1 + the largest value (classes, vocabulary), None where unknown. `mean` and `std` are over all
    elements of the column. Encoded images are described as what they decode to: uint8 (height, width, 3).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_values: int | None = None
    mean: float | None = None
    std: float | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory."""
        return int(np.dtype(self.dtype).itemsize * math.prod(self.shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One Parquet file: path relative to the dataset, size, rows of each row group, hashes of footer and content.

    `sha256` is over the whole file and known for packed shards only; `footer` is over the footer's bytes. `content` is
    known for encrypted shards only: what `sha256` would be without encryption. `xxh3` is known for packed shards that
    are not encrypted: the XXH3-64 of each row group's bytes, from its first column chunk to the end of its last, 16
    hexadecimal digits each, one after the other.
    """

    path: str
    size_bytes: int
    row_groups: tuple[int, ...]
    footer: str
    sha256: str | None = None
    content: str | None = None
    xxh3: str | None = None

    def group_hash(self, group: int) -> str | None:
        """Return the hash of a row group's bytes, None where it is not known."""
        return None if self.xxh3 is None else self.xxh3[GROUP_HASH * group : GROUP_HASH * (group + 1)]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What `Dataset.open` found: columns that can be read, shards in order, and a fingerprint over what they hold.

    `unusable` says for each other column why it cannot be read; `info` holds what `pack` noted (source, counts). `key`
    is the name of the key that it is encrypted with, None if it is not. `verified` says whether a byte that has
    changed is found when it is read; of plain files one is looked at. `broken` are the plain files without a readable
    footer that were left out, each with `file`, `rows` (0: nobody knows) and `why`.
    """

    url: str
    columns: tuple[Column, ...]
    shards: tuple[Shard, ...]
    fingerprint: str
    packed: bool
    unusable: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    verified: bool = True
    broken: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def open(cls, url: str, *, on_bad_shard: str = "error") -> Self:
        """Return the dataset at `url`: a packed one, a folder of Parquet files, or one Parquet file.

        "quarantine" leaves out plain files whose footer cannot be read; what else is bad, `quarantine.find_bad` finds.
        Raises DataError if there is nothing to read, a pack was cut off, the manifest is broken, or the files do not
        fit together; StorageError if storage does not answer, or if it is encrypted and its key is not there.
        """
        manifest = None if table_kind(url) else _manifest(url)
        if manifest is not None:
            return cls.from_manifest(url, manifest)
        from elastrain.data.footers import read_footers  # noqa: PLC0415 -- it builds on this module, and loads pyarrow

        return cls(**read_footers(url, on_bad_shard=on_bad_shard))

    @classmethod
    def from_manifest(cls, url: str, manifest: Mapping[str, Any]) -> Self:
        """Return the dataset that a manifest describes.

        Raises DataError if it is no manifest of ours, StorageError if it is encrypted and its key is not there.
        """
        try:
            if manifest["format"] != FORMAT:
                raise DataError(f"{url}: manifest format {manifest['format']}, this version reads {FORMAT}; {AGAIN}")
            if "encrypted" in manifest:
                return cls.from_manifest(url, _decrypted(url, manifest))
            return cls(
                url=url,
                columns=tuple(Column(**{**c, "shape": tuple(c["shape"])}) for c in manifest["columns"]),
                shards=tuple(_shard(entry) for entry in manifest["shards"]),
                fingerprint=manifest["fingerprint"],
                packed=manifest["packed"],
                unusable=manifest.get("unusable", {}),
                info=manifest.get("info", {}),
                key=manifest.get("key"),
                verified=manifest.get("verified", True),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{url}/{MANIFEST}: not a manifest of Elastrain ({error!r}); {AGAIN}") from error

    def manifest(self) -> dict[str, Any]:
        """Return the JSON document that `from_manifest` reads; raises StorageError if the key for it is not there."""
        found = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "packed": self.packed,
            "columns": [_plain(column) for column in self.columns],
            "shards": [_plain(shard) for shard in self.shards],
            "unusable": dict(self.unusable),
            "info": dict(self.info),
        }
        found |= {} if self.verified else {"verified": False}
        return found if self.key is None else _encrypted({**found, "key": self.key})

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

    def doubt(self) -> str | None:
        """Say in a sentence that nobody would notice if bytes of the files changed; None where somebody would."""
        if self.verified:
            return None
        return (
            f"{self.url}: the files have no page checksums, so bytes that change on a disk or on the way are trained "
            f"on unnoticed; `elastrain pack` makes a copy that is verified"
        )

    def why_missing(self, name: str) -> str:
        """Say in a sentence why column `name` cannot be read and which columns can."""
        why = self.unusable.get(name)
        there = ", ".join(column.name for column in self.columns) or "none"
        return f"column {name!r} cannot be read: {why}" if why else f"no column {name!r}; the dataset has {there}"


def fingerprint(columns: Iterable[Column], shards: Iterable[Shard]) -> str:
    """Return one hash over what a dataset holds: column names and types, row groups in order, contents.

    Where the files lie, when they were written, what they are called and how they are encrypted do not enter. For files
    that `pack` did not write the content is judged by the footer (counts, sizes, offsets, statistics of column chunks).
    """
    held = {
        "columns": [[c.name, c.dtype, list(c.shape)] for c in columns],
        "shards": [[list(s.row_groups), s.content or s.sha256 or s.footer] for s in shards],
    }
    return hashlib.sha256(json.dumps(held, separators=(",", ":")).encode()).hexdigest()


def read_footer(
    url: str, size_bytes: int, file: Any = None, *, expected: str | None = None, encrypted: bool = False
) -> tuple["pq.FileMetaData", str]:
    """Return a Parquet file's metadata and the hash of its footer, with one or two reads at its end.

    `file` is what `url` leads to where it is open; it has `size()` and `read_at(length, start)`.
    Raises DataError naming the file if it is missing, truncated, no Parquet file, or its footer's hash is not
    `expected`; StorageError if it is `encrypted` and its key is not there.
    """
    import pyarrow as pa  # noqa: PLC0415 -- 0.3 s that a packed dataset's plan need not pay
    import pyarrow.parquet as pq  # noqa: PLC0415

    if encrypted:
        from elastrain.data.parquet_encryption import decryption  # noqa: PLC0415 -- for encrypted datasets only
    try:
        with contextlib.nullcontext(file) if file is not None else storage.open_arrow(url) as opened:
            tail = _tail(opened, size_bytes, url, encrypted=encrypted)
        found = hashlib.sha256(tail).hexdigest()
        if expected not in (None, found):
            raise DataError(
                f"{url}: the footer is not the one that the manifest names: changed or corrupted; restore the file"
            )
        source = pa.BufferReader(tail[-4:] + tail)
        return pq.read_metadata(source, decryption_properties=decryption() if encrypted else None), found
    except FileNotFoundError as error:
        raise DataError(f"{url}: the file is gone; restore it, or pack the data again") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{url}: not a readable Parquet file ({_first_line(error)}); restore it, or leave it out"
        ) from error


def _tail(file: Any, size_bytes: int, url: str, *, encrypted: bool) -> bytes:
    """Return the footer with its length and closing mark."""
    if file.size() != size_bytes:
        raise DataError(
            f"{url}: {file.size()} bytes where {size_bytes} are expected: truncated or replaced; restore it"
        )
    guess = min(size_bytes, 65536)
    data = bytes(file.read_at(guess, size_bytes - guess))
    if not encrypted and data[-4:] == ENCRYPTED:
        raise DataError(
            f"{url}: an encrypted Parquet file, and no {MANIFEST} that says with which key; restore it, or give files "
            f"that are not encrypted"
        )
    if size_bytes < 12 or data[-4:] != (ENCRYPTED if encrypted else PLAIN):
        raise DataError(f"{url}: not a Parquet file, or truncated ({size_bytes} bytes); restore it, or leave it out")
    length = int.from_bytes(data[-8:-4], "little") + 8
    if length + 4 > size_bytes:
        raise DataError(f"{url}: a broken Parquet footer; restore the file, or leave it out")
    return data[-length:] if length <= guess else bytes(file.read_at(length, size_bytes - length))


def _manifest(url: str) -> Any:
    """Return the manifest of a packed dataset as it is stored, None where no pack wrote; raises as `Dataset.open`."""
    try:
        return json.loads(storage.read_bytes(storage.join(url, MANIFEST)))
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise DataError(f"{url}/{MANIFEST}: not a JSON document ({error}); {AGAIN}") from error
    except StorageError:
        if not storage.is_local(url) or storage.exists(storage.join(url, MANIFEST)):
            raise  # but not of a single file, below which a manifest cannot be looked for
    if storage.exists(storage.join(url, PACKING)):
        raise DataError(f"{url}: a pack of this dataset was cut off; run the same `elastrain pack` again to finish it")
    return None


def _shard(entry: Mapping[str, Any]) -> Shard:
    groups = tuple(entry["row_groups"])
    return Shard(
        path=entry["path"],
        size_bytes=entry["size_bytes"],
        row_groups=groups,
        footer=entry["footer"],
        sha256=entry["sha256"],
        content=entry.get("content"),
        xxh3=entry.get("xxh3"),
    )


def _plain(value: Any) -> dict[str, Any]:
    """Return a slots dataclass as a JSON object; `content` and `xxh3` only where they are known."""
    fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
    return {name: held for name, held in fields.items() if name not in ("content", "xxh3") or held is not None}


def _encrypted(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest of which only the key's name, and what `pack` was asked for, can be read without the key."""
    data = json.dumps(manifest).encode()
    asked = {name: manifest["info"][name] for name in ("pack", "splits") if name in manifest["info"]}
    held = base64.b64encode(Encryptor(manifest["key"]).encrypt(data, context=MANIFEST)).decode()
    return {"format": FORMAT, "key": manifest["key"], "info": asked, "encrypted": held}


def _decrypted(url: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    where = storage.join(url, MANIFEST)
    try:
        data = base64.b64decode(manifest["encrypted"], validate=True)
        found: dict[str, Any] = json.loads(decrypt(data, context=MANIFEST, where=where))
    except ValueError as error:
        raise DataError(f"{where}: {error}; {AGAIN}") from error
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
