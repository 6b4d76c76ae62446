"""Transforms: the same for any split of rows into blocks, and as a few lines by hand would do them."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastrain.data import transforms
from elastrain.data.blocks import FeedSpec, arrays_of, eval_task
from elastrain.data.columns import Array, Column, to_table
from elastrain.data.dataset import Dataset
from elastrain.data.plan import Plan, row_seeds
from elastrain.data.transforms import apply, check_transforms, delivered, delivered_bytes, load_object
from elastrain.errors import DataError, SpecError
from elastrain.spec.train import Custom, Flip, Scale, Shift, Standardise

COLUMNS = (
    Column(name="image", dtype="uint8", shape=(5, 4), num_values=256, mean=100.0, std=50.0),
    Column(name="colour", dtype="uint8", shape=(5, 4, 3)),
    Column(name="label", dtype="int64", shape=()),
)
STEPS = (
    Flip(name="flip", column="image"),
    Shift(name="shift", column="image", pixels=2),
    Shift(name="shift", column="colour", pixels=1),
    Flip(name="flip", column="colour", p=0.3),
    Custom(name="custom", function="tests.data.test_transforms:noisy", train_only=True),
    Standardise(name="standardise", column="image"),
    Scale(name="scale", column="colour"),
)


def noisy(arrays: dict[str, Array], seeds: Array) -> dict[str, Array]:
    """Add to each label what its seed says."""
    return {**arrays, "label": arrays["label"] + (seeds % np.uint64(1000)).astype(np.int64)}


def shorter(arrays: dict[str, Array], seeds: Array) -> dict[str, Array]:
    """Lose a row, which is not allowed."""
    del seeds
    return {name: array[1:] for name, array in arrays.items()}


def broken(arrays: dict[str, Array], seeds: Array) -> dict[str, Array]:
    """Ask for what is not there."""
    del seeds
    return {"x": arrays["x"]}


def giving(result: Any) -> Any:
    """A function that returns what it should not."""
    return lambda arrays, seeds: result if arrays is not seeds else None


SCALAR, WORDS = giving({"image": 3}), giving({"image": ["a"] * 8})
RAGGED, LIST, EMPTY = giving({"image": [[1], [1, 2]]}), giving([1]), giving({})


def rows(number: int) -> tuple[dict[str, Array], Array]:
    """Rows and their seeds in epoch 3."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        "image": rng.integers(0, 256, (number, 5, 4)).astype(np.uint8),
        "colour": rng.integers(0, 256, (number, 5, 4, 3)).astype(np.uint8),
        "label": np.arange(number),
    }
    return arrays, row_seeds(7, np.full(number, 3, np.int32), np.arange(number))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=5))
def test_any_split_into_blocks_gives_the_same(cuts: list[int]) -> None:
    arrays, seeds = rows(40)
    whole = apply(STEPS, COLUMNS, arrays, seeds, train=True)
    edges = [0, *sorted(set(cuts)), 40]
    parts = [
        apply(STEPS, COLUMNS, {n: a[low:high] for n, a in arrays.items()}, seeds[low:high], train=True)
        for low, high in itertools.pairwise(edges)
    ]
    for name, array in whole.items():
        assert np.array_equal(np.concatenate([part[name] for part in parts]), array)


def test_any_order_of_rows_gives_the_same() -> None:
    arrays, seeds = rows(40)
    order = np.random.default_rng(1).permutation(40)
    whole = apply(STEPS, COLUMNS, arrays, seeds, train=True)
    mixed = apply(STEPS, COLUMNS, {n: a[order] for n, a in arrays.items()}, seeds[order], train=True)
    assert all(np.array_equal(mixed[name], array[order]) for name, array in whole.items())


def test_epochs_and_rows_have_seeds_of_their_own() -> None:
    seeds = [row_seeds(seed, np.full(500, epoch, np.int32), np.arange(500)) for seed in range(2) for epoch in range(3)]
    assert len(np.unique(np.concatenate(seeds))) == 6 * 500


def test_randomness_is_for_training_only() -> None:
    arrays, seeds = rows(40)
    found = apply(STEPS, COLUMNS, arrays, seeds, train=False)
    assert np.array_equal(found["label"], arrays["label"])
    assert np.allclose(found["image"], (arrays["image"].astype(np.float32) - 100) / 50)
    assert np.allclose(found["colour"], arrays["colour"] / 255)


def test_what_is_read_is_left_alone() -> None:
    arrays, seeds = rows(40)
    before = {name: array.copy() for name, array in arrays.items()}
    apply(STEPS, COLUMNS, arrays, seeds, train=True)
    assert all(np.array_equal(array, before[name]) for name, array in arrays.items())


