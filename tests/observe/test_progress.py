"""The progress line: repainted on a terminal, plain and rare elsewhere, on stderr only, and never in the way."""

import io
import sys

import pytest

from elastrain.observe.progress import LiveLine, Pace, Status, describe, is_terminal, pack_progress, status_in


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        """Fail as a closed pipe does."""
        raise BrokenPipeError(text)


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.moment = 0.0

    def __call__(self) -> float:
        """The moment."""
        return self.moment


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rich looks at must not depend on who runs the tests."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")


def test_lines_are_rare_without_a_terminal_but_changes_are_told_at_once() -> None:
    stream, now = io.StringIO(), Hand()
    with LiveLine(stream, every_s=5, now=now) as line:
        line.show(Status(phase="starting workers"))
        for step in range(1, 121):
            now.moment += 0.1
            message = "worker 2 lost; redoing step 60" if step >= 60 else ""
            line.show(Status(phase="training", step=step, steps=200, message=message))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "starting workers"
    assert lines[1].startswith("training · step 1/200")
    assert [text for text in lines if "lost" in text] == [lines[3]]
    assert "step 60/200" in lines[3]
    assert len(lines) == 6
    assert "step 120/200" in lines[-1], "the last status stays"


def test_an_unchanged_status_is_not_repeated() -> None:
    stream, now = io.StringIO(), Hand()
    with LiveLine(stream, now=now) as line:
        for _ in range(3):
            line.show(Status(phase="waiting for workers"))
            now.moment += 60
    assert stream.getvalue() == "waiting for workers\n"


def test_a_terminal_gets_one_line_and_the_messages_above_it(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    with LiveLine(stream) as line:
        sys.stdout.write("a result\n")
        line.show(Status(phase="training", step=5, steps=10, message="[worker] joined"))
        line.show(Status(phase="training", step=10, steps=10, loss=0.25, workers=1, message="[worker] joined"))
    text = stream.getvalue()
    assert text.count("[worker] joined") == 1
    assert "10/10" in text
    assert "loss 0.25" in text
    assert "1 worker" in text
    assert "1 workers" not in text
    assert "\x1b[?25h" in text, "the cursor is back"
    assert capsys.readouterr() == ("a result\n", "")


def test_a_narrow_terminal_gets_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    with LiveLine(stream) as line:
        line.show(Status(phase="training", step=10, steps=10, loss=0.25, samples_per_s=12345.0, workers=4))
    assert "\x1b[1A" not in stream.getvalue(), "no second line to go back over"
    assert "…" in stream.getvalue()


def test_without_a_stream_it_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveLine() as line, pack_progress() as show:
        line.show(Status(phase="starting"))
        show("train", 1, None)
    assert capsys.readouterr() == ("", "starting\ntrain: 1\n")


def test_a_broken_stderr_stops_nothing() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (Broken(), closed):
        with LiveLine(stream) as line, pack_progress(stream) as show:
            line.show(Status(phase="training"))
            show("train", 1, 2)


def test_an_error_passes_through() -> None:
    with pytest.raises(KeyError), LiveLine(Terminal()):
        raise KeyError


def test_a_dumb_terminal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_terminal(Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())


def test_the_time_left_follows_the_present_pace_not_the_start() -> None:
    now = Hand()
    pace = Pace(now)
    assert pace.left_s(Status(phase="x", steps=100)) is None
    pace.note(40)  # resumed at step 40, after which 20 s pass without one
    now.moment = 20.0
    pace.note(40)
    for step in range(41, 61):
        now.moment += 0.5
        pace.note(step)
    assert pace.left_s(Status(phase="x", step=60, steps=100)) == pytest.approx(20.0)
    for step in range(61, 81):
        now.moment += 4.0
        pace.note(step)
    assert pace.left_s(Status(phase="x", step=80, steps=100)) == pytest.approx(80.0)
    pace.note(10)
    assert pace.left_s(Status(phase="x", step=10, steps=100)) is None


def test_what_is_not_known_is_not_said() -> None:
    assert describe(Status(phase="starting workers")) == ["starting workers"]
    full = Status(
        phase="training", epoch=1.5, epochs=3.0, step=5, steps=10, loss=0.123456, samples_per_s=20500.0,
        data_share=0.031, workers=4, last_checkpoint=0,
    )  # fmt: skip
    assert " · ".join(describe(full, 62.0)) == (
        "training · step 5/10 · 1 min 02 s left · epoch 1.50/3 · loss 0.1235 · 20.5k samples/s · 3% waiting for data"
        " · 4 workers · checkpoint 0"
    )


def test_packing_is_told_plainly_at_begin_end_and_now_and_then() -> None:
    stream, now = io.StringIO(), Hand()
    with pack_progress(stream, every_s=5, now=now) as show:
        for done in range(0, 101, 5):
            show("train", done, 100)
            now.moment += 1
        show("test", 7, None)
        show("test", 7, None)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: 0 of 100 (0%)"
    assert lines[1:5] == [f"train: {done} of 100 ({done}%)" for done in (25, 50, 75, 100)]
    assert lines[5:] == ["test: 7"]


def test_packing_on_a_terminal_shows_a_bar_for_each_label() -> None:
    stream = Terminal()
    with pack_progress(stream) as show:
        show("train", 50, 100)
        show("test", 1, None)
        show("train", 100, 100)
    assert "100/100" in stream.getvalue()
    assert "test" in stream.getvalue()


@pytest.mark.parametrize(
    "status",
    [
        Status(phase="starting"),
        Status(phase="starting workers, waiting for storage", steps=9, epochs=0.5),
        Status(phase="checking the data", message="worker 2 lost · redoing step 60"),
        Status(
            phase="training",
            epoch=1.25,
            epochs=3,
            step=7,
            steps=90,
            loss=float("nan"),
            samples_per_s=12345.0,
            data_share=0.07,
            workers=2,
            last_checkpoint=0,
            message="waiting for 1 more worker",
        ),
    ],
)
def test_a_line_of_a_run_elsewhere_tells_the_same_again(status: Status) -> None:
    parts = [*describe(status, left_s=12.0), *([status.message] if status.message else [])]
    found = status_in(" · ".join(parts))
    assert found is not None
    assert describe(found, left_s=12.0) == describe(status, left_s=12.0)
    assert found.message == status.message


def test_other_lines_of_a_log_are_no_status() -> None:
    for line in ("", "Traceback (most recent call last):", '{"run": "runs/a"}', "elastrain: error: no data"):
        assert status_in(line) is None
