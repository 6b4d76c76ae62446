"""Blocks: the unit in which rows reach a worker, each with an address, (slot, j) in training and (-1, i) in evaluation.

What a read task does is data and a function of files: it needs no Ray, so that a check may read a block by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from elastrain.data import transforms
from elastrain.data.cache import Cache
from elastrain.data.columns import Array, Column, from_table, to_table
from elastrain.data.dataset import Dataset
from elastrain.data.plan import Block, Ints, Plan, row_seeds
from elastrain.data.reader import Source, read_ahead, read_rows, sources_of
from elastrain.data.remote import ReadAhead
from elastrain.errors import ElastrainError, error_named

Address = tuple[int, int]
INDEX = ("elastrain.epoch", "elastrain.step", "elastrain.slot", "elastrain.row")
ERROR, MESSAGE = "elastrain.error", "elastrain.message"
EVALUATION = -1  # the slot of evaluation blocks
READERS = 2  # read tasks at once where no CPU is free for them, and the fewest where some are
EVAL_BLOCK_BYTES = 8 << 20
KEPT_EVAL_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedSpec:
    """What the feeder reads: the training plan from step `begin` to `end`, and the evaluation data.

    `reading` is (CPUs a read task, read tasks at once) to begin with; a task of 0 CPUs runs where workers hold all of
    them. `cache` is where nodes keep what they have read from remote storage.
    """

    plan: Plan
    train: Dataset
    evaluation: Dataset | None
    transforms: tuple[Any, ...]
    begin: int
    end: int
    reading: tuple[float, int]
    cache: Cache | None = None


def reading_beside(workers: int, spare: float) -> tuple[float, int]:
    """Return (CPUs a read task, read tasks at once) beside so many workers where so many CPUs are to spare.

    >>> reading_beside(4, 16.0), reading_beside(4, 3.5), reading_beside(1, 16.0), reading_beside(4, 0.5)
    ((1.0, 4), (1.0, 3), (1.0, 2), (0.0, 2))
    """
    return (1.0, min(int(spare), max(READERS, workers))) if spare >= 1 else (0.0, READERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadBlock:
    """The reading of one block: which rows, where they lie, what is done with them."""

    columns: tuple[Column, ...]
    sources: tuple[Source, ...]
    transforms: tuple[Any, ...]
    seed: int
    block: Block | None  # None: evaluation, rows first…last in order
    first: int
    last: int

    def __call__(self) -> pa.Table:
        """Read the block by itself."""
        (table,) = read_blocks([self])
        return table

    def read(self, ahead: ReadAhead[Source]) -> pa.Table:
        """Read the block; an error of ours travels as a block, for Ray would bury its sentence in its own.

        The table has one row, a whole array in each field: Ray Data hands on such a table as it is.
        """
        try:
            arrays = self._arrays(ahead)
        except ElastrainError as error:
            return pa.table({ERROR: [type(error).__name__], MESSAGE: [str(error)]})
        return to_table({name: array[np.newaxis] for name, array in arrays.items()})

    def _arrays(self, ahead: ReadAhead[Source]) -> dict[str, Array]:
        epoch, step, slot, row = self._index()
        arrays = read_rows(self.columns, self.sources, row, ahead)
        seeds = row_seeds(self.seed, epoch, row)
        arrays = transforms.apply(self.transforms, self.columns, arrays, seeds, train=self.block is not None)
        return {**dict(zip(INDEX, (epoch, step, slot, row), strict=True)), **arrays}

    def _index(self) -> tuple[Array, Array, Array, Ints]:
        if self.block is None:
            row = np.arange(self.first, self.last, dtype=np.int64)
            none = np.full(len(row), EVALUATION, np.int32)
            return none, none, none, row
        rows = self.block.rows(self.first, self.last)
        return rows.epoch, rows.step, np.full(len(rows.row), self.block.slot, np.int32), rows.row


def read_blocks(blocks: Sequence[ReadBlock]) -> Iterator[pa.Table]:
    """Yield blocks one by one, reading ahead from remote storage also for those that follow."""
    sources = [source for block in blocks for source in block.sources]
    with read_ahead(blocks[0].columns, sources) as ahead:
        for block in blocks:
            yield block.read(ahead)


def arrays_of(table: pa.Table, *, where: str) -> dict[str, Array]:
    """Return the columns of a block; raises what reading it met, DataError or StorageError naming the file."""
    if ERROR in table.column_names:
        raise error_named(table[ERROR][0].as_py(), table[MESSAGE][0].as_py())
    return {name: array[0] for name, array in from_table(table, where=where).items()}


def eval_block_rows(dataset: Dataset) -> int:
    """Return the rows of one evaluation block: a pure function of the dataset."""
    return max(1, EVAL_BLOCK_BYTES // max(1, dataset.row_bytes))


def keeps_evaluation(dataset: Dataset, steps: Sequence[Any]) -> bool:
    """Say whether evaluation data, as these transforms leave them, are small enough to be kept between evaluations."""
    return dataset.num_rows * transforms.delivered_bytes(steps, dataset.columns) <= KEPT_EVAL_BYTES


def block_size(plan: Plan, slot: int, block: int, begin: int, end: int) -> int:
    """Return how many rows a block has for the steps [begin, end)."""
    first, last = max(begin, block * plan.block_steps), min(end, (block + 1) * plan.block_steps)
    if first >= last:
        return 0
    k, full = plan.steps_per_epoch, plan.slot_rows(0, slot) if plan.full_steps else 0
    tails = last // k - first // k if plan.tail else 0
    return (last - first - tails) * full + tails * plan.slot_rows(plan.full_steps, slot)


def train_tasks(spec: FeedSpec) -> Iterator[tuple[Address, Callable[[], ReadBlock]]]:
    """Yield address and work of each training block that has rows, in the order in which steps need them."""
    plan = spec.plan
    for block in range(plan.block_of(spec.begin), plan.block_of(spec.end - 1) + 1 if spec.end > spec.begin else 0):
        for slot in range(plan.slots):
            if block_size(plan, slot, block, spec.begin, spec.end):
                yield (slot, block), lambda slot=slot, block=block: task_of(spec, (slot, block))  # type: ignore[misc]


def task_of(spec: FeedSpec, address: Address) -> ReadBlock:
    """Return the work of one block."""
    slot, index = address
    if slot == EVALUATION:
        return eval_task(spec, index)
    block = spec.plan.block(slot, index)
    firsts = np.concatenate([first for first, _ in block.ranges])
    ends = np.cumsum(spec.train.group_rows)
    return ReadBlock(
        columns=spec.train.columns,
        sources=tuple(sources_of(spec.train, np.searchsorted(ends, firsts, side="right"), spec.cache)),
        transforms=spec.transforms,
        seed=spec.plan.seed,
        block=block,
        first=spec.begin,
        last=spec.end,
    )


def eval_task(spec: FeedSpec, index: int) -> ReadBlock:
    """Return the work of one evaluation block; its columns are the training data's, with their statistics."""
    dataset = spec.evaluation
    assert dataset is not None
    size = eval_block_rows(dataset)
    first, last = index * size, min((index + 1) * size, dataset.num_rows)
    ends = np.cumsum(dataset.group_rows)
    groups = np.arange(np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last, side="left") + 1)
    return ReadBlock(
        columns=spec.train.columns,
        sources=tuple(sources_of(dataset, groups, spec.cache)),
        transforms=spec.transforms,
        seed=spec.plan.seed,
        block=None,
        first=first,
        last=last,
    )
