"""Which sizes of a step are measured, and how long: the same at any number of workers, so that digests compare."""

from collections.abc import Iterator
from dataclasses import dataclass

SLOTS, ROWS = (2, 4, 8, 24), (4, 32, 128)
SUM_SLOTS = {1: (8,), 2: (8, 24), 3: (8, 24)}  # by workers, for the sum by itself
SMALL_SLOTS, SMALL_ROWS = (2, 4), (4,)
WARM_STEPS, ROUNDS, SMALL_ROUNDS = 2, 6, 2
TURN_ROWS = {"mlp": 20_000, "gpt": 200}  # rows in one turn of a mode: about 0.3 s of one core
FEWEST_SLOTS = 3  # sizes with fewer cannot be shared by all numbers of workers, so they are no part of the digest


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the curve: a step of `slots` micro-batches of `rows` rows each."""

    slots: int
    rows: int

    def named(self, what: str) -> str:
        """Return the name of a measure of this point."""
        return f"{what}, {self.slots} slots of {self.rows} rows"

    def turn(self, model: str) -> int:
        """Return the steps of one turn: enough that a clock's noise does not count."""
        return min(100, max(1, TURN_ROWS[model] // (self.slots * self.rows)))


def points(workers: int, *, small: bool) -> Iterator[Point]:
    """Yield the sizes that so many workers can share."""
    for slots in SMALL_SLOTS if small else SLOTS:
        if slots >= workers:
            yield from (Point(slots, rows) for rows in (SMALL_ROWS if small else ROWS))
