"""The plan: which rows are in which step, for any sizes, and whoever asks in whatever order."""

import inspect
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastrain.data import plan as plan_module
from elastrain.data.columns import Column
from elastrain.data.dataset import Dataset, Shard
from elastrain.data.plan import Plan, hash64, permutation, row_seeds, share
from elastrain.errors import SpecError

Lines = list[tuple[int, int, int, int]]  # epoch, step, slot, row


def make_plan(groups: list[int], batch: int, slots: int, *, seed: int = 0, block_steps: int = 1) -> Plan:
    """A plan over row groups of these sizes."""
    return Plan(
        group_rows=np.array(groups, dtype=np.int64),
        seed=seed,
        global_batch=batch,
        slots=slots,
        block_steps=block_steps,
        row_bytes=100,
        fingerprint=repr(groups),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan of some hundred rows."""
    groups = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum))
    batch = draw(st.integers(1, sum(groups) + 5))
    slots = draw(st.integers(1, min(batch, 9)))
    return make_plan(groups, batch, slots, seed=draw(st.integers(0, 2**63)), block_steps=draw(st.integers(1, 12)))


def lines(plan: Plan, begin: int, end: int, slots: Any = None) -> Lines:
    """The samples of steps [begin, end), read block by block."""
    found = []
    for slot in range(plan.slots) if slots is None else slots:
        for block in range(plan.block_of(begin), plan.block_of(end - 1) + 1):
            rows = plan.block(slot, block).rows(begin, end)
            found += [(e, k, slot, r) for e, k, r in zip(rows.epoch, rows.step, rows.row, strict=True)]
    return [(int(e), int(k), int(s), int(r)) for e, k, s, r in found]


@settings(deadline=None)
@given(plans(), st.integers(0, 2))
def test_every_sample_of_an_epoch_is_there_exactly_once(plan: Plan, epoch: int) -> None:
    k = plan.steps_per_epoch
    found = lines(plan, epoch * k, (epoch + 1) * k)
    assert sorted(row for *_, row in found) == list(range(plan.num_rows))
    assert {e for e, *_ in found} == {epoch}


@settings(deadline=None)
@given(plans())
def test_every_slot_has_its_share_of_every_step(plan: Plan) -> None:
    steps = 2 * plan.steps_per_epoch + 1
    counts = Counter((step, slot) for _, step, slot, _ in lines(plan, 0, steps))
    for step in range(steps):
        last = plan.num_rows % plan.global_batch
        size = last if last and step % plan.steps_per_epoch == plan.steps_per_epoch - 1 else plan.global_batch
        assert plan.batch_rows(step) == size
        for slot in range(plan.slots):
            assert counts[step, slot] == plan.slot_rows(step, slot) == share(size, slot, plan.slots)


@settings(deadline=None)
@given(plans(), st.data())
def test_a_cut_at_any_steps_gives_the_samples_of_these_steps(plan: Plan, data: st.DataObject) -> None:
    end = 2 * plan.steps_per_epoch + 2
    begin = data.draw(st.integers(0, end - 1))
    stop = data.draw(st.integers(begin + 1, end))
    whole = [line for line in lines(plan, 0, end) if begin <= line[1] < stop]
    assert lines(plan, begin, stop) == whole


@settings(deadline=None)
@given(plans(), st.data())
def test_any_block_alone_is_what_it_is_in_order(plan: Plan, data: st.DataObject) -> None:
    """Random access: no block depends on which were asked for before, nor on the process."""
    blocks = [(slot, j) for slot in range(plan.slots) for j in range(3)]
    end = 3 * plan.block_steps
    expected = {address: plan.block(*address).rows(0, end) for address in blocks}
    plan_module._order.cache_clear()
    fresh = replace(plan)
    for address in data.draw(st.permutations(blocks)):
        found = fresh.block(*address).rows(0, end)
        assert np.array_equal(found.row, expected[address].row)
        assert np.array_equal(found.step, expected[address].step)


@settings(deadline=None)
@given(plans(), st.integers(1, 9))
def test_workers_change_nothing(plan: Plan, size: int) -> None:
    """Whoever holds the slots: together they read the same."""
    size = min(size, plan.slots)
    held = [range(rank * plan.slots // size, (rank + 1) * plan.slots // size) for rank in range(size)]
    assert [line for slots in held for line in lines(plan, 0, 3, slots)] == lines(plan, 0, 3)


def test_no_function_of_the_plan_takes_a_number_of_workers() -> None:
    kinds = (Plan, plan_module.Block, plan_module.Order)
    methods = [function for kind in kinds for _, function in inspect.getmembers(kind, inspect.isfunction)]
    functions = [function for _, function in inspect.getmembers(plan_module, inspect.isfunction)]
    words = {"worker", "workers", "num_workers", "rank", "world", "world_size", "group_size"}
    for function in methods + functions:
        assert not words & set(inspect.signature(function).parameters), function
    assert not words & set(Plan.__dataclass_fields__)


# --- epochs, seeds, blocks


def test_epochs_and_seeds_order_differently() -> None:
    plan = make_plan([50] * 10, 20, 4, block_steps=5)
    epochs = [[row for *_, row in lines(plan, 25 * e, 25 * (e + 1))] for e in range(3)]
    assert len({tuple(rows) for rows in epochs}) == 3
    other = [row for *_, row in lines(replace(plan, seed=1), 0, 25)]
    assert other != epochs[0]
    assert sum(a == b for a, b in zip(other, epochs[0], strict=True)) < 10


def test_rows_of_a_block_are_mixed_over_many_places() -> None:
    plan = make_plan([1000] * 10, 100, 4, block_steps=10)
    rows = plan.block(0, 0).rows(0, 10).row
    assert np.abs(np.diff(rows)).mean() > 500, "neighbours would be neighbours in the file"
    assert len(np.unique(rows // 100)) > 2
    first, last = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert abs(first.mean() - last.mean()) < 2500, "the first steps would see other places than the last"


@settings(deadline=None)
@given(plans())
def test_units_tile_the_row_groups(plan: Plan) -> None:
    first, size, group = plan.units
    assert np.array_equal(
        np.concatenate([np.arange(f, f + s) for f, s in zip(first, size, strict=True)]), np.arange(plan.num_rows)
    )
    assert size.max() <= max(1, plan.num_rows // (16 * plan.slots))
    ends = np.cumsum(plan.group_rows)
    assert np.all(first >= (ends - plan.group_rows)[group])
    assert np.all(first + size <= ends[group])


def test_a_block_may_span_epochs() -> None:
    plan = make_plan([7], 3, 2, block_steps=8)  # 3 steps an epoch
    assert [part.epoch for part in plan.parts(0, 0)] == [0, 1, 2]
    assert Counter(row for e, _, _, row in lines(plan, 0, 6) if e == 1) == Counter(range(7))


def test_a_block_beyond_an_end_is_permuted_whole() -> None:
    """A run with a shorter budget sees the same samples as far as it goes."""
    plan = make_plan([100], 10, 2, block_steps=6)
    assert lines(plan, 0, 4) == [line for line in lines(plan, 0, 10) if line[1] < 4]


# --- negative controls


def test_other_plans_would_be_caught() -> None:
    """The properties above fail for plans that drop, repeat, pad or depend on the workers."""
    plan = make_plan([20, 30], 12, 4, block_steps=4)
    good = lines(plan, 0, plan.steps_per_epoch)
    rows = [row for *_, row in good]
    assert sorted(rows) == list(range(50))
    assert sorted(rows[:48]) != list(range(50)), "a dropped tail"
    assert sorted([*rows, *rows[:10]]) != list(range(50)), "padding"
    block = plan.block(1, 0)
    shifted = replace(block, parts=tuple(replace(p, start=p.start + 1, stop=p.stop + 1) for p in block.parts))
    ranges = tuple(plan.order(p.epoch).ranges(p.start, p.stop) for p in shifted.parts)
    assert not np.array_equal(replace(shifted, ranges=ranges).rows(0, 4).row, block.rows(0, 4).row)
    assert not np.array_equal(replace(block, seed=1).rows(0, 4).row, block.rows(0, 4).row)


# --- sizes


class Counted:
    """Counts how many numbers go through numpy's sort and search."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sorted = 0
        argsort = np.argsort

        def counting(keys: Any) -> Any:
            self.sorted += len(keys)
            return argsort(keys)

        monkeypatch.setattr(np, "argsort", counting)


def test_a_plan_of_a_million_row_groups_is_linear_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 files of 100 row groups of 10,000 rows: the order is one sort over units, a block one over its rows."""
    plan = make_plan([10_000] * 1_000_000, 65_536, 64, block_steps=4)
    counted = Counted(monkeypatch)
    units = len(plan.units[0])
    assert units == 1_000_000
    block = plan.block(63, 10_000)
    assert counted.sorted == units
    again = plan.block(5, 10_001)
    assert counted.sorted == units, "the order is kept"
    rows = block.rows(0, 10**9)
    assert counted.sorted == units + len(rows.row) == units + 4 * 1024
    assert sum(len(first) for first, _ in again.ranges) <= 3, "a block is a few ranges, never a list of rows"
    held = sum(array.nbytes for array in (*plan.units, plan.group_rows))
    assert held <= 40 * units


def test_blocks_are_of_megabytes_whatever_the_rows() -> None:
    def plan_of(row_bytes: int, rows: int, batch: int, slots: int) -> Plan:
        column = Column(name="x", dtype="uint8", shape=(row_bytes,))
        shard = Shard(path="a", size_bytes=1, row_groups=(rows,), footer="")
        dataset = Dataset(url="", columns=(column,), shards=(shard,), fingerprint="f", packed=True)
        return Plan.of(dataset, seed=0, global_batch=batch, slots=slots)

    for row_bytes, batch, slots in [(100, 64, 8), (3000, 256, 8), (600_000, 256, 8), (4000, 4096, 64)]:
        plan = plan_of(row_bytes, 10**8, batch, slots)
        size = plan.block_steps * -(-batch // slots) * plan.row_bytes
        assert 8e6 / 2 < size <= max(32 << 20, plan.row_bytes * -(-batch // slots))
    assert plan_of(100, 1000, 100, 4).block_steps == 640, "small data: 64 epochs at most"
    assert plan_of(10**9, 1000, 100, 4).block_steps == 1


def test_more_slots_than_samples_are_refused() -> None:
    column = Column(name="x", dtype="uint8", shape=())
    shard = Shard(path="a", size_bytes=1, row_groups=(5,), footer="")
    dataset = Dataset(url="", columns=(column,), shards=(shard,), fingerprint="f", packed=True)
    assert Plan.of(dataset, seed=0, global_batch="all", slots=5).global_batch == 5
    with pytest.raises(SpecError, match=r"data\.slots 6 is more than data\.global_batch 5"):
        Plan.of(dataset, seed=0, global_batch="all", slots=6)


def test_the_identity_has_what_decides_the_samples() -> None:
    plan = make_plan([50], 10, 4)
    assert plan.identity() == {
        "fingerprint": "[50]",
        "seed": 0,
        "global_batch": 10,
        "slots": 4,
        "block_steps": 1,
    }
    assert plan == replace(plan)
    assert hash(plan) == hash(replace(plan))
    for change in ({"seed": 1}, {"global_batch": 9}, {"slots": 3}, {"block_steps": 2}, {"fingerprint": "x"}):
        assert replace(plan, **change) != plan


# --- numbers that must never change


def test_hashes_are_pinned() -> None:
    assert hash64() == 0
    assert hash64(0) == 0xE220A8397B1DCDAF, "the first output of SplitMix64 with seed 0"
    assert [hash64(1), hash64(1, 2, 3), hash64(-1), hash64(2**64)] == [
        0x910A2DEC89025CC1,
        0xD0734750FDE362B3,
        0xE4D971771B652C20,
        0xE220A8397B1DCDAF,
    ]


def test_permutations_are_pinned() -> None:
    assert permutation(10, 1, 2, 3).tolist() == [0, 7, 2, 8, 3, 4, 1, 6, 9, 5]
    assert permutation(0, 1).tolist() == []
    assert row_seeds(7, np.array([0, 1], np.int32), np.array([5, 5])).tolist() == [
        17974471473161811214,
        3463931956202551960,
    ]


def test_a_plan_is_pinned() -> None:
    """Were this to change, runs that go on would see other samples: never change it, add another plan instead."""
    plan = make_plan([5, 8, 7], 6, 3, seed=42, block_steps=2)
    assert [row for *_, row in lines(plan, 0, 4)] == [
        4,
        8,
        1,
        0,
        17,
        9,
        11,
        10,
        16,
        15,
        13,
        3,
        7,
        12,
        2,
        18,
        6,
        19,
        5,
        14,
    ]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2000), st.integers(0, 2**63))
def test_a_permutation_is_one(size: int, seed: int) -> None:
    assert sorted(permutation(size, seed).tolist()) == list(range(size))


def test_permutations_are_even() -> None:
    """Each place holds each value equally often over many addresses (chi-squared, 9 · 9 degrees of freedom)."""
    counts = np.zeros((10, 10))
    for address in range(3000):
        counts[np.arange(10), permutation(10, address)] += 1
    assert ((counts - 300) ** 2 / 300).sum() < 140  # the 99.99th percentile


def test_addresses_do_not_collide() -> None:
    seeds = {
        hash64(seed, domain, a, b) for seed in range(3) for domain in range(3) for a in range(40) for b in range(40)
    }
    assert len(seeds) == 3 * 3 * 40 * 40
