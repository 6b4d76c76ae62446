"""What came of a sweep as one page that needs nothing else: leaderboard, curves, slices, importance, times.

It shows what the leaderboard was made of, so that one can disagree with it. Without a network, without a script; what
is too much for a page is thinned (curves) or counted (cards), never left out in silence.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from elastrain import storage
from elastrain.observe.report import PAGE, thin
from elastrain.observe.report import STYLE as RUN_STYLE
from elastrain.sweeps import charts
from elastrain.sweeps.charts import HUES, Band, Bar, Line, is_number, shown
from elastrain.sweeps.leaderboard import Leaderboard, Row, best_trials, in_words
from elastrain.sweeps.results import cells, headline
from elastrain.sweeps.stats import Estimate, importance, varied
from elastrain.sweeps.trials import Trial

WIDE, CARD = (1000, 320), (500, 230)
MAX_SLICES, MAX_AXES, MAX_STRONG, MAX_ERRORS, MAX_ROWS = 24, 9, 10, 20, 40
MAX_CURVE_POINTS = 30_000
"""Points of all curves together: of more, each curve is thinned."""
STYLE = """
.table { overflow-x: auto; }
.table td, .table th { white-space: nowrap; overflow-wrap: normal; padding: 4px 18px 4px 0; }
.table th { color: var(--soft); font-size: 13px; } .table tr.main td { border-top: 1px solid var(--rule); }
.table tr.defaults td { color: var(--soft); font-size: 13px; } .notes { display: block; margin: 12px 0 0; }
.notes li { margin: 2px 0; } .warn { color: var(--mark); } header { margin-bottom: 20px; }
"""


def as_html(
    name: str,
    board: Leaderboard,
    trials: Sequence[Trial],
    *,
    times: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """Return the page of the sweep `name`; `times` holds begin and end of trials in seconds from the sweep's start."""
    arms = list(dict.fromkeys([*(row.arm for row in board.rows), *(trial.arm for trial in trials)]))
    colours = {arm: f"c{n % HUES}" for n, arm in enumerate(arms)}
    page = _Page(board, trials, colours)
    parts = [
        f"<header><h1>{escape(name)}</h1><small>{escape(headline(board))}</small></header>",
        page.leaderboard(),
        *page.confirmed(),
        *page.curves(),
        f'<div class="grid">{"".join([*page.times(), *page.importance(), *page.funnel()])}</div>',
        *page.parallel(),
        f'<div class="grid">{"".join(page.slices())}</div>',
        *page.timeline(times or {}),
        *page.errors(),
    ]
    style = RUN_STYLE + charts.STYLE + STYLE
    return PAGE.format(name=escape(name), style=style, body="\n".join(parts))


