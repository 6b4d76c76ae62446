"""How fast batches come from a store with 30 ms to the first byte and 90 MB/s a connection, and from the cache."""

import subprocess
import sys
from pathlib import Path

from benchmarks.harness import Case, Comparison, Series, Side
from benchmarks.ingest.data import BATCH, prepare

ROWS, EPOCHS = 2880 * BATCH, 2
SMALL_ROWS, SMALL_EPOCHS = 40 * BATCH, 1


def make(work: Path, *, small: bool) -> Case:
    """Return the case over packed images that are not compressed: bytes in storage are bytes that are delivered."""
    url = prepare(work, rows=SMALL_ROWS if small else ROWS, codec="none")
    given = {"url": url, "epochs": SMALL_EPOCHS if small else EPOCHS}
    module = "benchmarks.s3_ingest"
    sides: tuple[Side, ...] = (
        Side(name="ours", module=f"{module}.ours", options=given, note="shuffled by the plan, hashes verified"),
        Side(name="Ray Data", module=f"{module}.ray_data", options=given, note="no shuffle, no checksums"),
    )
    packages = _s3fs(work, install=not small)
    if packages is not None:
        note = "Arrow's dataset through it, no shuffle, no checksums"
        sides += (Side(name="s3fs", module=f"{module}.s3fs_loop", options={**given, "packages": packages}, note=note),)
    cached = Comparison(
        measure="cached_mb_per_s",
        against="local_mb_per_s",
        unit="MB/s",
        better="more",
        other="ours",
        target=0.95,
        label="from the cache",
        other_label="from a local folder",
    )
    hidden = Comparison(
        measure="hidden_share",
        against="none",
        unit="of the latency",
        better="more",
        other="ours",
        kind="difference",
        target=0.9,
        label="hidden in the first epoch",
        other_label="none",
    )
    peers = tuple(
        comparison
        for peer in (side.name for side in sides[1:])
        for comparison in (
            Comparison(measure="mb_per_s", unit="MB/s", better="more", other=peer, target=1.0, label="first epoch"),
            Comparison(
                measure="cpu_s_per_gb",
                unit="CPU-s",
                better="less",
                other=peer,
                label="the client's processor time a GB",
            ),
        )
    )
    return Case(
        name="s3_ingest",
        series=(Series(name="one consumer", sides=sides, comparisons=(cached, hidden, *peers)),),
    )


def _s3fs(work: Path, *, install: bool) -> str | None:
    """Return the folder with s3fs and what it needs, installed there once; None where it is not to be had."""
    folder = work.resolve() / "s3fs"
    if install and not (folder / "s3fs").is_dir():
        wanted = Path(__file__).with_name("s3fs-requirements.txt")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "-r", str(wanted)]
        if subprocess.run(pip, check=False).returncode:
            print("s3_ingest: s3fs cannot be installed, and is left out", file=sys.stderr)
    return str(folder) if (folder / "s3fs").is_dir() else None
