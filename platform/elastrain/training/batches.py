"""Batches of a worker: blocks of the slots that it holds, as tensors on its device, cut by step."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from elastrain.data.columns import Array
from elastrain.data.plan import Plan
from elastrain.observe.ledger import Clock
from elastrain.training.task import Batch

EPOCH, STEP, SLOT, ROW = "elastrain.epoch", "elastrain.step", "elastrain.slot", "elastrain.row"


class Feed(Protocol):
    """Where blocks come from: addresses in, arrays out (see `data.feed.WorkerFeed`)."""

    def prefetch(self, slots: Sequence[int], block: int) -> None:
        """Start to fetch blocks."""

    def take(self, slot: int, block: int) -> dict[str, Array] | None:
        """Wait for a block; None if the slot has no rows in it."""

    def release_before(self, block: int) -> None:
        """Say that every worker has committed past the blocks before `block`."""

    def evaluation(self, blocks: Sequence[int]) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield (index, columns) of evaluation blocks; they may be asked for again."""


@dataclass(frozen=True, slots=True)
class Held:
    """A block on the device: columns, dataset rows, and where each of its steps begins."""

    columns: dict[str, Tensor]
    rows: Array
    first_step: int
    starts: list[int]


class Batches:
    """The slots' batches of the step that `move_to` named."""

    def __init__(self, feed: Feed, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self._feed, self._device = feed, device
        self._held: dict[int, Held | None] = {}
        self._block, self._step = -1, 0
        self._slots: tuple[int, ...] = ()

    def move_to(self, step: int, slots: Sequence[int], clock: Clock) -> None:
        """Bring in the blocks that hold `step` for these slots; time spent waiting is booked under `data`."""
        self._step = step
        block = step // self.plan.block_steps
        if block == self._block and tuple(slots) == self._slots:
            return
        clock.switch("data")
        if block != self._block:
            self._held = {}
        self._feed.prefetch([slot for slot in slots if slot not in self._held], block)
        for slot in slots:
            if slot not in self._held:
                self._held[slot] = self._hold(self._feed.take(slot, block))
        self._held = {slot: self._held[slot] for slot in slots}
        self._block, self._slots = block, tuple(slots)
        self._feed.prefetch(slots, block + 1)

    def batch(self, slot: int) -> Batch | None:
        """Return the slot's rows in this step, None if it has none; each call gives tensors of its own."""
        held, span = self._span(slot)
        if held is None or span.start == span.stop:
            return None
        return Batch({name: tensor[span] for name, tensor in held.columns.items()}).clone()

    def rows(self, slot: int) -> Array:
        """Return the dataset rows of the slot in this step, in training order."""
        held, span = self._span(slot)
        return np.empty(0, np.int64) if held is None else held.rows[span]

    def _span(self, slot: int) -> tuple[Held | None, slice]:
        held = self._held[slot]
        if held is None:
            return None, slice(0, 0)
        place = self._step - held.first_step
        if not 0 <= place < len(held.starts) - 1:
            return held, slice(0, 0)
        return held, slice(held.starts[place], held.starts[place + 1])

    def _hold(self, arrays: dict[str, Array] | None) -> Held | None:
        if arrays is None:
            return None
        steps, rows = arrays.pop(STEP), arrays.pop(ROW)
        del arrays[EPOCH], arrays[SLOT]
        first, last = int(steps[0]), int(steps[-1])
        starts = np.searchsorted(steps, np.arange(first, last + 2)).tolist()
        columns = {name: tensor_of(array, self._device) for name, array in arrays.items()}
        return Held(columns, rows, first, starts)


def tensor_of(array: Array, device: torch.device) -> Tensor:
    """Return an array on a device; on the CPU it shares memory that may be read-only: clone before changing it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).to(device, non_blocking=True)
