"""Folders that Hugging Face's own library wrote, and what its Hub keeps."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Value

from elastrain.data.chunks import PackOptions
from elastrain.data.sources import open_source
from elastrain.errors import DataError

NAMES = ["cat", "dog"]
FEATURES = Features({"x": Array2D((2, 3), "float32"), "label": ClassLabel(names=NAMES), "id": Value("int32")})


def made(rows: int, seed: int) -> Dataset:
    """A dataset with a matrix, a class and a number a row."""
    draw = np.random.default_rng(seed)
    x, label = draw.random((rows, 2, 3), np.float32), draw.integers(0, 2, rows)
    return Dataset.from_dict({"x": list(x), "label": label.tolist(), "id": list(range(rows))}, features=FEATURES)


def ids(folder: Path) -> dict[str, list[int]]:
    """The numbers of the rows in each split, in order."""
    splits = open_source(f"hf:{folder}", PackOptions())
    return {n: [i for piece in split.pieces() for i in piece["id"].tolist()] for n, split in splits.items()}


def test_a_saved_dataset_is_read_with_shapes_and_classes(tmp_path: Path) -> None:
    whole = DatasetDict({"train": made(5000, 0), "test": made(30, 1)})
    whole.save_to_disk(tmp_path, num_shards={"train": 3, "test": 1})
    splits = open_source(f"hf:{tmp_path}", PackOptions())
    assert {name: split.rows for name, split in splits.items()} == {"train": 5000, "test": 30}
    assert [(c.name, c.dtype, c.shape) for c in splits["train"].columns] == [
        ("x", "float32", (2, 3)),
        ("label", "int64", ()),
        ("id", "int32", ()),
    ]
    assert splits["train"].info["classes"] == {"label": NAMES}
    pieces = list(splits["train"].pieces())
    for name in ("x", "label"):
        found = np.concatenate([piece[name] for piece in pieces])
        assert np.array_equal(found, np.array(whole["train"].with_format("numpy")[name]))
    assert ids(tmp_path) == {"train": list(range(5000)), "test": list(range(30))}


def test_a_folder_as_on_the_hub_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    made(40, 0).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    made(10, 1).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert ids(tmp_path) == {"train": list(range(40)), "test": list(range(10))}
    assert open_source(f"hf:{tmp_path}", PackOptions())["test"].info["classes"] == {"label": NAMES}


def test_arrow_files_that_do_not_count_are_left_out(tmp_path: Path) -> None:
    made(20, 0).save_to_disk(tmp_path)
    data = next(tmp_path.glob("*.arrow"))
    (tmp_path / "cache-0123.arrow").write_bytes(data.read_bytes())
    assert ids(tmp_path) == {"train": list(range(20))}
    (tmp_path / "state.json").unlink()
    with pytest.raises(
        DataError, match=r"state\.json: missing or broken, so that nobody knows which Arrow files count"
    ):
        ids(tmp_path)


def test_a_broken_arrow_file_is_named(tmp_path: Path) -> None:
    made(2000, 0).save_to_disk(tmp_path)
    data = next(tmp_path.glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:3000])
    with pytest.raises(DataError, match=rf"{data.name}: cannot be read"):
        ids(tmp_path)


def test_configurations_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    for name, column in (("one", "x"), ("two", "y")):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({column: [1, 2]}), tmp_path / name / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"two/train-00000-of-00001\.parquet: column 'x' is missing"):
        ids(tmp_path)
