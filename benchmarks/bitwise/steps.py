"""Steps under `bitwise` and `sample` in turns, in the same processes, on the same micro-batches: one forward a slot.

What differs is the whole price: torch's deterministic kernels, folding the slots along the tree, and the exchange of
partial sums in place of one all-reduce. On a CPU torch asks for its kernels at every call, so the mode can be switched
between turns. A group of ours joins the processes; blocks are in memory, and there is no Ray.
"""

import hashlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from benchmarks.bitwise.sizes import FEWEST_SLOTS, ROUNDS, SMALL_ROUNDS, WARM_STEPS, Point, points
from benchmarks.loop.ours import MemoryFeed
from benchmarks.loop.work import Size, work_of
from benchmarks.script import finish, in_ranks, options
from benchmarks.stats import alternating
from tests.training.meeting import meet  # noqa: TID251 -- one way to meet for tests and benchmarks

from elastrain.observe.ledger import Clock
from elastrain.training.batches import Batches
from elastrain.training.loop import fix_threads
from elastrain.training.precision import fix_arithmetic
from elastrain.training.reduce import Group, slots_of
from elastrain.training.state import TrainState, digest
from elastrain.training.step import run_step
from elastrain.training.task import make_task

Mode = Literal["bitwise", "sample"]
MODES: tuple[Mode, ...] = ("bitwise", "sample")
EPOCH_STEPS = 4


class Trainee:
    """One worker's half of a run in one mode."""

    def __init__(self, mode: Mode, model: str, point: Point, group: Group, steps: int) -> None:
        batch = point.slots * point.rows
        size = Size(held=EPOCH_STEPS * batch, rows=batch, slots=point.slots, workers=group.size, steps=steps)
        work, device = work_of(model, size, mode), torch.device("cpu")
        self._mode, self._group, self._steps = mode, group, steps
        self._slots = slots_of(group.rank, group.size, point.slots)
        self._batches = Batches(MemoryFeed(work, self._slots, steps), work.plan, device)
        self._clock = Clock()
        self.state = TrainState(work.spec, make_task(work.spec, work.dataset), device)
        self.state.share(group, 0)
        self.state.model.train()

    def turn(self, steps: int) -> float:
        """Do some steps; return seconds a step."""
        fix_arithmetic(self._mode)
        torch.use_deterministic_algorithms(self._mode == "bitwise")
        _meet(self._group)
        start = time.perf_counter()
        for _ in range(steps):
            done = run_step(
                self.state,
                self._batches,
                self._group,
                self._slots,
                clock=self._clock,
                flag=0.0,
                num_steps=self._steps,
            )
            done.totals.tolist()  # the loop reads them too
        return (time.perf_counter() - start) / steps


def _meet(group: Group) -> None:
    group.all_reduce(torch.zeros(1))


def measure(model: str, point: Point, group: Group, rounds: int) -> tuple[dict[str, float], str]:
    """Return microseconds a step in both modes, plain all-reduce's share, and the digest of bitwise's weights."""
    turn = point.turn(model)
    trainees: dict[str, Trainee] = {
        mode: Trainee(mode, model, point, group, WARM_STEPS + turn * rounds) for mode in MODES
    }
    for trainee in trainees.values():
        trainee.turn(WARM_STEPS)
    taken: dict[str, list[float]] = {mode: [] for mode in MODES}
    reduce: list[float] = []
    for place, mode in enumerate(alternating(MODES, rounds)):
        taken[mode].append(trainees[mode].turn(turn))
        if place % 2:
            reduce.append(all_reduce_s(group, trainees["sample"]))
    micros = {mode: statistics.median(values) * 1e6 for mode, values in taken.items()}
    share = statistics.median(reduce) * 1e6 / micros["sample"]
    found = {point.named(f"{mode}_us"): value for mode, value in micros.items()}
    return {**found, point.named("share"): share}, digest(trainees["bitwise"].state.model.state_dict())


def all_reduce_s(group: Group, trainee: Trainee, times: int = 5) -> float:
    """Return the seconds of a plain all-reduce of the gradients by itself, all workers arriving at once."""
    if group.size == 1:
        return 0.0
    copy = torch.zeros_like(trainee.state.phases[0].gradients.buffer)
    taken = []
    for _ in range(times):
        _meet(group)
        start = time.perf_counter()
        group.all_reduce(copy)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def work(rank: int, given: dict[str, Any], folder: str) -> tuple[dict[str, float], str, int]:
    """Measure all sizes as one worker; return the measures, the digest over them, and how many there are."""
    fix_threads(1.0)
    small = bool(given["small"])
    group = meet(Path(folder), rank, given["workers"])
    total, measures, count = hashlib.sha256(), dict[str, float](), 0
    for point in points(given["workers"], small=small):
        found, weights = measure(given["model"], point, group, SMALL_ROUNDS if small else ROUNDS)
        measures |= found
        count += 1
        if point.slots >= FEWEST_SLOTS:
            total.update(weights.encode())
    return measures, total.hexdigest(), count


def main() -> None:
    """Measure with one process a worker."""
    given = options()
    with tempfile.TemporaryDirectory() as folder:
        measures, digest_, count = in_ranks(given["workers"], work, given, folder)[0]
    finish(measures, {"workers": given["workers"], "sizes": count}, digest_)


if __name__ == "__main__":
    main()
