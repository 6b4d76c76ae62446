"""What came of a run and where its time went: the ledger's lines in; one mapping, one text or one page out.

Nothing is measured here. `read_report` reads the ledger alone, so `report RUN --json` answers at once; the curves of
the page come from `metrics/`. The page asks for nothing: style and curves are inside it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from elastrain import storage
from elastrain.errors import SpecError
from elastrain.observe.ledger import CATEGORIES, Record, read_ledger, read_steps
from elastrain.observe.progress import compact, duration, in_words

TRAIN_KEYS = (
    *("run", "step", "resumed_from", "samples", "metrics", "weights_sha256", "wall_s", "goodput", "workers"),
    *("restarts", "resizes"),
)
"""What `train --json` prints of a report."""

USEFUL = ("compute", "reduce")
EVENT = ("kind", "step", "recovery_s", "steps_redone")
NOT_EVENTS = ("start", "checkpoint", "snapshot", "eval", "seconds", "end", "cell", "cell_end", "demand", "drain")
MAX_POINTS, MEANS = 2000, 200
Points = Sequence[tuple[float, float]]


def read_report(run: str) -> dict[str, Any]:
    """Return what `report RUN --json` prints: the keys of `train` over all attempts, and where the seconds went.

    `seconds` and `shares` are over all workers and attempts; `goodput` is seconds of compute and reduce ÷ paid ones.
    Where the last attempt did not end (killed, or still running), `step` is that of the last checkpoint.

    Raises:
        SpecError: if `run` is no run.
        StorageError: if its files cannot be read.
    """
    records = read_ledger(run)
    if not records:
        raise SpecError(_no_run(run))
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for record in records:
        for category, spent in record["seconds"].items() if record["kind"] == "seconds" else ():
            seconds[category] = seconds.get(category, 0.0) + spent
    paid = sum(seconds.values())
    wall = sum(_wall_s(records, attempt) for attempt in range(records[-1]["attempt"] + 1))
    outcome = _outcome(run, records)
    events = [{**dict.fromkeys(EVENT), **record} for record in records if record["kind"] not in NOT_EVENTS]
    written = [record for record in records if record["kind"] == "checkpoint"]
    write_s = sum(record.get("write_s", 0.0) for record in written)
    return {
        **outcome,
        "wall_s": wall,
        "goodput": sum(seconds[category] for category in USEFUL) / paid if paid else 0.0,
        "workers": max((record["workers"] for record in records if isinstance(record.get("workers"), int)), default=0),
        "restarts": sum(event["kind"] == "restart" for event in events),
        "resizes": sum(event["kind"] == "resize" for event in events),
        "events": events,
        "seconds": seconds,
        "shares": {category: spent / paid if paid else 0.0 for category, spent in seconds.items()},
        "paid_s": paid,
        "samples_per_s": outcome["samples"] / wall if wall else 0.0,
        "attempts": records[-1]["attempt"] + 1,
        "evals": _standing(records, "eval"),
        "checkpoints": _standing(records, "checkpoint"),
        "checkpoint_stall_s": sum(record.get("stall_s", 0.0) for record in written),
        "checkpoint_bytes_per_s": sum(record.get("bytes", 0) for record in written) / write_s if write_s else 0.0,
    }


def _outcome(run: str, records: list[Record]) -> dict[str, Any]:
    """What the last attempt came to: its result where it ended, else what the last checkpoint is known to hold."""
    last = [record for record in records if record["attempt"] == records[-1]["attempt"]]
    start = next((record for record in last if record["kind"] == "start"), Record())
    end = next((record for record in reversed(last) if record["kind"] == "end"), Record())
    saved = next(iter(reversed(_standing(records, "checkpoint"))), start)
    evaluated = next(iter(reversed(_standing(records, "eval"))), Record())
    result: Record = end.get("result") or {}
    step = result.get("step", end.get("step", saved.get("step", 0)))
    samples = result.get("samples", saved.get("samples"))
    return {
        "run": storage.absolute(run),
        "step": step,
        "resumed_from": start.get("step", 0),
        "samples": samples if samples is not None else _count_samples(run, step),
        "metrics": result.get("metrics") or evaluated.get("metrics", {}),
        "weights_sha256": result.get("weights_sha256"),
        "outcome": end.get("outcome", "unfinished"),
        "error": end.get("error"),
        "versions": start.get("versions", {}),
    }


def _standing(records: Iterable[Record], kind: str) -> list[Record]:
    """The records of a kind by step; what a later attempt resumed before, or did again, does not stand."""
    found: dict[int, Record] = {}
    for record in records:
        if record["kind"] == "start":
            found = {step: earlier for step, earlier in found.items() if step <= record.get("step", 0)}
        elif record["kind"] == kind:
            found[record["step"]] = record
    return [found[step] for step in sorted(found)]


def _wall_s(records: Iterable[Record], attempt: int) -> float:
    moments = [record["t"] for record in records if record["attempt"] == attempt]
    return float(max(moments) - min(moments)) if moments else 0.0


def _count_samples(run: str, step: Any) -> int:
    """The samples of the committed steps of a run that nobody could close."""
    steps = _steps(run)
    return sum(count for at, count in zip(steps["step"], steps["samples"], strict=True) if at < step) if steps else 0


def _steps(run: str) -> dict[str, list[Any]]:
    try:
        return dict(read_steps(storage.join(run, "metrics")).to_pydict())
    except FileNotFoundError:
        return {}


def _no_run(run: str) -> str:
    inside = [name for name in storage.list_folders(run) if storage.exists(storage.join(run, name, "ledger"))]
    known = f"it holds the runs {', '.join(inside[:10])}" if inside else "check the path"
    return f"{run} is no run: a run is a folder that holds spec.yaml and ledger/, such as runs/digits-mlp; {known}"


def as_text(report: dict[str, Any], run: str) -> str:
    """Return the report as plain text, headed by `run` as the user wrote it."""
    time = [
        f"  {name:<10}  {share:>6.1%}  {'█' * round(share * 30):<30}  {duration(report['seconds'][name])}"
        for name, share in _by_share(report)
    ]
    lines = [f"{run}: {_headline(report)}", *(f"  {name:<16} {value}" for name, value in _figures(report))]
    lines += ["", f"Where the time went ({duration(report['paid_s'])} of all workers)", *time] if time else []
    if report["events"]:
        lines += ["", "What happened", *(f"  step {event['step']}: {_told(event)}" for event in report["events"])]
    lines += ["", f"weights sha256 {report['weights_sha256']}"] if report["weights_sha256"] else []
    return "\n".join(lines)


def _headline(report: dict[str, Any]) -> str:
    resumed = f", resumed at step {report['resumed_from']:,}" if report["resumed_from"] else ""
    error = f": {report['error']}" if report["error"] else ""
    return f"{report['outcome']} at step {report['step']:,} after {duration(report['wall_s'])}{resumed}{error}"


def _figures(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The few numbers that matter, each with its name."""
    return [
        *((name, _number(value)) for name, value in report["metrics"].items()),
        ("goodput", f"{report['goodput']:.1%}"),
        ("samples", f"{report['samples']:,}"),
        ("samples per s", compact(report["samples_per_s"])),
        ("workers at most", str(report["workers"])),
        ("checkpoints", str(len(report["checkpoints"]))),
        ("checkpoint stall", duration(report["checkpoint_stall_s"])),
    ]


