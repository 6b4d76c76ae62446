"""Precision: what forwards compute in, and loss scaling for fp16. Weights and gradients stay fp32 (fp64 for proofs)."""

import os
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


def fix_arithmetic(consistency: str, *, compiles: bool = False) -> None:
    """Under `bitwise`, have torch choose kernels that give the same bits each time, or refuse; call it before CUDA.

    Else torch may choose, also where this process has done another run before. Kernels that torch itself writes, where
    a run `compiles`, are held to the same; to say so loads the compiler, 1.6 s of a core that others need not spend.
    """
    if compiles:
        torch.use_deterministic_algorithms(mode=consistency == "bitwise")
    torch.set_deterministic_debug_mode("error" if consistency == "bitwise" else "default")
    if consistency == "bitwise":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it only
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a costly debugging aid


def arithmetic(device: torch.device) -> str:
    """Return what decides the bits of a forward: workers that say the same compute the same."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__} on {kind}, {torch.get_num_threads()} threads"


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