@pytest.mark.parametrize("column", ["image", "colour"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_a_flip_mirrors_some_rows(column: str, p: float) -> None:
    arrays, seeds = rows(2000)
    found = apply([Flip(name="flip", column=column, p=p)], COLUMNS, arrays, seeds, train=True)[column]
    flipped = np.array([np.array_equal(new, old[:, ::-1]) for new, old in zip(found, arrays[column], strict=True)])
    same = np.array([np.array_equal(new, old) for new, old in zip(found, arrays[column], strict=True)])
    assert np.all(flipped ^ same)
    assert abs(flipped.mean() - p) < 0.05


def moved(image: Array, down: int, right: int) -> Array:
    """An image moved, zeros coming in."""
    result = np.zeros_like(image)
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                result[y, x] = image[y - down, x - right]
    return result


@pytest.mark.parametrize("column", ["image", "colour"])
def test_a_shift_moves_each_row_by_its_own_amount(column: str) -> None:
    arrays, seeds = rows(300)
    found = apply([Shift(name="shift", column=column, pixels=2)], COLUMNS, arrays, seeds, train=True)[column]
    ways = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    taken = []
    for new, old in zip(found, arrays[column], strict=True):
        fitting = [way for way in ways if np.array_equal(new, moved(old, *way))]
        assert len(fitting) == 1
        taken += fitting
    assert {way for way in ways if taken.count(way) >= 3} == set(ways), "all ways are taken, about 12 times each"


def test_a_transform_used_twice_draws_twice() -> None:
    arrays, seeds = rows(200)
    step = Flip(name="flip", column="image")
    once = apply([step], COLUMNS, arrays, seeds, train=True)["image"]
    twice = apply([step, step], COLUMNS, arrays, seeds, train=True)["image"]
    assert not np.array_equal(twice, arrays["image"]), "the second would undo the first"
    assert not np.array_equal(twice, once)


def test_scale_and_standardise_are_float32() -> None:
    arrays, seeds = rows(10)
    scaled = apply([Scale(name="scale", column="image", factor=0.5, offset=1)], COLUMNS, arrays, seeds, train=True)[
        "image"
    ]
    assert scaled.dtype == np.float32
    assert np.array_equal(scaled, arrays["image"].astype(np.float32) * np.float32(0.5) + np.float32(1))
    plain = apply([Standardise(name="standardise", column="image")], COLUMNS, arrays, seeds, train=True)["image"]
    assert plain.dtype == np.float32


@pytest.fixture
def stored(tmp_path: Path) -> Dataset:
    """A dataset of 12 rows with the columns above."""
    pq.write_table(to_table(rows(12)[0]), tmp_path / "a.parquet")
    return replace(Dataset.open(str(tmp_path)), columns=COLUMNS)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Scale(name="scale", column="y"), "scale names column 'y'; the columns read are image, colour, label"),
        (Standardise(name="standardise", column="colour"), "'colour' has no stored statistics"),
        (Flip(name="flip", column="label"), r"flip needs images.*'label' is int64\[\]; give it that shape"),
        (Shift(name="shift", column="label"), r"shift needs images.*'label' is int64\[\]; give it that shape"),
    ],
)
def test_a_transform_of_a_column_that_it_cannot_work_on_is_named(stored: Dataset, step: Any, words: str) -> None:
    check_transforms(STEPS, stored, stored)
    with pytest.raises(DataError, match=words):
        check_transforms([step], stored, None)


def test_what_a_custom_function_makes_is_what_later_transforms_find(stored: Dataset) -> None:
    made = Custom(name="custom", function="tests.data.test_transforms:made")
    check_transforms([made, Scale(name="scale", column="new"), Flip(name="flip", column="new")], stored, stored)
    with pytest.raises(DataError, match=r"flip needs images.*'image' is float64\[20\]"):
        check_transforms([made, Flip(name="flip", column="image")], stored, None)
    with pytest.raises(DataError, match="the columns read are image, new"):
        check_transforms([made, Scale(name="scale", column="label")], stored, None)


def made(arrays: dict[str, Array], seeds: Array) -> dict[str, Array]:
    """Flatten the images where they are, drop two columns and make one."""
    del seeds
    arrays["image"] += 1
    return {"image": arrays["image"].reshape(-1, 20) / 2.0, "new": arrays["colour"][:, :, :, 0]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[:2], "no column 'label'; the dataset has image, colour; .*add 'label', or leave it out"),
        (lambda c: (*c[:2], replace(c[2], dtype="int32")), r"'label' is int32\[\], but int64\[\] in .*; pack both"),
        (
            lambda c: (replace(c[0], shape=(4, 5)), *c[1:]),
            r"'image' is uint8\[4, 5\], but uint8\[5, 4\] in .*; pack both",
        ),
    ],
)
def test_evaluation_data_that_are_not_as_the_training_data_are_named(stored: Dataset, change: Any, words: str) -> None:
    other = replace(stored, url="/other", columns=change(COLUMNS))
    with pytest.raises(DataError, match=f"/other: .*{words}"):
        check_transforms([], stored, other)
    more = replace(stored, columns=(Column(name="more", dtype="int8", shape=()), *COLUMNS))
    check_transforms([], stored, more)


