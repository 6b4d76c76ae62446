"""`torch.save` of the same state to the same disk, flushed with `sync`; training stands still for all of it."""

import os
import statistics
import time

import torch
from benchmarks.checkpoint.work import folder_on_disk, size_bytes, state
from benchmarks.script import finish, options


def main() -> None:
    """Save several times; report the stalls and the time to load."""
    given = options()
    torch.set_num_threads(1)
    tensors = state(given["megabytes"])
    stalls = []
    with folder_on_disk(given["folder"]) as run:
        for number in range(given["commits"] + 1):
            path = run / f"{number % 2}.pt"
            start = time.perf_counter()
            with path.open("wb") as file:
                torch.save(tensors, file)
                if given["sync"]:
                    file.flush()
                    os.fsync(file.fileno())
            stalls.append(time.perf_counter() - start)
        start = time.perf_counter()
        torch.load(path, weights_only=True)
        load_s = time.perf_counter() - start
    stall_s = statistics.median(stalls[1:])
    measures = {"stall_s": stall_s, "first_stall_s": stalls[0], "write_s": stall_s, "load_s": load_s}
    finish(measures, {"bytes": size_bytes(tensors), "tensors": len(tensors), "commits": given["commits"]})


if __name__ == "__main__":
    main()
