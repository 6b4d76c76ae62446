"""Many short trials: how many an hour with start-up, what one takes once warm, how soon decisions come, what is left.

All sides train the same settings on the same rows in the same order and come to the same final losses, or the case
fails. `asha` replays recorded learning curves through the scheduler of a sweep, without training.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Comparison, Series, Side
from benchmarks.sweep.data import prepare
from benchmarks.sweep.work import LONG_STEPS, SMALL_STEPS, STEPS

FOLDER = "benchmarks.sweep"
LIMIT_S = 600.0
OPTUNA, TUNE, OFFICIAL, OFTEN = "Optuna", "Ray Tune", "Tune over Train", "Tune over Train, looks 5 times a second"
AT_ONCE = (1, 2, 4, 8)


def make(work: Path, *, small: bool) -> Case:
    """Return the case: 32 trials of 200 steps, and of 2,000; a small one has 4 of 40 and no process a trial."""
    given = _given(work, small=small, steps=SMALL_STEPS if small else STEPS)
    two = Series(name="two workers a trial", sides=_two(given), comparisons=tuple(_two_lines()))
    series = (
        Series(name="one worker a trial", sides=_one(given, small=small), comparisons=tuple(_one_lines(small=small))),
        *(() if small else (_long(work), two)),
        Series(name="decisions", sides=(_side("ours", "decisions", given),), comparisons=DECISIONS),
        Series(name="asha", sides=(_side("ours", "asha", given),), comparisons=tuple(_asha_lines())),
    )
    return Case(name="sweep", series=series)


def _given(work: Path, *, small: bool, steps: int) -> dict[str, Any]:
    return {**prepare(work, small=small, steps=steps), "small": small, "steps": steps}


def _long(work: Path) -> Series:
    """Trials of 0.4 s: beside a start of Ray and of its workers there is something to do."""
    given = _given(work, small=False, steps=LONG_STEPS)
    sides = (_side("ours", "ours", given, workers=1), _side(OPTUNA, "optuna_loop", given))
    lines = (_rate(OPTUNA, 1 / 1.5), _warm(OPTUNA, 1.5))
    return Series(name=f"one worker a trial of {LONG_STEPS:,} steps", sides=sides, comparisons=lines)


def _side(name: str, module: str, given: dict[str, Any], **options: Any) -> Side:
    note = "few trials are run, the others counted on" if module == "official" else ""
    return Side(name=name, module=f"{FOLDER}.{module}", options={**given, **options}, note=note, limit_s=LIMIT_S)


def _one(given: dict[str, Any], *, small: bool) -> tuple[Side, ...]:
    sides = (_side("ours", "ours", given, workers=1), _side(OPTUNA, "optuna_loop", given))
    tune = _side(TUNE, "ray_tune", given)
    return sides if small else (*sides, tune, _side(OFFICIAL, "official", given, workers=1, measured=4, poll_s=None))


def _two(given: dict[str, Any]) -> tuple[Side, ...]:
    peers = ((OFFICIAL, None), (OFTEN, 0.2))
    official = (_side(name, "official", given, workers=2, measured=3, poll_s=poll_s) for name, poll_s in peers)
    return (_side("ours", "ours", given, workers=2), *official)


def _rate(other: str, target: float | None) -> Comparison:
    return Comparison(
        measure="trials_per_h",
        unit="1/h",
        better="more",
        other=other,
        target=target,
        label="trials an hour, start-up included",
    )


def _warm(other: str, target: float | None) -> Comparison:
    return Comparison(
        measure="trial_s", unit="s", better="less", other=other, target=target, label="a further trial, once warm"
    )


def _one_lines(*, small: bool) -> Iterator[Comparison]:
    yield _rate(OPTUNA, 1 / 1.5)
    yield _warm(OPTUNA, 1.5)
    for peer in () if small else (TUNE, OFFICIAL):
        yield _rate(peer, 1.0)
        yield _warm(peer, 1.0)


def _two_lines() -> Iterator[Comparison]:
    for peer in (OFFICIAL, OFTEN):
        yield _rate(peer, 20.0 if peer == OFFICIAL else None)
        yield _warm(peer, None)


def _bound(measure: str, against: str, unit: str, label: str, bound: str) -> Comparison:
    return Comparison(
        measure=measure,
        against=against,
        unit=unit,
        better="less",
        other="ours",
        target=1.0,
        role="limit",
        label=label,
        other_label=bound,
    )


DECISIONS = (
    _bound("decision_p50_s", "decision_bound_s", "s", "evaluation to the next step, median", "what is allowed"),
    _bound("decision_p99_s", "decision_bound_s", "s", "evaluation to the next step, 99 of 100", "what is allowed"),
    _bound("next_p50_s", "next_bound_s", "s", "stop to the next trial's first step, median", "what is allowed"),
    _bound("next_most_s", "next_bound_s", "s", "stop to the next trial's first step, longest", "what is allowed"),
)


def _asha_lines() -> Iterator[Comparison]:
    for trials in AT_ONCE:
        common: dict[str, Any] = {"better": "less", "other": "ours", "other_label": "all to the end"}
        yield Comparison(
            measure=f"share_{trials}",
            against="whole_share",
            unit="of 1",
            target=0.3,
            label=f"epochs, {trials} at once",
            **common,
        )
        yield Comparison(
            measure=f"loss_{trials}",
            against="whole_loss",
            unit="nats",
            target=1.01,
            label=f"best loss, {trials} at once",
            **common,
        )
