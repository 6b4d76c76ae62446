"""A command as a process of its own: what it prints, how long it takes, and its processor time."""

import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.machine import ROOT


class Timed:
    """The times of one command, turn by turn."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> str:
        """Run it and return what it printed; raises SystemExit with what it said if it fails."""
        before, start = _children_s(), time.time()
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        self._wall.append(time.time() - start)
        self._cpu.append(_children_s() - before)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return done.stdout

    @property
    def wall_s(self) -> float:
        """The middle one of the times from command to exit."""
        return median(self._wall)

    @property
    def cpu_s(self) -> float:
        """The middle one of the processor times."""
        return median(self._cpu)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
