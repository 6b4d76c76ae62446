"""What pairs of runs say: the median of their ratios or differences, with a bootstrap interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 4000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and the interval that holds it in 95 of 100 resamplings of the pairs."""

    value: float
    low: float
    high: float


def median_ratio(ours: Sequence[float], others: Sequence[float], *, seed: int = 0) -> Estimate:
    """Return the median of ours[i] / others[i] over pairs; all values must be positive.

    >>> median_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    logs = np.log(np.asarray(ours, float)) - np.log(np.asarray(others, float))
    estimate = _median(logs, seed)
    return Estimate(*(float(np.exp(v)) for v in (estimate.value, estimate.low, estimate.high)))


def median_difference(ours: Sequence[float], others: Sequence[float], *, seed: int = 0) -> Estimate:
    """Return the median of ours[i] - others[i] over pairs.

    >>> median_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).value
    2.0
    """
    return _median(np.asarray(ours, float) - np.asarray(others, float), seed)


def spread(values: Sequence[float]) -> float:
    """Return how much two runs of the same thing differ: the median of |a / b - 1| over consecutive runs.

    >>> round(spread([1.0, 1.1]), 3)
    0.1
    """
    array = np.asarray(values, float)
    if len(array) < 2 or not array.all():
        return float("nan")
    ratios = array[1:] / array[:-1]
    return float(np.median(np.maximum(ratios, 1.0 / ratios) - 1.0))


def alternating(names: Sequence[str], pairs: int) -> list[str]:
    """Return the order of runs: forth and back, so that a slow drift of the machine meets all sides alike.

    >>> alternating(["a", "b"], 2)
    ['a', 'b', 'b', 'a']
    """
    return [name for turn in range(pairs) for name in (names if turn % 2 == 0 else reversed(names))]


def _median(values: npt.NDArray[np.float64], seed: int) -> Estimate:
    draws = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    medians = np.median(values[draws], axis=1)
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(np.median(values)), float(low), float(high))
