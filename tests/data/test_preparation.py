"""What is checked, removed and noted before rows are written: each step alone, and as a pack of real files."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from elastrain.data import csv_files, duplicates
from elastrain.data.chunks import PackOptions, Removed, place_hashes
from elastrain.data.columns import Array, Column
from elastrain.data.dataset import Dataset
from elastrain.data.duplicates import HashReader, RowHashes, as_words, hashes_of
from elastrain.data.preparation import Preparation
from elastrain.data.shards import read_back
from elastrain.data.sources import open_source
from elastrain.data.statistics import COUNTED_VALUES, Distinct, Sums
from elastrain.data.tables import null_rows
from elastrain.errors import DataError, SpecError


def options(*, label: str | None = None, **prepare: Any) -> PackOptions:
    """Small row groups, so that there are several."""
    return PackOptions(label=label, row_group_bytes=4000, prepare=Preparation(**prepare))


def rows_of(url: str) -> dict[str, Array]:
    """Return all rows of a packed dataset."""
    dataset = Dataset.open(url)
    groups = [arrays for shard in dataset.shards for arrays in read_back(Path(url) / shard.path)]
    return {column.name: np.concatenate([group[column.name] for group in groups]) for column in dataset.columns}


def prepared(source: str, given: PackOptions) -> dict[str, Any]:
    """Pack without Ray's tasks and without writing: the rows of each split as its reader gives them."""
    found = {}
    for name, split in open_source(source, given).items():
        pieces = list(split.pieces())
        found[name] = {c.name: np.concatenate([piece[c.name] for piece in pieces]) for c in split.columns}
    return found


# --- options


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"nulls": "keep"}, "--nulls 'keep' is not one of error, drop"),
        ({"non_finite": "x"}, "--non-finite 'x' is not one of error, drop, keep"),
        ({"duplicates": "no"}, "--duplicates 'no'"),
        ({"key": "id"}, "--key says which rows are duplicates"),
        ({"classes": 0}, "--classes 0"),
        ({"split": "train=0.9"}, "sum to 1"),
        ({"split": "train=0.5,train=0.5"}, "sum to 1"),
        ({"split": "train=0.9,dev=0.1"}, "train, val and test"),
        ({"split": "train=1.5,test=-0.5"}, "sum to 1"),
        ({"split": "test=1"}, "sum to 1"),
        ({"split": "train=nan,test=0.1"}, "sum to 1"),
        ({"expect": "x"}, "NAME:TYPE"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        Preparation(**given)
    assert words in str(caught.value)


def test_options_are_refused_where_they_do_not_apply(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3,4\n")
    for source, given, words in (
        ("digits", options(nulls="drop"), "--nulls does not apply to digits"),
        ("digits", options(split="train=0.9,test=0.1"), "--split does not apply to digits"),
        (f"text:{tmp_path}/a.txt", options(duplicates="drop"), "--duplicates does not apply to text"),
        (f"csv:{tmp_path}/a.csv", options(classes=2), "--classes bounds a column of labels, and there is none"),
    ):
        with pytest.raises(SpecError, match=words):
            open_source(source, given)
    with pytest.raises(SpecError, match="give one of them"):
        PackOptions(test_fraction=0.1, prepare=Preparation(split="train=0.9,test=0.1"))
    with pytest.raises(SpecError, match="--by says how rows are split"):
        options(by="x")
    with pytest.raises(DataError, match="no column 'who'"):
        open_source(f"csv:{tmp_path}/a.csv", options(duplicates="drop", key="who"))


def test_a_pack_from_before_these_options_is_still_the_same_pack() -> None:
    assert set(PackOptions().identity()) == {
        *("context", "tokenizer", "test_fraction", "codec", "row_group_bytes", "shard_bytes"),
        *("image_size", "label", "columns"),
    }
    assert options(nulls="drop").identity()["nulls"] == "drop"


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ("x:int64,y:float64", None),
        ("x:int64", "column 'y', which is not expected"),
        ("x:int64,y:int64", "column 'y' is float64 where int64 is expected"),
        ("x:int64,y:float64,z:int8[2,2]", "no column 'z'"),
    ],
)
def test_columns_are_those_expected(expect: str, words: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2.5\n")
    if words is None:
        open_source(f"csv:{tmp_path}/a.csv", options(expect=expect))
        return
    with pytest.raises(DataError, match=words):
        open_source(f"csv:{tmp_path}/a.csv", options(expect=expect))


# --- nulls, and what is not finite


def test_rows_that_lack_something_are_found_in_any_layout() -> None:
    nested = pa.array([[[1], [2]], [[1], [None]], None, [[3], None]])
    fixed = pa.array([[1, 2], None, [3, None]], pa.list_(pa.int64(), 2))
    images = pa.array([{"bytes": b"x"}, {"bytes": None}, None])
    assert null_rows(pa.array([1, None, 3])).tolist() == [False, True, False]
    assert null_rows(nested).tolist() == [False, True, True, True]
    assert null_rows(fixed).tolist() == [False, True, True]
    assert null_rows(fixed.slice(1)).tolist() == [True, True]
    assert null_rows(images).tolist() == [False, True, True]
    assert null_rows(pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 3)))).tolist() == [False, False]


