"""Points that fill a cube evenly: Sobol's sequence, scrambled by a seed, point after point without a state.

Directions are those of Joe and Kuo ("Constructing Sobol sequences with better two-dimensional projections", SIAM J.
Sci. Comput. 30, 2008), the scrambling Matoušek's: a random lower triangular matrix a dimension, and a random shift.
torch has the same sequence, and takes seconds to be imported; a plan has to answer in less than one.
"""

import random
from functools import reduce
from operator import xor

BITS = 30
# Of the dimensions from the second on: degree and coefficients of the primitive polynomial, and the first directions.
_DIRECTIONS = (
    (1, 0, (1,)),
    (2, 1, (1, 3)),
    (3, 1, (1, 3, 1)),
    (3, 2, (1, 1, 1)),
    (4, 1, (1, 1, 3, 3)),
    (4, 4, (1, 3, 5, 13)),
    (5, 2, (1, 1, 5, 5, 17)),
    (5, 4, (1, 1, 5, 5, 5)),
    (5, 7, (1, 1, 7, 11, 19)),
    (5, 11, (1, 1, 5, 1, 1)),
    (5, 13, (1, 1, 1, 3, 11)),
    (5, 14, (1, 3, 5, 5, 31)),
    (6, 1, (1, 3, 3, 9, 7, 49)),
    (6, 13, (1, 1, 1, 15, 21, 21)),
    (6, 16, (1, 3, 1, 13, 27, 49)),
    (6, 19, (1, 1, 1, 15, 7, 5)),
    (6, 22, (1, 3, 1, 15, 13, 25)),
    (6, 25, (1, 1, 5, 5, 19, 61)),
    (7, 1, (1, 3, 7, 11, 23, 15, 103)),
    (7, 4, (1, 3, 7, 13, 13, 15, 69)),
)
MOST_DIMENSIONS = len(_DIRECTIONS) + 1


class Sobol:
    """The sequence of `seed` in `dimensions` (at most `MOST_DIMENSIONS`); not scrambled where seed is None."""

    def __init__(self, dimensions: int, *, seed: int | None) -> None:
        self._directions = [_directions(each) for each in range(dimensions)]
        self._shift = [0] * dimensions
        if seed is not None:
            chance = random.Random(seed)  # noqa: S311 -- points, no secrets
            # One dimension after the other: the first ones are the same however many follow.
            for at, row in enumerate(self._directions):
                self._directions[at] = _scrambled(row, chance)
                self._shift[at] = chance.getrandbits(BITS)

    def point(self, number: int) -> list[float]:
        """Return point `number`, from 0 and below 2^30, each coordinate from 0 to below 1."""
        gray = number ^ (number >> 1)
        chosen = [bit for bit in range(BITS) if gray >> bit & 1]
        rows = zip(self._directions, self._shift, strict=True)
        return [reduce(xor, (row[bit] for bit in chosen), shift) / (1 << BITS) for row, shift in rows]


def _directions(dimension: int) -> list[int]:
    """Return the directions of a dimension, `BITS` of them, the first the highest bit."""
    if dimension == 0:
        return [1 << (BITS - 1 - bit) for bit in range(BITS)]
    degree, polynomial, first = _DIRECTIONS[dimension - 1]
    found = [each << (BITS - 1 - bit) for bit, each in enumerate(first)]
    for bit in range(degree, BITS):
        new = found[bit - degree] ^ (found[bit - degree] >> degree)
        for back in range(1, degree):
            if polynomial >> (degree - 1 - back) & 1:
                new ^= found[bit - back]
        found.append(new)
    return found


def _scrambled(directions: list[int], chance: random.Random) -> list[int]:
    """Return directions times a random lower triangular matrix of bits with ones on its diagonal."""
    found = [0] * BITS
    for place in reversed(range(BITS)):  # a bit depends on itself and on those above it
        mask = (chance.getrandbits(BITS) >> (place + 1) << (place + 1)) | (1 << place)
        found = [each | ((row & mask).bit_count() & 1) << place for each, row in zip(found, directions, strict=True)]
    return found
