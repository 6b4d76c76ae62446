"""The plan: which rows are in which step, as a pure function of dataset, seed, batch, slots and block length.

Nothing is remembered and no row is listed: memory is O(row groups), any block is found in O(log row groups). No torch,
no Ray, no files. The words: an epoch's *order* is its row groups cut into *units* and permuted; a *slot* owns one
contiguous range of it; a *block* (slot, j) holds the slot's rows of steps [j·T, (j+1)·T), permuted within each epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt

from elastrain.data.dataset import Dataset
from elastrain.errors import SpecError

Ints = npt.NDArray[np.int64]
UNITS_PER_SLOT = 16
COLUMN_BYTES = 128 << 20  # what the blocks of one j should hold together
BLOCK_BYTES = (8 << 20, 32 << 20)
AHEAD_BYTES = 512 << 20  # of blocks read before they are fetched: with less, readers wait for room
MAX_EPOCHS_A_BLOCK = 64
INDEX_BYTES = 20  # epoch, step, slot and row of a sample


def hash64(*address: int) -> int:
    """Return a 64-bit hash of integers: the seed of whatever has this address. Stable for ever (SplitMix64 rounds).

    Plain integers, since this runs once a slot and step: 3 µs, where numpy scalars take 70.
    """
    state = 0
    for part in address:
        z = ((state ^ (part & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        state = z ^ (z >> 31)
    return state


def permutation(size: int, *address: int) -> Ints:
    """Return a permutation of range(size) that only the address decides.

    SplitMix64 is a bijection, so the sort keys never tie and no sorting algorithm can change the result.
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        keys = mix64(np.uint64(hash64(*address)) + np.arange(size, dtype=np.uint64) * _GAMMA)
    return np.argsort(keys)


def row_seeds(seed: int, epochs: npt.NDArray[np.integer], rows: Ints) -> npt.NDArray[np.uint64]:
    """Return one seed a row, decided by (seed, epoch, row): what randomness of transforms starts from."""
    base = mix64(np.uint64(hash64(seed, _TRANSFORM)) ^ epochs.astype(np.uint64))
    return mix64(base ^ rows.astype(np.uint64))


_MASK = 0xFFFFFFFFFFFFFFFF
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_EPOCH, _BLOCK, _TRANSFORM = 1, 2, 3  # domains, so that equal addresses of different kinds get different seeds


