"""What trials prove: times to a target, intervals, whether two arms differ, and which field decides.

Every random choice has a seed, so that the same trials give the same numbers. A target that was never reached is
infinite, which medians, ranks and ratios take as it is: a miss is never left out.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elastrain.sweeps.trials import Evaluation, Trial

Goal = Literal["min", "max"]
Floats = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 10_000
PAIRED_FROM = 6
"""Shared seeds from which runs are compared pair by pair: of five pairs, no outcome has p below 0.0625."""
EXACT_UP_TO = 20_000
"""Permutations that are all tried; of more, RESAMPLES random ones are."""
MIN_TRIALS = 8
"""Trials from which it is told how much a field explains."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic of runs and its 95 % interval; infinite: never. One run has no interval: both ends are None."""

    value: float
    low: float | None = None
    high: float | None = None


# --- time to target


def first_reached(trial: Trial, target: float, goal: Goal) -> Evaluation | None:
    """Return the first evaluation that is at the target or beyond; None where none is."""
    return next((told for told in trial.evaluations if _reaches(told.value, target, goal)), None)


def _reaches(value: float | None, target: float, goal: Goal) -> bool:
    if value is None or not math.isfinite(value):
        return False
    return value <= target if goal == "min" else value >= target


def loss_of(value: float | None, goal: Goal) -> float:
    """Return the value as one of which less is better; infinite where it is None or not finite."""
    if value is None or not math.isfinite(value):
        return math.inf
    return value if goal == "min" else -value


