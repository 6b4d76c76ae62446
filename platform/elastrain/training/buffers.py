"""Buffers that a forward changes, other than batch norm's: spectral norm's vectors, codebooks, counters.

Each slot starts from the buffers of the step's begin; the step ends with their mean over the slots, weighted by rows.
So they are the same on every worker, whatever slots it holds. Whether a phase changes any is settled in its first step.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from elastrain.errors import SpecError
from elastrain.training.reduce import Group


class MovingBuffers:
    """The persistent buffers of a model but batch norm's; a buffer that is not persistent holds nothing to keep."""

    def __init__(self, model: nn.Module) -> None:
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
        self._moves: list[Tensor | None] = []
        self.changed: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._places)

    def begin(self) -> None:
        """Take what the buffers hold as the begin of a step."""
        for index in self._touched():
            self._kept[index].copy_(self._held[index])
        self._settle()
        self._moves, self.changed = [None] * len(self._held), []

    def end_slot(self, share: float) -> None:
        """Note how a slot with this share of the step's rows moved the buffers, and put them back."""
        for index in self._touched():
            held, kept = self._held[index], self._kept[index]
            move = (held.double() - kept.double()) * share
            earlier = self._moves[index]
            self._moves[index] = move if earlier is None else earlier + move
            self.changed.append(self._places[index][2])
        self.put_back()

    def put_back(self) -> None:
        """Make the buffers what they were when the step began."""
        for index in self._touched():
            self._held[index].copy_(self._kept[index])
        self._settle()

    def end(self, group: Group) -> None:
        """Move the buffers by the mean over all slots; every worker calls it, with moves or without."""
        pairs = zip(self._moves, self._kept, strict=True)
        moves = [torch.zeros_like(kept, dtype=torch.float64) if move is None else move for move, kept in pairs]
        flat = torch.cat([move.flatten() for move in moves])
        group.all_reduce(flat)
        for held, kept, move in zip(self._held, self._kept, flat.split([move.numel() for move in moves]), strict=True):
            value = kept.double() + move.view_as(kept)
            held.copy_(value if held.is_floating_point() else value.round())
            kept.copy_(held)
        self._settle()

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
