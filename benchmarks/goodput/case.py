"""Goodput where one of four workers is killed every 20 s for three minutes: ours and plain Ray Train.

Goodput is the steps that were done for the first time in the window × seconds of an undisturbed step ÷ seconds of the
window. It takes four minutes a run, so it is no part of a call without names.
"""

from pathlib import Path

from benchmarks.harness import Case, Comparison, Series
from benchmarks.recovery.case import contenders

LONG = True
# Of twelve slots three workers hold four each where four hold three; of four slots one of three would hold two.
GIVEN = {"workers": 4, "slots": 12, "every_s": 20.0, "window_s": 180.0}
SMALL = {"workers": 2, "every_s": 4.0, "window_s": 8.0}
LIMIT_S = 600.0
WHOLE = Comparison(
    measure="goodput",
    against="undisturbed",
    unit="of 1",
    better="more",
    other="ours",
    target=0.9,
    role="limit",
    other_label="a run that nobody disturbs",
)


def make(work: Path, *, small: bool) -> Case:
    """Return the case; a small one has one kill in eight seconds."""
    sides = contenders(work, SMALL if small else GIVEN, small=small, limit_s=LIMIT_S)
    lines = [WHOLE, *(line for peer in sides[1:] for line in _against(peer.name))]
    return Case(name="goodput", series=(Series(name="kills every 20 s", sides=sides, comparisons=tuple(lines)),))


def _against(peer: str) -> tuple[Comparison, ...]:
    return (
        Comparison(measure="goodput", unit="of 1", better="more", other=peer, target=1.0),
        Comparison(measure="kills", unit="kills", better="more", other=peer, kind="difference", label="kills"),
        Comparison(
            measure="steps_redone",
            unit="steps",
            better="less",
            other=peer,
            kind="difference",
            target=0.0,
            label="steps done again",
        ),
        Comparison(measure="step_s", unit="s", better="less", other=peer, label="an undisturbed step"),
    )