def _by_share(report: dict[str, Any]) -> list[tuple[str, float]]:
    """Categories that took time: the useful ones first, then what took most."""
    spent = [(category, share) for category, share in report["shares"].items() if share > 0]
    return sorted(spent, key=lambda pair: (pair[0] not in USEFUL, -pair[1]))


def _told(event: Record) -> str:
    parts = [str(event["kind"]).replace("_", " ")]
    if event["recovery_s"] is not None:
        parts.append(f"back after {duration(event['recovery_s'])}")
    if event["steps_redone"] is not None:
        parts.append(f"{event['steps_redone']} step{'s' if event['steps_redone'] != 1 else ''} redone")
    rest = (in_words(key, value) for key, value in event.items() if key not in (*EVENT, "t", "attempt"))
    return ", ".join([*parts, *rest])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "not a number" if value is None else str(value)


# --- as a page

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1c2126; --soft: #626c76; --rule: #e3e5e2;
  --curve: #0b7a70; --mark: #b84a2a; }
@media (prefers-color-scheme: dark) { :root { --page: #121518; --card: #1a1e22; --ink: #e7eaec; --soft: #98a2ab;
  --rule: #2b3137; --curve: #4cc3b4; --mark: #f0896a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 40px 20px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.02em; }
h2 { font-size: 15px; margin: 0 0 12px; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; }
small { color: var(--soft); font-size: 13px; font-weight: 400; letter-spacing: 0; }
h1 small { vertical-align: 5px; margin-left: 10px; padding: 2px 10px; border-radius: 99px; border: 1px solid; }
.done { color: var(--curve); } .failed, .mark { color: var(--mark); }
ul { display: flex; flex-wrap: wrap; gap: 14px 38px; margin: 26px 0; padding: 0; list-style: none; }
ul b { display: block; font-size: 22px; font-weight: 600; line-height: 1.3; }
.grid, .keys { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.keys { grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 4px 24px; margin: 0; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 18px 20px;
  margin: 0 0 16px; min-width: 0; }
.grid section { margin: 0; } .grid { margin-bottom: 16px; } .wide { grid-column: 1 / -1; }
.bar { display: flex; height: 26px; gap: 2px; border-radius: 6px; overflow: hidden; margin-bottom: 14px; }
.keys i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 400px; height: auto; font-size: 12px; fill: var(--soft); }
polyline { fill: none; stroke: var(--curve); stroke-width: 2; stroke-linejoin: round; } circle { fill: var(--curve); }
.wide svg { min-width: 640px; } .raw { stroke-width: 1; opacity: .3; } path { stroke: var(--rule); }
path.mark { stroke: var(--mark); stroke-dasharray: 3 3; }
table { border-collapse: collapse; } td:first-child { white-space: nowrap; overflow-wrap: normal; }
td, th { text-align: left; padding: 3px 24px 3px 0; font-weight: 400; }
pre { margin: 12px 0 0; overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; overflow-wrap: normal; }
summary { cursor: pointer; font-weight: 600; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name} · Elastrain</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
HUES = ("#7d8994", "#e0a32e", "#0f8a7e", "#62c2b4", "#8663cf", "#4583d8", "#d65f43", "#b4bbc2")
COLORS = dict(zip(CATEGORIES, HUES, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A titled curve over steps; each point gets a dot where there are fewer than `max_dots`."""

    title: str
    points: Points
    size: tuple[int, int] = (500, 220)
    max_dots: int = 2
    from_zero: bool = False


def write_html(run: str, report: dict[str, Any]) -> str:
    """Write `<run>/report.html`, one page that needs nothing else, and return its absolute path or URL.

    Raises:
        StorageError: if the run's files cannot be read or the page cannot be written.
    """
    steps = _steps(run)
    marks = [(float(event["step"]), _told(event)) for event in report["events"] if event["step"] is not None]
    last = max([report["step"], *steps.get("step", ())[-1:]])
    cards = "".join(_card(curve, marks, last) for curve in _curves(steps, report))
    name = escape(report["run"].rstrip("/").rsplit("/", 1)[-1])
    parts = [_head(name, report), _time(report), f'<div class="grid">{cards}</div>', *_events(report), *_spec(run)]
    url = storage.join(report["run"], "report.html")
    storage.put(url, PAGE.format(name=name, style=STYLE, body="\n".join([*parts, _foot(report)])).encode())
    return url


def _curves(steps: dict[str, list[Any]], report: dict[str, Any]) -> list[Curve]:
    """The training loss first, then each metric of the evaluations, learning rate and speed."""
    at = steps.get("step", [])
    names = dict.fromkeys(name for record in report["evals"] for name in record["metrics"])
    evals = {name: [(record["step"], record["metrics"].get(name)) for record in report["evals"]] for name in names}
    curves = [
        Curve(title="Training loss", points=_finite(zip(at, steps.get("loss", ()), strict=False)), size=(1000, 280)),
        *(Curve(title=f"Evaluation: {name}", points=_finite(evals[name]), max_dots=100) for name in names),
        Curve(title="Learning rate", points=_finite(zip(at, steps.get("lr", ()), strict=False)), from_zero=True),
        Curve(title="Samples per second", points=_speed(steps), from_zero=True),
    ]
    return [curve for curve in curves if curve.points]


def _finite(pairs: Iterable[tuple[Any, Any]]) -> Points:
    return [(float(x), float(y)) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]


def _speed(steps: dict[str, list[Any]]) -> Points:
    """Samples ÷ seconds of stretches of steps: the mean of each step's speed would hide the slow ones."""
    if not {"samples", "time_s"} <= set(steps):
        return []
    lines = list(zip(steps["step"], steps["samples"], steps["time_s"], strict=True))
    parts = [(part[0][0], sum(row[1] for row in part), sum(row[2] for row in part)) for part in _parts(lines, MEANS)]
    return _finite((step, samples / taken if taken else None) for step, samples, taken in parts)


def _parts(items: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """At most `count` stretches of equal length (the last may be shorter)."""
    size = math.ceil(len(items) / count) or 1
    return (items[first : first + size] for first in range(0, len(items), size))


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """Return at most `limit` points: lowest and highest of each of limit/2 stretches, so that no peak is lost."""
    if len(points) <= limit:
        return points
    ends = ({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])} for part in _parts(points, limit // 2))
    return [point for pair in ends for point in sorted(pair)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers from low to high.

    >>> ticks(0, 97, 5), ticks(0.9, 1.7, 4)
    ([0.0, 20.0, 40.0, 60.0, 80.0], [1.0, 1.2, 1.4, 1.6])
    """
    raw = (high - low) / count
    power = math.floor(math.log10(raw))
    size = next(factor for factor in (1, 2, 5, 10) if factor * 10.0**power >= raw * 0.999) * 10.0**power
    return [round(n * size, max(0, -power)) for n in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _svg(curve: Curve, marks: list[tuple[float, str]], last: int) -> str:
    """Draw a curve over steps 0..last, with a dashed line at each mark."""
    (width, height), (left, right, top, bottom) = curve.size, (58, 10, 8, 26)
    lowest, highest = min(y for _, y in curve.points), max(y for _, y in curve.points)
    room = (highest - lowest) * 0.06 or abs(highest) * 0.1 or 1.0
    low, high = (0.0 if curve.from_zero or 0 <= lowest < room else lowest - room), highest + room

    def x(step: float) -> str:
        return f"{left + (width - left - right) * step / max(last, 1):.1f}"

    def y(value: float) -> str:
        return f"{top + (height - top - bottom) * (high - value) / (high - low):.1f}"

    drawn = [f'<text x="{width - right}" y="{height - 6}" text-anchor="end">step</text>']
    for value in ticks(low, high, 5):
        text = f'<text x="{left - 8}" y="{y(value)}" dy="4" text-anchor="end">{value:.4g}</text>'
        drawn.append(f'<path d="M{left} {y(value)}H{width - right}"/>{text}')
    for step in ticks(0, 0.93 * max(last, 1), width // 100):
        drawn += [f'<text x="{x(step)}" y="{height - 6}" text-anchor="middle">{compact(step)}</text>']
    for step, told in marks:
        title = f"<title>step {step:g}: {escape(told)}</title>"
        drawn.append(f'<path class="mark" d="M{x(step)} {top}V{height - bottom}">{title}</path>')
    for style, points in _lines(curve.points):
        path = " ".join(f"{x(step)},{y(value)}" for step, value in points)
        drawn.append(f'<polyline class="{style}" points="{path}"/>')
    for step, value in curve.points if len(curve.points) < curve.max_dots else ():
        title = f"<title>step {step:g}: {value:.6g}</title>"
        drawn.append(f'<circle cx="{x(step)}" cy="{y(value)}" r="3.5">{title}</circle>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(curve.title)}">{"".join(drawn)}</svg>'


def _lines(points: Points) -> Iterator[tuple[str, Points]]:
    """The line of a curve; of many points a pale one, and one through their means."""
    if len(points) <= 2 * MEANS:
        yield "line", points
        return
    yield "raw", thin(points)
    parts = _parts(points, MEANS)
    yield "line", [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _card(curve: Curve, marks: list[tuple[float, str]], last: int) -> str:
    (step, value), wide = curve.points[-1], ' class="wide"' if curve.size[0] > 500 else ""
    title = f"<h2>{escape(curve.title)}<small>{value:.4g} at step {step:,.0f}</small></h2>"
    return f'<section{wide}>{title}<div class="scroll">{_svg(curve, marks, last)}</div></section>'


def _head(name: str, report: dict[str, Any]) -> str:
    outcome = escape(report["outcome"])
    tiles = "".join(f"<li><b>{escape(value)}</b><small>{escape(key)}</small></li>" for key, value in _figures(report))
    heading = f'<h1>{name}<small class="{outcome}">{outcome}</small></h1><small>{escape(_headline(report))}</small>'
    return f"<header>{heading}</header>\n<ul>{tiles}</ul>"


def _time(report: dict[str, Any]) -> str:
    bar, keys = "", ""
    for name, share in _by_share(report):
        color, told = f"background:{COLORS.get(name, COLORS['other'])}", f"{share:.1%}"
        bar += f'<i style="{color};flex:{share:.5f}" title="{escape(name)} {told}"></i>'
        spent = duration(report["seconds"][name])
        keys += f'<li><i style="{color}"></i>{escape(name)} {told} <small>{spent}</small></li>'
    total = f"<small>{duration(report['paid_s'])} of all workers, {report['goodput']:.1%} useful</small>"
    body = f'<div class="bar">{bar}</div><ul class="keys">{keys}</ul>'
    return f"<section><h2>Where the time went{total}</h2>{body}</section>"


def _events(report: dict[str, Any]) -> Iterator[str]:
    rows = "".join(f"<tr><td>{event['step']}</td><td>{escape(_told(event))}</td></tr>" for event in report["events"])
    if rows:
        head = '<tr><th><small>step</small></th><th><small class="mark">┊ in the curves</small></th></tr>'
        yield f"<section><h2>What happened</h2><table>{head}{rows}</table></section>"


def _spec(run: str) -> Iterator[str]:
    url = storage.join(run, "spec.yaml")
    if storage.exists(url):
        text = escape(storage.read_bytes(url).decode(errors="replace"))
        yield f"<section><details open><summary>spec.yaml</summary><pre>{text}</pre></details></section>"


def _foot(report: dict[str, Any]) -> str:
    facts = [report["run"], " · ".join(f"{name} {version}" for name, version in report["versions"].items())]
    facts += [f"weights sha256 {report['weights_sha256']}"] if report["weights_sha256"] else []
    return f"<footer><small>{'<br>'.join(escape(str(fact)) for fact in facts)}</small></footer>"
