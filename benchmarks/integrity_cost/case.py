"""What it costs that no wrong byte is read: hashes, page checksums and encryption, against the same rows without."""

import base64
import os
from pathlib import Path
from typing import Literal

from benchmarks.harness import Case, Comparison, Series, Side
from benchmarks.ingest.data import BATCH
from benchmarks.integrity_cost.data import KEY_VARIABLE, KINDS, prepare

ROWS, EPOCHS, TURNS = 480 * BATCH, 12, 40
SMALL_ROWS, SMALL_EPOCHS, SMALL_TURNS = 40 * BATCH, 1, 2
LABELS = {"ours": "hashes", "pages": "page checksums", "unchecked": "nothing verified", "encrypted": "encrypted"}
Better = Literal["more", "less"]


def make(work: Path, *, small: bool) -> Case:
    """Return the case over packed images: what read tasks do by themselves, and a worker's whole ingest.

    All kinds take turns in one process, or in one Ray: what is looked for is less than runs far apart differ.
    """
    os.environ[KEY_VARIABLE] = base64.b64encode(bytes(32)).decode()  # of no worth, and inherited by the sides
    rows, epochs, turns = (SMALL_ROWS, SMALL_EPOCHS, SMALL_TURNS) if small else (ROWS, EPOCHS, TURNS)
    urls = {kind: prepare(work, rows=rows, kind=kind) for kind in KINDS}
    given = {"urls": urls, "epochs": epochs, "turns": turns}
    return Case(
        name="integrity_cost",
        series=tuple(
            Series(
                name=name,
                sides=(Side(name="ours", module=f"benchmarks.integrity_cost.{module}", options=given, limit_s=900.0),),
                comparisons=(*_comparisons(), *more),
            )
            for name, module, more in (("read tasks", "read", ()), ("ingest", "ingest", _shares()))
        ),
    )


def _comparisons() -> tuple[Comparison, ...]:
    return (
        _line("rows_per_s", "rows/s", "more", ("ours", "unchecked"), 0.97),
        _line("cpu", "CPU-s a million rows", "less", ("ours", "unchecked"), None),
        _line("cpu", "CPU-s a million rows", "less", ("pages", "unchecked"), None),
        _line("rows_per_s", "rows/s", "more", ("encrypted", "unchecked"), 0.9),
        _line("cpu", "CPU-s a million rows", "less", ("encrypted", "unchecked"), None),
    )


def _line(measure: str, unit: str, better: Better, kinds: tuple[str, str], target: float | None) -> Comparison:
    ours, other = kinds
    return Comparison(
        measure=f"{measure}_{ours}",
        against=f"{measure}_{other}",
        unit=unit,
        better=better,
        other="ours",
        target=target,
        role="limit",
        label=LABELS[ours],
        other_label=LABELS[other],
    )


def _shares() -> tuple[Comparison, ...]:
    """Return the lines that are asked for: what verifying costs the read tasks, of all that ingest costs."""
    return tuple(
        Comparison(
            measure=measure,
            against="share_unchecked",
            unit="of ingest's CPU-s",
            better="less",
            other="ours",
            kind="difference",
            target=target,
            role="limit",
            label=f"what it costs: {LABELS[kind]}",
            other_label=LABELS["unchecked"],
        )
        for measure, kind, target in (
            ("share_ours", "ours", 0.03),
            ("share_pages", "pages", None),
            ("share_encrypted", "encrypted", 0.1),
        )
    )
