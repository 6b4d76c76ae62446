"""How many workers a run wants and on which nodes: pure arithmetic over what fits where. No Ray, no clock."""

from collections.abc import Mapping
from dataclasses import dataclass

PAUSE_S = 0.1  # everybody waits so long for a newcomer: the state's broadcast and a new process group


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What growing is weighed against, in seconds.

    `remaining_s` of the run at its present size (None: not known yet), `start_s` from asking for a cell to its first
    step, and `pause_s` for which all wait when it joins.
    """

    remaining_s: float | None
    start_s: float
    pause_s: float = PAUSE_S


def worth_growing(*, slots: int, size: int, more: int, outlook: Outlook) -> bool:
    """Say whether `more` workers beside `size` are worth their start.

    A step takes as long as the worker with the most slots, ceil(slots / workers) of them. What is saved once they have
    joined must exceed the seconds in which their start disturbs the others, and the pause. While nobody knows how long
    the run still takes, any gain is worth it.

    >>> steady = Outlook(remaining_s=3600.0, start_s=15.0)
    >>> [more for more in range(1, 5) if worth_growing(slots=8, size=4, more=more, outlook=steady)]
    [4]
    >>> worth_growing(slots=8, size=4, more=4, outlook=Outlook(remaining_s=40.0, start_s=15.0))
    False
    >>> worth_growing(slots=8, size=0, more=1, outlook=Outlook(remaining_s=0.0, start_s=15.0))
    True
    """
    if size == 0:
        return more > 0
    gain = 1.0 - _busiest(slots, size + more) / _busiest(slots, size)
    if gain <= 0.0 or outlook.remaining_s is None:
        return gain > 0.0
    saved = gain * max(0.0, outlook.remaining_s - outlook.start_s)
    return saved > outlook.start_s + outlook.pause_s


def more_workers(*, slots: int, size: int, bounds: tuple[int, int], room: int, outlook: Outlook) -> int:
    """Return how many workers to add to `size` where `room` more fit and `bounds` are the fewest and the most wanted.

    No more than make a step faster: with 8 slots, 5 to 7 workers are no faster than 4. Below the fewest wanted nothing
    else counts.

    >>> outlook = Outlook(remaining_s=3600.0, start_s=15.0)
    >>> [more_workers(slots=8, size=4, bounds=(1, 8), room=room, outlook=outlook) for room in range(6)]
    [0, 0, 0, 0, 4, 4]
    >>> more_workers(slots=8, size=2, bounds=(3, 3), room=5, outlook=Outlook(remaining_s=1.0, start_s=15.0))
    1
    """
    fewest, most = bounds
    reach = min(most, size + room)
    if reach <= size:
        return 0
    if size < fewest:
        return max(min(fewest, reach), _smallest_alike(slots, reach)) - size
    reach = _smallest_alike(slots, reach)
    more = max(0, reach - size)
    return more if more and worth_growing(slots=slots, size=size, more=more, outlook=outlook) else 0


def sizes_at_start(room: Mapping[str, int], minimum: int, maximum: int) -> dict[str, int]:
    """Return the cells that a run starts with, a size for each node: as many workers as fit, up to `maximum`.

    One cell a node, on the fewest nodes; {} if not even `minimum` fit.

    >>> sizes_at_start({"a": 2, "b": 8, "c": 3}, 1, 10)
    {'b': 8, 'a': 2}
    >>> sizes_at_start({"a": 2, "b": 3}, 6, 8)
    {}
    """
    if sum(room.values()) < minimum:
        return {}
    return packed(room, maximum)


def packed(room: Mapping[str, int], total: int) -> dict[str, int]:
    """Put `total` workers, or as many as fit, on the fewest nodes; the last of them is the one with the least to spare.

    >>> packed({"a": 4, "b": 2, "c": 1}, 5)
    {'a': 4, 'c': 1}
    """
    left, sizes = {node: free for node, free in sorted(room.items()) if free > 0}, dict[str, int]()
    while left and total > 0:
        whole = [node for node, free in left.items() if free >= total]
        node = min(whole, key=lambda n: left[n]) if whole else max(left, key=lambda n: left[n])
        sizes[node] = min(total, left.pop(node))
        total -= sizes[node]
    return sizes


def room_beside(room: Mapping[str, int], coming: Mapping[str, int]) -> dict[str, int]:
    """Return the room that is left once `coming` workers, by node, have taken theirs.

    >>> room_beside({"a": 4, "b": 3}, {"a": 2, "b": 4})
    {'a': 2, 'b': 0}
    """
    return {node: max(0, free - coming.get(node, 0)) for node, free in room.items()}


def _busiest(slots: int, size: int) -> int:
    """Return the slots of the worker that holds the most."""
    return -(-slots // size)


def _smallest_alike(slots: int, size: int) -> int:
    """Return the fewest workers with which a step is as fast as with `size`."""
    return -(-slots // _busiest(slots, size))
