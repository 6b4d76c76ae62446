"""The source of the pack case, and what both sides measure and digest."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from benchmarks.script import descendants

NAMES = [f"x{place:02}" for place in range(16)]  # scalars, so that both sides write the same layout: 80 bytes a row
FILE_ROWS, GROUP_ROWS = 1 << 18, 1 << 16
EVERY_S = 0.1


def prepare(folder: Path, *, files: int) -> str:
    """Write tables of numbers, no two rows alike, that a codec makes little smaller; return their folder."""
    source = folder / f"pack-scalars-{files}"
    done = source / "_done"
    if not done.exists():
        source.mkdir(parents=True, exist_ok=True)
        for place in range(files):
            rng = np.random.default_rng(place)
            columns: dict[str, npt.NDArray[Any]] = {name: rng.random(FILE_ROWS, dtype=np.float32) for name in NAMES}
            columns["id"] = np.arange(place * FILE_ROWS, (place + 1) * FILE_ROWS)
            columns["label"] = rng.integers(0, 10, FILE_ROWS)
            pq.write_table(pa.table(columns), source / f"{place:04}.parquet", row_group_size=GROUP_ROWS)
        done.touch()
    return str(source)


def source_mib(source: str) -> float:
    """Return the size of the source's files."""
    return sum(path.stat().st_size for path in Path(source).glob("*.parquet")) / (1 << 20)


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Yield a dict that gets `peak_mib`: the most memory of its own that any one process below this one held."""
    found, over = {"peak_mib": 0.0}, threading.Event()

    def look() -> None:
        while not over.wait(EVERY_S):
            held = max(_own_bytes(pid) for pid in (os.getpid(), *descendants(os.getpid())))
            found["peak_mib"] = max(found["peak_mib"], held / (1 << 20))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def _own_bytes(pid: int) -> int:
    """Return the bytes of a process without the object store that it maps."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))


def digest(folder: str) -> tuple[int, str]:
    """Return the number of rows in all Parquet files below a folder, and a hash of what they hold in any order."""
    rows = total = 0
    for path in sorted(Path(folder).rglob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                rows += table.num_rows
                total += _sum(table)
    return rows, f"{total % 2**64:016x}"


def _sum(table: Any) -> int:
    """Return the sum over rows of id × (1 + label + the sum of the floats' bits), as unsigned integers of 64 bits."""
    bits = sum(table.column(name).to_numpy().view(np.uint32).astype(np.uint64) for name in NAMES)
    label, place = (table.column(name).to_numpy().astype(np.uint64) for name in ("label", "id"))
    return int((place * (bits + label + np.uint64(1))).sum())
