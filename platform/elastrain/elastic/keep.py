"""Keeps a command on a leash: when it ends, or whoever started this ends, nothing that it started is left.

Run as a script (`python -P keep.py COMMAND …`) with a pipe as standard input that its starter holds open. It adopts
what its descendants leave behind (Linux: child subreaper), hands SIGTERM on to the command, and kills every descendant
once the command has ended or the pipe is closed, which the kernel does however the starter ends.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.2


def descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, parents before their children."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children: list[int] = []
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for task in Path(f"/proc/{waiting[0]}/task").iterdir():
                children += map(int, (task / "children").read_text().split())
        found += children
        waiting = waiting[1:] + children
    return found


def end_descendants() -> None:
    """Kill everything below this process and wait until it is gone: who is orphaned by that comes to us."""
    while True:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(POLL_S / 20)


def main() -> None:
    """Run the command until it ends or standard input does."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)  # noqa: S603 -- what we are for
    signal.signal(signal.SIGTERM, lambda *_: command.send_signal(signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while command.poll() is None:
            if select.select([sys.stdin], [], [], POLL_S)[0] and not os.read(sys.stdin.fileno(), 1):
                break
    finally:
        end_descendants()


if __name__ == "__main__":
    main()
