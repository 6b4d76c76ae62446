"""Datasets: what opens, what does not, and what the fingerprint is over."""

import json
import subprocess
import sys
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


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_plain_files_whose_pages_have_no_checksums_are_told(version: str, dictionary: bool, tmp_path: Path) -> None:  # noqa: FBT001
    form: dict[str, Any] = {"use_dictionary": dictionary, "data_page_version": version, "compression": "zstd"}
    write(tmp_path / "with" / "a.parquet", 3000, write_page_checksum=True, **form)
    write(tmp_path / "without" / "a.parquet", 3000, **form)
    assert Dataset.open(str(tmp_path / "with")).doubt() is None
    told = Dataset.open(str(tmp_path / "without")).doubt()
    assert told is not None
    assert told.startswith(f"{tmp_path}/without: the files have no page checksums")


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
    (tmp_path / "a.csv").write_text("x\n1\n")
    broken(tmp_path / "a.csv", "a.csv: not a Parquet file", "elastrain pack")
    pq.write_table(pa.table({"x": pa.array([], pa.int64())}), tmp_path / "a.parquet")
    broken(tmp_path, "no rows")


def test_files_of_different_schema_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 3)
    pq.write_table(pa.table({"image": [1], "label": [1]}), tmp_path / "b.parquet")
    broken(tmp_path, f"{tmp_path}/b.parquet", "'image'", f"{tmp_path}/a.parquet")


def test_tensors_of_equal_width_and_different_type_are_not_one_column(tmp_path: Path) -> None:
    pq.write_table(to_table({"x": np.ones((3, 2), np.float32)}), tmp_path / "a.parquet")
    pq.write_table(to_table({"x": np.ones((3, 2), np.int32)}), tmp_path / "b.parquet")
    broken(tmp_path, f"{tmp_path}/b.parquet: column 'x' is int32 [2], but float32 [2] in {tmp_path}/a.parquet")
    pq.write_table(to_table({"x": np.ones((3, 2), np.float32)}), tmp_path / "b.parquet")
    assert Dataset.open(str(tmp_path)).num_rows == 6


@pytest.mark.parametrize("version", ["", "_v2"])
def test_ray_tensors_are_the_same_whether_ray_is_loaded_or_not(version: str, tmp_path: Path) -> None:
    """Ray registers the type when it is imported; else Arrow sees the lists that the tensors are stored as."""
    metadata = {"ARROW:extension:name": f"ray.data.arrow_tensor{version}", "ARROW:extension:metadata": "[2, 3]"}
    kind = pa.large_list(pa.float32()) if version else pa.list_(pa.float32())
    schema = pa.schema([pa.field("x", kind, metadata=metadata)])
    pq.write_table(pa.table([pa.array([[1.0] * 6] * 4, kind)], schema=schema), tmp_path / "a.parquet")
    code = "import sys; from elastrain import Dataset; d = Dataset.open(sys.argv[1]); print(d.columns, d.fingerprint)"
    seen = [
        subprocess.run([sys.executable, "-c", first + code, str(tmp_path)], capture_output=True, text=True, check=True)
        for first in ("", "import ray.data; ")
    ]
    assert "shape=(2, 3)" in seen[0].stdout
    assert seen[0].stdout == seen[1].stdout


def test_names_inside_lists_are_no_difference(tmp_path: Path) -> None:
    for name in ("item", "element"):
        values = pa.array([[1, 2], [3, 4]], pa.list_(pa.field(name, pa.int32())))
        pq.write_table(pa.table({"x": values}), tmp_path / f"{name}.parquet", use_compliant_nested_type=False)
    assert Dataset.open(str(tmp_path)).columns[0].shape == (2,)


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


def test_the_folder_above_the_splits_is_refused(tmp_path: Path) -> None:
    above = tmp_path / "d"
    for split in ("train", "test"):
        write(above / split / "part-00000.parquet", 3)
        (above / split / MANIFEST).write_text("{}")
    broken(above, f"{above} holds the splits test, train: give {above}/train")
    (above / "train" / MANIFEST).rename(above / "train" / PACKING)
    broken(above, f"{above} holds the splits test, train: give {above}/train")
    broken(tmp_path, f"{tmp_path} holds the splits d/test, d/train: give {tmp_path}/d/train")
    for split, name in {"train": PACKING, "test": MANIFEST}.items():
        (above / split / name).unlink()
    assert Dataset.open(str(above)).num_rows == 6, "a plain folder may have folders of any name"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "not a manifest"),
        ("{}", "not a manifest"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "sha', "not a JSON document"),
        ("", "not a JSON document"),
        ("\udcff", "not a JSON document"),
    ],
)
def test_other_manifests_are_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text, errors="surrogateescape")
    broken(tmp_path, str(tmp_path), words, "`elastrain pack … --overwrite`")


def test_a_dataset_opens_on_any_store(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 5)
    storage.put("memory://held/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert Dataset.open("memory://held").fingerprint == Dataset.open(str(tmp_path)).fingerprint
