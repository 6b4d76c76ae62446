"""Runs the sides of a case, each run in a fresh process, in an order that a drifting machine cannot favour.

```
Case ─► Series (sides that are compared) ─► runs, A B … B A ─► measures and counters ─► comparisons ─► JSON
```
A side is a module that prints one JSON object as its last line: `measures` (what varies: times, rates), `counters`
(what must not: rows, bytes, blocks) and `digest` (of what was delivered or computed; equal within a series).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import machine, stats

ROOT = Path(__file__).resolve().parent.parent
RUN_LIMIT_S = 300.0
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class BenchmarkError(Exception):
    """A run failed, or two sides did not do the same work."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One contender: a module to run with options; `note` says what the table's reader should know of it."""

    name: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    limit_s: float = RUN_LIMIT_S


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One line of the table: a measure of ours against the same of another side.

    `kind` ratio: ours / other; difference: ours − other. `target` is a bound on that, met from above where more is
    better and from below where less is; None where the line only informs. `role` says what the other side is.

    One process may hold both sides, in turns too short for a process each: `against` is then the other's measure, and
    `label` and `other_label` are what the table calls the two. `where` is (measure of ours, bound, what it is): the
    target stands only where the measure's median is at most the bound.
    """

    measure: str
    unit: str
    better: Literal["more", "less"]
    other: str
    ours: str = "ours"
    kind: Literal["ratio", "difference"] = "ratio"
    target: float | None = None
    role: Literal["limit", "peer"] = "peer"
    against: str = ""
    label: str = ""
    other_label: str = ""
    where: tuple[str, float, str] | None = None

    def met(self, value: float) -> bool | None:
        """Say whether a value meets the target; None without one."""
        if self.target is None:
            return None
        return value >= self.target if self.better == "more" else value <= self.target


@dataclass(frozen=True, kw_only=True)
class Series:
    """Sides that do the same work, run in turn."""

    name: str
    sides: tuple[Side, ...]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A question and the series that answer it."""

    name: str
    series: tuple[Series, ...]


Say = Callable[[str], None]


def run_case(case: Case, *, pairs: int, say: Say) -> dict[str, Any]:
    """Run every series of a case; return the result as a JSON object. Raises BenchmarkError."""
    before, start = machine.load(), time.time()
    series = [_run_series(part, pairs=pairs, say=say) for part in case.series]
    return {
        "schema": 1,
        "case": case.name,
        "pairs": pairs,
        "machine": machine.facts(),
        "load_before": before,
        "load_after": machine.load(),
        "started": start,
        "wall_s": time.time() - start,
        "series": series,
    }


def _run_series(series: Series, *, pairs: int, say: Say) -> dict[str, Any]:
    sides = {side.name: side for side in series.sides}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for place, name in enumerate(stats.alternating(list(sides), pairs)):
        say(f"{series.name}: run {place + 1} of {pairs * len(sides)}, {name}")
        runs[name].append(run_side(sides[name]))
    _same_work(series, runs)
    return {
        "series": series.name,
        "sides": [{**asdict(side), "options": dict(side.options), "runs": runs[side.name]} for side in series.sides],
        "comparisons": [_compare(comparison, runs) for comparison in series.comparisons],
    }


def run_side(side: Side) -> dict[str, Any]:
    """Run a side once in a fresh process; return what it printed, with `wall_s`. Raises BenchmarkError."""
    command = [sys.executable, "-W", "ignore", "-m", side.module, json.dumps(dict(side.options))]
    start = time.time()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=side.limit_s)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        raise BenchmarkError(f"{side.name}: no end after {side.limit_s:g} s") from error
    wall_s = time.time() - start
    try:
        result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise BenchmarkError(
            f"{side.name}: exit {process.returncode}, no result\n{out[-2000:]}\n{err[-4000:]}"
        ) from error
    if process.returncode:
        raise BenchmarkError(f"{side.name}: exit {process.returncode}\n{err[-4000:]}")
    return {**result, "wall_s": wall_s, "load": machine.load()[0]}


def environment() -> dict[str, str]:
    """Return what all sides run under: one thread a library, the package and these modules importable."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **dict.fromkeys(THREADS, "1"), **quiet, "PYTHONPATH": os.pathsep.join(paths)}


def _same_work(series: Series, runs: Mapping[str, list[dict[str, Any]]]) -> None:
    """Raise BenchmarkError unless counters are the same in all runs of a side and digests in all runs of the series."""
    for name, results in runs.items():
        if any(result["counters"] != results[0]["counters"] for result in results):
            raise BenchmarkError(
                f"{series.name}, {name}: counters differ: {[result['counters'] for result in results]}"
            )
    digests = {result["digest"] for results in runs.values() for result in results if result.get("digest") is not None}
    if len(digests) > 1:
        found = {name: sorted({str(result.get("digest")) for result in results}) for name, results in runs.items()}
        raise BenchmarkError(f"{series.name}: the sides did not deliver the same: {found}")


def _compare(comparison: Comparison, runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return a line with its figures; they are None where a run did not come to what the line measures."""
    ours = _values(runs[comparison.ours], comparison.measure)
    others = _values(runs[comparison.other], comparison.against or comparison.measure)
    line = {**asdict(comparison), "ours_median": _middle(ours), "other_median": _middle(others)}
    if ours is None or others is None:
        return {**line, "estimate": None, "spread": None, "met": None, "found": None}
    estimate = (stats.median_ratio if comparison.kind == "ratio" else stats.median_difference)(ours, others)
    met, found = comparison.met(estimate.value), None
    if comparison.where is not None:
        found = _middle(_values(runs[comparison.ours], comparison.where[0]))
        met = met if found is not None and found <= comparison.where[1] else None
    return {**line, "estimate": asdict(estimate), "spread": stats.spread(others), "met": met, "found": found}


def _values(runs: list[dict[str, Any]], measure: str) -> list[float] | None:
    """Return a measure of all runs; None if one of them lacks it."""
    values = [run["measures"].get(measure) for run in runs]
    return None if None in values else values


def _middle(values: list[float] | None) -> float | None:
    return None if values is None else stats.median_difference(values, [0.0] * len(values)).value
