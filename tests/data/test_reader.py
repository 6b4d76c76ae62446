"""Rows out of Parquet come as they were asked for, also where one is asked for twice and another one not at all."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastrain.data.blocks import INDEX, FeedSpec, arrays_of, train_tasks
from elastrain.data.columns import to_table
from elastrain.data.dataset import Dataset
from elastrain.data.plan import Plan
from elastrain.data.reader import read_rows, sources_of

ROWS = 40
LABELS = np.arange(ROWS, dtype=np.int32)
IMAGES = np.arange(ROWS * 6, dtype=np.uint8).reshape(ROWS, 2, 3)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Rows whose columns tell which they are, in row groups of 16."""
    pq.write_table(to_table({"image": IMAGES, "label": LABELS}), tmp_path / "a.parquet", row_group_size=16)
    return Dataset.open(str(tmp_path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=2 * ROWS))
def test_any_rows_in_any_order_any_number_of_times(dataset: Dataset, rows: list[int]) -> None:
    found = read_rows(dataset.columns, sources_of(dataset, np.arange(3)), np.asarray(rows))
    assert np.array_equal(found["label"], LABELS[rows])
    assert np.array_equal(found["image"], IMAGES[rows])


def test_as_many_rows_as_a_run_are_one_only_if_none_is_there_twice(dataset: Dataset) -> None:
    rows = np.asarray([0, 1, 1, 3, 5, 5])
    assert read_rows(dataset.columns, sources_of(dataset, np.arange(3)), rows)["label"].tolist() == rows.tolist()


def test_a_block_holds_the_rows_of_the_plan_from_whatever_step_it_is_cut(dataset: Dataset) -> None:
    """Over two epochs, so that some rows are in it twice."""
    plan = Plan.of(dataset, seed=0, global_batch=5, slots=1)
    for begin in range(16):
        for end in range(begin + 1, 17):
            spec = FeedSpec(
                plan=plan, train=dataset, evaluation=None, transforms=(), begin=begin, end=end, reading=(0.0, 0)
            )
            for _, make in train_tasks(spec):
                arrays = arrays_of(make()(), where="a block")
                assert np.array_equal(arrays["label"], arrays[INDEX[3]])
