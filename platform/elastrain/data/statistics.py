"""What a column holds, as its row groups go by: range, mean, deviation, different values, how often each class is."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from elastrain.data.columns import Array, Column
from elastrain.data.plan import mix64

EXACT = 1 << 63
COUNTED_VALUES = 4096  # more different values than this of an integer column are not counted one by one
AT_ONCE = 16384  # values that are hashed in one go: in the processor's cache
SKETCHED = 4096  # hashes that are kept to estimate how many different values there are


class Distinct:
    """How many different numbers there are: exact up to `SKETCHED`, then an estimate from the smallest of their hashes.

    Of n hashes spread over [0, 1) the k-th smallest lies near k/n; with 4,096 of them the estimate is off by 1.6 % (one
    standard deviation). What is added in which order changes nothing. NaN is no number.
    Source: Bar-Yossef, Jayram, Kumar, Sivakumar, Trevisan, "Counting distinct elements in a data stream", RANDOM 2002.
    """

    def __init__(self) -> None:
        self._smallest: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._waiting: list[npt.NDArray[np.uint64]] = []  # hashes that may be among them: sorted in, many at a time
        self._bound = np.uint64(2**64 - 1)  # none above it is among them

    def add(self, values: Array) -> None:
        """Take numbers of any type and shape into account."""
        if np.issubdtype(values.dtype, np.floating):
            values = values[~np.isnan(values)].astype(np.float64) + 0.0  # so that -0.0 is 0.0
        else:
            values = values.astype(np.int64, copy=False)
        words = np.ascontiguousarray(values).reshape(-1).view(np.uint64)
        for start in range(0, len(words), AT_ONCE):
            hashes = mix64(words[start : start + AT_ONCE])
            hashes = hashes[hashes <= self._bound]
            if hashes.size:
                self._waiting.append(hashes)
            if sum(map(len, self._waiting)) >= SKETCHED:
                self._sort_in()

    def _sort_in(self) -> None:
        self._smallest = np.unique(np.concatenate([self._smallest, *self._waiting]))[:SKETCHED]
        self._waiting = []
        if len(self._smallest) == SKETCHED:
            self._bound = self._smallest[-1]

    @property
    def estimated(self) -> bool:
        """Whether `count` is an estimate."""
        self._sort_in()
        return len(self._smallest) == SKETCHED

    @property
    def count(self) -> int:
        """Return how many different numbers were added."""
        if not self.estimated:
            return len(self._smallest)
        return round((SKETCHED - 1) * 2.0**64 / float(self._smallest[-1]))


class Sums:
    """Mean, deviation and range over all elements of a column: exact for integers, in row-group order for floats.

    Of columns of one number a row also how many different ones there are and, of few integers, how often each is there.
    """

    def __init__(self, column: Column) -> None:
        self.column = column
        self.count = 0
        self.total = self.squares = 0
        self.low: float | None = None
        self.high: float | None = None
        self.mean = self.spread = 0.0
        self.not_finite = 0
        self.distinct = None if column.shape else Distinct()
        self.counts: dict[int, int] | None = {} if not column.shape and np.dtype(column.dtype).kind in "iu" else None

    def add(self, values: Array) -> None:
        """Take the values of one row group into account."""
        if not values.size:
            return
        if np.issubdtype(values.dtype, np.integer):
            self._add_integers(values.reshape(-1))
        else:
            self._add_floats(values.reshape(-1).astype(np.float64))
        if self.distinct is not None and self.counts is None:
            self.distinct.add(values)
        self.count += values.size

    def _add_integers(self, values: Array) -> None:
        low, high = int(values.min()), int(values.max())
        self._widen(low, high)
        self._add_counts(values)
        if max(abs(low), abs(high)) ** 2 * values.size < EXACT:
            wide = values.astype(np.int64)
            self.total += int(wide.sum())
            self.squares += int(np.dot(wide, wide))
        else:
            numbers = values.tolist()
            self.total += sum(numbers)
            self.squares += sum(number * number for number in numbers)

    def _widen(self, low: float, high: float) -> None:
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)

    def _add_counts(self, values: Array) -> None:
        if self.counts is None:
            return
        found, times = np.unique(values, return_counts=True)
        for value, count in zip(found.tolist(), times.tolist(), strict=True):
            self.counts[value] = self.counts.get(value, 0) + count
            if len(self.counts) > COUNTED_VALUES:
                self._stop_counting()
                return

    def _stop_counting(self) -> None:
        """Go on with an estimate of how many different values there are; `add` gives it those of this row group."""
        if self.distinct is not None:
            self.distinct.add(np.array(list(self.counts or ())).astype(np.dtype(self.column.dtype)))
        self.counts = None

    def different(self) -> tuple[int | None, bool]:
        """Return how many different values there are, None where a row has several, and whether it is an estimate."""
        if self.counts is not None:
            return len(self.counts), False
        return (None, False) if self.distinct is None else (self.distinct.count, self.distinct.estimated)

    def _add_floats(self, values: Array) -> None:
        # Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983: no cancellation.
        with np.errstate(invalid="ignore", over="ignore"):
            mean = float(values.mean())
            spread = float(np.square(values - mean).sum())
        finite = values if math.isfinite(mean) else values[np.isfinite(values)]
        self.not_finite += values.size - finite.size
        if finite.size:
            self._widen(float(finite.min()), float(finite.max()))
        shift, total = mean - self.mean, self.count + values.size
        self.mean += shift * values.size / total
        self.spread += spread + shift * shift * self.count * values.size / total

    def result(self) -> Column:
        """Return the column with its statistics; those that are no finite numbers are None."""
        mean, deviation = self.mean, math.sqrt(self.spread / max(self.count, 1)) if self.spread >= 0 else math.nan
        values = self.column.num_values
        if np.issubdtype(np.dtype(self.column.dtype), np.integer) and self.count:
            mean = self.total / self.count
            deviation = math.sqrt(Fraction(self.count * self.squares - self.total**2, self.count**2))
            low, high = int(self.low or 0), int(self.high or 0)
            values = high + 1 if values is None and low >= 0 else values
        finite = math.isfinite(mean) and math.isfinite(deviation)
        return replace(self.column, num_values=values, mean=mean if finite else None, std=deviation if finite else None)
