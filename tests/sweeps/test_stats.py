"""Numbers that were worked out by hand, and the intervals' promise."""

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastrain.sweeps import stats
from elastrain.sweeps.stats import (
    beats,
    estimate,
    first_reached,
    importance,
    mean,
    median,
    midranks,
    p_value,
    performance_ratios,
    profile_score,
    speed_up,
    t_quantile,
    varied,
)
from elastrain.sweeps.trials import Evaluation, Outcome, Trial

inf = math.inf


def trial(number: int, values: list[float | None], outcome: Outcome = "finished", **point: object) -> Trial:
    """A trial with an evaluation every 10 steps, 2 device-seconds each."""
    told = tuple(Evaluation(10 * n, 640 * n, value, {}, 2.0 * n) for n, value in enumerate(values, start=1))
    return Trial(f"t{number}", "a", "tune", number, point, 0, outcome, 10 * len(values), 2.0 * len(values), "", told)


def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


# --- time to target


@pytest.mark.parametrize(
    ("goal", "target", "step"), [("min", 0.5, 20), ("min", 0.3, 40), ("min", 0.1, None), ("max", 0.9, 10)]
)
def test_a_target_is_reached_at_its_first_evaluation_at_or_beyond(
    goal: Literal["min", "max"], target: float, step: int | None
) -> None:
    told = first_reached(trial(0, [0.9, 0.5, 0.6, 0.3]), target, goal)
    assert (told.step if told else None) == step


def test_what_is_not_finite_reaches_nothing() -> None:
    assert first_reached(trial(0, [None, math.nan, -inf]), 0.5, "min") is None


def test_profile_and_score_of_two_workloads() -> None:
    ratios = performance_ratios({"a": [10, 30, inf], "b": [20, 10, inf], "c": [inf, inf, inf]})
    assert ratios == {"a": [1, 3, inf], "b": [2, 1, inf], "c": [inf, inf, inf]}
    # the integral over 1..4 of steps at 1 and 3: (3 + 1 + 0) / 3 workloads / length 3
    assert profile_score(ratios["a"]) == pytest.approx(4 / 9)
    assert profile_score(ratios["c"]) == 0


@settings(deadline=None)
@given(st.lists(st.floats(1, 8) | st.just(inf), min_size=1, max_size=6))
def test_the_score_is_the_integral_of_the_profile(ratios: list[float]) -> None:
    grid = np.linspace(1, 4, 3001)
    area = np.mean([np.mean(np.asarray(ratios) <= tau) for tau in (grid[1:] + grid[:-1]) / 2])
    assert profile_score(ratios) == pytest.approx(area, abs=1e-3)


# --- intervals


def test_one_run_has_no_interval_and_none_no_estimate() -> None:
    one = estimate([3.0], mean)
    assert one is not None
    assert (one.value, one.low, one.high) == (3.0, None, None)
    assert estimate([], mean) is None


def test_equal_runs_have_an_interval_without_width_and_misses_one_that_is_infinite() -> None:
    for value in (4.0, inf):
        told = estimate([value] * 5, median)
        assert told is not None
        assert (told.value, told.low, told.high) == (value, value, value)
    told = estimate([10, 20, 30, inf, inf], median)
    assert told is not None
    assert (told.value, told.high) == (30, inf)
    assert told.low is not None
    assert told.low <= 20


def test_an_interval_is_the_same_each_time_and_grows_narrower_with_runs() -> None:
    draws = np.random.default_rng(0).normal(size=40).tolist()
    few, many = estimate(draws[:5], mean), estimate(draws, mean)
    assert few == estimate(draws[:5], mean)
    assert few
    assert many
    assert (few.high or 0) - (few.low or 0) > (many.high or 0) - (many.low or 0)


