"""When a worker evaluated and when it next trained, in a file per process: seconds in between, and of which trial."""

import os
import time
from pathlib import Path

_evaluated = 0.0
_trained: object = None


def evaluates() -> None:
    """Note that a batch of an evaluation has been computed."""
    global _evaluated  # noqa: PLW0603 -- one process, one trial after the other
    _evaluated = time.perf_counter()


def trains(trial: object, folder: str) -> None:
    """Note that a step begins; the first after an evaluation is written down, as of the same trial or of the next."""
    global _evaluated, _trained
    if _evaluated:
        kind = "same" if trial is _trained else "next"
        with Path(folder, str(os.getpid())).open("a") as file:
            file.write(f"{kind} {time.perf_counter() - _evaluated}\n")
    _evaluated, _trained = 0.0, trial


def read(folder: str) -> dict[str, list[float]]:
    """Return all seconds written, by kind, ascending."""
    found: dict[str, list[float]] = {"same": [], "next": []}
    for path in Path(folder).iterdir():
        for line in path.read_text().splitlines():
            kind, seconds = line.split()
            found[kind].append(float(seconds))
    return {kind: sorted(values) for kind, values in found.items()}
