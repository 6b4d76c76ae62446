"""The limits: the same bytes copied in memory (a stall), written and flushed (a write), read back (a load)."""

import os
import statistics
import time

import torch
from benchmarks.checkpoint.work import folder_on_disk, size_bytes, state
from benchmarks.script import finish, options


def main() -> None:
    """Copy, write and read several times."""
    given = options()
    torch.set_num_threads(1)
    tensors = state(given["megabytes"])
    held = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    stalls, writes = [], []
    with folder_on_disk(given["folder"]) as run:
        for _ in range(given["commits"] + 1):
            start = time.perf_counter()
            for name, tensor in tensors.items():
                held[name].copy_(tensor)
            stalls.append(time.perf_counter() - start)
            start = time.perf_counter()
            with (run / "raw").open("wb") as file:
                for tensor in held.values():
                    file.write(tensor.numpy().data)
                file.flush()
                os.fsync(file.fileno())
            writes.append(time.perf_counter() - start)
        start = time.perf_counter()
        (run / "raw").read_bytes()
        load_s = time.perf_counter() - start
    measures = {
        "stall_s": statistics.median(stalls[1:]),
        "first_stall_s": stalls[0],
        "write_s": statistics.median(writes[1:]),
        "load_s": load_s,
    }
    finish(measures, {"bytes": size_bytes(tensors), "tensors": len(tensors), "commits": given["commits"]})


if __name__ == "__main__":
    main()