def performance_ratios(times: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return for each arm, workload by workload, its time ÷ the best arm's: 1 is the best, infinite a miss."""
    best = [min(column) for column in zip(*times.values(), strict=True)]
    return {arm: [_ratio(mine, least) for mine, least in zip(of, best, strict=True)] for arm, of in times.items()}


def _ratio(mine: float, least: float) -> float:
    if mine == least:
        return 1.0 if math.isfinite(mine) else math.inf
    return mine / least if least else math.inf


def profile_score(ratios: Sequence[float], most: float = 4.0) -> float:
    """Return the integral of ρ(τ) over 1..`most` ÷ its length: 1 where an arm is best everywhere, 0 beyond `most`.

    ρ(τ) is the share of workloads on which an arm took at most τ times the best arm's time. Source: Dolan & Moré 2002,
    as in AlgoPerf, arXiv 2306.07179.
    """
    return sum(max(0.0, most - ratio) for ratio in ratios) / (most - 1) / len(ratios)


# --- intervals


def mean(samples: Floats) -> Floats:
    """Return the means of rows, shape (rows, runs) → (rows,)."""
    with np.errstate(over="ignore"):
        return np.asarray(samples.mean(axis=-1))


def median(samples: Floats) -> Floats:
    """Return the medians of rows, shape (rows, runs) → (rows,)."""
    with np.errstate(over="ignore"):
        return np.asarray(np.median(samples, axis=-1))


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation of runs (n - 1 in the denominator); None of fewer than two."""
    with np.errstate(over="ignore"):
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


def estimate(values: Sequence[float], statistic: Callable[[Floats], Floats], *, seed: int = 0) -> Estimate | None:
    """Return a statistic of runs and its bootstrap interval; None without a run.

    The percentile bootstrap is too narrow for few runs. Its tails are moved out as far as Student's t is wider than
    the normal distribution (Hesterberg 2015, arXiv 1411.5279, "expanded percentile"): with five runs or fewer the
    interval is about the range of the runs.
    """
    runs = np.asarray(values, dtype=np.float64)
    if not len(runs):
        return None
    value = float(statistic(runs[None])[0])
    if len(runs) == 1:
        return Estimate(value)
    drawn = statistic(runs[_draws(len(runs), seed)])
    return Estimate(value, *_ends(drawn, drawn, len(runs)))


def speed_up(base: Mapping[int, float], mine: Mapping[int, float], *, seed: int = 0) -> Estimate | None:
    """Return median time of the baseline ÷ median time of an arm, both by seed; above 1 the arm is faster.

    Seeds that both have are drawn together. None where neither got there (or both at step 0), or one has no run. A
    draw in which neither gets there says nothing: it counts against either end of the interval.
    """
    shared = sorted(base.keys() & mine.keys())
    pairs = min(len(base), len(mine)) == len(shared)
    ours, theirs = ([times[key] for key in (shared if pairs else sorted(times))] for times in (mine, base))
    if not ours or not theirs:
        return None
    value = float(_quotients(np.median([theirs], axis=-1), np.median([ours], axis=-1))[0])
    if math.isnan(value):
        return None
    if min(len(ours), len(theirs)) == 1:
        return Estimate(value)
    drawn = _draws(len(ours), seed)
    other = drawn if pairs else _draws(len(theirs), seed + 1)
    ratios = _quotients(median(np.asarray(theirs)[other]), median(np.asarray(ours)[drawn]))
    lowest, highest = np.nan_to_num(ratios, nan=0.0, posinf=np.inf), np.nan_to_num(ratios, nan=np.inf, posinf=np.inf)
    return Estimate(value, *_ends(lowest, highest, min(len(ours), len(theirs))))


def _quotients(over: Floats, under: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(over, dtype=np.float64) / np.asarray(under, dtype=np.float64)


def _draws(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, count]).integers(0, count, (RESAMPLES, count))


def _ends(lowest: Floats, highest: Floats, count: int) -> tuple[float, float]:
    """The ends of the interval; no interpolation, which would make not-a-number of two infinities."""
    wide = math.sqrt(count / (count - 1)) * t_quantile((1 + LEVEL) / 2, count - 1)
    out = int(NormalDist().cdf(-wide) * len(lowest))
    return float(np.sort(lowest)[out]), float(np.sort(highest)[len(highest) - 1 - out])


def t_quantile(share: float, freedom: int) -> float:
    """Return the quantile (share above a half) of Student's t for whole degrees of freedom, to 1e-9.

    Source: Abramowitz & Stegun 26.7.3 and 26.7.4, inverted by bisection.

    >>> round(t_quantile(0.975, 4), 4), round(t_quantile(0.975, 9), 4)
    (2.7764, 2.2622)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _t_within(angle, freedom) < 2 * share - 1 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _t_within(angle: float, freedom: int) -> float:
    """The probability that |t| is below √freedom · tan(angle)."""
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


# --- whether two arms differ


def p_value(first: Mapping[int, float], second: Mapping[int, float], *, seed: int = 0) -> float | None:
    """Return the two-sided p of "both arms are alike", from their runs by seed; None where one has no run.

    Ranks are compared, so that infinite times count as the longest ones. From six shared seeds on it is the signed
    rank test of pairs; below, the rank sum test, which can tell four from four runs apart. Both are exact up to
    `EXACT_UP_TO` permutations.
    """
    shared = sorted(first.keys() & second.keys())
    if len(shared) >= PAIRED_FROM:
        return _signed_ranks(np.array([first[key] for key in shared]), np.array([second[key] for key in shared]), seed)
    if not first or not second:
        return None
    return _rank_sums(np.array(list(first.values())), np.array(list(second.values())), seed)


def beats(first: Mapping[int, float], second: Mapping[int, float], *, seed: int = 0) -> bool:
    """Say whether the first arm's runs are less than the second's, and p is at most 5 %."""
    p = p_value(first, second, seed=seed)
    if p is None or p > 1 - LEVEL + 1e-12:
        return False
    ranks = midranks(np.array([*first.values(), *second.values()]))
    return bool(ranks[: len(first)].mean() < ranks[len(first) :].mean())


def _signed_ranks(first: Floats, second: Floats, seed: int) -> float:
    with np.errstate(invalid="ignore"):
        apart = np.where(first == second, 0.0, first - second)
    ranks, count = midranks(np.abs(apart)), len(apart)
    if 2**count <= EXACT_UP_TO:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), (RESAMPLES, count))
    ranks[apart == 0] = 0
    return _share(np.abs(signs @ ranks), abs(float(np.sign(apart) @ ranks)), exact=2**count <= EXACT_UP_TO)


