"""Buffers that a forward changes, other than batch norm's: spectral norm's vectors, codebooks, counters.

Each slot starts from the buffers of the step's begin; the step ends with their mean over the slots, weighted by rows.
So they are the same on every worker, whatever slots it holds. Whether a phase changes any is settled in its first step.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from elastrain.errors import SpecError
from elastrain.training.reduce import Group
from elastrain.training.slotsum import SlotSum, slot_sum


class MovingBuffers:
    """The persistent buffers of a model but batch norm's; a buffer that is not persistent holds nothing to keep."""

    def __init__(self, model: nn.Module, slots: int, consistency: str) -> None:
        self._places: list[tuple[nn.Module, str, str]] = []
        self._held: list[Tensor] = []
        for path, module in model.named_modules():
            normed = isinstance(module, _BatchNorm) and module.track_running_stats
            for name, buffer in module.named_buffers(recurse=False):
                if not normed and name not in module._non_persistent_buffers_set:  # noqa: SLF001 -- no public way
                    self._places.append((module, name, f"{path}.{name}".removeprefix(".")))
                    self._held.append(buffer)
        self._kept = [buffer.clone() for buffer in self._held]
        self._versions = [buffer._version for buffer in self._held]  # noqa: SLF001 -- counts writes, at no cost
        self.changed: list[str] = []
        self._slots, self._consistency = slots, consistency
        self._moves: tuple[Tensor, ...] = ()
        self._total: SlotSum | None = None

    def __bool__(self) -> bool:
        return bool(self._places)

    def begin(self, *, moving: bool) -> None:
        """Take what the buffers hold as the begin of a step in which forwards are `moving` them."""
        for index in self._touched():
            self._kept[index].copy_(self._held[index])
        self._settle()
        self._total = self._new_total() if moving and self._held else None
        self.changed = []

    def begin_slot(self, slot: int) -> None:
        """Note moves from here on as those of this slot."""
        if self._total is not None:
            self._total.begin_slot(slot)

    def end_slot(self, share: float) -> None:
        """Note how a slot with this share of the step's rows moved the buffers, and put them back."""
        for index in self._touched():
            held, kept = self._held[index], self._kept[index]
            if self._total is not None:
                self._moves[index].add_(((held.double() - kept.double()) * share).view(-1))
            self.changed.append(self._places[index][2])
        self.put_back()

    def put_back(self) -> None:
        """Make the buffers what they were when the step began."""
        for index in self._touched():
            self._held[index].copy_(self._kept[index])
        self._settle()

    def end(self, group: Group) -> None:
        """Move the buffers by the mean over all slots; every worker calls it, with moves or without."""
        assert self._total is not None
        self._total.reduce(group)
        for held, kept, move in zip(self._held, self._kept, self._moves, strict=True):
            value = kept.double() + move.view_as(kept)
            held.copy_(value if held.is_floating_point() else value.round())
            kept.copy_(held)
        self._settle()

    def _new_total(self) -> SlotSum:
        sizes = [buffer.numel() for buffer in self._held]
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=self._held[0].device)
        self._moves = flat.split(sizes)
        return slot_sum(flat, self._slots, self._consistency)

    def _touched(self) -> list[int]:
        """Return which buffers were written since the last call of `_settle`; one that was replaced is taken over."""
        touched = []
        for index, (module, name, path) in enumerate(self._places):
            now, held = module._buffers[name], self._held[index]  # noqa: SLF001 -- getattr costs three times as much
            if now is not held:
                if now is None or now.shape != held.shape or now.dtype != held.dtype:
                    raise SpecError(
                        f"buffer {path} changes its shape or type in forward; register it with persistent=False"
                    )
                held.copy_(now.detach())
                module._buffers[name] = held  # noqa: SLF001
            if held._version != self._versions[index]:  # noqa: SLF001
                touched.append(index)
        return touched

    def _settle(self) -> None:
        self._versions = [buffer._version for buffer in self._held]  # noqa: SLF001
