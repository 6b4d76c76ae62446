"""A sweep while it runs, for who waits: a table that repaints on a terminal, one plain line elsewhere."""

import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from elastrain.observe.progress import EVERY_S, duration, is_terminal
from elastrain.sweeps.leaderboard import Scoring, in_words, tally
from elastrain.sweeps.stats import loss_of
from elastrain.sweeps.trials import Evaluation, Told, Trial

if TYPE_CHECKING:
    from rich.table import Table

MAX_BEST, MAX_RUNNING = 5, 12
PHASES = {"tune": "tuning", "defaults": "defaults", "confirm": "confirming"}


class LiveView:
    """A context in which `show` tells how far a sweep is, on stderr; a broken stderr never stops it."""

    def __init__(self, scoring: Scoring, stream: TextIO | None = None) -> None:
        self._scoring, self._stream = scoring, stream if stream is not None else sys.stderr
        self._told, self._taken = Told(), 0
        self._live: Any = None
        self._written, self._written_at = "", -EVERY_S

    def __enter__(self) -> Self:
        """Take the lines."""
        if is_terminal(self._stream):
            from rich.console import Console  # noqa: PLC0415 -- 0.1 s that pipes need not pay
            from rich.live import Live  # noqa: PLC0415

            self._live = Live(console=Console(file=self._stream), redirect_stdout=False, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave what was shown last standing."""
        with contextlib.suppress(OSError, ValueError):
            if self._live:
                self._live.stop()

    def show(self, events: Sequence[Mapping[str, Any]], cells: int) -> None:
        """Show the trials of a sweep's events, those shown before and what is new, and how many cells run one."""
        self._told.take(events[self._taken :])
        self._taken = len(events)
        trials = self._told.trials()
        with contextlib.suppress(OSError, ValueError):
            if self._live:
                self._live.update(live_table(trials, self._scoring))
            elif time.monotonic() - self._written_at >= EVERY_S:
                self.say(f"{cells} at once · {live_line(trials, self._scoring)}" if trials else "starting workers")
                self._written_at = time.monotonic()

    def say(self, text: str) -> None:
        """Show a line that stays, unless it was the last one, too."""
        with contextlib.suppress(OSError, ValueError):
            if self._live:
                self._live.console.print(text, markup=False, highlight=False)
            elif text != self._written:
                self._stream.write(text + "\n")
                self._stream.flush()
            self._written = text


def live_table(trials: Sequence[Trial], scoring: Scoring) -> "Table":
    """Return what a terminal shows: the best so far of each arm, what runs and where it is, and how many ended how."""
    from rich.table import Table  # noqa: PLC0415 -- 0.1 s that pipes need not pay

    table = Table(box=None, pad_edge=False, header_style="dim", caption_justify="left", caption_style="dim")
    for heading in ("", "trial", "arm", "step", scoring.metric, "device-s"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("", "trial", "arm") else "right")
    best = best_so_far(trials, scoring)
    for trial, told in best[:MAX_BEST]:
        table.add_row("best", _text(trial.id), _text(trial.arm), *_numbers(told, scoring), style="bold")
    running = [trial for trial in trials if trial.outcome == "running"]
    for trial in running[:MAX_RUNNING]:
        told_last = trial.evaluations[-1] if trial.evaluations else None
        table.add_row(PHASES[trial.phase], _text(trial.id), _text(trial.arm), *_numbers(told_last, scoring))
    hidden = [f"{len(best) - MAX_BEST} more arms"] if len(best) > MAX_BEST else []
    hidden += [f"{len(running) - MAX_RUNNING} more run"] if len(running) > MAX_RUNNING else []
    table.caption = _text(" · ".join([in_words(tally(trials)), *hidden]))
    return table


def live_line(trials: Sequence[Trial], scoring: Scoring) -> str:
    """Return the same as one line: how many ended how, and the best so far of all."""
    best = best_so_far(trials, scoring)
    if not best:
        return in_words(tally(trials))
    trial, told = min(best, key=lambda pair: loss_of(pair[1].value, scoring.goal))
    return f"{in_words(tally(trials))} · best {scoring.metric} {told.value:.4g} ({trial.id}, step {told.step})"


def best_so_far(trials: Sequence[Trial], scoring: Scoring) -> list[tuple[Trial, Evaluation]]:
    """Return for each arm the trial with the best last value, of the tuning and its defaults, best first.

    Values of trials that still run or were pruned count: they say where the sweep is, not what came of it.
    """
    found: dict[str, tuple[float, Trial, Evaluation]] = {}
    for trial in trials:
        if trial.phase != "confirm" and trial.outcome in ("running", "pruned", "finished") and trial.evaluations:
            loss = loss_of(trial.value, scoring.goal)
            if loss < found[trial.arm][0] if trial.arm in found else loss < math.inf:
                found[trial.arm] = (loss, trial, trial.evaluations[-1])
    return [(trial, told) for _, trial, told in sorted(found.values(), key=lambda entry: entry[0])]


def _numbers(told: Evaluation | None, scoring: Scoring) -> tuple[str, str, str]:
    of = f"/{scoring.max_steps}" if scoring.max_steps else ""
    if told is None:
        return (f"0{of}", "", "")
    value = "not a number" if told.value is None else f"{told.value:.4g}"
    return (f"{told.step}{of}", value, duration(told.device_s))


def _text(text: str) -> str:
    """Names of the user are no markup of rich."""
    from rich.markup import escape  # noqa: PLC0415

    return escape(text)
