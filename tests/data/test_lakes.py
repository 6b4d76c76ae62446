"""Tables: real Delta and Iceberg tables, a version of which is read as the Parquet files that it is made of."""

import json
import os
import secrets
import string
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.manifest import DataFile, DataFileContent
from pyiceberg.table import FileScanTask
from pyiceberg.types import DoubleType

from elastrain.data.chunks import PackOptions
from elastrain.data.dataset import Dataset
from elastrain.data.iceberg import _opened, snapshot_files, tasks_files
from elastrain.data.lakes import find_table, pinned
from elastrain.data.reader import read_group, sources_of
from elastrain.data.sources import identity, open_source
from elastrain.errors import DataError, SpecError, StorageError


def rows(first: int, last: int) -> pa.Table:
    """Rows with a number each."""
    return pa.table({"x": pa.array(range(first, last), pa.int64()), "y": [0.5] * (last - first)})


def numbers(source: str) -> list[int]:
    """The numbers that packing a source would read, sorted."""
    split = open_source(source, PackOptions())["train"]
    return sorted(number for piece in split.pieces() for number in piece["x"].tolist())


@pytest.fixture
def delta(tmp_path: Path) -> str:
    """A Delta table: version 0 has rows 0 to 9, version 1 also 10 to 29, version 2 lacks those below 5."""
    path = str(tmp_path / "sales")
    write_deltalake(path, rows(0, 10))
    write_deltalake(path, rows(10, 30), mode="append")
    DeltaTable(path).delete("x < 5")
    return path


@pytest.fixture
def iceberg(tmp_path: Path) -> Iterator[Any]:
    """An Iceberg table of two snapshots."""
    catalog = SqlCatalog("test", uri="sqlite:///:memory:", warehouse=f"file://{tmp_path}/warehouse")
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.sales", schema=rows(0, 1).schema)
    table.append(rows(0, 10))
    table.append(rows(10, 30))
    yield table
    catalog.close()


def test_a_version_of_a_delta_table_is_what_it_was(delta: str) -> None:
    assert [numbers(f"delta:{delta}@{version}") for version in range(3)] == [
        list(range(10)),
        list(range(30)),
        list(range(5, 30)),
    ]


def test_a_snapshot_of_an_iceberg_table_is_what_it_was(iceberg: Any) -> None:
    path = iceberg.location().removeprefix("file://")
    first, second = (snapshot.snapshot_id for snapshot in iceberg.snapshots())
    assert numbers(f"iceberg:{path}@{first}") == list(range(10))
    assert numbers(f"iceberg:{path}@{second}") == list(range(30))
    metadata = iceberg.metadata_location.removeprefix("file://")
    assert numbers(f"iceberg:{metadata}@{first}") == list(range(10))


def test_packing_takes_the_newest_version_and_says_which(delta: str, iceberg: Any) -> None:
    assert pinned(f"delta:{delta}") == f"delta:{delta}@2"
    path = iceberg.location().removeprefix("file://")
    newest = iceberg.current_snapshot().snapshot_id
    assert pinned(f"iceberg:{path}") == f"iceberg:{path}@{newest}"
    assert identity(pinned(f"delta:{delta}"))["source"] == f"delta:{delta}@2"


def test_training_reads_a_version_as_it_is_and_names_one_where_none_is_named(delta: str) -> None:
    before = Dataset.open(f"delta:{delta}@1")
    assert (before.num_rows, [column.name for column in before.columns]) == (30, ["x", "y"])
    write_deltalake(delta, rows(30, 40), mode="append")
    assert Dataset.open(f"delta:{delta}@1").fingerprint == before.fingerprint
    with pytest.raises(SpecError, match=f"name the version, for the table may change: delta:{delta}@3 is the newest"):
        Dataset.open(f"delta:{delta}")


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_a_table_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing@1: no .* table there.*; check the path"):
        find_table(f"{kind}:{tmp_path}/nothing@1")
    with pytest.raises(DataError, match=r"nothing: no .* table there"):
        pinned(f"{kind}:{tmp_path}/nothing")
    with pytest.raises(SpecError, match=f"write {kind}:PATH"):
        find_table(f"{kind}:")


