"""What several consumers come to together."""

from collections.abc import Sequence
from typing import Any

INTERVAL = ("begin", "end", "rows_per_s")


def combined(results: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int], str]:
    """Return measures, counters and digest of all consumers.

    Rows a second are over the interval from the first consumer's begin to the last one's end; processor seconds are
    those of rank 0's window, in which the whole process tree is counted.
    """
    measured = [result["measures"] for result in results]
    seconds = max(m["end"] for m in measured) - min(m["begin"] for m in measured)
    rows = sum(m["rows_per_s"] * (m["end"] - m["begin"]) for m in measured)
    others = {name: value for name, value in measured[0].items() if name not in INTERVAL}
    cpu = {"cpu_s_per_million_rows": measured[0]["cpu_s_per_million_rows"] / len(results)}
    first = {"first_batch_s": max(m["first_batch_s"] for m in measured)}
    counters = {name: sum(r["counters"][name] for r in results) for name in results[0]["counters"]}
    digest = f"{sum(r['digest'] for r in results) % 2**64:016x}"
    return {**others, **cpu, **first, "rows_per_s": rows / seconds}, counters, digest