def mix64(state: "np.uint64 | npt.NDArray[np.uint64]") -> "npt.NDArray[np.uint64]":
    """One SplitMix64 round over an array: the same bits as a round of `hash64`."""
    with np.errstate(over="ignore"):
        z = np.asarray(state, dtype=np.uint64) + _GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def share(size: int, slot: int, slots: int) -> int:
    """Return how many of `size` samples belong to `slot`; the shares of all slots sum to `size`.

    >>> [share(10, s, 4) for s in range(4)]
    [2, 3, 2, 3]
    """
    return (slot + 1) * size // slots - slot * size // slots


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one epoch: unit u holds dataset rows [row[u], row[u] + size[u]) at place[u] of the order."""

    row: Ints
    size: Ints
    place: Ints
    group: Ints

    def ranges(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Return (first rows, counts) of the row ranges at places [start, stop)."""
        if start >= stop:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        first = int(np.searchsorted(self.place, start, side="right")) - 1
        last = int(np.searchsorted(self.place, stop, side="left"))
        rows, sizes, places = self.row[first:last], self.size[first:last], self.place[first:last]
        low: Ints = np.maximum(places, start)
        high: Ints = np.minimum(places + sizes, stop)
        return rows + (low - places), high - low


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The rows of a block in one epoch: places [start, stop) of its order, for the epoch's steps [first, last)."""

    epoch: int
    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Samples in the order of training: arrays of equal length; `row` is the index in the dataset, 0…N−1."""

    epoch: npt.NDArray[np.int32]
    step: npt.NDArray[np.int32]
    row: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One block of the plan by itself: `rows` lists its samples. `ranges` are (first rows, counts) of each part."""

    slot: int
    block: int
    seed: int
    steps_per_epoch: int
    full_steps: int
    step_rows: int
    parts: tuple[Part, ...]
    ranges: tuple[tuple[Ints, Ints], ...]

    def rows(self, begin: int, end: int) -> Rows:
        """Return the samples of the run's steps [begin, end) in training order; each part is permuted whole."""
        pieces = [self._part(part, ranges, begin, end) for part, ranges in zip(self.parts, self.ranges, strict=True)]
        pieces = [piece for piece in pieces if len(piece.row)]
        if not pieces:
            return Rows(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64))
        return Rows(
            np.concatenate([piece.epoch for piece in pieces]),
            np.concatenate([piece.step for piece in pieces]),
            np.concatenate([piece.row for piece in pieces]),
        )

    def _part(self, part: Part, ranges: tuple[Ints, Ints], begin: int, end: int) -> Rows:
        origin = part.epoch * self.steps_per_epoch
        places = [self._place(part, min(max(step - origin, part.first), part.last)) for step in (begin, end)]
        low, high = places[0], max(places)
        if low == high:
            return Rows(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64))
        order = permutation(part.stop - part.start, self.seed, _BLOCK, part.epoch, self.slot, self.block)[low:high]
        place = np.arange(low, high, dtype=np.int64)
        local = (
            np.full(high - low, part.first, np.int64) if not self.step_rows else part.first + place // self.step_rows
        )
        if part.last > self.full_steps:
            local[max((self.full_steps - part.first) * self.step_rows - low, 0) :] = self.full_steps
        return Rows(
            np.full(high - low, part.epoch, np.int32), (origin + local).astype(np.int32), _expand(*ranges)[order]
        )

    def _place(self, part: Part, step: int) -> int:
        """Return where the rows of an epoch's step begin in the part; step `part.last` is its end."""
        return part.stop - part.start if step == part.last else (step - part.first) * self.step_rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will happen: `Plan.of(dataset, …)`; every method is a pure function of these fields."""

    group_rows: Ints
    seed: int
    global_batch: int
    slots: int
    block_steps: int
    row_bytes: int
    fingerprint: str

    @classmethod
    def of(cls, dataset: Dataset, *, seed: int, global_batch: int | str, slots: int) -> Self:
        """Return the plan of a run over `dataset`; the block length follows from manifest, batch and slots.

        Raises SpecError if there are more slots than samples in a batch.
        """
        batch = dataset.num_rows if global_batch == "all" else int(global_batch)
        if slots > batch:
            raise SpecError(
                f"data.slots {slots} is more than data.global_batch {batch}: a slot would never have a sample"
            )
        row_bytes = dataset.row_bytes + INDEX_BYTES
        low, high = BLOCK_BYTES
        target = min(high, max(low, COLUMN_BYTES // slots))
        steps_per_epoch = -(-dataset.num_rows // batch)
        block_steps = target // (row_bytes * -(-batch // slots))
        return cls(
            group_rows=dataset.group_rows,
            seed=seed,
            global_batch=batch,
            slots=slots,
            block_steps=max(1, min(block_steps, MAX_EPOCHS_A_BLOCK * steps_per_epoch)),
            row_bytes=row_bytes,
            fingerprint=dataset.fingerprint,
        )

    @cached_property
    def num_rows(self) -> int:
        """N, the samples of an epoch."""
        return int(self.group_rows.sum())

    @cached_property
    def full_steps(self) -> int:
        """n, the steps of an epoch with a full batch."""
        return self.num_rows // self.global_batch

    @cached_property
    def tail(self) -> int:
        """r, the samples of the short last batch of an epoch; 0 where there is none."""
        return self.num_rows % self.global_batch

    @cached_property
    def steps_per_epoch(self) -> int:
        """K, the steps of an epoch."""
        return self.full_steps + (self.tail > 0)

    def batch_rows(self, step: int) -> int:
        """Return the samples of a step."""
        return self.tail if step % self.steps_per_epoch == self.full_steps else self.global_batch

    def slot_rows(self, step: int, slot: int) -> int:
        """Return the samples of a slot in a step; 0 where the slot is skipped."""
        return share(self.batch_rows(step), slot, self.slots)

    def block_of(self, step: int) -> int:
        """Return j of the blocks that hold a step."""
        return step // self.block_steps

    def parts(self, slot: int, block: int) -> Iterator[Part]:
        """Yield the block's share of each epoch that it touches, in order."""
        begin, end = block * self.block_steps, (block + 1) * self.block_steps
        k, batch_share = self.steps_per_epoch, share(self.global_batch, slot, self.slots)
        origin = self.full_steps * (slot * self.global_batch // self.slots) + slot * self.tail // self.slots
        total = self.full_steps * batch_share + share(self.tail, slot, self.slots)
        for epoch in range(begin // k, -(-end // k)):
            first, last = max(begin - epoch * k, 0), min(end - epoch * k, k)
            stop = total if last == k else last * batch_share
            yield Part(epoch=epoch, first=first, last=last, start=origin + first * batch_share, stop=origin + stop)

    def block(self, slot: int, block: int) -> "Block":
        """Return the block (slot, block): small, and all that a reader needs to know of the plan."""
        parts = tuple(self.parts(slot, block))
        return Block(
            slot=slot,
            block=block,
            seed=self.seed,
            steps_per_epoch=self.steps_per_epoch,
            full_steps=self.full_steps,
            step_rows=share(self.global_batch, slot, self.slots),
            parts=parts,
            ranges=tuple(self.order(part.epoch).ranges(part.start, part.stop) for part in parts),
        )

    def order(self, epoch: int) -> Order:
        """Return the order of an epoch, O(row groups)."""
        return _order(self, epoch)

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.seed, self.global_batch, self.slots, self.block_steps))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.identity() == other.identity()

    def identity(self) -> dict[str, int | str]:
        """Return what decides the samples of every step; stored with a run and compared when it goes on."""
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "slots": self.slots,
            "block_steps": self.block_steps,
        }

    @cached_property
    def unit_rows(self) -> int:
        """The most rows of a unit: small enough that every slot draws from many places."""
        return max(1, self.num_rows // (UNITS_PER_SLOT * self.slots))

    @cached_property
    def units(self) -> tuple[Ints, Ints, Ints]:
        """(first row, rows, row group) of every unit before permutation."""
        starts = np.cumsum(self.group_rows) - self.group_rows
        if self.group_rows.max() <= self.unit_rows:
            whole = np.flatnonzero(self.group_rows)
            return starts[whole], self.group_rows[whole], whole
        pieces = np.maximum(1, -(-self.group_rows // self.unit_rows))
        group = np.repeat(np.arange(len(self.group_rows)), pieces)
        piece = np.arange(len(group)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        low = piece * self.group_rows[group] // pieces[group]
        high = (piece + 1) * self.group_rows[group] // pieces[group]
        filled = high > low
        return (starts[group] + low)[filled], (high - low)[filled], group[filled]


@lru_cache(maxsize=4)
def _order(plan: Plan, epoch: int) -> Order:
    row, size, group = plan.units
    permuted = permutation(len(row), plan.seed, _EPOCH, epoch)
    sizes = size[permuted]
    return Order(row=row[permuted], size=sizes, place=np.cumsum(sizes) - sizes, group=group[permuted])


def _expand(first: Ints, counts: Ints) -> Ints:
    """Return the rows of ranges, one after another."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(first - (ends - counts), counts) + np.arange(total, dtype=np.int64)
