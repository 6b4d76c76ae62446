"""Ours on one GPU: `training.loop.Loop` on blocks in memory, one worker that holds all slots."""

import tempfile
from typing import Any

import torch
from benchmarks.loop.ours import FixedSeat, Lines, MemoryFeed
from benchmarks.loop.work import gpu_work, measured_on_gpu
from benchmarks.script import finish, options

from elastrain.observe.ledger import Clock
from elastrain.training.loop import Loop
from elastrain.training.precision import fix_arithmetic
from elastrain.training.reduce import Solo
from elastrain.training.state import TrainState
from elastrain.training.task import make_task


def train(given: dict[str, Any], folder: str) -> list[tuple[float, ...]]:
    """Train; return the lines of the steps: (step, epoch, samples, loss, lr, norm, time)."""
    slots, steps, device = given["slots"], given["steps"], torch.device("cuda", 0)
    fix_arithmetic(given["consistency"])
    work = gpu_work(given, given["consistency"])
    lines = Lines()
    Loop(
        spec=work.spec,
        plan=work.plan,
        evaluation=None,
        eval_block_rows=1,
        num_steps=steps,
        run_url=folder,
        state=TrainState(work.spec, make_task(work.spec, work.dataset), device),
        feed=MemoryFeed(work, range(slots), steps),
        seat=FixedSeat(Solo()),
        recorder=lines,
        clock=Clock(),
        info={},
    ).run()
    return lines.lines


def main() -> None:
    """Train and tell."""
    with tempfile.TemporaryDirectory() as folder:
        lines = train(options(), folder)
    finish(*measured_on_gpu([line[6] for line in lines], [line[3] for line in lines]))


if __name__ == "__main__":
    main()
