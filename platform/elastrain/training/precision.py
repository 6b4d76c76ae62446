"""Precision: what forwards compute in, and loss scaling for fp16. Weights and gradients stay fp32 (fp64 for proofs)."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

GROWTH_STEPS, LARGEST_SCALE = 2000, 2.0**24
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def forward_context(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward: autocast for bf16 and fp16, nothing for fp32 and fp64."""
    if precision in AUTOCAST:
        return torch.autocast(device.type, AUTOCAST[precision])
    return nullcontext()


@dataclass(slots=True)
class LossScale:
    """The factor on the loss that keeps small fp16 gradients from vanishing; 1 in every other precision.

    Halved when a step overflows (the step is skipped), doubled after 2000 steps without. Source: Micikevicius et al.,
    "Mixed precision training", 2018 (arXiv 1710.03740).
    """

    value: float
    good_steps: int = 0

    @classmethod
    def of(cls, precision: str) -> "LossScale":
        """Return the scale that a run starts with."""
        return cls(value=2.0**16 if precision == "fp16" else 1.0)

    def update(self, *, overflow: bool) -> None:
        """Move on after a step."""
        if overflow:
            self.value, self.good_steps = max(1.0, self.value / 2.0), 0
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = min(LARGEST_SCALE, self.value * 2.0), 0
