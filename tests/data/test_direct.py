"""A feed that reads by itself gives what the read tasks give, keeps it within bounds, and never another plan's."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from elastrain.data.blocks import EVALUATION, FeedSpec, arrays_of, eval_block_rows, task_of, train_tasks
from elastrain.data.columns import to_table
from elastrain.data.dataset import Dataset
from elastrain.data.direct import DirectFeed, KeptBlocks
from elastrain.data.plan import Plan
from elastrain.errors import DataError
from elastrain.spec.train import Scale, Standardise

ROWS, SLOTS = 600, 3


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Dataset]:
    """Return a function that writes a dataset whose values are moved by `shift`."""

    def made(name: str, *, shift: int = 0, rows: int = ROWS) -> Dataset:
        (tmp_path / name).mkdir()
        value = (np.arange(rows * 4, dtype=np.float32) + shift).reshape(rows, 4)
        table = to_table({"value": value, "label": (np.arange(rows) % 10).astype(np.uint8)})
        pq.write_table(table, tmp_path / name / "0.parquet", row_group_size=37, write_page_checksum=True)
        found = Dataset.open(str(tmp_path / name))
        columns = (replace(column, mean=float(shift), std=2.0) for column in found.columns)  # as pack measures them
        return replace(found, columns=tuple(columns))

    return made


def spec_of(train: Dataset, evaluation: Dataset, *, seed: int = 0, begin: int = 0, end: int = 40) -> FeedSpec:
    plan = replace(Plan.of(train, seed=seed, global_batch=64, slots=SLOTS), block_steps=5)
    return FeedSpec(
        plan=plan, train=train, evaluation=evaluation, transforms=(), begin=begin, end=end, reading=(0.0, 0)
    )


def same(one: Any, other: Any) -> None:
    assert one is not None
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def everything(feed: DirectFeed, spec: FeedSpec) -> dict[Any, Any]:
    found = {address: feed.take(*address) for address, _ in train_tasks(spec)}
    size = eval_block_rows(spec.evaluation or spec.train)
    blocks = range(-(-(spec.evaluation or spec.train).num_rows // size))
    return found | {(EVALUATION, index): arrays for index, arrays in feed.evaluation(blocks)}


@pytest.mark.parametrize(("begin", "end"), [(0, 40), (3, 38), (7, 8)])
def test_it_gives_what_the_read_tasks_give(make: Callable[..., Dataset], begin: int, end: int) -> None:
    spec = spec_of(make("train"), make("eval", shift=7, rows=90), begin=begin, end=end)
    feed = DirectFeed(spec, KeptBlocks())
    found = everything(feed, spec)
    for address, arrays in found.items():
        same(arrays, arrays_of(task_of(spec, address)(), where=str(address)))
    steps = np.concatenate([arrays["elastrain.step"] for (slot, _), arrays in found.items() if slot != EVALUATION])
    assert (steps.min(), steps.max()) == (begin, end - 1)
    assert feed.take(0, end // 5 + 1) is None  # no rows there
    feed.close()


def test_a_block_is_read_once_for_all_runs_of_a_plan_and_never_for_another(make: Callable[..., Dataset]) -> None:
    train, other, evaluation = make("train"), make("other", shift=1000), make("eval", shift=7, rows=90)
    kept = KeptBlocks()
    specs = [
        spec_of(train, evaluation),
        spec_of(train, evaluation, seed=1),
        spec_of(other, evaluation),
        spec_of(train, evaluation, begin=3, end=38),
        replace(spec_of(train, evaluation), transforms=(Scale(name="scale", column="value", factor=2.0),)),
        replace(spec_of(train, evaluation), transforms=(Standardise(name="standardise", column="value"),)),
        replace(spec_of(other, evaluation), transforms=(Standardise(name="standardise", column="value"),)),
    ]
    for spec in specs:
        feed = DirectFeed(spec, kept)
        for address, arrays in everything(feed, spec).items():
            same(arrays, arrays_of(task_of(spec, address)(), where=str(address)))
        feed.close()
    reads = kept.reads
    for spec in specs:
        feed = DirectFeed(spec, kept)
        everything(feed, spec)
        feed.close()
    assert kept.reads == reads


def test_a_worker_may_take_columns_out_of_what_it_gets(make: Callable[..., Dataset]) -> None:
    spec = spec_of(make("train"), make("eval", rows=90))
    kept = KeptBlocks()
    for _ in range(2):
        feed = DirectFeed(spec, kept)
        taken = feed.take(0, 0)
        assert taken is not None
        taken.pop("value")
        for _, arrays in feed.evaluation([0]):
            arrays.pop("value")
        feed.close()


def test_a_block_that_cannot_be_read_says_so_and_is_not_kept(make: Callable[..., Dataset]) -> None:
    train = make("train")
    spec = spec_of(train, train)
    shard = Path(train.url.removeprefix("file://")) / "0.parquet"
    data = shard.read_bytes()
    kept = KeptBlocks()
    feed = DirectFeed(spec, kept)
    shard.write_bytes(data[:4] + bytes(len(data) - 4))
    with pytest.raises(DataError, match="parquet"):
        feed.take(0, 0)
    shard.write_bytes(data)
    assert feed.take(0, 0) is not None
    feed.close()


# --- what is kept


def block(size: int) -> dict[str, Any]:
    return {"value": np.zeros(size, np.uint8)}


def test_the_least_recently_used_go_first_and_bytes_are_bounded() -> None:
    kept = KeptBlocks(most_bytes=30)
    for key in "abc":
        kept.get(key, lambda: block(10))
    kept.get("a", lambda: block(10))
    kept.get("d", lambda: block(10))  # b gives way
    assert kept.reads == 4
    for key in "acd":
        kept.get(key, lambda: block(10))
    assert kept.reads == 4
    kept.get("b", lambda: block(10))
    assert kept.reads == 5
    assert held(kept) == 30


def held(kept: KeptBlocks) -> int:
    assert kept._bytes == sum(a.nbytes for each in kept._blocks.values() for a in each.values())
    return kept._bytes


def test_a_block_that_is_too_large_is_given_and_not_kept() -> None:
    kept = KeptBlocks(most_bytes=30)
    kept.get("small", lambda: block(20))
    assert len(kept.get("large", lambda: block(31))["value"]) == 31
    assert held(kept) == 20
    kept.get("small", lambda: block(20))
    assert kept.reads == 2


def test_two_threads_that_read_the_same_block_count_it_once() -> None:
    kept, both = KeptBlocks(most_bytes=100), threading.Barrier(2)

    def read() -> dict[str, Any]:
        both.wait(30)
        return block(40)

    threads = [threading.Thread(target=kept.get, args=("a", read)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held(kept) == 40
