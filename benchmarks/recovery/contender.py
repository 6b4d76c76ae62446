"""What the sides of the case have in common: a command with a Ray of its own, whose workers can be found and killed."""

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.script import descendants, lives

END_S = 25.0


class Contender(Protocol):
    """One side while it runs."""

    @property
    def command(self) -> "Command":
        """The command that was started."""

    def lines(self) -> Iterable[tuple[int, float]]:
        """Return (step, Unix time of its end) as far as it is known by now."""

    def workers(self) -> list[int]:
        """Return the processes of the workers that have done a step or are about to, living ones only."""


class Command:
    """A command in a session of its own; its Ray is its own too, in `folder`, at ports that Ray chooses."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        given = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._errors = folder / "stderr"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                arguments,
                cwd=folder,
                env={**given, "RAY_TMPDIR": str(folder)},
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        self._seen: dict[int, int] = {}

    def look(self) -> dict[int, int]:
        """Return the processes below the command, and remember them; raises SystemExit if it has ended by itself."""
        if self._process.poll() is not None:
            said = self._errors.read_text(errors="replace")[-4000:]
            raise SystemExit(f"the command ended with {self._process.returncode}\n{said}")
        found = descendants(self._process.pid)
        self._seen |= found
        return found

    def kill(self, pid: int) -> float:
        """SIGKILL a process below the command; return the Unix time."""
        assert pid in self.look(), "not a process of this command"
        moment = time.time()
        os.kill(pid, signal.SIGKILL)
        return moment

    def end(self) -> None:
        """Ask the command to stop, and see to it that nothing of it is left."""
        if self._process.poll() is None:
            self.look()
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        deadline = time.monotonic() + END_S
        while left := [pid for pid, started in self._seen.items() if lives(pid, started)]:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise SystemExit(f"processes {left} do not end")
            time.sleep(0.1)
