"""Do the shipped sweeps of the digits say the truth: is what the search finds at least as good as the shipped setting?

And does the fair comparison of optimizers come out again with another seed, within its own intervals? No peers: the
sweeps, the pipelines and their budgets are those that are shipped.
"""

from pathlib import Path
from typing import Any

from benchmarks.cold_start.data import prepare
from benchmarks.harness import Case, Comparison, Series, Side

FOLDER = "benchmarks.sweep_digits"
LONG = True
LIMIT_S = 1200.0
NOBODY = "ours"  # both are measured in one process


def make(work: Path, *, small: bool) -> Case:
    """Return the case: the sweeps as they are shipped; small ones have a handful of short trials."""
    given = {"data": str(Path(prepare(work)).resolve()), "small": small}
    return Case(
        name="sweep_digits",
        series=(
            Series(name="search", sides=(_side("found", given),), comparisons=tuple(_found())),
            Series(name="fair, twice", sides=(_side("twice", given),), comparisons=(_TWICE,)),
        ),
    )


def _side(module: str, given: dict[str, Any]) -> Side:
    return Side(name=NOBODY, module=f"{FOLDER}.{module}", options=given, limit_s=LIMIT_S)


def _found() -> list[Comparison]:
    common: dict[str, Any] = {"better": "less", "other": NOBODY, "target": 1.0, "other_label": "the shipped setting"}
    return [
        Comparison(
            measure="best_loss",
            against="shipped_loss",
            unit="nats",
            label="loss of the search's best, mean over its seeds",
            **common,
        ),
        Comparison(
            measure="best_steps", against="shipped_steps", unit="steps", label="steps to the target, median", **common
        ),
    ]


_TWICE = Comparison(
    measure="inside",
    against="estimates",
    unit="estimates",
    better="more",
    other=NOBODY,
    target=0.9,
    label="estimates inside the other seed's interval",
    other_label="all of both runs",
)
