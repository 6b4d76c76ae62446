"""A leaderboard as text, Markdown, CSV and JSON, and a sweep's trials and curves as Parquet and JSON lines."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from elastrain import storage
from elastrain.observe.progress import compact, duration
from elastrain.sweeps.leaderboard import Leaderboard, Row, in_words
from elastrain.sweeps.stats import Estimate, plain
from elastrain.sweeps.trials import Trial

FILES = ("leaderboard.md", "leaderboard.csv", "leaderboard.json", "trials.parquet", "trials.jsonl", "curves.parquet")
TRIAL = ("arm", "phase", "number", "seed", "outcome", "step", "device_s", "value")
CURVE = ("step", "samples", "device_s", "value")
MAX_ROWS = 30
"""Rows of a leaderboard as text: a terminal holds no more."""
NOT_IN_TEXT = ("± sd", "in device-s", "tuning", "on the edge", "note")
"""Columns that a terminal has no room for; notes stand below the table there."""
Column = tuple[str, Callable[[Row], str]]


def write_results(folder: str, board: Leaderboard, trials: Sequence[Trial]) -> None:
    """Write `FILES` into a folder or URL, each whole or not at all; raises StorageError."""
    storage.put(storage.join(folder, "leaderboard.md"), as_markdown(board).encode())
    storage.put(storage.join(folder, "leaderboard.csv"), as_csv(board).encode())
    storage.put_json(storage.join(folder, "leaderboard.json"), as_json(board))
    lines = (json.dumps(strict(row), allow_nan=False) + "\n" for row in trial_rows(trials))
    storage.put(storage.join(folder, "trials.jsonl"), "".join(lines).encode())
    for name, rows in (("trials", trial_rows(trials)), ("curves", curve_rows(trials))):
        sink = pa.BufferOutputStream()
        pq.write_table(as_table(rows), sink, compression="zstd")
        storage.put(storage.join(folder, f"{name}.parquet"), sink.getvalue().to_pybytes())


# --- trials and curves


def trial_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return a row a trial; the fields of its point are columns `point.<field>`."""
    names = dict.fromkeys(name for trial in trials for name in trial.point)
    rows = []
    for trial in trials:
        told = {"trial": trial.id} | {name: getattr(trial, name) for name in TRIAL}
        rows.append(told | {f"point.{name}": plain(trial.point.get(name)) for name in names} | {"error": trial.error})
    return rows


def curve_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return a row an evaluation; its metrics are columns `metric.<name>`."""
    names = dict.fromkeys(name for trial in trials for told in trial.evaluations for name in told.metrics)
    rows = []
    for trial in trials:
        whose = {"trial": trial.id, "arm": trial.arm, "phase": trial.phase, "seed": trial.seed}
        for told in trial.evaluations:
            row = whose | {name: getattr(told, name) for name in CURVE}
            rows.append(row | {f"metric.{name}": told.metrics.get(name) for name in names})
    return rows


def as_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows with equal keys as an Arrow table; a column of mixed kinds holds text."""
    return pa.table({name: _column([row[name] for row in rows]) for name in (rows[0] if rows else ())})


def _column(values: Sequence[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pa.array(values, pa.int64())
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])


# --- a leaderboard for programs


