"""Transforms: the same for any split of rows into blocks, and as a few lines by hand would do them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastrain.data import transforms
from elastrain.data.columns import Array, Column
from elastrain.data.plan import row_seeds
from elastrain.data.transforms import apply, check_transforms, load_object
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


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Scale(name="scale", column="y"), "scale names column 'y'; the columns read are image, colour, label"),
        (Standardise(name="standardise", column="colour"), "'colour' has no stored statistics"),
    ],
)
def test_a_transform_of_a_column_that_is_not_there_is_named(step: Any, words: str) -> None:
    check_transforms(STEPS, COLUMNS)
    with pytest.raises(DataError, match=words):
        check_transforms([step], COLUMNS)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("tests.data.test_transforms:shorter", "must return a dict of arrays with 10 rows"),
        ("tests.data.test_transforms:nothing", "has no 'nothing'"),
        ("nowhere.at_all:f", "cannot import nowhere.at_all"),
        ("nowhere.py:f", "no file nowhere.py"),
    ],
)
def test_a_function_that_does_not_work_is_named(function: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        apply([Custom(name="custom", function=function)], COLUMNS, *rows(10), train=True)


def test_a_file_is_loaded_once_and_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_functions.py").write_text("number = 3\n")
    file = tmp_path / "functions.py"
    file.write_text("from neighbour_of_functions import number\n\nmade = object()\n")
    assert load_object(f"{file}:number", where="here") == 3
    assert load_object(f"{file}:made", where="here") is load_object(f"{file}:made", where="here")
    (tmp_path / "broken.py").write_text("raise ValueError('mine')\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"):
            load_object(f"{tmp_path / 'broken.py'}:x", where="here")
    assert transforms._load_file(file).number == 3
