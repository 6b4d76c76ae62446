"""The sum by itself: gradients of S slots added along the tree, against a plain sum and one all-reduce, over W workers.

Also how many buffers of the gradient's size are held at once: never one a slot.
"""

import hashlib
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from benchmarks.bitwise.sizes import SUM_SLOTS
from benchmarks.script import finish, in_ranks, options
from benchmarks.stats import alternating
from tests.training.meeting import meet  # noqa: TID251 -- one way to meet for tests and benchmarks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elastrain.training.loop import fix_threads
from elastrain.training.reduce import Group, slots_of
from elastrain.training.slotsum import SlotSum, slot_sum

MODES = {"tree": "bitwise", "plain": "sample"}
ROUNDS, SMALL_ROUNDS = 10, 2


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations have made and that are still held; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what was asked for, and count."""
        del types
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, list | tuple) else [result]
        self._made += [ref(tensor) for tensor in found if isinstance(tensor, Tensor)]
        held = [tensor for made in self._made if (tensor := made()) is not None]
        self._made = [ref(tensor) for tensor in held]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        self.peak = max(self.peak, sum(storages.values()))
        return result


def run(total: SlotSum, slots: range, gradients: list[Tensor], group: Group) -> tuple[float, float]:
    """Add up all slots; return the seconds of all of it, and of the sum over workers alone."""
    start = time.perf_counter()
    add(total, slots, gradients)
    folded = time.perf_counter()
    total.reduce(group)
    end = time.perf_counter()
    return end - start, end - folded


def add(total: SlotSum, slots: range, gradients: list[Tensor]) -> None:
    """Do what backward does for each slot."""
    total.begin()
    for slot, gradient in zip(slots, gradients, strict=True):
        total.begin_slot(slot)
        total.buffer.add_(gradient)


def make_gradient(slot: int, floats: int) -> Tensor:
    """Return numbers of a wide range of sizes, so that every other order of adding gives other bits."""
    generator = torch.Generator().manual_seed(slot)
    return torch.randn(floats, generator=generator) * torch.exp(3 * torch.randn(floats, generator=generator))


def held_bytes(total: SlotSum, slots: range, gradients: list[Tensor], group: Group) -> dict[str, int]:
    """Return the most bytes that a sum holds while slots are added, and with the exchange between workers."""
    with Held() as held:
        add(total, slots, gradients)
        adding = held.peak
        total.reduce(group)
    return {"adding": adding, "all": held.peak}


def measure(slots: int, floats: int, group: Group, rounds: int) -> tuple[dict[str, float], dict[str, int], str]:
    """Return milliseconds of both sums, the most bytes that the tree held, and the digest of its result."""
    mine = slots_of(group.rank, group.size, slots)
    gradients = [make_gradient(slot, floats) for slot in mine]
    totals = {name: slot_sum(torch.zeros(floats), slots, consistency) for name, consistency in MODES.items()}
    run(totals["tree"], mine, gradients, group)
    run(totals["plain"], mine, gradients, group)
    held = held_bytes(totals["tree"], mine, gradients, group)  # by now it has what it keeps from step to step
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in totals}
    for name in alternating(list(totals), rounds):
        group.all_reduce(torch.zeros(1))  # all begin together
        taken[name].append(run(totals[name], mine, gradients, group))
    measures = {}
    for (name, values), (place, part) in itertools.product(taken.items(), enumerate(("all", "sum"))):
        measures[f"{name}_{part}_ms, {slots} slots"] = statistics.median(value[place] for value in values) * 1e3
    result = totals["tree"].buffer.numpy().tobytes()
    peaks = {f"peak_bytes_{part}_{slots}_slots": value for part, value in held.items()}
    return measures, peaks, hashlib.sha256(result).hexdigest()


def work(rank: int, given: dict[str, Any], folder: str) -> tuple[dict[str, float], dict[str, int], str]:
    """Measure all sizes as one worker; the digest is that of eight slots, which all numbers of workers can share."""
    fix_threads(1.0)
    floats, rounds = given["floats"], SMALL_ROUNDS if given["small"] else ROUNDS
    group = meet(Path(folder), rank, given["workers"])
    measures, peaks, digests = dict[str, float](), dict[str, int](), dict[int, str]()
    for slots in SUM_SLOTS[given["workers"]]:
        found, held, digests[slots] = measure(slots, floats, group, rounds)
        measures, peaks = measures | found, peaks | held
    return measures, peaks, digests[8]


def main() -> None:
    """Measure with one process a worker; what is held is that of the worker that holds most."""
    given = options()
    with tempfile.TemporaryDirectory() as folder:
        ranks = in_ranks(given["workers"], work, given, folder)
    measures, peaks, digest = ranks[0]
    most = {name: max(rank[1][name] for rank in ranks) for name in peaks}
    for slots in SUM_SLOTS[given["workers"]]:
        measures[f"slots, {slots} slots"] = float(slots)
        for part in ("adding", "all"):
            buffers = most[f"peak_bytes_{part}_{slots}_slots"] / (4 * given["floats"])
            measures[f"held_{part}, {slots} slots"] = buffers
    finish(measures, {"workers": given["workers"], **most}, digest)


if __name__ == "__main__":
    main()
