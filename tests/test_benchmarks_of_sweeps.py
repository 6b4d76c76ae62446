"""The benchmark that asks whether the shipped sweeps of the digits say the truth: what it counts, and that it runs."""

from pathlib import Path

import pytest
from tests.test_benchmarks import small

from elastrain.sweeps.leaderboard import Leaderboard, Row, Scoring
from elastrain.sweeps.stats import Estimate

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def board(steps: Estimate, value: Estimate) -> Leaderboard:
    rows = [
        Row(kind="tuned", arm="adamw", steps=steps, speed_up=Estimate(1.0, 1.0, 1.0), value=value),
        Row(kind="defaults", arm="adamw", value=Estimate(9.0)),
    ]
    scoring = Scoring(baseline="adamw")
    return Leaderboard(mode="fair", scoring=scoring, ranked_by="steps to target", rows=tuple(rows), ends={})


def test_estimates_are_held_against_the_other_runs_intervals_both_ways() -> None:
    from benchmarks.sweep_digits.twice import inside, pairs

    first = board(Estimate(40.0, 40.0, 60.0), Estimate(0.10, 0.09, 0.12))
    second = board(Estimate(60.0, 50.0, 70.0), Estimate(0.11, 0.105, 0.12))
    found = {what: inside(estimate, other) for what, other, estimate in pairs(first, second)}
    assert found == {
        "adamw: steps of the second run": True,
        "adamw: steps of the first run": False,
        "adamw: value of the second run": True,
        "adamw: value of the first run": False,
    }, "not the defaults, and not the baseline's speed-up"


def test_an_estimate_without_an_interval_is_met_by_its_equal_alone() -> None:
    from benchmarks.sweep_digits.twice import inside

    never = Estimate(float("inf"), 46.0, float("inf"))
    assert inside(never, never)
    assert inside(Estimate(2.0), Estimate(2.0))
    assert not inside(Estimate(2.0), Estimate(2.1))


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_the_search_and_the_shipped_setting_are_held_against_each_other_with_the_same_seeds(work: Path) -> None:
    found = small("sweep_digits", work)
    assert found["search"]["ours"]["counters"] == {"seeds": 2}
    assert found["fair, twice"]["ours"]["counters"] == {"arms": 5}
    assert found["fair, twice"]["ours"]["measures"]["estimates"] > 0
