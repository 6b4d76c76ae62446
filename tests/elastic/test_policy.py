"""How many workers and where: properties over any room, slots and size."""

import math

from hypothesis import given
from hypothesis import strategies as st

from elastrain.elastic.policy import Outlook, more_workers, packed, room_beside, sizes_at_start, worth_growing

ROOM = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.integers(0, 9), max_size=8)
COUNT = st.integers(1, 24)
OUTLOOK = st.builds(
    Outlook, remaining_s=st.none() | st.floats(0, 1e5), start_s=st.floats(0, 60), pause_s=st.floats(0, 1)
)


def step_s(slots: int, size: int) -> int:
    """A step's length, in forwards of a slot."""
    return math.ceil(slots / size)


@given(room=ROOM, minimum=COUNT, maximum=COUNT)
def test_a_run_starts_with_all_that_fit_up_to_the_most_and_not_at_all_below_the_least(
    room: dict[str, int], minimum: int, maximum: int
) -> None:
    minimum = min(minimum, maximum)
    sizes = sizes_at_start(room, minimum, maximum)
    if sum(room.values()) < minimum:
        assert sizes == {}
    else:
        assert sum(sizes.values()) == min(maximum, sum(room.values()))
        assert all(0 < size <= room[node] for node, size in sizes.items())


@given(room=ROOM, total=COUNT)
def test_workers_are_put_on_as_few_nodes_as_hold_them(room: dict[str, int], total: int) -> None:
    sizes = packed(room, total)
    largest = sorted(room.values(), reverse=True)
    assert sum(sizes.values()) == min(total, sum(largest))
    assert sum(largest[: max(0, len(sizes) - 1)]) < total  # one node less would not do


@given(slots=COUNT, size=st.integers(0, 24), fewest=COUNT, most=COUNT, room=st.integers(0, 30), outlook=OUTLOOK)
def test_what_is_added_fits_is_wanted_and_none_of_it_is_in_vain(
    slots: int, size: int, fewest: int, most: int, room: int, outlook: Outlook
) -> None:
    most = min(most, slots)
    fewest = min(fewest, most)
    more = more_workers(slots=slots, size=size, bounds=(fewest, most), room=room, outlook=outlook)
    assert 0 <= more <= room
    if more:
        assert size + more <= most
        if size + more > fewest and size + more - 1 > 0:
            assert step_s(slots, size + more) < step_s(slots, size + more - 1)
    if size < fewest and room:
        assert more >= min(room, fewest - size)  # below the fewest nothing else counts


@given(slots=COUNT, size=COUNT, more=COUNT, outlook=OUTLOOK, longer=st.floats(0, 1e5))
def test_growing_is_worth_it_only_where_a_step_gets_shorter_and_never_less_the_longer_it_lasts(
    slots: int, size: int, more: int, outlook: Outlook, longer: float
) -> None:
    worth = worth_growing(slots=slots, size=size, more=more, outlook=outlook)
    if worth:
        assert step_s(slots, size + more) < step_s(slots, size)
        if outlook.remaining_s is not None:
            later = Outlook(remaining_s=outlook.remaining_s + longer, start_s=outlook.start_s, pause_s=outlook.pause_s)
            assert worth_growing(slots=slots, size=size, more=more, outlook=later)
            saved = outlook.remaining_s * (1 - step_s(slots, size + more) / step_s(slots, size))
            assert saved > outlook.start_s + outlook.pause_s


def test_five_to_seven_workers_of_eight_slots_gain_nothing_over_four() -> None:
    outlook = Outlook(remaining_s=1e9, start_s=10.0)
    assert [more for more in range(1, 5) if worth_growing(slots=8, size=4, more=more, outlook=outlook)] == [4]


@given(room=ROOM, coming=ROOM)
def test_what_is_on_its_way_takes_its_room_and_no_more(room: dict[str, int], coming: dict[str, int]) -> None:
    left = room_beside(room, coming)
    assert left == {node: max(0, free - coming.get(node, 0)) for node, free in room.items()}
