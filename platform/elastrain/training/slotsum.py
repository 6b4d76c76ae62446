"""Sums over the slots of a step: fast (`sample`), or in an order that the slots alone decide (`bitwise`).

Under `bitwise` the slots are the leaves of a binary tree. Node (first, level) is the sum over the slots from `first` up
to `first + 2**level`, as far as they exist: left half + right half. A worker folds its slots as they finish, so it
holds at most one partial sum a level. Then each worker finishes the tree for its share of the elements, and the shares
are gathered: the traffic of a ring all-reduce where workers hold whole nodes, and the same bits at any number of them.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from elastrain.training.reduce import Group, slots_of

Node = tuple[int, int]


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
        self._nodes.append(self._fold(self._leaf))
        if group.size == 1:
            root = _root(dict(self._nodes), self._slots)
            if root is not self.buffer:
                self.buffer.copy_(root)
        else:
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
        size, length = group.size, self.buffer.numel()
        share = -(-length // size)
        lengths = [min(length, (rank + 1) * share) - min(length, rank * share) for rank in range(size)]
        values = [value for _, value in self._nodes]
        cuts = [part for parts in zip(*(value.split(lengths) for value in values), strict=True) for part in parts]
        sent = values[0] if len(values) == 1 else torch.cat(cuts)
        layout = [nodes_of(slots_of(rank, size, self._slots)) for rank in range(size)]
        assert [node for node, _ in self._nodes] == layout[group.rank]
        mine = lengths[group.rank]
        received = self.buffer.new_empty(mine * sum(map(len, layout)))
        group.all_to_all(received, sent, [mine * len(nodes) for nodes in layout], [n * len(values) for n in lengths])
        parts = received.view(-1, mine).unbind() if mine else [received] * sum(map(len, layout))
        root = _root(dict(zip([node for nodes in layout for node in nodes], parts, strict=True)), self._slots)
        own, gathered = self.buffer.new_zeros(share), self.buffer.new_empty(share * size)
        own[:mine] = root
        group.all_gather(gathered, own)
        self.buffer.copy_(gathered[:length])


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


def _root(parts: Mapping[Node, Tensor], slots: int) -> Tensor:
    """Return the sum over all slots from partial sums that cover them; what they hold is used up."""

    def value(first: int, level: int) -> Tensor:
        if (first, level) in parts:
            return parts[first, level]
        left, middle = value(first, level - 1), first + 2 ** (level - 1)
        return left.add_(value(middle, level - 1)) if middle < slots else left

    return value(0, (slots - 1).bit_length())


def slot_sum(buffer: Tensor, slots: int, consistency: str) -> SlotSum:
    """Return the sum that a spec's `consistency` asks for."""
    return TreeSum(buffer, slots) if consistency == "bitwise" else PlainSum(buffer)
