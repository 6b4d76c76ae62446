"""Ours: `training.checkpoint.Writer`; training stands still for the copy, the write goes on beside it."""

import statistics
import threading
import time

import torch
from benchmarks.checkpoint.work import folder_on_disk, size_bytes, state, step, steps
from benchmarks.script import finish, options

from elastrain.spec.train import CheckpointSpec
from elastrain.training import checkpoint
from elastrain.training.checkpoint import Writer


def beside(writer: Writer, weight: torch.Tensor) -> list[float]:
    """Return the seconds of the steps done while a commit is being written."""
    waiter = threading.Thread(target=writer.wait)
    waiter.start()
    found: list[float] = []
    while waiter.is_alive():
        found.append(step(weight))
    return found


def main() -> None:
    """Commit several times; report stalls, write and load times, and how steps slow down beside a write."""
    given = options()
    torch.set_num_threads(1)
    tensors, weight = state(given["megabytes"]), torch.rand(768, 768)
    with folder_on_disk(given["folder"]) as run:
        writer = Writer(str(run), CheckpointSpec(keep=1))
        alone = steps(0.5, weight)
        stalls, during = [], []
        for number in range(given["commits"] + 1):
            start = time.perf_counter()
            writer.commit(tensors, {"step": number}, {})
            stalls.append(time.perf_counter() - start)
            during += beside(writer, weight)
        written = statistics.median(entry.write_s for entry in writer.written[1:])
        start = time.perf_counter()
        checkpoint.load(str(run), given["commits"])
        load_s = time.perf_counter() - start
    measures = {
        "stall_s": statistics.median(stalls[1:]),
        "first_stall_s": stalls[0],
        "write_s": written,
        "load_s": load_s,
        "slowdown": statistics.fmean(during) / statistics.fmean(alone),
    }
    finish(measures, {"bytes": size_bytes(tensors), "tensors": len(tensors), "commits": given["commits"]})


if __name__ == "__main__":
    main()