def test_a_function_for_training_only_may_change_what_columns_are(stored: Dataset) -> None:
    """Soft labels, say; but what evaluation does must not need what only training has."""
    steps = [Custom(name="custom", function="tests.data.test_transforms:made", train_only=True)]
    check_transforms(steps, stored, stored)
    check_transforms([*steps, Flip(name="flip", column="new")], stored, stored)
    steps_on_new = [*steps, Scale(name="scale", column="new")]
    check_transforms(steps_on_new, stored, None)
    with pytest.raises(DataError, match="scale names column 'new'; the columns read are image, colour, label"):
        check_transforms(steps_on_new, stored, stored)


def test_standardising_evaluation_takes_what_the_training_data_measured(stored: Dataset) -> None:
    other = replace(stored, columns=(replace(COLUMNS[0], mean=1.0, std=2.0), *COLUMNS[1:]))
    spec = FeedSpec(
        plan=Plan.of(stored, seed=0, global_batch=4, slots=2),
        train=stored,
        evaluation=other,
        transforms=(Standardise(name="standardise", column="image"),),
        begin=0,
        end=3,
        reading=(1.0, 1),
    )
    found = arrays_of(eval_task(spec, 0)(), where="here")
    assert np.array_equal(found["image"], (rows(12)[0]["image"].astype(np.float32) - 100) / 50)


def test_what_workers_get_is_told_without_rows() -> None:
    arrays, seeds = rows(10)
    steps = [step for step in STEPS if not isinstance(step, Custom)]
    found = apply(steps, COLUMNS, arrays, seeds, train=True)
    told = {column.name: (column.dtype, column.shape) for column in delivered(steps, COLUMNS)}
    assert told == {name: (str(array.dtype), array.shape[1:]) for name, array in found.items()}
    assert delivered_bytes(steps, COLUMNS) == sum(array.nbytes for array in found.values()) / 10


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("tests.data.test_transforms:shorter", r"arrays with 8 rows.*given; its 'image' is uint8\[7, 5, 4\]"),
        ("tests.data.test_transforms:SCALAR", "arrays with 8 rows.*its 'image' is int64"),
        ("tests.data.test_transforms:RAGGED", "arrays with 8 rows.*its 'image' is no array"),
        ("tests.data.test_transforms:WORDS", "arrays with 8 rows.*its 'image' is <U1"),
        ("tests.data.test_transforms:LIST", "arrays with 8 rows.*it gave list"),
        ("tests.data.test_transforms:EMPTY", "arrays with 8 rows.*it gave an empty one"),
        ("tests.data.test_transforms:broken", "broken raised KeyError: 'x' at .*test_transforms.py line"),
        ("tests.data.test_transforms:nothing", "has no 'nothing'"),
        ("nowhere.at_all:f", "cannot import nowhere.at_all: ModuleNotFoundError: No module named 'nowhere'; correct"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("f", "'f' is neither file.py:name nor module:name"),
    ],
)
def test_a_function_that_does_not_work_is_named_before_anything_starts(
    stored: Dataset, function: str, words: str
) -> None:
    step = Custom(name="custom", function=function)
    with pytest.raises(SpecError, match=words):
        check_transforms([step], stored, None)
    with pytest.raises(SpecError, match=words):
        apply([step], COLUMNS, *rows(8), train=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:\n", r"cannot import .*mine.py: SyntaxError: .*mine.py, line 1\); correct it"),
        (
            "\nimport nowhere_at_all\n",
            "cannot import .*mine.py: ModuleNotFoundError: .*at .*mine.py line 2; correct it",
        ),
        ("open('/no/where')\n", "cannot import .*mine.py: FileNotFoundError: .*/no/where.* at .*mine.py line 1"),
        ("def f(arrays, seeds):\n    return 1 / 0\n", "raised ZeroDivisionError: .* at .*mine.py line 2"),
    ],
)
def test_a_file_that_does_not_work_is_named_and_read_again_once_corrected(
    stored: Dataset, text: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    step = Custom(name="custom", function=f"{file}:f")
    with pytest.raises(SpecError, match=words):
        check_transforms([step], stored, None)
    file.write_text("def f(arrays, seeds):\n    return dict(arrays)\n\n")
    check_transforms([step], stored, None)


def test_a_file_is_loaded_once_and_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_functions.py").write_text("number = 3\n")
    file = tmp_path / "functions.py"
    file.write_text("from neighbour_of_functions import number\n\nmade = object()\n")
    assert load_object(f"{file}:number", where="here") == 3
    assert load_object(f"{file}:made", where="here") is load_object(f"{file}:made", where="here")
    (tmp_path / "broken.py").write_text("raise ValueError('mine')\n")
    for _ in range(2):
        with pytest.raises(SpecError, match=r"here: cannot import .*ValueError: mine at .*broken\.py line 1"):
            load_object(f"{tmp_path / 'broken.py'}:x", where="here")
    assert transforms._load_file(file).number == 3