def with_nulls(folder: Path) -> None:
    """Two CSV files of 1000 rows with 5 rows that lack a value (CSV has no other NaN) and one that is not finite."""
    folder.mkdir()
    for name in ("a", "b"):
        lines = [f"{row},{row / 2},{'cat' if row % 2 else 'dog'}" for row in range(1000)]
        if name == "b":
            lines[10], lines[20], lines[30] = ",1.5,cat", "20,,dog", "30,2.5,"
            lines[40], lines[50], lines[60] = "40,nan,cat", "50,inf,cat", ",-inf,dog"
        (folder / f"{name}.csv").write_text("n,x,kind\n" + "\n".join(lines) + "\n")


def test_rows_without_values_are_an_error_with_their_number_and_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_files, "BLOCK_BYTES", 150)  # there is a row without a value in several blocks
    with_nulls(tmp_path / "in")
    for given, words in (
        (options(label="kind"), "in/b.csv: column 'n' has no value in row 10, the first of 5 such rows"),
        (options(label="kind", nulls="drop"), "in/b.csv: column 'x' is not finite in row 50, the first of 1 such rows"),
    ):
        with pytest.raises(DataError) as caught:
            prepared(f"csv:{tmp_path}/in", given)
        assert words in str(caught.value)
    kept = prepared(f"csv:{tmp_path}/in", options(label="kind", nulls="drop", non_finite="keep"))
    assert len(kept["train"]["x"]) == 1995
    assert np.isinf(kept["train"]["x"]).sum() == 1
    values = [[1.0, 2.0], [np.nan, 3.0], [4.0, np.inf], [5.0, 6.0]]
    pq.write_table(pa.table({"x": pa.array(values), "y": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'x' is not finite in row 1, the first of 2 such rows"):
        prepared(f"parquet:{tmp_path}/a.parquet", options(nulls="drop"))
    left = prepared(f"parquet:{tmp_path}/a.parquet", options(non_finite="drop"))
    assert left["train"]["y"].tolist() == [1, 4]


# --- duplicates


@pytest.mark.parametrize("by_key", [False, True])
def test_duplicates_are_those_that_a_dictionary_finds(by_key: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    monkeypatch.setattr(duplicates, "COUNTED_AT_ONCE", 100)
    rng = np.random.default_rng(0)
    values, labels = rng.integers(0, 3000, 5000), rng.integers(0, 3, 5000)
    with RowHashes(by_key=by_key) as hashes:
        for low in range(0, 5000, 77):
            part = slice(low, low + 77)
            words = as_words(hashes_of(value.tobytes() for value in values[part]))
            hashes.add({"hash": words, "label": labels[part]})
        hashes.finish()
        seen: set[Any] = set()
        expected = []
        for value, label in zip(values.tolist(), labels.tolist(), strict=True):
            same = value if by_key else (value, label)
            expected.append(same in seen)
            seen.add(same)
        found = np.concatenate([hashes.twice(low, min(33, 5000 - low)) for low in range(0, 5000, 33)])
        assert found.tolist() == expected
        assert hashes.duplicates == hashes.count(0, 5000) == sum(expected)
        with pytest.raises(DataError, match="its files change"):
            hashes.twice(4999, 2)
        if not by_key:
            first = {
                v: [
                    int(np.flatnonzero((values == v) & (labels == k))[0])
                    for k in range(3)
                    if ((values == v) & (labels == k)).any()
                ]
                for v in set(values.tolist())
            }
            several = {v: rows for v, rows in first.items() if len(rows) > 1}
            assert hashes.num_contradictions == len(several)
            assert len(hashes.contradictions) == duplicates.SHOWN
            for pair in hashes.contradictions:
                assert values[pair["rows"][0]] == values[pair["rows"][1]]
                assert labels[pair["rows"]].tolist() == pair["labels"]


def test_memory_holds_a_part_of_the_hashes() -> None:
    rows, step = 1_000_000, 50_000
    with RowHashes(by_key=False) as hashes:
        tracemalloc.start()
        for low in range(0, rows, step):
            words = as_words(hashes_of(b"%d" % (row % 700_000) for row in range(low, low + step)))
            hashes.add({"hash": words, "label": np.zeros(step, np.int64)})
        hashes.finish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert hashes.duplicates == 300_000
    buffers = 256 * duplicates.BUFFER_BYTES
    assert (
        peak
        < buffers + 12 * step * duplicates.RECORD.itemsize
        < rows * duplicates.RECORD.itemsize + buffers + (4 << 20)
    )


def test_rows_that_are_all_removed_leave_nothing_to_hash(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"x": [np.nan, np.inf], "who": pa.array(["", "a"]).dictionary_encode()}), tmp_path / "a.parquet"
    )
    source = f"parquet:{tmp_path}/a.parquet"
    for given, removed in (
        (options(non_finite="drop", nulls="drop", duplicates="drop", key="who"), [("nulls", 1), ("non-finite", 1)]),
        (options(non_finite="drop", duplicates="drop"), [("non-finite", 2)]),
    ):
        split = open_source(source, replace(given, columns=("x",)))["train"]
        pieces = list(split.reader.read(split.chunks[0]))
        assert [(p.step, p.rows) for p in pieces if isinstance(p, Removed)] == removed
        assert not list(HashReader(split.reader, ("x",), None).read(split.chunks[0]))


# --- splits


def people(folder: Path, rows: range) -> None:
    """CSV rows of 200 people, with nothing but their own number beside."""
    folder.mkdir(exist_ok=True)
    lines = (f"p{row * 7919 % 200},{row}" for row in rows)
    (folder / f"{rows.start:06}.csv").write_text("who,n\n" + "\n".join(lines) + "\n")


def split_of(folder: Path) -> dict[str, set[int]]:
    """Return the rows of each split by person."""
    given = PackOptions(columns=("n",), prepare=Preparation(split="train=0.6,val=0.2,test=0.2", by="who"))
    return {name: set(rows["n"].tolist()) for name, rows in prepared(f"csv:{folder}", given).items()}


def test_all_rows_of_a_key_are_in_one_split_also_when_rows_are_added(tmp_path: Path) -> None:
    people(tmp_path / "in", range(1000, 3000))
    before = split_of(tmp_path / "in")
    owners = {name: {row * 7919 % 200 for row in rows} for name, rows in before.items()}
    assert list(before) == ["train", "val", "test"]
    assert sum(map(len, before.values())) == 2000
    assert sum(map(len, owners.values())) == len(set().union(*owners.values())) == 200
    assert all(15 < len(owners[name]) < 65 for name in ("val", "test"))
    people(tmp_path / "in", range(1000))
    after = split_of(tmp_path / "in")
    assert sum(map(len, after.values())) == 3000
    assert all(before[name] <= after[name] for name in before), "no row changed sides"


def test_shares_without_a_key_split_as_a_test_fraction_does(tmp_path: Path) -> None:
    people(tmp_path / "in", range(2000))
    source = f"csv:{tmp_path}/in"
    shared = prepared(source, PackOptions(columns=("n",), prepare=Preparation(split="train=0.9,test=0.1")))
    fraction = prepared(source, PackOptions(columns=("n",), test_fraction=0.1))
    held_out = place_hashes("000000.csv", np.arange(2000)) < np.uint64(0.1 * 2**64)
    for found in (shared, fraction):
        assert np.array_equal(found["test"]["n"], np.flatnonzero(held_out))
        assert np.array_equal(found["train"]["n"], np.flatnonzero(~held_out))


# --- labels and statistics


def test_different_values_are_counted_up_to_a_bound() -> None:
    few, many = (Sums(Column(name="x", dtype="int64", shape=())) for _ in range(2))
    few.add(np.array([3, 1, 3]))
    few.add(np.array([1, 1]))
    assert few.counts == {3: 2, 1: 3}
    many.add(np.arange(COUNTED_VALUES))
    assert many.different() == (COUNTED_VALUES, False)
    many.add(np.array([-1]))
    assert many.different()[0] == pytest.approx(COUNTED_VALUES + 1, rel=0.05), "what was counted is not forgotten"
    many.add(np.arange(4 * COUNTED_VALUES))
    assert many.different()[0] == pytest.approx(4 * COUNTED_VALUES, rel=0.05)
    assert many.different()[1]


def test_different_values_are_exact_while_few_and_then_estimated_in_any_order() -> None:
    few, many, backwards = Distinct(), Distinct(), Distinct()
    few.add(np.array([1.5, 0.0, -0.0, np.nan, np.inf, 1.5]))
    few.add(np.array([np.inf, np.nan, 2.5], np.float32))
    assert (few.count, few.estimated) == (4, False)
    rows = np.random.default_rng(0).integers(-(2**40), 2**40, 100_000)
    for low in range(0, len(rows), 997):
        many.add(rows[low : low + 997])
        backwards.add(rows[::-1][low : low + 997])
        if low < 3000:
            assert many.count == low + 997
    assert many.estimated
    assert many.count == backwards.count == pytest.approx(100_000, rel=0.05)
    one = many.count
    many.add(rows)
    assert many.count == one, "a value counts once"


def test_options_can_be_replaced() -> None:
    assert replace(Preparation(), nulls="drop").removes
    assert not Preparation(duplicates="count").removes
