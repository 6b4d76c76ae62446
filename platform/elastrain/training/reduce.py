"""Sums over workers: the Group that a step runs on, and the gradients of a phase as one flat buffer.

A Group may be another one after every step; nothing here or in the loop keeps what depends on its size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from elastrain.errors import SpecError


class GroupLost(Exception):  # noqa: N818 -- an event: the membership decides what follows
    """A member of the group is gone; whatever was being summed is not to be used."""


class Group(Protocol):
    """The workers of one generation. Raises GroupLost from any operation when a member is gone."""

    @property
    def rank(self) -> int:
        """This worker's place, 0…size−1."""

    @property
    def size(self) -> int:
        """How many workers there are."""

    @property
    def generation(self) -> int:
        """Counts the groups of a run; grows by one whenever members change."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all members."""

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace `tensor` by the one of rank `source`."""

    def all_to_all(self, output: Tensor, tensor: Tensor, received: list[int], sent: list[int]) -> None:
        """Send `sent[r]` elements of `tensor`, in order, to each rank r; `received[r]` from it come into `output`."""

    def all_gather(self, output: Tensor, tensor: Tensor) -> None:
        """Put the tensors of all members, of equal length, one after another into `output`."""


class Solo:
    """The group of one worker: nothing to do."""

    rank, size = 0, 1

    def __init__(self, generation: int = 1) -> None:
        self.generation = generation

    def all_reduce(self, tensor: Tensor) -> None:
        """Leave `tensor` as it is."""

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Leave `tensor` as it is."""

    def all_to_all(self, output: Tensor, tensor: Tensor, received: list[int], sent: list[int]) -> None:
        """Copy."""
        del received, sent
        output.copy_(tensor)

    def all_gather(self, output: Tensor, tensor: Tensor) -> None:
        """Copy."""
        output.copy_(tensor)


def slots_of(rank: int, size: int, slots: int) -> range:
    """Return the slots that a worker holds: contiguous, all slots over all workers, sizes differing by one at most.

    >>> [list(slots_of(r, 3, 8)) for r in range(3)]
    [[0, 1], [2, 3, 4], [5, 6, 7]]
    """
    return range(rank * slots // size, (rank + 1) * slots // size)


class FlatGradients:
    """Gradients of some parameters as views of one buffer, with a tail for what is summed along with them.

    `buffer` is summed in one call a step: first the gradients, then `slot_rows` of shape (slots, width), then `flags`
    of shape (width,). A slot's row, `rows[slot]`, is written by the worker that holds it and zero elsewhere, so its sum
    is exact in any order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, slots: int, width: int) -> None:
        first = parameters[0]
        size = sum(parameter.numel() for parameter in parameters)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        self.parameters = list(parameters)
        self.buffer = torch.zeros(size + (slots + 1) * width, dtype=dtype, device=first.device)
        self.values = self.buffer[:size]
        tail = self.buffer[size:].view(slots + 1, width)
        self.slot_rows, self.flags = tail[:-1], tail[-1]
        self.rows = self.slot_rows.unbind()
        self._views = []
        offset = 0
        for parameter in parameters:
            self._views.append(_like(self.buffer[offset : offset + parameter.numel()], parameter))
            offset += parameter.numel()

    def attach(self) -> None:
        """Make backward add into the buffer."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.grad is not view:
                parameter.grad = view

    def check_attached(self) -> None:
        """Raise SpecError if the task replaced a gradient: it would be missing from the sum."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.grad is not view:
                raise SpecError(
                    "the task replaced or cleared the gradients of its model; leave `.grad` and zero_grad() alone"
                )


def _like(flat: Tensor, parameter: Tensor) -> Tensor:
    """Return a view of `flat` with a parameter's shape and memory layout: fused optimizers walk both side by side."""
    return flat.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride(), flat.storage_offset())


def sum_in_order(rows: Tensor) -> Tensor:
    """Return the sum over dimension 0, added one after another: the same bits whoever computed the rows."""
    return torch.cumsum(rows, dim=0)[-1] if len(rows) > 1 else rows[0].clone()
