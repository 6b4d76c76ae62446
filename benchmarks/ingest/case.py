"""How fast a worker gets its batches: ours against a raw pyarrow loop, torch's DataLoader and plain Ray Data.

The small case has each peer once: with one consumer or with two.
"""

from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Comparison, Series, Side
from benchmarks.ingest.data import BATCH, prepare

ROWS, EPOCHS = 960 * BATCH, 24
SMALL_ROWS, SMALL_EPOCHS = 40 * BATCH, 1


def make(work: Path, *, small: bool) -> Case:
    """Return the case over packed images (lz4, the default of `elastrain pack`), for one and two consumers."""
    url = prepare(work, rows=SMALL_ROWS if small else ROWS, codec="lz4")
    given = {"url": url, "epochs": SMALL_EPOCHS if small else EPOCHS}
    one, two = (_sides({**given, "consumers": size}) for size in (1, 2))
    if small:
        one, two = one[:4], (*two[:2], *two[3:])
    return Case(name="ingest", series=(_series("one consumer", one), _series("2 consumers", two)))


def _sides(given: dict[str, Any]) -> tuple[Side, ...]:
    module = "benchmarks.ingest"
    plain = {"workers": 0, "shuffle": False}
    sides: tuple[Side, ...] = (
        Side(name="ours", module=f"{module}.ours", options=given, note="shuffled by the plan"),
        Side(name="raw", module=f"{module}.raw", options={**given, "batch": 8192}, note="views, no shuffle"),
        Side(name="DataLoader", module=f"{module}.loader", options={**given, **plain}, note="0 workers, no shuffle"),
        Side(name="DataLoader, 2 workers", module=f"{module}.loader", options={**given, **plain, "workers": 2}),
        Side(name="DataLoader, shuffled", module=f"{module}.loader", options={**given, **plain, "shuffle": True}),
        Side(
            name="Ray Data",
            module=f"{module}.ray_data",
            options={**given, "prefetch": 4},
            note="no shuffle, no checksums",
        ),
    )
    return sides if given["consumers"] == 1 else tuple(side for side in sides if "2 workers" not in side.name)


def _series(name: str, sides: tuple[Side, ...]) -> Series:
    lines = tuple(line for side in sides[1:] for line in _comparisons(side))
    return Series(name=name, sides=sides, comparisons=lines)


def _comparisons(side: Side) -> tuple[Comparison, ...]:
    limit = side.name == "raw"
    rate = Comparison(
        measure="rows_per_s",
        unit="rows/s",
        better="more",
        other=side.name,
        target=0.7 if limit else 1.0,
        role="limit" if limit else "peer",
    )
    cpu = Comparison(measure="cpu_s_per_million_rows", unit="CPU-s", better="less", other=side.name)
    first = Comparison(measure="first_batch_s", unit="s", better="less", other=side.name)
    return rate, cpu, first
