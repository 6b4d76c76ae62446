"""What it costs that no wrong byte is read: page checksums, and encryption, against the same rows without."""

import base64
import os
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Comparison, Series, Side
from benchmarks.ingest.data import BATCH
from benchmarks.integrity_cost.data import KEY_VARIABLE, prepare

ROWS, EPOCHS = 480 * BATCH, 12
SMALL_ROWS, SMALL_EPOCHS = 40 * BATCH, 1


def make(work: Path, *, small: bool) -> Case:
    """Return the case over packed images: what read tasks do by themselves, and a worker's whole ingest."""
    os.environ[KEY_VARIABLE] = base64.b64encode(bytes(32)).decode()  # of no worth, and inherited by the sides
    rows, epochs = (SMALL_ROWS, SMALL_EPOCHS) if small else (ROWS, EPOCHS)
    urls = {kind: prepare(work, rows=rows, kind=kind) for kind in ("ours", "unchecked", "encrypted")}
    return Case(
        name="integrity_cost",
        series=(
            _series("read tasks", "benchmarks.integrity_cost.read", urls, {"epochs": epochs}),
            _series("ingest", "benchmarks.ingest.ours", urls, {"epochs": epochs, "consumers": 1}),
        ),
    )


def _series(name: str, module: str, urls: dict[str, str], given: dict[str, Any]) -> Series:
    sides = (
        Side(name="ours", module=module, options={**given, "url": urls["ours"]}, note="page checksums verified"),
        Side(name="no checksums", module=module, options={**given, "url": urls["unchecked"]}, note="none in the files"),
        Side(
            name="encrypted",
            module=module,
            options={**given, "url": urls["encrypted"]},
            note="AES-GCM tags instead of checksums",
        ),
    )
    return Series(
        name=name,
        sides=sides,
        comparisons=(
            *_comparisons("ours", "no checksums", 0.97, "with checksums, "),
            *_comparisons("encrypted", "ours", 0.9, "encrypted, "),
        ),
    )


def _comparisons(ours: str, other: str, target: float, label: str) -> tuple[Comparison, Comparison]:
    rate = Comparison(
        measure="rows_per_s",
        unit="rows/s",
        better="more",
        ours=ours,
        other=other,
        target=target,
        role="limit",
        label=f"{label}steady rate",
    )
    cpu = Comparison(
        measure="cpu_s_per_million_rows",
        unit="CPU-s",
        better="less",
        ours=ours,
        other=other,
        role="limit",
        label=f"{label}processor time a million rows",
    )
    return rate, cpu
