"""What `elastrain pack` costs beside plain Ray Data that reads and writes the same files and checks nothing."""

from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Comparison, Series, Side
from benchmarks.pack.data import prepare

FILES, SMALL_FILES = 32, 2
CHECKED = {"nulls": "drop", "non_finite": "drop", "duplicates": "drop"}


def make(work: Path, *, small: bool) -> Case:
    """Return the case over Parquet files of 20 MiB, packed as they are and with every step that removes rows."""
    source = prepare(work, files=SMALL_FILES if small else FILES)
    given: dict[str, Any] = {"source": source, "work": str(work)}
    module = "benchmarks.pack"
    sides = (
        Side(name="ours", module=f"{module}.ours", options={**given, "prepare": {}}, note="checked and proven"),
        Side(
            name="every step",
            module=f"{module}.ours",
            options={**given, "prepare": CHECKED},
            note="nulls, non-finite and duplicates dropped: the source is read twice",
        ),
        Side(name="Ray Data", module=f"{module}.ray_data", options=given, note="no checks, no checksums, no hashes"),
    )
    rate = Comparison(measure="rows_per_s", unit="rows/s", better="more", other="Ray Data", target=0.7)
    checked = Comparison(
        measure="rows_per_s", unit="rows/s", better="more", other="Ray Data", ours="every step", label="every step"
    )
    memory = [
        Comparison(
            measure="peak_mib",
            against="source_mib",
            unit="MiB",
            better="less",
            ours=name,
            other=name,
            label=f"{name}: largest process",
            other_label="the source",
            target=0.5,
            role="limit",
        )
        for name in ("ours", "every step")
    ]
    cpu = Comparison(measure="cpu_s", unit="CPU-s", better="less", other="Ray Data")
    return Case(name="pack", series=(Series(name="tables", sides=sides, comparisons=(rate, checked, cpu, *memory)),))
