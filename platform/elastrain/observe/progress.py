"""What is happening, for who waits: one line that repaints on a terminal, a plain line now and then elsewhere.

Everything goes to stderr; stdout belongs to results. Showing a status costs microseconds: it is painted by a thread
of rich on a terminal, and written at most every few seconds elsewhere. A broken stderr never stops a run.
"""

import contextlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.text import Text

EVERY_S = 5.0
BAR_WIDTH = 16
RATE_WINDOW_S = 30.0
PHASES = ("starting", "checking the data", "training")
"""How the phases begin that a run tells of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What a run is doing: `phase` in words ("starting workers", "training"), the rest as far as it is known.

    `epoch` and `epochs` may be fractions; `data_share` is the share of time spent waiting for data, 0..1.
    """

    phase: str
    epoch: float = 0.0
    epochs: float | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    samples_per_s: float | None = None
    data_share: float | None = None
    workers: int = 0
    last_checkpoint: int | None = None
    message: str = ""


class LiveLine:
    """A context in which `show` tells what is going on.

    Messages stay above the line on a terminal. Elsewhere a line is written when phase or message changes, and else at
    most every `every_s` seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        every_s: float = EVERY_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._every_s = every_s
        self._now = now
        self._live: Any = None
        self._shown: Status | None = None
        self._written: Status | None = None
        self._written_at = 0.0
        self._pace = Pace(now)

    def __enter__(self) -> Self:
        """Take the line."""
        if is_terminal(self._stream):
            from rich.live import Live  # noqa: PLC0415 -- 0.1 s that pipes and tests need not pay

            # Standard output stays as it is: rich would send it to this stream.
            self._live = Live(
                get_renderable=self._paint,
                console=_console(self._stream),
                redirect_stdout=False,
                refresh_per_second=5,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last status standing."""
        with contextlib.suppress(OSError, ValueError):
            if self._live:
                self._live.stop()
            elif self._shown is not None and self._shown != self._written:
                self._write(self._shown)

    def show(self, status: Status) -> None:
        """Show `status` from now on."""
        before, self._shown = self._shown, status
        self._pace.note(status.step)
        fresh = status.message if before is None or status.message != before.message else ""
        with contextlib.suppress(OSError, ValueError):
            if not self._live:
                self._write_if_due(status)
            elif fresh:
                self._live.console.print(fresh, markup=False, highlight=False)

    def _write_if_due(self, status: Status) -> None:
        last = self._written
        changed = last is None or (status.phase, status.message) != (last.phase, last.message)
        if changed or (status != last and self._now() - self._written_at >= self._every_s):
            self._write(status)

    def _write(self, status: Status) -> None:
        said = self._written is not None and self._written.message == status.message
        self._written, self._written_at = status, self._now()
        parts = describe(status, self._pace.left_s(status))
        self._stream.write(" · ".join(parts if said or not status.message else [*parts, status.message]) + "\n")
        self._stream.flush()

    def _paint(self) -> "Text":
        from rich.text import Text  # noqa: PLC0415

        text = Text(no_wrap=True, overflow="ellipsis")
        if self._shown is not None:
            phase, *parts = describe(self._shown, self._pace.left_s(self._shown))
            text.append(phase, style="bold")
            if self._shown.steps:
                full = min(BAR_WIDTH, BAR_WIDTH * self._shown.step // self._shown.steps)
                text.append("  " + "━" * full, style="cyan").append("━" * (BAR_WIDTH - full), style="bright_black")
            for part in parts:
                text.append("  ").append(part)
        return text


class Pace:
    """How fast steps pass, over the last half minute: what is left is told from that, not from a slow start."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._marks: deque[tuple[float, int]] = deque()

    def note(self, step: int) -> None:
        """Note that `step` steps are done; a step back (a resume) starts anew."""
        moment = self._now()
        if self._marks and step < self._marks[-1][1]:
            self._marks.clear()
        if len(self._marks) == 1 and self._marks[0][1] == step:
            self._marks.clear()  # standing still before the first step is no pace
        if not self._marks or moment - self._marks[-1][0] >= RATE_WINDOW_S / 30:
            self._marks.append((moment, step))
        while len(self._marks) > 1 and moment - self._marks[0][0] > RATE_WINDOW_S:
            self._marks.popleft()

    def left_s(self, status: Status) -> float | None:
        """Return the seconds to the last step at this pace; None where it is not known yet."""
        if not self._marks or not status.steps:
            return None
        moment, step = self._marks[0]
        done = status.step - step
        return (status.steps - status.step) * (self._now() - moment) / done if done > 0 else None


def describe(status: Status, left_s: float | None = None) -> list[str]:
    """Return the parts of a status line, the phase first; what is not known is left out."""
    epochs = f"/{status.epochs:g}" if status.epochs is not None else ""
    parts = [
        (status.phase, True),
        (f"step {status.step}/{status.steps}", status.steps),
        (f"{duration(left_s or 0)} left", left_s is not None),
        (f"epoch {status.epoch:.2f}{epochs}", status.steps and (status.epoch or status.epochs)),
        (f"loss {status.loss or 0:.4g}", status.loss is not None),
        (f"{compact(status.samples_per_s or 0)} samples/s", status.samples_per_s),
        (f"{status.data_share or 0:.0%} waiting for data", status.data_share is not None),
        (f"{status.workers} worker{'s' if status.workers != 1 else ''}", status.workers),
        (f"checkpoint {status.last_checkpoint}", status.last_checkpoint is not None),
    ]
    return [part for part, known in parts if known]


def status_in(line: str) -> Status | None:
    """Return the status that a line of `describe`'s parts tells, the time left aside; None if it is another line.

    >>> status_in("training · step 30/460 · 12 s left · epoch 1.30/20 · loss 0.52 · 12.3k samples/s · 2 workers")
    ... # doctest: +ELLIPSIS
    Status(phase='training', epoch=1.3, epochs=20.0, step=30, steps=460, loss=0.52, samples_per_s=12300.0, ...)
    >>> status_in("Traceback (most recent call last):")
    """
    phase, *parts = line.split(" · ")
    if not phase.startswith(PHASES):
        return None
    found: dict[str, Any] = {}
    for index, part in enumerate(parts):
        known = next(((kind, match) for kind, match in ((k, k.fullmatch(part)) for k in _PARTS) if match), None)
        if known is None:
            found["message"] = " · ".join(parts[index:])
            break
        found |= {name: _PARTS[known[0]](text) for name, text in known[1].groupdict().items() if text is not None}
    if "data_share" in found:
        found["data_share"] /= 100
    return Status(phase=phase, **found)


def _uncompact(text: str) -> float:
    """Return the number that `compact` wrote."""
    exponent = "kMGT".find(text[-1]) + 1
    return float(text[:-1]) * 1000**exponent if exponent else float(text)


_PARTS: dict[re.Pattern[str], Callable[[str], Any]] = {
    re.compile(r"step (?P<step>\d+)/(?P<steps>\d+)"): int,
    re.compile(r"\d.* left"): str,
    re.compile(r"epoch (?P<epoch>[\d.]+)(?:/(?P<epochs>[\d.e+-]+))?"): float,
    re.compile(r"loss (?P<loss>\S+)"): float,
    re.compile(r"(?P<samples_per_s>[\d.e+-]+[kMGT]?) samples/s"): _uncompact,
    re.compile(r"(?P<data_share>\d+)% waiting for data"): float,
    re.compile(r"(?P<workers>\d+) workers?"): int,
    re.compile(r"checkpoint (?P<last_checkpoint>\d+)"): int,
}


def duration(seconds: float) -> str:
    """Return seconds as people say them.

    >>> [duration(value) for value in (0.034, 9.26, 75, 3725, 200000)]
    ['0.03 s', '9.3 s', '1 min 15 s', '1 h 02 min', '2 d 07 h']
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for unit, size, part, fraction in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // fraction:02d} {part}"
    return f"{whole // 60} min {whole % 60:02d} s"


def in_words(key: str, value: Any) -> str:
    """Return a field of an event as people say it: seconds, names, and of an id as much as tells it from others.

    >>> in_words("detect_s", 1.13e-05), in_words("joined", ["w3"]), in_words("node", "af89ac3d143c70668f")
    ('detect 0.00 s', 'joined w3', 'node af89ac3d143c')
    """
    name = key.replace("_", " ")
    if key.endswith("_s") and isinstance(value, float):
        return f"{key.removesuffix('_s').replace('_', ' ')} {duration(value)}"
    if isinstance(value, list):
        return f"{name} {', '.join(map(str, value)) or 'none'}"
    return f"{name} {value[:12] if key == 'node' and isinstance(value, str) else value}"


def compact(value: float) -> str:
    """Return a number in at most three digits and a letter.

    >>> [compact(value) for value in (7, 950.4, 12345, 4.2e6, 3e9)]
    ['7', '950', '12.3k', '4.2M', '3G']
    """
    letters = iter(("", "k", "M", "G", "T"))
    letter = next(letters)
    while abs(value) >= 999.5 and (following := next(letters, None)):
        value, letter = value / 1000, following
    return f"{value:.3g}{letter}"


@contextlib.contextmanager
def pack_progress(
    stream: TextIO | None = None, *, every_s: float = EVERY_S, now: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a callable `(label, done, total)` that shows how far the packing of `label` is; total None: not known."""
    stream = stream if stream is not None else sys.stderr
    if not is_terminal(stream):
        yield _plain_progress(stream, every_s, now)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bars: dict[str, Any] = {}
    with Progress(*columns, console=_console(stream), redirect_stdout=False) as progress:

        def show(label: str, done: int, total: int | None) -> None:
            if label not in bars:
                bars[label] = progress.add_task(label, total=total)
            progress.update(bars[label], completed=done, total=total)

        yield show


def _plain_progress(stream: TextIO, every_s: float, now: Callable[[], float]) -> Callable[[str, int, int | None], None]:
    written: dict[str, tuple[float, int]] = {}

    def show(label: str, done: int, total: int | None) -> None:
        moment, before = written.get(label, (-every_s, -1))
        if done != before and (before < 0 or done == total or now() - moment >= every_s):
            written[label] = now(), done
            of = f" of {total} ({done / total:.0%})" if total else ""
            with contextlib.suppress(OSError, ValueError):
                stream.write(f"{label}: {done}{of}\n")
                stream.flush()

    return show


def is_terminal(stream: TextIO) -> bool:
    """Say whether lines on `stream` can be repainted: a terminal, and not a dumb one."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def _console(stream: TextIO) -> Any:
    from rich.console import Console  # noqa: PLC0415

    return Console(file=stream, soft_wrap=False)
