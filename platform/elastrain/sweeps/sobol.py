"""Points that fill a cube evenly: Sobol's sequence, scrambled by a seed, point after point without a state.

Directions are those of Joe and Kuo ("Constructing Sobol sequences with better two-dimensional projections", SIAM J.
Sci. Comput. 30, 2008), the scrambling Matoušek's: a random lower triangular matrix a dimension, and a random shift.
torch has the same sequence, and takes seconds to be imported; a plan has to answer in less than one.
"""

import numpy as np
from numpy.typing import NDArray

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
        directions = np.stack([_directions(each) for each in range(dimensions)])
        shift = np.zeros(dimensions, dtype=np.int64)
        if seed is not None:
            chance = np.random.default_rng(seed)
            directions = np.stack([_scrambled(row, chance) for row in directions])
            shift = chance.integers(0, 1 << BITS, size=dimensions, dtype=np.int64)
        self._directions, self._shift = directions, shift

    def point(self, number: int) -> list[float]:
        """Return point `number`, from 0 and below 2^30, each coordinate from 0 to below 1."""
        gray = number ^ (number >> 1)
        chosen = self._directions[:, [bit for bit in range(BITS) if gray >> bit & 1]]
        found = np.bitwise_xor.reduce(chosen, axis=1, initial=0) ^ self._shift
        return [float(each) / (1 << BITS) for each in found]


def _directions(dimension: int) -> NDArray[np.int64]:
    """Return the directions of a dimension, shape (BITS,), the first the highest bit."""
    if dimension == 0:
        return np.array([1 << (BITS - 1 - bit) for bit in range(BITS)], dtype=np.int64)
    degree, polynomial, first = _DIRECTIONS[dimension - 1]
    found = [each << (BITS - 1 - bit) for bit, each in enumerate(first)]
    for bit in range(degree, BITS):
        new = found[bit - degree] ^ (found[bit - degree] >> degree)
        for back in range(1, degree):
            if polynomial >> (degree - 1 - back) & 1:
                new ^= found[bit - back]
        found.append(new)
    return np.array(found, dtype=np.int64)


def _scrambled(directions: NDArray[np.int64], chance: np.random.Generator) -> NDArray[np.int64]:
    """Return directions times a random lower triangular matrix of bits with ones on its diagonal."""
    low = chance.integers(0, 1 << BITS, size=BITS, dtype=np.int64)
    found = np.zeros_like(directions)
    for row in range(BITS):  # from the highest bit: it depends on itself and on those above it
        place = BITS - 1 - row
        mask = (low[row] >> (place + 1) << (place + 1)) | (1 << place)
        odd = np.array([int(each).bit_count() & 1 for each in directions & mask], dtype=np.int64)
        found |= odd << place
    return found
