"""Shards that cannot be read: found, left out with all that follows, and never those that only storage lacks."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastrain.data.columns import Column
from elastrain.data.dataset import MANIFEST, Dataset, fingerprint
from elastrain.data.quarantine import QUARANTINE, events, find_bad, left_out, without
from elastrain.data.shards import ShardWriter
from elastrain.data.sources import PackOptions
from elastrain.errors import DataError, StorageError
from elastrain.storage import put_json


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Four shards of two row groups of 100 rows."""
    columns = [Column(name="x", dtype="int32", shape=())]
    with ShardWriter(str(tmp_path), columns, PackOptions(row_group_bytes=400, shard_bytes=800, codec="none")) as writer:
        writer.write({"x": np.arange(800, dtype=np.int32)})
        shards, _ = writer.finish()
    made = Dataset(
        url=str(tmp_path),
        columns=tuple(columns),
        shards=tuple(shards),
        fingerprint=fingerprint(columns, shards),
        packed=True,
    )
    put_json(str(tmp_path / MANIFEST), made.manifest())
    return Dataset.open(str(tmp_path))


def damage(dataset: Dataset, index: int, place: int) -> str:
    path = Path(dataset.url, dataset.shards[index].path)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    return str(path)


def test_whole_data_are_left_as_they_are(dataset: Dataset) -> None:
    note = find_bad(dataset)
    assert note == {"fingerprint": dataset.fingerprint, "shards": []}
    assert without(dataset, note) is dataset


def test_what_a_run_began_without_stays_so_while_its_data_are_the_same(dataset: Dataset, tmp_path: Path) -> None:
    noted = {"fingerprint": dataset.fingerprint, "shards": [{"file": "x", "rows": 1, "why": "then"}]}
    put_json(f"{tmp_path}/run/{QUARANTINE}", {"train": noted})
    run = f"{tmp_path}/run"
    assert left_out({"train": dataset}, run, fresh=False) == {"train": noted}
    whole = {"train": {"fingerprint": dataset.fingerprint, "shards": []}}
    assert left_out({"train": dataset}, run, fresh=True) == whole
    put_json(f"{tmp_path}/run/{QUARANTINE}", {"train": noted | {"fingerprint": "another"}})
    assert left_out({"train": dataset}, run, fresh=False) == whole


@pytest.mark.parametrize("place", [200, -20], ids=["a page", "the footer"])
def test_a_shard_with_a_flipped_bit_is_left_out_with_a_fingerprint_that_says_so(dataset: Dataset, place: int) -> None:
    path = damage(dataset, 2, place)
    note = find_bad(dataset)
    assert [(shard["file"], shard["rows"]) for shard in note["shards"]] == [(dataset.shards[2].path, 200)]
    rest = without(dataset, note)
    assert (rest.num_rows, len(rest.shards)) == (600, 3)
    assert rest.fingerprint != dataset.fingerprint
    assert rest.fingerprint == without(dataset, find_bad(dataset)).fingerprint
    (told,) = events({"train": dataset}, {"train": note})
    assert (told["file"], told["rows"]) == (path, 200)
    assert "corrupted" in told["why"]
    assert not find_bad(rest)["shards"]


def test_a_shard_that_is_missing_is_an_error(dataset: Dataset) -> None:
    Path(dataset.url, dataset.shards[1].path).unlink()
    with pytest.raises(DataError, match=rf"{dataset.shards[1].path}: the file is gone"):
        find_bad(dataset)


def test_data_of_which_nothing_can_be_read_are_an_error(dataset: Dataset) -> None:
    for index in range(4):
        damage(dataset, index, 200)
    with pytest.raises(DataError, match="no shard can be read"):
        find_bad(dataset)


def test_storage_that_does_not_answer_makes_no_shard_bad(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object) -> None:
        raise StorageError("no proper answer")

    monkeypatch.setattr("elastrain.storage.open_arrow", down)
    with pytest.raises(StorageError, match="no proper answer"):
        find_bad(dataset)


def plain(folder: Path, *files: range) -> None:
    for number, rows in enumerate(files):
        table = pa.table({"x": list(rows)})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=100, write_page_checksum=True)


def test_a_plain_file_without_a_readable_footer_is_left_out_for_good(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    plain(folder, range(100), range(100, 300), range(300, 600))
    bad = folder / "1.parquet"
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=rf"^{bad}: not a Parquet file, or truncated"):
        Dataset.open(str(folder))
    data = Dataset.open(str(folder), on_bad_shard="quarantine")
    assert data.num_rows == 400
    notes = left_out({"train": data}, f"{tmp_path}/run", fresh=True)
    (told,) = events({"train": data}, notes)
    assert (told["file"], told["rows"]) == (str(bad), 0)
    assert "truncated" in told["why"]
    rest = without(data, notes["train"])
    put_json(f"{tmp_path}/run/{QUARANTINE}", notes)
    bad.write_bytes(good)
    restored = Dataset.open(str(folder), on_bad_shard="quarantine")
    assert restored.num_rows == 600
    assert left_out({"train": restored}, f"{tmp_path}/run", fresh=False) == notes
    assert without(restored, notes["train"]).fingerprint == rest.fingerprint
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="truncated"):
        Dataset.open(str(folder), on_bad_shard="quarantine")
