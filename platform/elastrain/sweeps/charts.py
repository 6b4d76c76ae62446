"""Charts of many trials as inline SVG: lines with bands, slices, parallel coordinates, bars with intervals, spans.

A chart is a string. Colours are classes `c0`…`c7` that the page's style defines, so that they follow its light or dark
scheme. What is not finite, or beyond what a chart shows, is drawn on the edge of its frame.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from elastrain.observe.progress import compact
from elastrain.observe.report import ticks
from elastrain.sweeps.stats import plain

HUES = 8
HUGE = 1e30
"""Numbers from here on are drawn as infinite ones: a range that holds them would overflow."""
MAX_NAMES = 12
STYLE = """
.c0 { --curve: #0b7a70; } .c1 { --curve: #d65f43; } .c2 { --curve: #4583d8; } .c3 { --curve: #b07d12; }
.c4 { --curve: #8663cf; } .c5 { --curve: #c2478f; } .c6 { --curve: #5d7f2b; } .c7 { --curve: #7d8994; }
@media (prefers-color-scheme: dark) { .c0 { --curve: #4cc3b4; } .c1 { --curve: #f0896a; } .c2 { --curve: #77a9ef; }
  .c3 { --curve: #e0b04a; } .c4 { --curve: #ab90e8; } .c5 { --curve: #e583bd; } .c6 { --curve: #9dc162; }
  .c7 { --curve: #a3adb6; } }
polyline.thin { stroke-width: 1; opacity: .35; } polyline.many { opacity: .12; }
.off { opacity: .3; } polyline.off { stroke-dasharray: 3 2; }
.good { stroke-width: 1.5; opacity: .85; } .best { stroke-width: 3; }
.band { fill: var(--curve); opacity: .16; } .range { fill: var(--curve); opacity: .1; }
path.miss, path.whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; } path.miss { stroke: var(--mark); }
.box { fill: var(--curve); } .grid svg { max-width: 600px; } svg text { paint-order: stroke; stroke: var(--card);
  stroke-width: 3px; stroke-linejoin: round; } circle { opacity: .75; } text.name { fill: var(--ink); }
.legend { margin: 0 0 12px; gap: 4px 20px; } .legend i { display: inline-block; width: 10px; height: 10px;
  border-radius: 3px; margin-right: 7px; background: var(--curve); }
"""


@dataclass(frozen=True, slots=True)
class Axis:
    """Where values lie between two pixels: numbers from low to high, or names at equal distances.

    `bad` is the share of the way at which what is not finite lies.
    """

    start: float
    end: float
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    bad: float = 1.0
    names: tuple[str, ...] = ()

    def at(self, value: Any) -> float:
        """Return the pixel of a value; what is beyond the axis, or not finite, is at its end."""
        if self.names:
            share = (
                (self.names.index(text) + 0.5) / len(self.names) if (text := shown(value)) in self.names else self.bad
            )
        elif not is_number(value):
            share = self.bad
        elif self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * min(1.0, max(0.0, share))

    def marks(self, count: int) -> list[tuple[float, str]]:
        """Return pixels and labels of about `count` round numbers, or of the names."""
        if self.names:
            step = math.ceil(len(self.names) / MAX_NAMES)
            return [(self.at(name), _cut(name, 14)) for name in self.names[::step]]
        values = _decades(self.low, self.high) if self.log else ticks(self.low, self.high, count)
        return [(self.at(value), f"{value:.4g}" if abs(value) < 1e4 else compact(value)) for value in values]


def is_number(value: Any) -> bool:
    """Say whether a value can be drawn as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < HUGE


def shown(value: Any) -> str:
    """Return a value as a label."""
    return f"{value:.4g}" if isinstance(value, float) else str(plain(value))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 200 * low else (1,)
    step = math.ceil(len(powers) / 8)
    values = (factor * 10.0**power for power in powers[::step] for factor in factors)
    return [value for value in values if low * 0.999 <= value <= high * 1.001]


def axis_of(values: Iterable[Any], start: float, end: float, *, room: float = 0.04, bad: str = "") -> Axis:
    """Return an axis for the values: names if one of them is no number, logarithmic if most lie low on a linear one.

    `bad` is the end ("high" or "low") at which the worst of them, as of trials that diverge, may lie beyond the axis.
    """
    found = list(values)
    if any(isinstance(value, bool | str | list | tuple | dict) or value is None for value in found):
        return Axis(start, end, names=tuple(dict.fromkeys(shown(value) for value in sorted(found, key=_kind))))
    numbers = sorted(float(value) for value in found if is_number(value)) or [0.0]
    low, high = numbers[0], numbers[-1]
    few = len(numbers) // 14
    inner_low, inner_high = numbers[few], numbers[-1 - few]
    if bad == "high" and high - low > 3 * (inner_high - low) > 0:
        high = inner_high
    if bad == "low" and high - low > 3 * (high - inner_low) > 0:
        low = inner_low
    worst = 0.0 if bad == "low" else 1.0
    if low > 1e-300 and high >= 20 * low and numbers[len(numbers) // 2] < low + 0.25 * (high - low):
        return Axis(start, end, low / (high / low) ** room, high * (high / low) ** room, log=True, bad=worst)
    width = high - low if high - low > 1e-9 * max(abs(low), abs(high), 1e-290) else abs(high) * 0.2 or 1.0
    return Axis(start, end, low - room * width, max(high, low + 0.5 * width) + room * width, bad=worst)


def _kind(value: Any) -> tuple[str, Any]:
    number = is_number(value)
    return ("0" if number else type(value).__name__, value if number else shown(value))


@dataclass(frozen=True, slots=True)
class Line:
    """Points to join, in data units; `style` are classes, one of them a colour."""

    points: Sequence[tuple[Any, Any]]
    style: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Band:
    """What lies between two lines: (x, low, high)."""

    points: Sequence[tuple[float, float, float]]
    style: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A labelled length and its interval; infinite: never."""

    label: str
    value: float
    low: float | None
    high: float | None
    text: str
    style: str


def svg(width: int, height: int, label: str, parts: Iterable[str]) -> str:
    """Return an SVG element that scales with its place."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _frame(x: Axis, y: Axis, label: str) -> list[str]:
    """Grid, numbers at the left and below, and what the horizontal axis is."""
    parts = []
    for at, text in y.marks(5):
        parts.append(f'<path d="M{x.start:.0f} {at:.1f}H{x.end:.0f}"/>')
        parts.append(f'<text x="{x.start - 8:.0f}" y="{at:.1f}" dy="4" text-anchor="end">{escape(text)}</text>')
    below, width = y.start + 20, x.end - x.start
    marks = [mark for mark in x.marks(max(2, int(width / 110))) if label == "" or mark[0] < x.end - 7 * len(label) - 12]
    parts += [f'<text x="{at:.1f}" y="{below:.0f}" text-anchor="middle">{escape(text)}</text>' for at, text in marks]
    return [*parts, f'<text x="{x.end:.0f}" y="{below:.0f}" text-anchor="end">{escape(label)}</text>']


def line_chart(
    lines: Sequence[Line],
    bands: Sequence[Band],
    label: str,
    *,
    bad: str,
    size: tuple[int, int],
    target: float | None = None,
    floor: float | None = None,
) -> str:
    """Return lines over steps; those of later entries lie above.

    `target` is a dashed horizontal, and `floor` a value that has to be in the frame.
    """
    width, height = size
    shown_too = [value for value in (target, floor) if value is not None]
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points if value is not None]
    values += [end for band in bands for _, *ends in band.points for end in ends]
    x = Axis(58, width - 10, 0.0, float(max(steps, default=1) or 1))
    y = axis_of([*values, *shown_too], height - 28, 8, bad=bad)
    parts = _frame(x, y, "step")
    for band in bands:
        there = [f"{x.at(step):.1f},{y.at(high):.1f}" for step, _, high in band.points]
        back = [f"{x.at(step):.1f},{y.at(low):.1f}" for step, low, _ in reversed(band.points)]
        parts.append(f'<polygon class="band {band.style}" points="{" ".join(there + back)}"/>')
    for line in lines:
        parts.append(_drawn(line, [(x.at(step), y.at(value)) for step, value in line.points]))
    if target is not None:
        parts.append(f'<path class="mark" d="M{x.start:.0f} {y.at(target):.1f}H{x.end:.0f}"/>')
    return svg(width, height, label, parts)


def _drawn(line: Line, pixels: Sequence[tuple[float, float]]) -> str:
    """A line, or the dot that a single point is."""
    if len(pixels) == 1:
        return _dot(*pixels[0], line)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    return f'<polyline class="{line.style}" points="{points}">{_title(line.title)}</polyline>'


def _dot(x: float, y: float, line: Line) -> str:
    return f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{_title(line.title)}</circle>'


def _name(x: float, y: float, text: str, anchor: str, length: int) -> str:
    place = f'class="name" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(_cut(text, length))}{_title(text)}</text>"


def parallel(names: Sequence[str], lines: Sequence[Line], *, bad: str, size: tuple[int, int]) -> str:
    """Return parallel coordinates: each line holds (name, value) pairs; the last name is the objective's."""
    width, height = size
    places = {name: 60 + (width - 120) * n / max(1, len(names) - 1) for n, name in enumerate(names)}
    values: dict[str, list[Any]] = {name: [] for name in names}
    for line in lines:
        for name, value in line.points:
            values[name] += [value] if name != names[-1] or is_number(value) else []
    ends = {name: bad if name == names[-1] else "" for name in names}
    axes = {name: axis_of(of or [0.0], height - 12, 30, bad=ends[name]) for name, of in values.items()}
    parts = [_drawn(line, [(places[name], axes[name].at(value)) for name, value in line.points]) for line in lines]
    for n, (name, axis) in enumerate(axes.items()):
        at, anchor = places[name], "end" if n == len(axes) - 1 else "start" if n == 0 else "middle"
        edge = at + {"end": 55, "start": -55, "middle": 0}[anchor]
        title = _name(edge, 14, name, anchor, 22)
        parts += [f'<path d="M{at:.1f} {axis.start:.0f}V{axis.end:.0f}"/>', title]
        for tick, text in axis.marks(6):
            parts.append(f'<text x="{at + 5:.0f}" y="{tick:.1f}" dy="4">{escape(text)}</text>')
    return svg(width, height, "parallel coordinates", parts)


def scatter(points: Sequence[Line], best: Sequence[Any], name: str, *, bad: str, size: tuple[int, int]) -> str:
    """Return a slice: a dot a trial over a field's value, crosses at the bad end for those without a value.

    `best` are values of the field between which the background is shaded.
    """
    width, height = size
    pairs = [line.points[0] for line in points]
    x = axis_of([at for at, _ in pairs], 58, width - 10, room=0.05)
    y = axis_of([value for _, value in pairs if is_number(value)], height - 28, 12, bad=bad)
    parts = _frame(x, y, "")
    if best and not x.names:
        left, right = x.at(min(best)) - 2, x.at(max(best)) + 2
        title = _title(f"the best quarter: {shown(min(best))} to {shown(max(best))}")
        area = f'x="{left:.1f}" y="8" width="{right - left:.1f}" height="{height - 36}"'
        parts.append(f'<rect class="range c0" {area}>{title}</rect>')
    for line, (at, value) in zip(points, pairs, strict=True):
        a, b = x.at(at), y.at(value)
        if is_number(value):
            parts.append(_dot(a, b, line))
        else:
            cross = f"M{a - 3:.1f} {b - 3:.1f}l6 6m0 -6l-6 6"
            parts.append(f'<path class="miss" d="{cross}">{_title(line.title)}</path>')
    return svg(width, height, name, parts)


def bars(rows: Sequence[Bar], label: str, *, full: float = 0.0, width: int = 500) -> str:
    """Return horizontal bars with their intervals; one that never ends has none. The longest is at least `full`."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None and is_number(end)]
    high = max([*ends, full]) or 1.0
    x = Axis(120, width - 110, 0.0, high)
    parts = []
    for n, row in enumerate(rows):
        y = 8 + 28 * n
        length = x.at(row.value) - x.start if is_number(row.value) else 0.0
        parts.append(_name(112, y + 14, row.label, "end", 17))
        parts.append(f'<rect class="box {row.style}" x="{x.start}" y="{y}" width="{length:.1f}" height="20"/>')
        if row.low is not None and row.high is not None and is_number(row.low):
            a, b = x.at(row.low), x.at(row.high)
            cap = f"M{b:.1f} {y + 5}v10" if is_number(row.high) else f"M{b - 4:.1f} {y + 6}l5 4l-5 4"
            parts.append(f'<path class="whisker" d="M{a:.1f} {y + 5}v10m0 -5H{b:.1f}{cap}"/>')
        parts.append(f'<text x="{x.end + 8:.0f}" y="{y + 14}">{escape(row.text)}</text>')
    return svg(width, 16 + 28 * len(rows), label, parts)


def spans(rows: Sequence[tuple[float, float, str, str]], width: int = 1000) -> str:
    """Return what ran when: (begin, end, style, title) in seconds, each on the first lane that is free."""
    ordered = sorted(rows)
    lanes: list[float] = []
    x = Axis(10, width - 10, 0.0, max((end for _, end, _, _ in ordered), default=1.0) or 1.0)
    parts = []
    for begin, end, style, title in ordered:
        lane = next((n for n, free in enumerate(lanes) if free <= begin), len(lanes))
        lanes[lane : lane + 1] = [end]
        length = max(1.5, x.at(end) - x.at(begin) - 1)
        area = f'x="{x.at(begin):.1f}" y="{8 + 16 * lane}" width="{length:.1f}" height="13" rx="2"'
        parts.append(f'<rect class="box {style}" {area}>{_title(title)}</rect>')
    below = 26 + 16 * len(lanes)
    parts += [f'<text x="{at:.1f}" y="{below}" text-anchor="middle">{text} s</text>' for at, text in x.marks(8)[1:]]
    return svg(width, below + 8, "timeline", parts)
