"""Datasets: what opens, what does not, and what the fingerprint is over."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastrain import storage
from elastrain.data.columns import Array, to_table
from elastrain.data.dataset import MANIFEST, PACKING, Dataset, read_footer
from elastrain.errors import DataError


def write(path: Path, rows: int, *, first: int = 0, **options: Any) -> None:
    """Write a Parquet file with an image and a label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(first, first + rows)
    images: Array = np.repeat(numbers.astype(np.uint8), 4).reshape(-1, 2, 2)
    arrays: dict[str, Array] = {"image": images, "label": (numbers % 3).astype(np.int64)}
    pq.write_table(to_table(arrays), path, **options)


def test_a_plain_folder_is_a_dataset(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 10, row_group_size=4)
    write(tmp_path / "deep" / "b.parquet", 5, first=10)
    dataset = Dataset.open(str(tmp_path))
    assert [shard.path for shard in dataset.shards] == ["a.parquet", "deep/b.parquet"]
    assert dataset.group_rows.tolist() == [4, 4, 2, 5]
    assert dataset.num_rows == 15
    assert not dataset.packed
    assert {c.name: (c.dtype, c.shape, c.num_values) for c in dataset.columns} == {
        "image": ("uint8", (2, 2), None),
        "label": ("int64", (), 3),
    }
    assert dataset.row_bytes == 12
    assert [dataset.group_address(group) for group in range(4)] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert Dataset.from_manifest(dataset.url, json.loads(json.dumps(dataset.manifest()))) == dataset
    assert Dataset.open(str(tmp_path / "a.parquet")).num_rows == 10


def test_the_fingerprint_is_over_what_is_held_not_where(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.parquet", 10)
    write(tmp_path / "two" / "z.parquet", 10)
    write(tmp_path / "other" / "a.parquet", 10, first=1)
    one, two, other = (Dataset.open(str(tmp_path / name)).fingerprint for name in ("one", "two", "other"))
    assert one == two
    assert one != other


def test_columns_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2], "name": ["a", "b"], "list": [[1], [1, 2]]}), tmp_path / "a.parquet")
    dataset = Dataset.open(str(tmp_path))
    assert [column.name for column in dataset.columns] == ["x"]
    assert set(dataset.unusable) == {"name", "list"}
    with pytest.raises(DataError, match=r"'name' cannot be read: .*string"):
        dataset.select(["name"])
    with pytest.raises(DataError, match="no column 'y'; the dataset has x"):
        dataset.select(["y"])
    assert dataset.select(["x"]).columns == dataset.columns


def broken(url: Path, *words: str) -> None:
    """Check that opening is a DataError which says all of the words."""
    with pytest.raises(DataError) as caught:
        Dataset.open(str(url))
    for word in words:
        assert word in str(caught.value)


def test_what_is_no_dataset_is_named(tmp_path: Path) -> None:
    broken(tmp_path / "nowhere", "nowhere", "elastrain pack")
    broken(tmp_path, str(tmp_path), "no Parquet files")
    pq.write_table(pa.table({"x": pa.array([], pa.int64())}), tmp_path / "a.parquet")
    broken(tmp_path, "no rows")


def test_files_of_different_schema_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 3)
    pq.write_table(pa.table({"image": [1], "label": [1]}), tmp_path / "b.parquet")
    broken(tmp_path, f"{tmp_path}/b.parquet", "'image'", f"{tmp_path}/a.parquet")


@pytest.mark.parametrize("keep", [0, 3, 11, 50, -1])
def test_truncated_files_are_named(keep: int, tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 3)
    write(tmp_path / "b.parquet", 3)
    data = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[:keep])
    broken(tmp_path, f"{tmp_path}/b.parquet")


def test_footers_of_another_size_or_gone(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 3)
    url, size = str(tmp_path / "a.parquet"), (tmp_path / "a.parquet").stat().st_size
    assert read_footer(url, size)[0].num_rows == 3
    with pytest.raises(DataError, match="truncated or replaced"):
        read_footer(url, size + 1)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError, match="gone"):
        read_footer(url, size)


def test_a_big_footer_is_read_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 2000, row_group_size=1)
    metadata, _ = read_footer(str(tmp_path / "a.parquet"), (tmp_path / "a.parquet").stat().st_size)
    assert metadata.serialized_size > 65536
    assert metadata.num_row_groups == 2000


def test_a_pack_that_was_cut_off_does_not_open(tmp_path: Path) -> None:
    write(tmp_path / "part-00000.parquet", 3)
    (tmp_path / PACKING).write_text("{}")
    broken(tmp_path, "cut off", "again")


@pytest.mark.parametrize(
    ("text", "words"), [("[]", "not a manifest"), ("{}", "not a manifest"), ('{"format": 99}', "format 99")]
)
def test_other_manifests_are_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    broken(tmp_path, words)


def test_a_dataset_opens_on_any_store(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 5)
    storage.put("memory://held/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert Dataset.open("memory://held").fingerprint == Dataset.open(str(tmp_path)).fingerprint
