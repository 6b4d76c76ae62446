"""Batch normalisation under slots: normalise per slot, merge the running statistics once a step in slot order.

torch's own modules are used. With momentum 1 a forward leaves the batch's statistics in the running buffers; a hook
takes them from there, and the true running values are kept aside and updated when all slots have been summed. One value
a channel (a forward of one row) has no variance: torch refuses it, and here the running statistics normalise it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from elastrain.training.reduce import sum_in_order


class BatchNorms:
    """The batch norms of a model that track statistics; `width` numbers a slot carry count, means and variances."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._momentum = [norm.momentum for norm in self._norms]
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._sums: list[list[Tensor]] = []
        self._alone = [False] * len(self._norms)
        for index, norm in enumerate(self._norms):
            norm.register_forward_pre_hook(lambda module, args, index=index: self._prepare(index, module, args))
            norm.register_forward_hook(lambda module, args, _, index=index: self._collect(index, module, args))

    @property
    def width(self) -> int:
        """Numbers that a slot contributes to the sum of a step."""
        return sum(1 + 2 * norm.num_features for norm in self._norms)

    def begin(self) -> None:
        """Keep the running statistics aside; from here to `end` forwards only leave their batch's."""
        self._kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in self._norms]  # type: ignore[union-attr]
        for norm in self._norms:
            norm.momentum = 1.0

    def begin_slot(self) -> None:
        """Forget what earlier slots left."""
        self._sums = [[] for _ in self._norms]

    def end_slot(self, row: Tensor) -> None:
        """Write count, count-weighted means and variances of this slot into `row` of length `width`."""
        offset = 0
        for norm, calls in zip(self._norms, self._sums, strict=True):
            length = 1 + 2 * norm.num_features
            if calls:
                row[offset : offset + length] = sum_in_order(torch.stack(calls))
            offset += length

    def end(self, rows: Tensor | None) -> None:
        """Put the running statistics back, moved by `rows` (slots, width) of all slots; None moves nothing."""
        offset, self._sums = 0, []
        for norm, alone in zip(self._norms, self._alone, strict=True):
            norm.training = norm.training or alone  # where a forward was cut off
        self._alone = [False] * len(self._norms)
        for norm, momentum, (mean, var) in zip(self._norms, self._momentum, self._kept, strict=True):
            size = norm.num_features
            norm.momentum = momentum
            norm.running_mean.copy_(mean)  # type: ignore[union-attr]
            norm.running_var.copy_(var)  # type: ignore[union-attr]
            if rows is not None:
                total = sum_in_order(rows[:, offset : offset + 1 + 2 * size])
                self._move(norm, total)
            offset += 1 + 2 * size

    def _move(self, norm: _BatchNorm, total: Tensor) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        size, called = norm.num_features, total[0] > 0
        norm.num_batches_tracked.add_(called)
        dtype = norm.running_mean.dtype
        count = norm.num_batches_tracked.clamp_min(1).to(dtype)
        weight = called.to(dtype) * (
            1.0 / count if norm.momentum is None else norm.momentum
        )  # 0 where no slot called it
        statistics = (total[1:] / total[0].clamp_min(1.0)).to(dtype)
        norm.running_mean.lerp_(statistics[:size], weight)
        norm.running_var.lerp_(statistics[size:], weight)

    def _prepare(self, index: int, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if norm.training and self._sums and args[0].numel() == norm.num_features:
            assert isinstance(norm, _BatchNorm)
            self._use_running(index, norm)

    def _use_running(self, index: int, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var = self._kept[index]
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.training, self._alone[index] = False, True

    def _collect(self, index: int, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if self._alone[index]:
            norm.training, self._alone[index] = True, False
            return
        if not norm.training or not self._sums:
            return
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.sub_(1)  # a forward counts itself; a step counts once
        count = args[0].numel() // norm.num_features
        both = torch.cat([norm.running_mean, norm.running_var]).detach() * count
        self._sums[index].append(torch.cat([both.new_tensor([float(count)]), both]))
