"""The state that the checkpoint case saves, and steps that run beside a write."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

WIDTH = 1024
ADAM = 3  # a weight and two moments each


def state(megabytes: int) -> dict[str, Tensor]:
    """Return weights and moments of square layers, together about `megabytes`, named as a run's state."""
    layers = max(1, round(megabytes * 1e6 / (ADAM * 4 * WIDTH * WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    named = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    moments = ("exp_avg", "exp_avg_sq")
    weights = list(named.values())
    named |= {f"optim/loss/{i}/{key}": torch.rand_like(w) for i, w in enumerate(weights) for key in moments}
    return named


def size_bytes(tensors: dict[str, Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def step(weight: Tensor) -> float:
    """Do the arithmetic of a step of some 10 ms; return its seconds."""
    start = time.perf_counter()
    for _ in range(4):
        weight @ weight
    return time.perf_counter() - start


def steps(seconds: float, weight: Tensor) -> list[float]:
    """Return the seconds of each step that fits in `seconds`, at least five."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 5:
        found.append(step(weight))
    return found


@contextmanager
def folder_on_disk(base: str) -> Iterator[Path]:
    """Yield a folder beside the data, so that all sides write to one disk."""
    Path(base).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as name:
        yield Path(name)
