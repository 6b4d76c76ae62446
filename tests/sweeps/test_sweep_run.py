"""What a sweep that goes on tells Ray Tune of a trial: its words, where it stands, and what lacks a word."""

from typing import Any

import pytest

from elastrain.sweeps import run
from elastrain.sweeps.trials import Evaluation, Trial

EVALUATED = tuple(Evaluation(step, 1, 1.0 / step, {}, step / 10) for step in (20, 40, 60))


def trial(last: int, outcome: Any = "running") -> Trial:
    told = tuple(each for each in EVALUATED if each.step <= last)
    return Trial("t0", "search", "tune", 0, {}, 0, outcome, last, last / 10, "", told)


class Job:
    """As much of a sweep as is asked."""

    folder, decisions, pauses = "trials", frozenset({20, 60}), False

    def __init__(self, *words: int) -> None:
        self.undecided: dict[str, Any] = {}
        told = [{"step": step, "device_s": step / 10, "value": 1.0 / step} for step in words]
        self.before = [{"kind": "go_on", "trial": "t0", **each} for each in told]


def recorded(job: Any, known: Trial, newest: int | None, patch: pytest.MonkeyPatch) -> tuple[list[Any], Any, int]:
    patch.setattr(run, "_newest", lambda _: newest)
    found = run._recorded(job, known)
    told = [(each["step"], each["outcome"], each.get("recorded", True)) for each in found["recorded"]]
    return told, found.get("resume"), found.get("decided", 0)


@pytest.mark.parametrize(
    ("words", "last", "newest", "told", "decided"),
    [
        ((), 20, None, [], 0),  # from the start: it comes to its decision again
        ((), 20, 20, [(20, "", False)], 20),  # it waited for a word, or was to stop, as the driver was killed
        ((20,), 20, 20, [(20, "", True)], 20),
        ((20,), 40, 40, [(20, "", True)], 40),
        ((20,), 60, 40, [(20, "", True)], 40),  # 60 is done again
        ((20,), 60, 60, [(20, "", True), (60, "", False)], 60),
        ((20, 60), 60, 40, [(20, "", True), (60, "", True)], 60),  # 60 is done again, and was decided on
        ((20,), 20, None, [(20, "", True)], 20),
    ],
)
def test_a_word_stands_and_what_had_none_is_decided_on(
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[int, ...],
    last: int,
    newest: int | None,
    told: list[Any],
    decided: int,
) -> None:
    job = Job(*words)
    resume = None if newest is None else ("trials/t0", newest)
    assert recorded(job, trial(last), newest, monkeypatch) == (told, resume, decided)
    assert set(job.undecided) == ({"t0"} if told and not told[-1][2] else set())


@pytest.mark.parametrize(("newest", "untold", "decided"), [(20, False, 20), (40, True, 20)])
def test_an_evaluation_that_is_not_in_the_ledger_is_told_from_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, newest: int, untold: object, decided: int
) -> None:
    monkeypatch.setattr(run, "_newest", lambda _: newest)
    job: Any = Job(20)
    found = run._recorded(job, trial(20))
    assert (found["resume"], found["untold"], found["decided"]) == (("trials/t0", newest), untold, decided)


def test_one_that_has_ended_tells_its_words_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = recorded(Job(20), trial(60, "pruned"), 60, monkeypatch)
    assert found == ([(20, "", True), (60, "pruned", True)], None, 0)


def test_where_trials_pause_nothing_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(20)
    job.pauses = True
    assert recorded(job, trial(60), 60, monkeypatch) == ([], ("trials/t0", 60), 60)


class Desk:
    """A desk in this process that knows no trial."""

    def __init__(self) -> None:
        self.noted: list[tuple[Any, ...]] = []
        self.leave = self.event = self

    def remote(self, *told: Any) -> None:
        """Take note."""
        self.noted.append(told)


def test_a_trial_that_is_stopped_before_it_goes_on_has_its_end_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda found: found)
    job: Any = Job()
    recorded(job, trial(20), 20, monkeypatch)
    desk = Desk()
    run._leave(job, desk, "t0", "pruned")
    run._leave(job, desk, "t0", "pruned")
    ended = {"trial": "t0", "outcome": "pruned", "step": 20, "device_s": 2.0, "error": "", "error_kind": ""}
    assert [told for told in desk.noted if told[0] == "ended"] == [("ended", ended)]


def test_who_goes_on_is_noted_and_the_desk_ends_it_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda found: found)
    job: Any = Job()
    recorded(job, trial(20), 20, monkeypatch)
    desk = Desk()
    run._went_on(job, desk, "t0", {"step": 20, "device_s": 2.0, "objective": 0.5})
    run._leave(job, desk, "t0", "pruned")
    word = ("go_on", {"trial": "t0", "step": 20, "device_s": 2.0, "value": 0.5})
    assert desk.noted == [word, ("t0", "pruned")]
