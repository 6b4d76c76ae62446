"""What the loop adds to a step: ours against a hand-written DDP script on the same model, batches and order.

And what being able to lose workers adds: ours with seats in a membership against ours with a plain group. Where there
is a GPU, also one worker on it, with one slot and with several, and what `consistency: bitwise` costs there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Comparison, Series, Side

STEPS = {"gpt": 300, "mlp": 4000}
SMALL_STEPS = 40
GPU = Path("/dev/nvidia0")
GPU_POINTS = (("gpt", 64, 1, 160), ("gpt", 1024, 1, 96), ("gpt", 1024, 4, 96), ("mlp", 64, 1, 3200))
"""Model, rows and slots of a step, and steps, such that the last losses are read together."""


def make(work: Path, *, small: bool) -> Case:
    """Return the case: steps of about 10 ms (gpt) and under 1 ms (mlp), one and two workers, one slot a worker."""
    del work
    sizes = {model: SMALL_STEPS if small else steps for model, steps in STEPS.items()}
    series = [_series(model, workers, sizes[model]) for model in sizes for workers in (1, 2)]
    if GPU.exists():
        series += [_gpu_series(*point) for point in GPU_POINTS]
    return Case(name="loop", series=tuple(series))


def _gpu_series(model: str, rows: int, slots: int, steps: int) -> Series:
    given: dict[str, Any] = {"model": model, "rows": rows, "slots": slots, "steps": steps}
    ours = "benchmarks.loop.gpu_ours"
    return Series(
        name=f"{model} on a GPU, {rows} rows in {slots} slot" + "s" * (slots > 1),
        sides=(
            Side(name="ours", module=ours, options={**given, "consistency": "sample"}),
            Side(name="by hand", module="benchmarks.loop.gpu_by_hand", options=given),
            Side(name="ours, bitwise", module=ours, options={**given, "consistency": "bitwise"}),
        ),
        comparisons=(
            Comparison(measure="step_us", unit="µs", better="less", other="by hand", target=1.03),
            Comparison(measure="step_us", unit="µs", better="less", ours="ours, bitwise", other="ours"),
            Comparison(measure="loss", unit="", better="less", other="by hand", kind="difference", target=0.05),
            Comparison(measure="peak_mb", unit="MB", better="less", other="by hand"),
            Comparison(measure="peak_mb", unit="MB", better="less", ours="ours, bitwise", other="ours"),
        ),
    )


def _series(model: str, workers: int, steps: int) -> Series:
    given: dict[str, Any] = {"model": model, "workers": workers, "steps": steps}
    by_hand = "benchmarks.loop.by_hand"
    sides = [
        Side(name="ours", module="benchmarks.loop.ours", options=given),
        Side(name="DDP by hand", module=by_hand, options={**given, "ddp": True}),
    ]
    if workers == 1:
        sides.append(Side(name="plain by hand", module=by_hand, options={**given, "ddp": False}, note="no DDP"))
    lines = [line for side in sides[1:] for line in _comparisons(model, side.name)]
    sides.append(Side(name="ours in a membership", module="benchmarks.loop.ours", options={**given, "member": True}))
    lines += _membership()
    return Series(name=f"{model}, {workers} worker" + "s" * (workers > 1), sides=tuple(sides), comparisons=tuple(lines))


def _membership() -> Iterator[Comparison]:
    """Yield what a seat in a membership costs over the same loop with one group from beginning to end."""
    for kind in ("ratio", "difference"):
        yield Comparison(
            measure="step_us",
            unit="µs",
            better="less",
            ours="ours in a membership",
            other="ours",
            kind=kind,
            label="time a step in a membership",
            other_label="ours, a plain group",
        )


def _comparisons(model: str, other: str) -> tuple[Comparison, ...]:
    target = other == "DDP by hand"
    ratio = Comparison(
        measure="step_us", unit="µs", better="less", other=other, target=1.03 if target and model == "gpt" else None
    )
    added = Comparison(
        measure="step_us", unit="µs", better="less", other=other, kind="difference", target=50.0 if target else None
    )
    return ratio, added
