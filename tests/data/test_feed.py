"""The feed delivers exactly the plan: from any cursor, in order, checked by the worker, and within bounds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from elastrain.data import blocks as blocks_module
from elastrain.data import feed as feed_module
from elastrain.data import reader
from elastrain.data.blocks import (
    EVALUATION,
    INDEX,
    FeedSpec,
    arrays_of,
    block_size,
    eval_block_rows,
    keeps_evaluation,
    train_tasks,
)
from elastrain.data.columns import to_table
from elastrain.data.dataset import MANIFEST, Dataset
from elastrain.data.feed import FeederLogic, WorkerFeed
from elastrain.data.pipeline import grouped
from elastrain.data.plan import INDEX_BYTES, Plan
from elastrain.errors import DataError
from elastrain.spec.train import Scale

ROWS, SLOTS = 1000, 3
IMAGES = np.arange(ROWS * 16, dtype=np.uint16).reshape(ROWS, 4, 4)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    for index, part in enumerate(np.split(np.arange(ROWS), 4)):
        table = to_table({"image": IMAGES[part], "label": (part % 10).astype(np.uint8)})
        pq.write_table(table, tmp_path / f"{index}.parquet", row_group_size=37, write_page_checksum=True)
    return Dataset.open(str(tmp_path))


@pytest.fixture(autouse=True)
def not_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read with several tasks at once, as data that are not small are."""
    monkeypatch.setattr(feed_module, "SMALL_BYTES", 0)


def spec_of(dataset: Dataset, *, seed: int = 0, begin: int = 0, end: int = 60) -> FeedSpec:
    plan = replace(Plan.of(dataset, seed=seed, global_batch=64, slots=SLOTS), block_steps=5)
    return FeedSpec(plan=plan, train=dataset, evaluation=dataset, transforms=(), begin=begin, end=end, reading=(1.0, 2))


