"""Results as Markdown: one line a comparison, losses included."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HEAD = ("Series", "Measure", "Ours", "Other", "Value", "Ours against it (95 %)", "Target", "")

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
    estimate = line["estimate"]
    low, value, high = (number(estimate[key]) for key in ("low", "value", "high"))
    sign, unit = ("×", "") if line["kind"] == "ratio" else ("", f" {line['unit']}")
    bound = "≥" if line["better"] == "more" else "≤"
    return (
        title,
        f"{TITLES.get(line['measure'], line['measure'].rpartition('_')[0])}, {line['unit']}",
        number(line["ours_median"]),
        f"{line['other']} ({line['role']})" if line["role"] == "limit" else line["other"],
        number(line["other_median"]),
        f"{value}{sign}{unit} ({low}–{high})",
        "" if line["target"] is None else f"{bound} {number(line['target'])}{sign}{unit}",
        {True: "met", False: "**missed**", None: ""}[line["met"]],
    )


def number(value: float) -> str:
    """Return a number with three digits that count.

    >>> [number(x) for x in (1234567.0, 12.345, 0.012345, 0.0)]
    ['1,230,000', '12.3', '0.0123', '0']
    """
    if not value or value != value:
        return "0" if not value else "–"
    size = f"{value:.3g}"
    return f"{float(size):,.0f}" if abs(value) >= 100 else f"{float(size):g}"
