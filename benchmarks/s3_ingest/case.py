"""How fast batches come from a store with 30 ms to the first byte and 90 MB/s a connection, and from the cache."""

from pathlib import Path

from benchmarks.harness import Case, Comparison, Series, Side
from benchmarks.ingest.data import BATCH, prepare

ROWS, EPOCHS = 960 * BATCH, 3
SMALL_ROWS, SMALL_EPOCHS = 40 * BATCH, 1


def make(work: Path, *, small: bool) -> Case:
    """Return the case over packed images that are not compressed: bytes in storage are bytes that are delivered."""
    url = prepare(work, rows=SMALL_ROWS if small else ROWS, codec="none")
    given = {"url": url, "epochs": SMALL_EPOCHS if small else EPOCHS}
    module = "benchmarks.s3_ingest"
    sides = (
        Side(name="ours", module=f"{module}.ours", options=given, note="shuffled by the plan, checksums verified"),
        Side(name="Ray Data", module=f"{module}.ray_data", options=given, note="no shuffle, no checksums"),
    )
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
    first = Comparison(measure="mb_per_s", unit="MB/s", better="more", other="Ray Data", target=1.0)
    cpu = Comparison(measure="cpu_s_per_gb", unit="CPU-s", better="less", other="Ray Data")
    return Case(
        name="s3_ingest",
        series=(Series(name="one consumer", sides=sides, comparisons=(cached, hidden, first, cpu)),),
    )