def write_html(
    folder: str,
    board: Leaderboard,
    trials: Sequence[Trial],
    *,
    times: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """Write `report.html` into a sweep's folder or URL and return its path; raises StorageError."""
    name, url = folder.rstrip("/").rsplit("/", 1)[-1], storage.join(folder, "report.html")
    storage.put(url, as_html(name, board, trials, times=times).encode())
    return url


def _card(title: str, note: str, body: str, *, wide: bool = False) -> str:
    head = f"<h2>{escape(title)}<small>{escape(note)}</small></h2>"
    return f'<section{" class=wide" if wide else ""}>{head}<div class="scroll">{body}</div></section>'


def _legend(colours: Mapping[str, str]) -> str:
    keys = "".join(f'<li><i class="{style}"></i>{escape(arm)}</li>' for arm, style in colours.items())
    return f'<ul class="legend">{keys}</ul>' if len(colours) > 1 else ""


def _points(trial: Trial) -> list[tuple[float, float]]:
    return [
        (float(told.step), told.value) for told in trial.evaluations if told.value is not None and is_number(told.value)
    ]


class _Page:
    """The sections of a page; each is empty where there is nothing to show."""

    def __init__(self, board: Leaderboard, trials: Sequence[Trial], colours: Mapping[str, str]) -> None:
        self.board = board
        self.scoring = board.scoring
        self.trials = trials
        self.colours = colours
        self.bad = "high" if board.scoring.goal == "min" else "low"
        self.tuning = [trial for trial in trials if trial.phase == "tune"]

    def leaderboard(self) -> str:
        heads, lines = cells(self.board, MAX_ROWS)
        head = "".join(f"<th>{escape(text)}</th>" for text in heads)
        body = "".join(self._row(row, line) for row, line in zip(self.board.rows, lines, strict=False))
        more = len(self.board.rows) - MAX_ROWS
        notes = [*self.board.notes, *([f"{more} more rows are in leaderboard.csv."] if more > 0 else [])]
        listed = "".join(f'<li class="{"warn" if "edge" in note else ""}">{escape(note)}</li>' for note in notes)
        table = f'<div class="table"><table><tr>{head}</tr>{body}</table></div><ul class="notes">{listed}</ul>'
        return f"<section><h2>Leaderboard<small>{escape(in_words(self.board.ends))}</small></h2>{table}</section>"

    def _row(self, row: Row, line: Sequence[str]) -> str:
        return f'<tr class="{"defaults" if row.kind == "defaults" else "main"}">{_tds(line)}</tr>'

    def confirmed(self) -> Iterator[str]:
        """Median and range over the seeds of what was confirmed, an arm or (in mode search) a point a colour."""
        groups: dict[str, list[Trial]] = {}
        fields = varied(self.trials)
        for trial in self.trials:
            if trial.phase == "confirm" and _points(trial):
                key = trial.arm if self.board.mode == "fair" else _named(trial.point, fields)
                groups.setdefault(key, []).append(trial)
        if not groups:
            return
        colours = {key: f"c{n % HUES}" for n, key in enumerate(groups)} if self.board.mode == "search" else self.colours
        lines, bands = [], []
        for key, runs in groups.items():
            middle, band = _over_seeds(runs)
            lines.append(Line(middle, f"{colours[key]} good", f"{key}: median of {len(runs)} seeds"))
            bands.append(Band(band, colours[key]))
        chart = self._line_chart(lines, bands, "Confirmed")
        shown_here = {key: colours[key] for key in groups}
        yield _card("Confirmed: median and range over seeds", self._metric(), _legend(shown_here) + chart)

    def curves(self) -> Iterator[str]:
        """Every trial, thin; what was stopped early or broke is dashed, the best is thick."""
        there = [trial for trial in self.trials if _points(trial)]
        total = sum(len(trial.evaluations) for trial in there)
        if not there:
            return
        limit = max(10, MAX_CURVE_POINTS // len(there)) if total > MAX_CURVE_POINTS else total
        best = {trial.id for arm in self.colours for trial in best_trials(self._of(arm), self.scoring.goal)[:1]}
        rank = {True: 2, False: 1}
        ordered = sorted(there, key=lambda trial: rank[trial.id in best] if trial.outcome == "finished" else 0)
        lines = [
            Line(thin(_points(trial), limit), self._style(trial, trial.id in best), self._told(trial))
            for trial in ordered
        ]
        note = f"{self._metric()}; dashed: pruned, diverged or failed; thick: the best of the tuning"
        yield _card("All trials", note, _legend(self.colours) + self._line_chart(lines, [], "All trials"))

    def times(self) -> Iterator[str]:
        """Bars of the time to the target, in steps and in device-seconds."""
        rows = [row for row in self.board.rows if row.kind == "tuned" and row.steps]
        for title, times in (
            ("Steps to target", [row.steps for row in rows]),
            ("Device-seconds to target", [row.device_s for row in rows]),
        ):
            if rows:
                drawn = [self._bar(row, told) for row, told in zip(rows, times, strict=True) if told]
                yield _card(title, "median and 95 % interval; shorter is better", charts.bars(drawn, title))

    def _bar(self, row: Row, told: Estimate) -> Bar:
        text = f"{told.value:.4g}" if math.isfinite(told.value) else f"{row.reached}/{row.runs} reached"
        return Bar(row.arm, told.value, told.low, told.high, text, self.colours[row.arm])

    def importance(self) -> Iterator[str]:
        """For each arm how much of the outcome each field explains alone."""
        for arm, colour in self.colours.items():
            shares = {name: of for name, of in importance(self._of(arm), self.scoring.goal).items() if of >= 0.01}
            rows = [Bar(_last(name), share, None, None, f"{share:.0%}", colour) for name, share in shares.items()]
            if rows:
                title = f"What decides{f' in {arm}' if arm else ''}"
                note = "share of the variance that a field explains alone, from 1 %"
                yield _card(title, note, charts.bars(rows, title, full=1.0))

    def funnel(self) -> Iterator[str]:
        """How many trials of the tuning got as far as each step."""
        lines = []
        for arm, colour in self.colours.items():
            lengths = sorted(trial.evaluations[-1].step for trial in self._of(arm) if trial.evaluations)
            if lengths:
                ends = [(step, sum(length >= step for length in lengths)) for step in sorted({0, *lengths})]
                corners = [corner for (a, m), (b, n) in pairwise(ends) for corner in ((a, n), (b, n))]
                lines.append(
                    Line(corners or [(lengths[0], len(lengths))], f"{colour} good", f"{arm}: {len(lengths)} trials")
                )
        if lines:
            chart = charts.line_chart(lines, [], "Trials left", bad="", size=CARD, floor=0.0)
            yield _card("Trials left at each step", "of the tuning", chart)

    def parallel(self) -> Iterator[str]:
        """Points and outcomes of the tuning, a line a trial; the best quarter stands out."""
        dims = varied(self.tuning)
        if len({trial.arm for trial in self.tuning}) > 1:
            within = {name for arm in self.colours for name in varied(self._of(arm))}
            dims = {"arm": [], **{name: values for name, values in dims.items() if name in within}}
        names = list(dims)[:MAX_AXES]
        if not dims or len(self.tuning) < 2:
            return
        objective = self.scoring.metric
        best = {
            trial.id for arm in self.colours for trial in _best_quarter(self._of(arm), self.scoring.goal)[:MAX_STRONG]
        }
        faint = self._faint()
        lines = []
        for trial in sorted(self.tuning, key=lambda trial: trial.id in best):
            row = {"arm": trial.arm, **trial.point}
            style = f"{self.colours[trial.arm]} {'good' if trial.id in best else faint}"
            points = [*((name, row[name]) for name in names if name in row), (objective, _end_value(trial))]
            lines.append(Line(points, style, self._told(trial)))
        left = len(dims) - MAX_AXES
        note = f"strong: the best quarter of an arm, {MAX_STRONG} at most" + (
            f"; {left} more fields are in trials.parquet" if left > 0 else ""
        )
        chart = charts.parallel([*names, objective], lines, bad=self.bad, size=WIDE)
        yield _card("Parallel coordinates", note, _legend(self.colours) + chart)

    def slices(self) -> Iterator[str]:
        """The outcome over each field of each arm, with the range of the best quarter."""
        wanted = [(arm, name) for arm in self.colours for name in varied(self._of(arm))]
        for arm, name in wanted[:MAX_SLICES]:
            those = [trial for trial in self._of(arm) if name in trial.point]
            best = [trial.point[name] for trial in _best_quarter(those, self.scoring.goal)]
            band = best if best and all(is_number(value) for value in best) else []
            dots = [
                Line([(trial.point[name], _end_value(trial))], self._style(trial, best=False), self._told(trial))
                for trial in those
            ]
            edge = name in self.scoring.edges.get(arm, ())
            note = "⚠ the best is on the edge: widen the range" if edge else f"best {self._best(arm, name)}"
            chart = charts.scatter(dots, band, name, bad=self.bad, size=CARD)
            yield _card(f"{arm}: {name}" if arm else name, note, chart)
        if len(wanted) > MAX_SLICES:
            yield _card(f"{len(wanted) - MAX_SLICES} more fields", "are in trials.parquet", "")

    def _best(self, arm: str, name: str) -> str:
        found = best_trials(self._of(arm), self.scoring.goal)
        return shown(found[0].point[name]) if found and name in found[0].point else "unknown: none finished"

    def timeline(self, times: Mapping[str, tuple[float, float]]) -> Iterator[str]:
        """What ran when, where that is known."""
        rows = [
            (*times[trial.id], self._style(trial, best=False), self._told(trial))
            for trial in self.trials
            if trial.id in times
        ]
        if rows:
            yield _card("What ran when", "seconds from the start", _legend(self.colours) + charts.spans(rows))

    def errors(self) -> Iterator[str]:
        """The errors of failed trials, whole, each once with those that it ended."""
        found: dict[str, list[str]] = {}
        for trial in self.trials:
            if trial.error:
                found.setdefault(trial.error, []).append(trial.id)
        for error, ids in list(found.items())[:MAX_ERRORS]:
            who = f"{len(ids)} trial{'s' * (len(ids) > 1)}: {', '.join(ids[:5])}{', …' * (len(ids) > 5)}"
            text = error if len(error) < 8000 else f"{error[:2000]}\n…\n{error[-6000:]}"
            body = f"<details open><summary>{escape(who)}</summary><pre>{escape(text)}</pre></details>"
            yield f"<section><h2>Error</h2>{body}</section>"
        if len(found) > MAX_ERRORS:
            yield _card(f"{len(found) - MAX_ERRORS} more kinds of error", "are in trials.jsonl", "")

    def _of(self, arm: str) -> list[Trial]:
        return [trial for trial in self.tuning if trial.arm == arm]

    def _metric(self) -> str:
        target = "" if self.scoring.target is None else f", dashed line: target {self.scoring.target:g}"
        return f"{self.scoring.metric} over steps{target}"

    def _line_chart(self, lines: Sequence[Line], bands: Sequence[Band], label: str) -> str:
        return charts.line_chart(lines, bands, label, bad=self.bad, size=WIDE, target=self.scoring.target)

    def _style(self, trial: Trial, best: bool) -> str:  # noqa: FBT001
        kind = "best" if best else self._faint() + ("" if trial.outcome in ("finished", "running") else " off")
        return f"{self.colours[trial.arm]} {kind}"

    def _faint(self) -> str:
        return "thin many" if len(self.trials) > 100 else "thin"

    def _told(self, trial: Trial) -> str:
        value = f" {trial.value:.4g} at" if trial.value is not None else ""
        return f"{trial.id}:{value} step {trial.step}, {trial.outcome}"


def _tds(line: Iterable[str]) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in line)


def _end_value(trial: Trial) -> float | None:
    return trial.value if trial.outcome in ("finished", "pruned", "running") else None


def _named(point: Mapping[str, Any], fields: Iterable[str]) -> str:
    return ", ".join(f"{_last(name)} {shown(point[name])}" for name in fields if name in point) or "the point"


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _best_quarter(trials: Sequence[Trial], goal: Any) -> list[Trial]:
    found = best_trials(trials, goal)
    return found[: max(1, math.ceil(len(found) / 4))]


def _over_seeds(runs: Sequence[Trial]) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """Median and range at each step that a run has; runs that ended by then are not in it."""
    at: dict[float, list[float]] = {}
    for run in runs:
        for step, value in _points(run):
            at.setdefault(step, []).append(value)
    steps = sorted(at)
    return [(s, float(np.median(at[s]))) for s in steps], [(s, min(at[s]), max(at[s])) for s in steps]
