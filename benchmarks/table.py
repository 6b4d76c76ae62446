"""Results as Markdown: one line a comparison, losses included."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HEAD = ("Series", "Measure", "Ours", "Other", "Value", "Ours against it (95 %)", "Target", "")

BOUNDS = {"more": "≥", "less": "≤"}
TITLES = {
    "rows_per_s": "steady rate",
    "cpu_s_per_million_rows": "processor time a million rows",
    "first_batch_s": "time to first batch",
    "step_us": "time a step",
    "first_step_s": "command to first step",
    "command_s": "whole command",
    "stall_s": "training stands still",
    "first_stall_s": "the same, first commit",
    "write_s": "until it is on disk",
    "load_s": "reading it back",
    "goodput": "goodput",
}


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of some cases' results."""
    rows = [HEAD, ("---",) * len(HEAD), *(row for result in results for row in _rows(result))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for series in result["series"]:
        for line in series["comparisons"]:
            yield _row(f"{result['case']}: {series['series']}", line)


def _row(title: str, line: Mapping[str, Any]) -> tuple[str, ...]:
    measure = line["label"] or TITLES.get(line["measure"], line["measure"].rpartition("_")[0])
    other = line["other_label"] or line["other"]
    return (
        title,
        f"{measure}, {line['unit']}",
        number(line["ours_median"]),
        f"{other} (limit)" if line["role"] == "limit" else other,
        number(line["other_median"]),
        _value(line),
        _target(line),
        {True: "met", False: "**missed**", None: ""}[line["met"]],
    )


def _value(line: Mapping[str, Any]) -> str:
    if line["estimate"] is None:
        return "not measured"
    low, value, high = (number(line["estimate"][key]) for key in ("low", "value", "high"))
    return f"{value}{_unit(line)} ({low}–{high})"


def _target(line: Mapping[str, Any]) -> str:
    """Return the bound, and where it stands only under a condition, that and what was found of it."""
    bound = "" if line["target"] is None else f"{BOUNDS[line['better']]} {number(line['target'])}{_unit(line)}"
    if line["where"] is None:
        return bound
    _, most, what = line["where"]
    found = f"{what} {number(line['found'])}"
    return f"{bound} if {found} ≤ {number(most)}" if bound else found


def _unit(line: Mapping[str, Any]) -> str:
    return "×" if line["kind"] == "ratio" else f" {line['unit']}"


def number(value: float | None) -> str:
    """Return a number with three digits that count.

    >>> [number(x) for x in (1234567.0, 12.345, 0.012345, 0.0)]
    ['1,230,000', '12.3', '0.0123', '0']
    """
    if value is None or value != value:
        return "–"
    size = f"{value:.3g}"
    return f"{float(size):,.0f}" if abs(value) >= 100 else f"{float(size):g}"
