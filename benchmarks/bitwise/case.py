"""What the same bits at any number of workers cost: `consistency: bitwise` over `sample`, and both sums by themselves.

Both modes take turns in the same processes. All numbers of workers must come to the same weights, or the case fails.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bitwise.sizes import SUM_SLOTS, points
from benchmarks.harness import Case, Comparison, Series, Side

FLOATS, SMALL_FLOATS = 2_000_000, 10_000
MOST, SMALL_SHARE = 1.1, 0.05  # at most 10 % over sample where a plain all-reduce is at most 5 % of the step
WORKERS = (1, 2, 3)
LIMIT_S = 1200.0


def make(work: Path, *, small: bool) -> Case:
    """Return the case: a small and a compute-bound network and the bare sums, over one to three workers."""
    del work
    workers = WORKERS[:2] if small else WORKERS
    models = ("mlp",) if small else ("mlp", "gpt")
    series = [_steps(model, workers, small=small) for model in models]
    return Case(name="bitwise", series=(*series, _sums(workers, small=small)))


def _steps(model: str, workers: tuple[int, ...], *, small: bool) -> Series:
    sides = [_side("steps", count, {"model": model, "small": small}) for count in workers]
    lines = [line for count in workers for line in _curve(count, small=small)]
    return Series(name=model, sides=tuple(sides), comparisons=tuple(lines))


def _curve(workers: int, *, small: bool) -> Iterator[Comparison]:
    """Yield the lines of one number of workers; the target is for those that divide the slots."""
    for point in points(workers, small=small):
        yield Comparison(
            measure=point.named("bitwise_us"),
            against=point.named("sample_us"),
            unit="µs",
            better="less",
            ours=_named(workers),
            other=_named(workers),
            label=f"a step of {point.slots} slots of {point.rows} rows, {_named(workers)}",
            other_label="sample",
            target=None if point.slots % workers else MOST,
            where=(point.named("share"), SMALL_SHARE, "all-reduce's share"),
        )


def _sums(workers: tuple[int, ...], *, small: bool) -> Series:
    floats = SMALL_FLOATS if small else FLOATS
    sides = [_side("reduction", count, {"floats": floats, "small": small}) for count in workers]
    lines = [line for count in workers for slots in SUM_SLOTS[count] for line in _sum_lines(count, slots)]
    return Series(name=f"sum of {floats:,} floats", sides=tuple(sides), comparisons=tuple(lines))


def _sum_lines(workers: int, slots: int) -> Iterator[Comparison]:
    given: dict[str, Any] = {"better": "less", "ours": _named(workers), "other": _named(workers)}
    parts = {"all": "adding up"} | ({"sum": "of it over workers"} if workers > 1 else {})
    for part, label in parts.items():
        yield Comparison(
            measure=f"tree_{part}_ms, {slots} slots",
            against=f"plain_{part}_ms, {slots} slots",
            unit="ms",
            label=f"{label}, {slots} slots, {_named(workers)}",
            other_label="plain sum, all-reduce",
            **given,
        )
    held = {"adding": "held at most while adding"} | ({"all": "the same with the exchange"} if workers > 1 else {})
    for part, label in held.items():
        yield Comparison(
            measure=f"held_{part}, {slots} slots",
            against=f"slots, {slots} slots",
            unit="gradients",
            label=f"{label}, {slots} slots, {_named(workers)}",
            other_label="one a slot",
            target=1.0,
            **given,
        )


def _side(module: str, workers: int, options: dict[str, Any]) -> Side:
    return Side(
        name=_named(workers),
        module=f"benchmarks.bitwise.{module}",
        options={**options, "workers": workers},
        note="more processes than cores" if workers > 2 else "",
        limit_s=LIMIT_S,
    )


def _named(workers: int) -> str:
    return (
        f"{workers} workers" if workers == 2 else "1 worker" if workers == 1 else f"{workers} workers, oversubscribed"
    )