def _rank_sums(first: Floats, second: Floats, seed: int) -> float:
    ranks, count = midranks(np.concatenate([first, second])), len(first)
    exact = math.comb(len(ranks), count) <= EXACT_UP_TO
    if exact:
        chosen = np.array(list(itertools.combinations(range(len(ranks)), count)))
    else:
        chosen = np.random.default_rng(seed).random((RESAMPLES, len(ranks))).argsort(axis=1)[:, :count]
    expected = count * ranks.mean()
    return _share(np.abs(ranks[chosen].sum(axis=1) - expected), abs(float(ranks[:count].sum() - expected)), exact=exact)


def _share(all_of_them: Floats, seen: float, *, exact: bool) -> float:
    """How many permutations are as far out as what was seen; of random ones, what was seen is one more."""
    extreme = int((all_of_them >= seen - 1e-9).sum())
    return extreme / len(all_of_them) if exact else (extreme + 1) / (len(all_of_them) + 1)


def midranks(values: Floats) -> Floats:
    """Return the ranks from 1 of values of shape (n,); equal ones share the mean of theirs.

    >>> midranks(np.array([7.0, 1.0, 7.0, np.inf])).tolist()
    [2.5, 1.0, 2.5, 4.0]
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place], dtype=np.float64)


# --- which field decides


def plain(value: Any) -> str | float | int | bool | None:
    """Return a value of a point as a scalar: lists and mappings become JSON text."""
    return value if value is None or isinstance(value, str | float | int) else json.dumps(value, default=str)


def varied(trials: Iterable[Trial]) -> dict[str, list[Any]]:
    """Return the fields that have more than one value over the trials, each with its distinct values as scalars."""
    found: dict[str, dict[tuple[type, Any], None]] = {}
    for trial in trials:
        for name, value in trial.point.items():
            found.setdefault(name, {})[(type(plain(value)), plain(value))] = None
    return {name: [value for _, value in values] for name, values in found.items() if len(values) > 1}


def importance(trials: Sequence[Trial], goal: Goal) -> dict[str, float]:
    """Return for each varied field the share of the outcome's variance that it explains alone, 0..1, largest first.

    Of trials that finished or diverged (the worst of all), outcomes are ranked. Numbers are cut into bins of equal
    counts, so that no scale has to be known. The share is that of the main effect of a functional analysis of variance
    (Hutter et al. 2014), with Kelley's correction (ε², 1935) for what bins explain by chance; what fields explain
    together only is not in it. A field that fewer than `MIN_TRIALS` trials have is left out.
    """
    ended = [trial for trial in trials if trial.outcome in ("finished", "diverged")]
    shares = {}
    for name in varied(ended):
        those = [trial for trial in ended if name in trial.point]
        if len(those) >= MIN_TRIALS:
            losses = np.array([loss_of(trial.value if trial.outcome == "finished" else None, goal) for trial in those])
            shares[name] = _explained(_bins([plain(trial.point[name]) for trial in those]), midranks(losses))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _bins(values: Sequence[Any]) -> NDArray[np.int64]:
    """The bin of each value: its own for names and few numbers, else one of about √n of equal counts."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    most = max(2, min(10, round(math.sqrt(len(values)))))
    if numbers and len(set(values)) > most:
        return np.asarray((midranks(np.array(values, dtype=np.float64)) - 0.5) * most // len(values), dtype=np.int64)
    places: dict[Any, int] = {}
    return np.array([places.setdefault((type(value), value), len(places)) for value in values])


def _explained(bins: NDArray[np.int64], outcomes: Floats) -> float:
    total = float(((outcomes - outcomes.mean()) ** 2).sum())
    groups = [outcomes[bins == place] for place in np.unique(bins)]
    freedom = len(outcomes) - len(groups)
    if not total or freedom < 1:
        return 0.0
    within = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return max(0.0, min(1.0, (total - within - (len(groups) - 1) * within / freedom) / total))
