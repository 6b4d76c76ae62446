"""A worker is killed: how long until the next new step, what is done again, how long a join stands in the way.

Ours and plain Ray Train on the same network, batch and time of a step, which is a sleep of 50 ms in each forward. Plain
Ray Train runs twice: as it comes, looking at its workers every 2 s, and as often as ours has it look, every 0.2 s.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cold_start.data import prepare
from benchmarks.harness import Case, Comparison, Series, Side

FORWARD_S = 0.05
PEERS = {"Ray Train": None, "Ray Train, looks 5 times a second": 0.2}
PARTS = {"detect_s": "noticing", "agree_s": "agreeing", "connect_s": "connecting", "state_s": "state", "step_s": "step"}


def make(work: Path, *, small: bool) -> Case:
    """Return the case with two workers; a small one leaves out the second plain side."""
    sides = contenders(work, {"workers": 2}, small=small)
    lines = [line for peer in sides[1:] for line in _against(peer.name)]
    series = Series(name="one of two workers killed", sides=sides, comparisons=(*lines, *_itself()))
    return Case(name="recovery", series=(series,))


def contenders(work: Path, options: dict[str, Any], *, small: bool, limit_s: float = 400.0) -> tuple[Side, ...]:
    """Return ours, then plain Ray Train in both ways; each with `options`."""
    given = {**options, "forward_s": FORWARD_S}
    data = str(Path(prepare(work)).resolve())
    ours = Side(name="ours", module="benchmarks.recovery.ours", options={**given, "data": data}, limit_s=limit_s)
    peers = [
        Side(
            name=name,
            module="benchmarks.recovery.ray_train",
            options={**given, "poll_s": poll_s},
            note="rows in memory, a checkpoint every 20 steps, max_failures=-1",
            limit_s=limit_s,
        )
        for name, poll_s in list(PEERS.items())[: 1 if small else None]
    ]
    return (ours, *peers)


def _against(peer: str) -> Iterator[Comparison]:
    yield Comparison(
        measure="recovery_s", unit="s", better="less", other=peer, target=0.1, label="kill to the next new step"
    )
    for measure, label in {"steps_redone": "steps done again", "steps_lost": "steps lost"}.items():
        yield Comparison(
            measure=measure, unit="steps", better="less", other=peer, kind="difference", target=0.0, label=label
        )
    yield Comparison(measure="step_s", unit="s", better="less", other=peer, label="an undisturbed step")


def _itself() -> Iterator[Comparison]:
    """Yield what ours says of itself: what the recovery consists of, and the pause of the join after it."""
    for part, label in PARTS.items():
        yield Comparison(
            measure=f"told_{part}",
            against="told_recovery_s",
            unit="s",
            better="less",
            other="ours",
            label=f"of the recovery: {label}",
            other_label="all of it, as reported",
        )
    yield Comparison(
        measure="join_pause_s",
        against="step_s",
        unit="s",
        better="less",
        other="ours",
        label="pause of a join",
        other_label="an undisturbed step",
    )