class Here:
    """Calls a feeder of this process as if it were an actor: `feeder.get.remote(…)` gives a reference."""

    def __init__(self, logic: FeederLogic) -> None:
        self._logic = logic

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                return ray.put(getattr(self._logic, name)(*arguments))

        return Method


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("begin", "end"), [(0, 60), (7, 33), (59, 60)])
def test_blocks_hold_the_plan_from_any_cursor(dataset: Dataset, begin: int, end: int) -> None:
    spec = spec_of(dataset, begin=begin, end=end)
    logic = FeederLogic(spec)
    worker = WorkerFeed(Here(logic), spec, begin=begin)
    seen: dict[tuple[int, int], list[int]] = {}
    for block in range(begin // 5, -(-end // 5)):
        for slot in range(SLOTS):
            arrays = worker.take(slot, block)
            assert arrays is not None
            assert np.array_equal(arrays["image"], IMAGES[arrays[INDEX[3]]])
            for step, row in zip(arrays[INDEX[1]], arrays[INDEX[3]], strict=True):
                seen.setdefault((int(step), slot), []).append(int(row))
        logic.release_before(block)
        assert len(logic._train._ready) <= 2 * SLOTS
    for step in range(begin, end):
        for slot in range(SLOTS):
            assert len(seen[step, slot]) == spec.plan.slot_rows(step, slot)
    worker.close()
    logic.close()
    named = ray.util.list_named_actors(all_namespaces=True)
    assert "AutoscalingCoordinator" not in {each["name"] for each in named}, "it would keep a node for ever"


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kept", [True, False])
def test_evaluation_delivers_each_row_once_in_every_round(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, *, kept: bool
) -> None:
    monkeypatch.setattr(blocks_module, "EVAL_BLOCK_BYTES", 128 * dataset.row_bytes)
    monkeypatch.setattr(blocks_module, "KEPT_EVAL_BYTES", dataset.row_bytes * ROWS - 1 + kept)
    spec = spec_of(dataset)
    logic = FeederLogic(spec)
    worker = WorkerFeed(Here(logic), spec, begin=0)
    blocks = list(range(-(-ROWS // eval_block_rows(dataset))))
    for _ in range(2):
        rows = [arrays[INDEX[3]] for _, arrays in worker.evaluation(blocks)]
        assert np.array_equal(np.concatenate(rows), np.arange(ROWS))
        assert len(logic._kept) == kept * len(blocks), "small data are read once and kept for all rounds"
    worker.close()
    logic.close()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_workers_evaluate_at_their_own_pace_and_a_lost_one_holds_up_nobody(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that are not kept: a worker stops half-way, one comes late to blocks that others are done with."""
    monkeypatch.setattr(blocks_module, "EVAL_BLOCK_BYTES", 8 * dataset.row_bytes)
    monkeypatch.setattr(blocks_module, "KEPT_EVAL_BYTES", 0)
    spec = spec_of(dataset)
    logic = FeederLogic(spec)
    workers = [WorkerFeed(Here(logic), spec, begin=0) for _ in range(3)]
    lost, first, late = (worker.evaluation(list(range(125))) for worker in workers)
    next(lost)
    assert [index for index, _ in first] == list(range(125))
    assert [index for index, _ in late] == list(range(125))
    again = [arrays[INDEX[3]] for _, arrays in workers[1].evaluation(range(0, 125, 2))]
    assert [len(rows) for rows in again] == [8] * 63
    for worker in workers:
        worker.close()
    logic.close()


def test_reading_begins_with_the_first_node_and_follows_the_run_from_lease_to_lease(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run from zero: its head lends no CPU, and nobody knows at the start how many workers there will be."""
    leases: list[tuple[int, tuple[float, int]]] = []

    def read(blocks: list[Any], *, reading: tuple[float, int], **_: int) -> Iterator[int]:
        leases.append((len(blocks), reading))
        yield from range(len(blocks))

    head = {"NodeID": "head", "Alive": True, "Resources": {"node:__internal_head__": 1.0}}
    other = {"NodeID": "other", "Alive": True, "Resources": {"CPU": 8.0}}
    looks = iter([[head]] * 4)
    monkeypatch.setattr(feed_module, "execute", read)
    monkeypatch.setattr(feed_module, "LOOK_S", 0.0)
    monkeypatch.setattr(ray, "nodes", lambda: next(looks, [head, other]))
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 7.5})
    logic = FeederLogic(replace(spec_of(dataset), reading=(0.0, 2)))
    for block in range(12):
        logic.get([(slot, block) for slot in range(SLOTS)])
        logic.read_beside(3 + block // 3, 2.0)
        logic.release_before(block)
    logic.close()
    assert next(looks, None) is None, "it waited for a node"
    assert leases == [(2 * SLOTS, (0.0, 2)), (36 - 2 * SLOTS, (1.0, 3))]
    assert feed_module.off_idle_head()["label_selector"] == {"ray.io/node-id": "!in(head)"}


def test_small_data_are_read_by_one_task_at_a_time_unless_something_is_done_with_them_or_they_are_far(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[float, int]] = []

    class Watched:
        def __init__(self, *_: Any, reading: Any, **__: Any) -> None:
            given.append(reading())

    monkeypatch.setattr(feed_module, "Stream", Watched)
    worked = replace(spec_of(dataset), transforms=(Scale(name="scale", column="image"),))
    far = replace(spec_of(dataset), train=replace(dataset, url="s3://bucket/digits"))
    for spec, more in ((spec_of(dataset), 0), (spec_of(dataset), 1), (worked, 0), (far, 0)):
        monkeypatch.setattr(feed_module, "SMALL_BYTES", 33 * ROWS - more)
        FeederLogic(spec)
    assert given == [(1.0, 1), (1.0, 2), (1.0, 2), (1.0, 2)]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_room_for_blocks_is_counted_as_transforms_leave_them(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    class Watched(feed_module.Stream):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            given.append(named["block_bytes"])
            super().__init__(*arguments, **named)

    monkeypatch.setattr(feed_module, "Stream", Watched)
    wide = replace(spec_of(dataset), transforms=(Scale(name="scale", column="image"),))
    for spec in (spec_of(dataset), wide):
        FeederLogic(spec).close()
    rows = 5 * -(-64 // SLOTS)
    assert given == [rows * (16 * 2 + 1 + INDEX_BYTES), rows * (16 * 4 + 1 + INDEX_BYTES)]


def test_whether_evaluation_is_kept_is_decided_by_what_transforms_leave(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "KEPT_EVAL_BYTES", ROWS * (16 * 2 + 1))
    assert keeps_evaluation(dataset, [])
    assert not keeps_evaluation(dataset, [Scale(name="scale", column="image")])


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_feed_out_of_order_is_noticed(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered = feed_module.execute

    def shuffled(*arguments: Any, **named: Any) -> Iterator[Any]:
        first, second, *rest = ordered(*arguments, **named)
        yield from (second, first, *rest)

    monkeypatch.setattr(feed_module, "execute", shuffled)
    spec = spec_of(dataset)
    logic = FeederLogic(spec)
    worker = WorkerFeed(Here(logic), spec, begin=0)
    with pytest.raises(DataError, match="does not hold the samples"):
        worker.take(0, 0)
    worker.close()
    logic.close()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_feed_of_another_plan_is_noticed(dataset: Dataset) -> None:
    logic = FeederLogic(spec_of(dataset, seed=1))
    worker = WorkerFeed(Here(logic), spec_of(dataset), begin=0)
    with pytest.raises(DataError, match="does not hold the samples"):
        worker.take(0, 0)
    worker.close()
    logic.close()


def test_footers_are_read_once_a_process_and_nothing_is_listed(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    monkeypatch.setattr("elastrain.storage.list_files", lambda url, **_: listed.append(url))
    monkeypatch.setattr("elastrain.storage.read_json", listed.append)
    reader._open_local.cache_clear()
    for _, make in train_tasks(spec_of(dataset)):
        arrays_of(make()(), where="a block")
    assert reader._open_local.cache_info().misses == 4, "one footer a file, whatever the epochs and blocks"
    assert not listed
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (3, [1, 1, 1]), (20, [1, 1, 2, 2, 4, 4, 4, 2])])
def test_read_tasks_grow_and_lose_no_block(dataset: Dataset, count: int, sizes: list[int]) -> None:
    blocks = [make() for _, make in train_tasks(spec_of(dataset))][:count]
    tasks = grouped(blocks, at_once=2, most=4)
    assert [block for task in tasks for block in task.blocks] == blocks
    assert [len(task.blocks) for task in tasks] == sizes


def test_block_sizes_are_those_of_the_blocks(dataset: Dataset) -> None:
    spec = spec_of(dataset, begin=3, end=41)
    for slot in range(SLOTS):
        for block in range(10):
            rows = spec.plan.block(slot, block).rows(3, 41)
            assert block_size(spec.plan, slot, block, 3, 41) == len(rows.row)


def test_only_what_a_block_needs_is_read(dataset: Dataset) -> None:
    spec = spec_of(dataset)
    ends = np.cumsum(dataset.group_rows)
    for (slot, block), make in train_tasks(spec):
        assert slot != EVALUATION
        task = make()
        rows = spec.plan.block(slot, block).rows(0, 60).row
        assert len(task.sources) == len(np.unique(np.searchsorted(ends, rows, side="right")))