def test_a_version_that_is_not_there_is_named(delta: str, iceberg: Any) -> None:
    with pytest.raises(DataError, match="sales@9: this version cannot be read"):
        find_table(f"delta:{delta}@9")
    path, newest = iceberg.location().removeprefix("file://"), iceberg.current_snapshot().snapshot_id
    with pytest.raises(DataError, match=rf"@1: no such snapshot; the table has \d+, {newest}$"):
        find_table(f"iceberg:{path}@1")


def test_values_that_are_not_in_the_files_are_refused(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path), rows(0, 10), partition_by=["y"])
    with pytest.raises(DataError, match="partitioned by y, whose values are not in the files"):
        find_table(f"delta:{tmp_path}@0")


Z85 = string.digits + string.ascii_letters + ".-:+=^!/*?&<>()[]{}@%$#"


def deletion_vector(deleted: list[int]) -> str:
    """Rows of a file as Delta writes them into its log: a Roaring bitmap of one array, 64-bit, in Z85."""
    array = struct.pack(f"<{len(deleted)}H", *deleted)
    bitmap = struct.pack("<IIHHI", 12346, 1, 0, len(deleted) - 1, 16) + array
    data = struct.pack("<IQI", 1681511377, 1, 0) + bitmap
    words = struct.unpack(f">{len(data) // 4}I", data)
    return "".join(Z85[word // 85**power % 85] for word in words for power in (4, 3, 2, 1, 0))


@pytest.mark.parametrize("vector", [deletion_vector([3, 4, 7, 11, 18, 29]), "0" * 55], ids=["read", "unreadable"])
def test_rows_of_a_delta_table_that_are_deleted_and_still_in_the_files_are_refused(vector: str, tmp_path: Path) -> None:
    write_deltalake(str(tmp_path), rows(0, 40))
    log = tmp_path / "_delta_log"
    first = [json.loads(line) for line in (log / f"{0:020}.json").read_text().splitlines()]
    add, meta = (next(line[kind] for line in first if kind in line) for kind in ("add", "metaData"))
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    held = {"storageType": "i", "pathOrInlineDv": vector, "sizeInBytes": 44, "cardinality": 6}
    actions = [
        {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}},
        {"metaData": {**meta, "configuration": {"delta.enableDeletionVectors": "true"}}},
        {"remove": {"path": add["path"], "deletionTimestamp": 1, "dataChange": True}},
        {"add": {**add, "deletionVector": held}},
    ]
    (log / f"{1:020}.json").write_text("".join(json.dumps(action) + "\n" for action in actions))
    assert numbers(f"delta:{tmp_path}@0") == list(range(40))
    with pytest.raises(DataError, match=r"@1: it has rows that are deleted but still in the files; write a copy"):
        find_table(f"delta:{tmp_path}@1")


def test_rows_of_an_iceberg_table_that_are_deleted_and_still_in_the_files_are_refused(iceberg: Any) -> None:
    """Such tables other writers make: pyiceberg rewrites files where rows are deleted."""
    path = iceberg.location().removeprefix("file://")
    task, *_ = iceberg.scan().plan_files()
    places = DataFile.from_args(
        content=DataFileContent.POSITION_DELETES, file_path=f"{path}/data/deletes.parquet", file_format="PARQUET"
    )
    assert len(list(tasks_files("iceberg:x@1", path, [task]))) == 1
    with pytest.raises(DataError, match=r"^iceberg:x@1: it has rows that are deleted but still in the files"):
        list(tasks_files("iceberg:x@1", path, [FileScanTask(task.file, {places})]))


def test_an_empty_version_is_named(delta: str) -> None:
    DeltaTable(delta).delete()
    with pytest.raises(DataError, match="sales@3: this version of the table has no files"):
        find_table(f"delta:{delta}@3")


def test_a_file_that_was_vacuumed_is_named(delta: str) -> None:
    files = find_table(f"delta:{delta}@0")
    Path(files.url(files.files[0])).unlink()
    with pytest.raises(DataError, match="the file is gone"):
        Dataset.open(f"delta:{delta}@0")


def test_columns_that_were_renamed_or_dropped_in_the_table_only_are_refused(iceberg: Any) -> None:
    path, before = iceberg.location().removeprefix("file://"), iceberg.current_snapshot().snapshot_id
    with iceberg.update_schema() as update:
        update.delete_column("x")
    with iceberg.update_schema() as update:
        update.rename_column("y", "x")
    with pytest.raises(DataError, match=rf"after its newest snapshot, whose files have x, y; .*: {path}@{before}$"):
        pinned(f"iceberg:{path}")
    assert numbers(f"iceberg:{path}@{before}") == list(range(30)), "a snapshot is what it was"
    iceberg.append(pa.table({"x": [1.5]}))
    newest = pinned(f"iceberg:{path}")
    for read in (Dataset.open, find_table):
        with pytest.raises(
            DataError, match=r"\.parquet has other columns \(x, y\) than the snapshot \(x\): they were ren"
        ):
            read(newest)


def test_a_column_that_was_dropped_and_came_again_under_its_name_is_another_one(iceberg: Any) -> None:
    with iceberg.update_schema() as update:
        update.delete_column("y")
    with iceberg.update_schema() as update:
        update.add_column("y", DoubleType())
    iceberg.append(rows(30, 40))
    with pytest.raises(DataError, match=r"has other columns \(x, y\) than the snapshot \(x, y\)"):
        find_table(pinned(f"iceberg:{iceberg.location().removeprefix('file://')}"))


def test_of_metadata_that_was_never_committed_nothing_is_guessed(iceberg: Any) -> None:
    path, newest = iceberg.location().removeprefix("file://"), iceberg.current_snapshot().snapshot_id
    good = Path(iceberg.metadata_location.removeprefix("file://"))
    number = int(good.name.split("-")[0])
    (good.parent / f"{number:05d}-00000000-lost.metadata.json").write_bytes(good.read_bytes())
    with pytest.raises(DataError, match=rf"{number:05d}-0.* and {good.name} are both the newest, and only the catalog"):
        pinned(f"iceberg:{path}")
    assert pinned(f"iceberg:{good}") == f"iceberg:{good}@{newest}"
    assert numbers(f"iceberg:{path}@{newest}") == list(range(30)), "of a snapshot that is named both say the same"
    (good.parent / "version-hint.text").write_text("1\n")
    (first,) = good.parent.glob(f"{1:05d}-*")
    assert pinned(f"iceberg:{path}").rpartition("@")[2] == pinned(f"iceberg:{first}").rpartition("@")[2] != str(newest)


# --- on a real S3 server


def made_on_s3(kind: str, root: str, tmp_path: Path) -> str:
    """A table of 30 rows in two versions; return it with its first version, of 10 rows."""
    if kind == "delta":
        write_deltalake(f"{root}/sales", rows(0, 10))
        write_deltalake(f"{root}/sales", rows(10, 30), mode="append")
        return f"delta:{root}/sales@0"
    held = {"s3.endpoint": os.environ["AWS_ENDPOINT_URL"], "s3.region": "us-east-1"}
    catalog = SqlCatalog("test", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=root, **held)
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.sales", schema=rows(0, 1).schema)
    table.append(rows(0, 10))
    table.append(rows(10, 30))
    catalog.close()
    return f"iceberg:{table.location()}@{table.metadata.snapshots[0].snapshot_id}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_a_table_on_s3_is_packed_and_trained_on(
    kind: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made_on_s3(kind, f"{s3_bucket}/{secrets.token_hex(4)}", tmp_path)
    assert numbers(source) == list(range(10))
    assert numbers(pinned(source.rpartition("@")[0])) == list(range(30))
    found = Dataset.open(source)
    every = np.arange(len(found.group_rows))
    read = np.concatenate([read_group(found.columns, each)["x"] for each in sources_of(found, every)])
    assert sorted(read.tolist()) == list(range(10))
    assert identity(source)["source"] == source
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    snapshot_files.cache_clear()
    _opened.cache_clear()
    for call in (Dataset.open, find_table, lambda source: pinned(source.rpartition("@")[0])):
        with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as caught:
            call(source)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"no proper answer from http://127.0.0.1:9 in \d s"):
        find_table(source)
