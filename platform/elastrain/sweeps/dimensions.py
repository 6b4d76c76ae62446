"""One dimension of a space: from a number between 0 and 1 to a value of the field, and back, on its own scale."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from elastrain.spec.sweep import LISTS, Dimension

DIGITS = 6  # significant, of drawn numbers: they read well, and their text is the number itself
EDGE = 0.05  # of a range at either end, where the best value may lie outside
REACH = 3.0  # standard deviations either way, beyond which a normal dimension gives nothing
_TAIL = NormalDist().cdf(-REACH)
_ORDERED = 3  # numbers in a grid, from which on its ends say something


def value_at(dimension: Dimension, unit: float) -> Any:
    """Return the value of `dimension` at `unit`, 0 to 1: evenly spread units give values as the dimension asks.

    >>> value_at(Dimension(log=(1e-4, 1e-2)), 0.5), value_at(Dimension(int=(1, 4)), 0.99)
    (0.001, 4)
    >>> value_at(Dimension(one_minus_log=(0.01, 0.1)), 1.0), value_at(Dimension(choice=("a", "b")), 0.4)
    (0.9, 'a')
    """
    unit, values = min(max(unit, 0.0), 1.0), dimension.values
    if dimension.kind in LISTS:
        return values[_cell(unit, len(values))]
    low, high = values
    found: float
    match dimension.kind:
        case "int":
            return low + _cell(unit, high - low + 1)
        case "int_log":
            return min(max(math.floor(_between(low, high + 1, unit)), low), high)
        case "one_minus_log":
            return round(1.0 - _rounded(_between(low, high, unit), low, high), 2 * DIGITS)
        case "uniform":
            found = low + unit * (high - low)
        case "log":
            found = _between(low, high, unit)
        case _:
            mean, deviation = values
            low, high = mean - REACH * deviation, mean + REACH * deviation
            found = mean + deviation * NormalDist().inv_cdf(_TAIL + unit * (1.0 - 2.0 * _TAIL))
    return _rounded(found, low, high)


def unit_of(dimension: Dimension, value: Any) -> float:
    """Return the unit at which `dimension` has `value`: the middle of them, where they are many; 0 to 1 in any case.

    Raises ValueError where a list does not hold the value.

    >>> unit_of(Dimension(log=(1e-4, 1e-2)), 0.001), unit_of(Dimension(choice=("a", "b")), "a")
    (0.5, 0.25)
    """
    values = dimension.values
    if dimension.kind in LISTS:
        return (values.index(value) + 0.5) / len(values)
    if dimension.kind == "normal":
        mean, deviation = values
        found = (NormalDist().cdf((value - mean) / deviation) - _TAIL) / (1.0 - 2.0 * _TAIL)
    elif dimension.kind == "int":
        found = (value - values[0] + 0.5) / (values[1] - values[0] + 1)
    elif dimension.kind == "int_log":
        middle = math.sqrt(max(value, 1) * (max(value, 1) + 1))
        found = math.log(middle / values[0]) / math.log((values[1] + 1) / values[0])
    else:
        found = _position(dimension, value)
    return min(max(found, 0.0), 1.0)


def on_edge(dimension: Dimension, value: Any) -> bool:
    """Say whether `value` lies in the outer 5 % of the range on its own scale, so that a better one may lie outside.

    A choice has no order and no edge; a grid of three numbers or more has its ends.

    >>> [on_edge(Dimension(log=(1e-4, 1e-2)), value) for value in (1.1e-4, 1e-3, 9.9e-3)]
    [True, False, True]
    """
    values = dimension.values
    if dimension.kind in LISTS:
        numbers = dimension.kind == "grid" and len(values) >= _ORDERED and all(map(_is_number, values))
        return numbers and value in (min(values), max(values))
    position = _position(dimension, value)
    return not EDGE < position < 1.0 - EDGE


def extremes(dimension: Dimension) -> Sequence[Any]:
    """Return the values at the ends of a range, or all that a list holds: what a spec has to accept."""
    return dimension.values if dimension.kind in LISTS else (value_at(dimension, 0.0), value_at(dimension, 1.0))


def holds(dimension: Dimension, value: Any) -> bool:
    """Say whether `value` may stand for the dimension: one of a list, or a number (of any size) for a range."""
    if dimension.kind in LISTS:
        return any(one == value for one in dimension.values)
    return _is_number(value)


def moved(dimension: Dimension, value: Any, by: float) -> Any:
    """Return `value` moved `by` a share of the range on its own scale, kept inside; a list's goes to a neighbour."""
    unit = unit_of(dimension, value)
    if dimension.kind in LISTS:
        by = math.copysign(1.0 / len(dimension.values), by)
    return value_at(dimension, min(max(unit + by, 0.0), 1.0))


def as_text(dimension: Dimension) -> str:
    """Return how a field varies, in short.

    >>> as_text(Dimension(log=(1e-4, 0.1)))
    'log 0.0001 to 0.1'
    """
    if dimension.kind in LISTS:
        return f"{dimension.kind} {', '.join(map(shown, dimension.values))}"
    low, high = dimension.values
    return f"{dimension.kind} {low:g} {'±' if dimension.kind == 'normal' else 'to'} {high:g}"


def shown(value: Any) -> str:
    """Return a value as YAML has it on one line.

    >>> shown({"name": "wsd", "on": [None, True, 0.1]})
    '{name: wsd, on: [null, true, 0.1]}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    return {None: "null", True: "true", False: "false"}[value] if value is None or value is bool(value) else str(value)


def _position(dimension: Dimension, value: float) -> float:
    """Return where in the range `value` lies on its own scale: 0 at one end, 1 at the other."""
    low, high = dimension.values
    match dimension.kind:
        case "log" | "int_log":
            return math.log(max(value, low * 1e-9) / low) / math.log(high / low)
        case "one_minus_log":
            return math.log(max(1.0 - value, low * 1e-9) / low) / math.log(high / low)
        case "normal":
            return float(0.5 + (value - low) / (2.0 * REACH * high))
    return float((value - low) / (high - low))


def _cell(unit: float, count: int) -> int:
    return min(int(unit * count), count - 1)


def _between(low: float, high: float, unit: float) -> float:
    return low * math.exp(unit * math.log(high / low))


def _rounded(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.{DIGITS}g}"), float(low)), float(high))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