@pytest.mark.parametrize("runs", [5, 10])
def test_the_interval_of_a_mean_holds_it_about_as_often_as_it_says(runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain percentile bootstrap holds it in 83 % of fives; 91 % is where this fails."""
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    rng = np.random.default_rng(7)
    tries = [(estimate(rng.normal(3.0, 2.0, runs).tolist(), mean, seed=n)) for n in range(400)]
    held = np.mean([told is not None and (told.low or 0) <= 3.0 <= (told.high or 0) for told in tries])
    assert 0.91 <= held <= 0.99


def test_students_t_as_tables_have_it() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423}
    assert {freedom: round(t_quantile(0.975, freedom), 4) for freedom in table} == table


def test_speed_up_is_the_ratio_of_medians_and_knows_what_never_is() -> None:
    told = speed_up(seeds(200, 220, 240), seeds(100, 110, 120))
    assert told is not None
    assert (told.value, told.low, told.high) == (2.0, 2.0, 2.0)  # pairs are drawn together, and all have the ratio 2
    assert speed_up(seeds(inf, inf), seeds(inf, inf)) is None
    for base, mine, value in ((seeds(inf, inf), seeds(5, 6), inf), (seeds(5, 6), seeds(inf, inf), 0)):
        told = speed_up(base, mine)
        assert told is not None
        assert (told.value, told.low, told.high) == (value, value, value)
    assert speed_up({}, seeds(1, 2)) is None


def test_a_draw_in_which_neither_arrives_widens_the_interval() -> None:
    told = speed_up(seeds(10, inf, inf, 10, 10), seeds(10, inf, inf, 10, 10))
    assert told is not None
    assert (told.value, told.low, told.high) == (1, 0, inf)


# --- whether two arms differ


def test_p_values_worked_out_by_hand() -> None:
    assert p_value(seeds(1, 2, 3, 4), seeds(5, 6, 7, 8)) == pytest.approx(2 / 70)  # of C(8, 4) labellings the outer two
    assert p_value(seeds(*range(5)), seeds(*range(10, 15))) == pytest.approx(2 / 252)
    assert p_value(seeds(*range(6)), seeds(*range(10, 16))) == pytest.approx(2 / 64)  # six pairs: 2⁶ signs
    # one of six pairs is the other way, and the closest: ranks 1..6, |T| ≥ 19 for it, for none, and for their mirrors
    assert p_value(seeds(0, 0, 0, 0, 0, 1), seeds(2, 3, 4, 5, 6, 0)) == pytest.approx(4 / 64)
    assert p_value(seeds(1), seeds(2)) == 1
    assert p_value({}, seeds(1, 2)) is None


def test_misses_are_the_longest_times_and_equal_among_themselves() -> None:
    assert p_value(seeds(1, 2, 3, 4), seeds(inf, inf, inf, inf)) == pytest.approx(2 / 70)
    assert p_value(seeds(*[inf] * 6), seeds(*[inf] * 6)) == 1
    assert p_value(seeds(*[inf] * 4), seeds(*[inf] * 4)) == 1


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 9) | st.just(inf), min_size=1, max_size=8), st.lists(st.floats(0, 9), min_size=1, max_size=8)
)
def test_p_is_a_probability_whichever_arm_comes_first(first: list[float], second: list[float]) -> None:
    p = p_value(seeds(*first), seeds(*second))
    assert p is not None
    assert 0 < p <= 1
    assert p == pytest.approx(p_value(seeds(*second), seeds(*first)))
    assert not (beats(seeds(*first), seeds(*second)) and beats(seeds(*second), seeds(*first)))


def test_many_runs_are_compared_by_random_permutations() -> None:
    rng = np.random.default_rng(3)
    for count in (15, 30):
        alike, better = rng.normal(size=count), rng.normal(-2, 1, size=count)
        assert 0 < (p_value(seeds(*better), seeds(*alike)) or 1) < 0.01
        apart = {seed + 1000: value for seed, value in enumerate(alike)}  # no shared seed: labels, not pairs
        assert 0 < (p_value(seeds(*better), apart) or 1) < 0.01


def test_one_arm_beats_another_only_where_that_is_no_chance() -> None:
    assert beats(seeds(1, 2, 3, 4), seeds(5, 6, 7, 8))
    assert not beats(seeds(5, 6, 7, 8), seeds(1, 2, 3, 4))
    assert not beats(seeds(1, 2, 3), seeds(5, 6, 7))  # three runs prove nothing


def test_midranks_sum_to_what_ranks_sum_to() -> None:
    assert midranks(np.array([3.0, 3.0, 3.0, 1.0])).tolist() == [3, 3, 3, 1]


# --- which field decides


def test_the_field_that_decides_explains_most_and_noise_next_to_nothing() -> None:
    rng = np.random.default_rng(5)
    lrs, noise = 10 ** rng.uniform(-5, -1, 80), rng.uniform(size=80)
    trials = [
        trial(n, [abs(math.log10(lr) + 3) + 0.02 * rng.normal()], lr=lr, noise=other, fixed=1, clip=[0.5, 1.0][n % 2])
        for n, (lr, other) in enumerate(zip(lrs, noise, strict=True))
    ]
    shares = importance(trials, "min")
    assert next(iter(shares)) == "lr"
    assert shares["lr"] > 0.9
    assert max(shares["noise"], shares["clip"]) < 0.15
    assert "fixed" not in shares


def test_what_bins_explain_by_chance_is_not_counted() -> None:
    rng = np.random.default_rng(2)
    point = {f"noise{n}": rng.uniform(size=20) for n in range(40)}
    trials = [trial(n, [rng.normal()], **{name: of[n] for name, of in point.items()}) for n in range(20)]
    assert np.mean(list(importance(trials, "min").values())) < 0.11  # three of nineteen degrees of freedom are 0.16


def test_a_choice_that_makes_all_the_difference_explains_all_of_it_even_by_diverging() -> None:
    trials = [
        trial(n, [1.0 if n % 2 else None], "finished" if n % 2 else "diverged", name="ab"[n % 2]) for n in range(20)
    ]
    assert importance(trials, "min") == {"name": pytest.approx(1.0)}
    assert importance(trials[:6], "min") == {}  # too few to tell


def test_fields_of_some_trials_and_of_any_kind_are_no_trouble() -> None:
    values = [None, True, 1, 1.0, "x", [1, 2], {"a": 1}, 0.5] * 2
    trials = [trial(n, [float(n)], one=value) for n, value in enumerate(values)]
    trials += [trial(n + 50, [0.0], other=n) for n in range(3)]
    assert list(importance(trials, "min")) == ["one"]
    assert [1, 2] not in varied(trials)["one"]
    assert "[1, 2]" in varied(trials)["one"]
