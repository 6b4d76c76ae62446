"""What happens to a contender: one worker killed, or one every so many seconds; and what it came to."""

import time
from typing import Any

from benchmarks.recovery.contender import Contender
from benchmarks.recovery.timeline import Timeline

POLL_S = 0.2
WARM_STEPS = 40  # before the first kill: two checkpoints, and enough for the time of an undisturbed step
START_S, RECOVER_S = 150.0, 120.0
SETTLE_S = 1.0  # lines are on disk about this long after their steps


class Watch:
    """Looks at a contender now and then."""

    def __init__(self, contender: Contender) -> None:
        self.contender, self.seen = contender, Timeline()

    def look(self) -> None:
        """Wait a little, and see what there is."""
        time.sleep(POLL_S)
        self.contender.command.look()
        self.seen.add(self.contender.lines())

    def wait(self, limit_s: float) -> None:
        """Look for some seconds."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            self.look()

    def warm(self, workers: int) -> float:
        """Wait until all workers are there and have trained for a while; return the moment it began to count."""
        deadline = time.monotonic() + START_S
        while self.seen.done(time.time()) < WARM_STEPS or len(self.contender.workers()) < workers:
            if time.monotonic() > deadline:
                raise SystemExit(f"step {self.seen.done(time.time())} after {START_S:g} s, not {WARM_STEPS}")
            self.look()
        return time.time()


def kill_one(watch: Watch, workers: int) -> tuple[float, dict[str, float]]:
    """Kill the worker with the highest pid; return when, and what it cost."""
    warm = watch.warm(workers)
    kill = watch.contender.command.kill(max(watch.contender.workers()))
    deadline = time.monotonic() + RECOVER_S
    while watch.seen.recovery_s(kill) is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"no new step {RECOVER_S:g} s after the kill")
        watch.look()
    watch.wait(2 * SETTLE_S)
    recovery = watch.seen.recovery_s(kill)
    assert recovery is not None
    measures = {"recovery_s": recovery, "steps_redone": float(watch.seen.redone())}
    return kill, {**measures, "steps_lost": float(watch.seen.lost()), "step_s": watch.seen.step_s(0.0, warm)}


def kill_many(watch: Watch, workers: int, every_s: float, window_s: float) -> dict[str, float]:
    """Kill a worker every `every_s` seconds of a window, another one each time; return the goodput and its parts.

    Where no worker lives at that moment, there is nothing to kill. Goodput is steps done for the first time in the
    window × seconds of an undisturbed step ÷ seconds of the window.
    """
    begin = watch.warm(workers)
    step_s = watch.seen.step_s(0.0, begin)
    kills = 0
    for turn in range(1, int(window_s / every_s)):
        watch.wait(begin + turn * every_s - time.time())
        living = sorted(watch.contender.workers())
        if living:
            watch.contender.command.kill(living[turn % len(living)])
            kills += 1
    watch.wait(begin + window_s - time.time())
    end = time.time()
    watch.wait(2 * SETTLE_S)
    steps = watch.seen.counted(begin, end)
    return {
        "goodput": steps * step_s / (end - begin),
        "undisturbed": 1.0,
        "window_steps": float(steps),
        "kills": float(kills),
        "steps_redone": float(watch.seen.redone()),
        "steps_lost": float(watch.seen.lost()),
        "step_s": step_s,
    }


def soak(watch: Watch, given: dict[str, Any]) -> dict[str, float]:
    """Do `kill_many` with a side's options."""
    return kill_many(watch, given["workers"], float(given["every_s"]), float(given["window_s"]))
