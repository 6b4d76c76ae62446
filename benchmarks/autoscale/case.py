"""Fake nodes from zero to two and back under Ray's real autoscaler: from `submit` on, again and again, none stuck.

Ours submits a run of two workers that need a GPU each; the other side is a bare Ray job of two such tasks on the same
kind of cluster: what Ray itself takes for the same way. All times are the slowest round's.
"""

from pathlib import Path

from benchmarks.cold_start.data import prepare
from benchmarks.harness import Case, Comparison, Series, Side

LONG = True
ROUNDS, IDLE_S = 10, 10
UP_S, AFTER_IDLE_S = 12.0, 10.0


def make(work: Path, *, small: bool) -> Case:
    """Return the case of ten rounds in one cluster; a small one has a single round and no bare job."""
    options = {
        "data": str(Path(prepare(work)).resolve()),
        "rounds": 1 if small else ROUNDS,
        "idle_s": IDLE_S,
        "allowed_up_s": UP_S,
        "allowed_zero_s": IDLE_S + AFTER_IDLE_S,
    }
    names = {"ours": False} if small else {"ours": False, "Ray tasks in a job": True}
    sides = tuple(
        Side(name=name, module="benchmarks.autoscale.ours", options={**options, "bare": bare}, limit_s=1800.0)
        for name, bare in names.items()
    )
    allowed = [
        Comparison(
            measure=measure,
            against=f"allowed_{measure}",
            unit="s",
            better="less",
            other="ours",
            target=1.0,
            label=label,
            other_label="allowed",
        )
        for measure, label in (("up_s", "submit to two nodes, slowest"), ("zero_s", "end of the run to none, slowest"))
    ]
    peers = [Comparison(measure="up_s", unit="s", better="less", other=name, role="limit") for name in list(names)[1:]]
    return Case(name="autoscale", series=(Series(name="0 to 2 to 0", sides=sides, comparisons=(*allowed, *peers)),))
