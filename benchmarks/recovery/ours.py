"""Ours: `elastrain train` as a command, a worker of which is killed; steps are read from the run's metrics.

The metrics on disk are about a second behind. Where a run goes on from a checkpoint they are cut back to it, so they
are looked at all the time, and a step that was done again is known by its second end; the last half second before a
kill may never have been reported then.
"""

import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.recovery.contender import Command
from benchmarks.recovery.scenario import Watch, kill_one, soak
from benchmarks.script import finish, options
from ruamel.yaml import YAML

from elastrain.errors import ElastrainError
from elastrain.observe.ledger import Record, read_ledger, read_steps
from elastrain.observe.report import read_report

MAIN = "from elastrain.__main__ import main; main()"
NAME, BATCH, CHECKPOINT_STEPS = "recovery", 64, 20
JOIN_S, AFTER_JOIN_S = 40.0, 4.0
PARTS = ("detect_s", "agree_s", "connect_s", "state_s", "step_s")  # of a recovery, as the run itself reports them
LEAST_S = 1e-6  # a part that took no time at all still has a ratio


class Ours:
    """A run of `workers` workers that goes on with as few as one."""

    def __init__(self, folder: Path, given: dict[str, Any]) -> None:
        self._run = str(folder / "runs" / NAME)
        self.command = Command([sys.executable, "-c", MAIN, "train", str(write_spec(folder, given)), "--json"], folder)

    def lines(self) -> Iterable[tuple[int, float]]:
        """Return (step, Unix time of its end)."""
        try:
            steps = read_steps(f"{self._run}/metrics")
        except (FileNotFoundError, ElastrainError):
            return []  # not yet there, or just being cut back
        return zip(steps["step"].to_pylist(), steps["ended"].to_pylist(), strict=True)

    def workers(self) -> list[int]:
        """Return the living processes among those that the ledger names: its workers are called <host>-<pid>."""
        named = {int(name.rpartition("-")[2]) for record in self.records() if (name := record.get("worker"))}
        return sorted(named & set(self.command.look()))

    def records(self) -> list[Record]:
        """Return the ledger as far as it is written."""
        try:
            return read_ledger(self._run)
        except ElastrainError:
            return []

    def report(self) -> dict[str, Any]:
        """Return what `elastrain report --json` prints."""
        return read_report(self._run)


def write_spec(folder: Path, given: dict[str, Any]) -> Path:
    """Write the spec of a run that is longer than the case; return its path.

    However many slots there are, those of one of all workers sleep `forward_s` together.
    """
    slots = given.get("slots", given["workers"])
    spec = {
        "kind": "train",
        "name": NAME,
        "task": str(ROOT / "benchmarks" / "recovery" / "task.py") + ":Sleepy",
        "task_args": {"forward_s": given["forward_s"] * given["workers"] / slots},
        "data": {"train": f"{given['data']}/train", "global_batch": BATCH, "slots": slots},
        "optimizer": {"name": "adamw", "lr": 0.001},
        "budget": {"steps": 100_000},
        "workers": {"min": 1, "max": given["workers"]},
        "checkpoint": {"every_steps": CHECKPOINT_STEPS},
        "storage": str(folder / "runs"),
    }
    path = folder / "train.yaml"
    with path.open("w") as file:
        YAML().dump(spec, file)
    return path


def joined(records: Iterable[Record], kill: float) -> int | None:
    """Return the first step after a kill that had more workers than the one before; None if there is none."""
    grown = (
        int(record["step"])
        for record in records
        if record["kind"] == "resize" and record["t"] > kill and record.get("workers", 0) > record.get("before", 0)
    )
    return next(grown, None)


def watch_join(watch: Watch, ours: Ours, kill: float) -> dict[str, float]:
    """Wait for the replacement; return the pause of its join, nothing where the run started all workers again."""
    deadline = time.monotonic() + JOIN_S
    while (step := joined(ours.records(), kill)) is None:
        if time.monotonic() > deadline or any(record["kind"] == "restart" for record in ours.records()):
            return {}
        watch.look()
    watch.wait(AFTER_JOIN_S)
    pause = watch.seen.join_pause_s(step)
    return {} if pause is None else {"join_pause_s": max(pause, LEAST_S)}


def told(report: dict[str, Any], kill: float) -> dict[str, float]:
    """Return what the run itself says of the recovery: `told_recovery_s` and its parts, as far as they are there."""
    events = [event for event in report["events"] if event["kind"] in ("worker_lost", "restart") and event["t"] > kill]
    event = next((event for event in events if event.get("recovery_s") is not None), Record())
    found = {name: event.get(name) for name in ("recovery_s", *PARTS)}
    return {f"told_{name}": max(float(value), LEAST_S) for name, value in found.items() if value is not None}


def main() -> None:
    """Train, kill, and tell."""
    given = options()
    with tempfile.TemporaryDirectory(prefix="eb-", ignore_cleanup_errors=True) as name:
        ours = Ours(Path(name), given)
        try:
            watch = Watch(ours)
            if "every_s" in given:
                measures = soak(watch, given)
            else:
                kill, measures = kill_one(watch, given["workers"])
                measures |= watch_join(watch, ours, kill)
                measures |= told(ours.report(), kill)
        finally:
            ours.command.end()
    finish(measures, {"workers": given["workers"]})


if __name__ == "__main__":
    main()