def strict(value: Any) -> Any:
    """Return what JSON can hold of a value: what is not finite becomes null, what it does not know text."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def as_json(board: Leaderboard) -> dict[str, Any]:
    """Return the leaderboard as strict JSON holds it.

    An estimate is {value, low, high}. Null in the place of one: does not apply; null as its value: never (the target
    was missed by half of the runs).
    """
    scoring = asdict(board.scoring)
    del scoring["edges"]
    head = {"mode": board.mode, **scoring, "ranked_by": board.ranked_by, "trials": dict(board.ends)}
    told: dict[str, Any] = strict({**head, "notes": board.notes, "rows": [asdict(row) for row in board.rows]})
    return told


def as_csv(board: Leaderboard) -> str:
    """Return a line a row; an estimate becomes three columns, and `inf` is never."""
    rows = [_flat(row) for row in board.rows]
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if name in ("steps", "device_s", "speed_up", "speed_up_device_s", "value"):
            parts = value or {"value": None, "low": None, "high": None}
            flat |= {name: parts["value"], f"{name}_low": parts["low"], f"{name}_high": parts["high"]}
        elif name == "ends":
            flat |= {end: value.get(end, 0) for end in ("finished", "pruned", "diverged", "failed", "running")}
        elif name == "point":
            flat |= {f"point.{field}": plain(item) for field, item in value.items()}
        else:
            flat[name] = " ".join(value) if name == "edges" else value
    return flat


# --- a leaderboard for people


def columns(board: Leaderboard) -> list[Column]:
    """Return the columns that people see, each a heading and what it shows of a row."""
    metric, fields = board.scoring.metric, _fields(board.rows)
    timed: list[Column] = [
        ("reached", lambda row: "" if row.reached is None else f"{row.reached}/{row.runs}"),
        ("steps to target", lambda row: _interval(row.steps, _count)),
        ("device-s to target", lambda row: _interval(row.device_s, _short)),
    ]
    if board.mode == "search":
        return [
            ("rank", lambda row: str(row.rank or "–")),
            ("trial", lambda row: row.trial),
            (metric, lambda row: _interval(row.value, _short)),
            ("± sd", lambda row: _maybe(row.sd)),
            ("point", lambda row: _point(row, fields)),
            ("how it ended", lambda row: in_words(row.ends) if row.runs > 1 else next(iter(row.ends))),
            *timed,
            ("steps", lambda row: f"{row.cost_steps:,}"),
            ("note", lambda row: row.note),
        ]
    return [
        ("rank", lambda row: "" if row.kind == "defaults" else str(row.rank or "–")),
        ("by device-s", lambda row: str(row.rank_device_s or "")),
        ("arm", _who),
        *timed,
        ("speed-up", lambda row: _interval(row.speed_up, _times)),
        ("in device-s", lambda row: _interval(row.speed_up_device_s, _times)),
        ("p", lambda row: "" if row.p is None else f"{row.p:.2g}"),
        (metric, lambda row: _interval(row.value, _short)),
        ("± sd", lambda row: _maybe(row.sd)),
        ("defaults", lambda row: _maybe(row.defaults)),
        ("tuning", lambda row: f"{compact(row.cost_steps)} steps, {duration(row.cost_device_s)}"),
        ("trials", lambda row: in_words(row.ends)),
        ("on the edge", lambda row: ", ".join(row.edges)),
        ("note", lambda row: row.note),
    ]


def cells(
    board: Leaderboard, limit: int | None = None, without: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Return headings and lines of text; columns with nothing in them are left out."""
    rows = board.rows[:limit]
    shown = [(name, [show(row) for row in rows]) for name, show in columns(board) if name not in without]
    shown = [(name, texts) for name, texts in shown if any(texts)]
    return [name for name, _ in shown], [list(line) for line in zip(*(texts for _, texts in shown), strict=True)]


def headline(board: Leaderboard) -> str:
    """Return what was compared, in one line."""
    scoring = board.scoring
    target = "" if scoring.target is None else f", target {scoring.target:g}"
    baseline = f", baseline {scoring.baseline}" if scoring.baseline else ""
    better = "smaller" if scoring.goal == "min" else "larger"
    return (
        f"{scoring.metric} ({better} is better){target}{baseline}; ranked by {board.ranked_by}; {in_words(board.ends)}"
    )


def as_text(board: Leaderboard) -> str:
    """Return the leaderboard as aligned text, `MAX_ROWS` rows of it at most."""
    heads, lines = cells(board, MAX_ROWS, NOT_IN_TEXT)
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [heads, *lines]]
    more = len(board.rows) - MAX_ROWS
    rest = [f"… and {more} more in leaderboard.csv"] if more > 0 else []
    noted = [row for row in board.rows[:MAX_ROWS] if row.note not in ("", "confirmed", "defaults")]
    notes = [f"{_who(row)}: {row.note}" for row in noted]
    return "\n".join([headline(board), *(text.rstrip() for text in texts), *rest, *board.notes, *notes])


def as_markdown(board: Leaderboard) -> str:
    """Return the leaderboard as a Markdown table, with its notes below."""
    heads, lines = cells(board)
    table = [heads, ["---"] * len(heads), *lines]
    text = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in table) if heads else "No trials."
    return "\n\n".join([_escaped(headline(board)), text, *map(_escaped, board.notes)]) + "\n"


def _escaped(text: str) -> str:
    for mark in "\\|<*_`[":
        text = text.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return text.replace("\n", " ")


def _who(row: Row) -> str:
    return row.trial if row.kind == "trial" else f"{row.arm}, defaults" if row.kind == "defaults" else row.arm


def _interval(told: Estimate | None, show: Callable[[float], str]) -> str:
    if told is None:
        return ""
    if told.low is None or told.high is None or (told.low == told.high and not 0 < told.low < math.inf):
        return show(told.value)
    return f"{show(told.value)} [{show(told.low)}, {show(told.high)}]"


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "never"


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "never"


def _times(value: float) -> str:
    return "never" if value == 0 else f"{value:.2f}×" if math.isfinite(value) else "∞"


def _maybe(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _fields(rows: Sequence[Row]) -> dict[str, str]:
    """The fields in which rows differ, each with its last name, or the whole one where two end alike."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.point.items():
            values.setdefault(name, set()).add(_scalar(value))
    kept = [name for name, of in values.items() if len(of) > 1 or len(rows) == 1]
    ends = Counter(name.rsplit(".", 1)[-1] for name in kept)
    return {name: last if ends[last := name.rsplit(".", 1)[-1]] == 1 else name for name in kept}


def _point(row: Row, fields: Mapping[str, str]) -> str:
    return ", ".join(f"{fields[name]}={_scalar(value)}" for name, value in row.point.items() if name in fields)


def _scalar(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(plain(value))
