"""Sums over the slots of a step: fast (`sample`), or in an order that the slots alone decide (`bitwise`).

Under `bitwise` the slots are the leaves of a binary tree. Node (first, level) is the sum over the slots from `first` up
to `first + 2**level`, as far as they exist: left half + right half. A worker folds its slots as they finish, so it
holds at most one partial sum a level. Then, chunk by chunk, each worker finishes the tree for its share of the elements
and the shares are gathered: the traffic of a ring all-reduce where workers hold whole nodes, little memory besides the
partial sums, and the same bits at any number of workers. Short gradients take a shorter way to the same bits.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from elastrain.training.reduce import Group, slots_of

Node = tuple[int, int]

CHUNK = 1 << 20
"""Elements that workers exchange at a time. Each time costs them two meetings: with a quarter of it, they take longer
than their data; far more is no faster, and would be held besides the partial sums."""


SMALL = 1 << 16
"""Elements of a gradient up to which it takes longer to meet twice than to send all partial sums to everybody: that is
done where there are no more of them than half the slots, since nobody is to hold the gradients of all."""


class SlotSum(Protocol):
    """Turns what `buffer` holds for each slot into its sum over all slots, on every member of a group."""

    buffer: Tensor

    def begin(self) -> None:
        """Start anew, with an empty buffer."""

    def begin_slot(self, slot: int) -> None:
        """Have the next slot's numbers added to the buffer; slots come in order, those without rows too."""

    def reduce(self, group: Group) -> None:
        """Leave the sum over all slots in `buffer`; raises GroupLost."""


