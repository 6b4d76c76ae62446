"""What the scripts of the sides share: options in, one JSON object out, and the processor time of a process tree."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def options() -> dict[str, Any]:
    """Return the options that the harness gave as the only argument."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    return given


def finish(measures: Mapping[str, float], counters: Mapping[str, int], digest: str | None = None) -> None:
    """Print the result as the last line."""
    print(json.dumps({"measures": dict(measures), "counters": dict(counters), "digest": digest}), flush=True)


def started() -> float:
    """Return the Unix time at which this process began, before Python and what it imports."""
    fields = _stat(os.getpid())
    assert fields is not None
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) * TICK_S


def tree_cpu_s(root: int) -> float:
    """Return the processor seconds of a process and all below it, ended children that were waited for included."""
    return sum(sum(int(value) for value in fields[11:15]) * TICK_S for fields in _tree(root).values())


def descendants(root: int) -> dict[int, int]:
    """Return the processes below one, each with the tick of its start, by which it is told from a later one."""
    return {pid: int(fields[19]) for pid, fields in _tree(root).items() if pid != root}


def lives(pid: int, started: int) -> bool:
    """Say whether a process that was found by `descendants` is still running; a zombie is not."""
    fields = _stat(pid)
    return fields is not None and int(fields[19]) == started and fields[0] != "Z"


def _tree(root: int) -> dict[int, list[str]]:
    """Return what the kernel says of a process and all below it, from its state on."""
    found = {int(entry.name): _stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdecimal()}
    stats = {pid: fields for pid, fields in found.items() if fields is not None}
    parents = {pid: int(fields[1]) for pid, fields in stats.items()}
    return {pid: fields for pid, fields in stats.items() if _is_below(pid, root, parents)}


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None  # ended meanwhile


def _is_below(pid: int, root: int, parents: Mapping[int, int]) -> bool:
    while pid and pid != root:
        pid = parents.get(pid, 0)
    return pid == root


def in_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(rank, *arguments)` in `size` processes at once, rank 0 in this one; return the results by rank."""
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.SimpleQueue(), context.Barrier(size)
    others = [context.Process(target=_call, args=(queue, barrier, function, r, arguments)) for r in range(1, size)]
    for process in others:
        process.start()
    barrier.wait()
    results = {0: function(0, *arguments)}
    for _ in others:
        rank, value = queue.get()
        results[rank] = value
    for process in others:
        process.join()
    return [results[rank] for rank in range(size)]


def _call(queue: Any, barrier: Any, function: Callable[..., Any], rank: int, arguments: tuple[Any, ...]) -> None:
    barrier.wait()
    queue.put((rank, function(rank, *arguments)))
