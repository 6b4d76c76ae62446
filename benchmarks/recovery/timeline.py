"""When which step ended, as far as it was seen, and what follows: recovery, steps redone and lost, pauses, goodput."""

import itertools
import statistics
from collections.abc import Iterable, Sequence

NEAR_STEPS = 5  # on both sides of a join
UNDER_WAY_S = 0.01  # a step whose sum had gone through when a worker died still ends: that is no recovery


class Timeline:
    """The ends of steps. A step that was done again has several; one counts as done when it first was.

    >>> seen = Timeline([(0, 1.0), (1, 2.0), (2, 3.0), (1, 13.0), (2, 14.0), (3, 15.0)])  # killed at 3.5
    >>> seen.recovery_s(3.5), seen.redone(), seen.lost()
    (11.5, 2, 0)
    """

    def __init__(self, lines: Iterable[tuple[int, float]] = ()) -> None:
        self._ends: dict[int, list[float]] = {}
        self.add(lines)

    def add(self, lines: Iterable[tuple[int, float]]) -> None:
        """Add (step, Unix time of its end); what is known already is left out."""
        for step, ended in lines:
            ends = self._ends.setdefault(step, [])
            if ended not in ends:
                ends.append(ended)

    def done(self, moment: float) -> int:
        """Return the last step that was done by a moment; -1 if none was."""
        return max((step for step, ends in self._ends.items() if min(ends) <= moment), default=-1)

    def recovery_s(self, kill: float) -> float | None:
        """Return the seconds from a kill to the end of the first step not done before; None if there is none yet."""
        before = self.done(kill + UNDER_WAY_S)
        return min((min(ends) - kill for step, ends in self._ends.items() if step > before), default=None)

    def redone(self) -> int:
        """Return how many times a step was done that had been done before."""
        return sum(len(ends) - 1 for ends in self._ends.values())

    def lost(self) -> int:
        """Return how many steps before the last one were never seen to end."""
        return max(self._ends, default=-1) + 1 - len(self._ends)

    def counted(self, begin: float, end: float) -> int:
        """Return how many steps were done for the first time between two moments."""
        return sum(begin < min(ends) <= end for ends in self._ends.values())

    def step_s(self, begin: float, end: float) -> float:
        """Return the median seconds of a step between two moments."""
        return statistics.median(self._gaps(begin, end))

    def join_pause_s(self, step: int) -> float | None:
        """Return how much longer than usual the longest step around a join took; `step` is the first with more workers.

        Usual is the median of the steps on the same side of the join. None where too few steps were seen.
        """
        first = {at: min(ends) for at, ends in self._ends.items()}
        gaps = {at: first[at] - first[at - 1] for at in sorted(first) if at - 1 in first}
        sides = ([at for at in gaps if step - 40 < at < step], [at for at in gaps if step <= at < step + 40])
        if min(len(side) for side in sides) < NEAR_STEPS:
            return None
        near = (sides[0][-NEAR_STEPS:], sides[1][:NEAR_STEPS])
        usual = [statistics.median(gaps[at] for at in side) for side in sides]
        return max(gaps[at] - usual[place] for place, side in enumerate(near) for at in side)

    def _gaps(self, begin: float, end: float) -> Sequence[float]:
        ends = sorted(min(ends) for ends in self._ends.values() if begin < min(ends) <= end)
        return [later - earlier for earlier, later in itertools.pairwise(ends)]