class PlainSum:
    """Adds up slots in the buffer, and workers by one all-reduce: its order depends on the number of workers."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def begin(self) -> None:
        """Clear the buffer."""
        self.buffer.zero_()

    def begin_slot(self, slot: int) -> None:
        """Nothing to do: what comes is added to what is there."""

    def reduce(self, group: Group) -> None:
        """Sum over all workers."""
        group.all_reduce(self.buffer)


class TreeSum:
    """Adds in the order of the tree over `slots` leaves."""

    def __init__(self, buffer: Tensor, slots: int) -> None:
        self.buffer, self._slots = buffer, slots
        self._nodes: list[tuple[Node, Tensor]] = []
        self._spare: list[Tensor] = []
        self._leaf: int | None = None  # the slot whose numbers are in the buffer
        # For exchanges, and kept: touching fresh memory takes as long as sending what is in it. An exchange that was
        # given up may go on to write here as into `buffer`: whoever replaces that one makes a new TreeSum.
        self._kept = buffer.new_empty(0)

    def begin(self) -> None:
        """Clear the buffer, and forget what a broken step left."""
        self._spare += [value for _, value in self._nodes if value is not self.buffer]
        self._nodes, self._leaf = [], None
        self.buffer.zero_()

    def begin_slot(self, slot: int) -> None:
        """Fold the slot before, and clear the buffer."""
        if self._leaf is not None:
            node, value = self._fold(self._leaf)
            if value is self.buffer:
                value = self._spare.pop() if self._spare else torch.empty_like(self.buffer)
                value.copy_(self.buffer)
            self._nodes.append((node, value))
            self.buffer.zero_()
        self._leaf = slot

    def reduce(self, group: Group) -> None:
        """Finish the tree with all workers; `buffer` holds its root."""
        assert self._leaf is not None, "every worker holds a slot"
        if group.size == 1:
            _finish(dict([*self._nodes, ((self._leaf, 0), self.buffer)]), self._slots, self.buffer)
        else:
            self._nodes.append(self._fold(self._leaf))
            self._exchange(group)
        self._leaf = None

    def _fold(self, slot: int) -> tuple[Node, Tensor]:
        """Return the largest node that ends with this slot, added up from the buffer and the partial sums before it."""
        first, level, value = slot, 0, self.buffer
        while self._nodes and first % 2 ** (level + 1) and self._nodes[-1][0] == (first - 2**level, level):
            (first, level), left = self._nodes.pop()
            left.add_(value)
            if value is not self.buffer:
                self._spare.append(value)
            value, level = left, level + 1
        return (first, level), value

    def _exchange(self, group: Group) -> None:
        """Finish the tree with all workers, chunk by chunk: what it takes besides partial sums has a bound."""
        layout = [nodes_of(slots_of(rank, group.size, self._slots)) for rank in range(group.size)]
        assert [node for node, _ in self._nodes] == layout[group.rank]
        length = max(1, self.buffer.numel())
        if length <= SMALL and 2 * sum(map(len, layout)) <= self._slots:
            self._gather(group, layout)
            return
        share = -(-length // (-(-length // CHUNK) * group.size))  # of chunks of equal length, but for the last one's
        chunks = (tensor.split(share * group.size) for tensor in (self.buffer, *(value for _, value in self._nodes)))
        for result, *values in zip(*chunks, strict=True):
            self._exchange_chunk(group, layout, result, values)

    def _gather(self, group: Group, layout: list[list[Node]]) -> None:
        """Give all workers all partial sums, and let each finish the tree: one meeting, not two."""
        length, most = self.buffer.numel(), max(map(len, layout))
        mine, all_of_them = self._scratch(most * length, group.size * most * length)
        torch.cat([value for _, value in self._nodes], out=mine[: len(self._nodes) * length])
        group.all_gather(all_of_them, mine)
        parts = all_of_them.view(group.size, most, length)
        found = {node: parts[rank, place] for rank, nodes in enumerate(layout) for place, node in enumerate(nodes)}
        _finish(found, self._slots, self.buffer)

    def _exchange_chunk(self, group: Group, layout: list[list[Node]], result: Tensor, values: list[Tensor]) -> None:
        """Put the sum over all slots into `result`: of this worker's share from all partial sums, then of all shares.

        `values` are the worker's own partial sums; one of them may be in the memory of `result`.
        """
        length, rank, others = len(result), group.rank, [r for r in range(group.size) if r != group.rank]
        share = -(-length // group.size)
        lengths = [max(0, min(share, length - r * share)) for r in range(group.size)]
        mine, cuts = lengths[rank], [value.split(lengths) for value in values]
        received = [0 if r == rank else mine * len(layout[r]) for r in range(group.size)]
        sent = [0 if r == rank else lengths[r] * len(values) for r in range(group.size)]
        inbox, outbox = self._scratch(sum(received), max(sum(sent), share * group.size))
        packed = torch.cat([cut[r] for r in others for cut in cuts], out=outbox[: sum(sent)])
        group.all_to_all(inbox, packed, received, sent)
        nodes = layout[rank] + [node for r in others for node in layout[r]]
        parts = [cut[rank] for cut in cuts] + list(inbox.split([mine] * (len(nodes) - len(values))))
        whole = result if length == share * group.size else outbox[: share * group.size]
        own = whole[rank * share : (rank + 1) * share]
        _finish(dict(zip(nodes, parts, strict=True)), self._slots, own[:mine])
        group.all_gather(whole, own)
        if whole is not result:
            result.copy_(whole[:length])

    def _scratch(self, *sizes: int) -> tuple[Tensor, ...]:
        """Return pieces of the memory that is kept; it grows where a group needs more than those before."""
        if self._kept.numel() < sum(sizes):
            self._kept = self.buffer.new_empty(sum(sizes))
        pieces: tuple[Tensor, ...] = self._kept[: sum(sizes)].split(sizes)
        return pieces


def nodes_of(slots: range) -> list[Node]:
    """Return the largest nodes of the tree that make up a range of slots, in order.

    >>> nodes_of(range(2, 5)), nodes_of(range(5, 8)), nodes_of(range(8))
    ([(2, 1), (4, 0)], [(5, 0), (6, 1)], [(0, 3)])
    """
    nodes, first = [], slots.start
    while first < slots.stop:
        level = 0
        while first % 2 ** (level + 1) == 0 and first + 2 ** (level + 1) <= slots.stop:
            level += 1
        nodes.append((first, level))
        first += 2**level
    return nodes


def _finish(parts: Mapping[Node, Tensor], slots: int, result: Tensor) -> None:
    """Put the sum over all slots into `result`, from partial sums that cover them; what they hold is used up."""

    def value(first: int, level: int, out: Tensor | None = None) -> Tensor:
        if (first, level) in parts:
            return parts[first, level]
        middle = first + 2 ** (level - 1)
        if middle >= slots:
            return value(first, level - 1, out)
        left = value(first, level - 1)
        return torch.add(left, value(middle, level - 1), out=left if out is None else out)

    root = value(0, (slots - 1).bit_length(), result)
    if root is not result:
        result.copy_(root)


def slot_sum(buffer: Tensor, slots: int, consistency: str) -> SlotSum:
    """Return the sum that a spec's `consistency` asks for."""
    return TreeSum(buffer, slots) if consistency == "bitwise" else PlainSum(buffer)
