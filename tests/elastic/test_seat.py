"""Seats in a real membership: workers as threads, each with a seat, a door and a state of its own, or as processes."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.harness import Classifier, Setup, make_spec

from elastrain.elastic.door import Door
from elastrain.elastic.membership import Membership
from elastrain.elastic.mesh import Mesh
from elastrain.elastic.protocol import Generation, Roster, Worker
from elastrain.elastic.seat import HUNG, Dismissed, MemberSeat
from elastrain.errors import ResourceError
from elastrain.observe.ledger import Clock
from elastrain.training.reduce import Group, GroupLost, Solo
from elastrain.training.state import TrainState

CPU = torch.device("cpu")
WAIT_S = 30.0


def served(size: int, *, minimum: int = 1, lease_s: float = 30.0, timeout_s: float = 60.0) -> Membership:
    """A membership whose first generation has `size` members."""
    roster = Roster(minimum=minimum, maximum=9, initial=size, lease_s=lease_s)
    return Membership(roster, lambda *_: None, timeout_s=timeout_s)


class Member:
    """A worker: `do` has its main thread do something, `result` waits for what came of it."""

    def __init__(
        self,
        membership: Membership,
        name: str,
        *,
        place: int = 0,
        lease_s: float = 30.0,
        restore: Callable[[TrainState, int], None] = lambda *_: None,
    ) -> None:
        self.name, self.clock, self.door = name, Clock(), Door("127.0.0.1", membership.token)
        self.state = Setup(spec=make_spec(), kind=Classifier).state()
        self.entered = 0
        self.seat = MemberSeat(
            membership.address,
            membership.token,
            me=Worker(name=name, node="n", place=place, door=self.door.address),
            door=self.door,
            device=CPU,
            clock=self.clock,
            lease_s=lease_s,
            timeout_s=60.0,
            restore=restore,
            before_entering=self._enters,
        )
        self._thread: threading.Thread | None = None
        self._result: Any = None

    def _enters(self) -> None:
        self.entered += 1

    def do(self, work: Callable[[], Any]) -> "Member":
        """Begin to do something, in the main thread of this worker."""

        def run() -> None:
            try:
                self._result = work()
            except Exception as error:  # noqa: BLE001 -- the result of the test
                self._result = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        return self

    def result(self) -> Any:
        """Wait for what came of it."""
        assert self._thread is not None
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), f"{self.name} hangs"
        return self._result

    def ask(self) -> "Member":
        """Begin to ask for a group, again after each loss, as the loop does."""

        def again() -> Group:
            while True:
                try:
                    return self.seat.group(self.state)
                except GroupLost:
                    self.seat.lost()

        return self.do(again)

    def group(self) -> Group:
        """Wait for the group."""
        found = self.result()
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, Mesh | Solo)
        return found


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    """What is closed at the end of a test."""
    things: list[Any] = []
    yield things
    for thing in things:
        thing.close()


@pytest.fixture
def start(opened: list[Any]) -> Callable[..., Member]:
    """Start a worker."""

    def make(*arguments: Any, **options: Any) -> Member:
        member = Member(*arguments, **options)
        opened.append(member.seat)
        return member

    return make


@pytest.fixture
def serve(opened: list[Any]) -> Callable[..., Membership]:
    """Start a membership."""

    def make(*arguments: Any, **options: Any) -> Membership:
        membership = served(*arguments, **options)
        opened.append(membership)
        return membership

    return make


Serve = Callable[..., Membership]
Start = Callable[..., Member]


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is about to be."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_newcomer_takes_the_state_of_the_most_advanced_member(serve: Serve, start: Start) -> None:
    membership = serve(1)
    a = start(membership, "a").ask()
    assert isinstance(a.group(), Solo)
    a.state.step = 5
    b = start(membership, "b").ask()
    until(lambda: a.seat.decision().change)
    a.seat.change()
    a.ask()
    first, second = a.group(), b.group()
    assert (first.generation, first.size, {first.rank, second.rank}) == (2, 2, {0, 1})
    assert b.state.step == 5
    assert (a.entered, b.entered) == (2, 1)


def test_who_survives_keeps_its_state_and_goes_on(serve: Serve, start: Start) -> None:
    membership = serve(3)
    members = [start(membership, name, place=place).ask() for place, name in enumerate("abc")]
    for member in members:
        assert member.group().size == 3
        member.state.step = 7
    a, b, c = members
    before = b.state.phases[0].gradients
    a.do(lambda: a.seat._group.all_reduce(torch.ones(3)))  # type: ignore[union-attr]
    b.do(lambda: b.seat._group.all_reduce(torch.ones(3)))  # type: ignore[union-attr]
    c.seat.close()
    for member in (a, b):
        assert isinstance(member.result(), GroupLost)
        member.seat.lost()
        member.ask()
    assert (a.group().size, b.group().generation) == (2, 2)
    assert (a.state.step, b.state.step) == (7, 7)
    assert b.state.phases[0].gradients is before


def test_a_loss_while_the_state_is_handed_out_is_survived(serve: Serve, start: Start) -> None:
    """Two wait for a state that never comes; neither waits for the end of the other's operation."""
    membership = serve(3)
    waiting = threading.Event()

    def fail(*_: Any) -> None:
        waiting.wait(WAIT_S)
        raise OSError("no such storage")

    a = start(membership, "a", place=0, restore=fail).ask()
    others = [start(membership, name, place=place).ask() for place, name in enumerate("bc", start=1)]
    until(lambda: membership.roster.generation.number == 1 and all(m.clock.running()[0] == "start" for m in others))
    time.sleep(0.3)  # so that they wait by now; it goes well in any case
    waiting.set()
    assert isinstance(a.result(), OSError)
    a.seat.close()
    assert [member.group().size for member in others] == [2, 2]


def test_a_member_that_dies_before_it_connects_holds_nobody_up(serve: Serve, start: Start) -> None:
    membership = serve(3)
    a, b = (start(membership, name, place=place).ask() for place, name in enumerate("ab"))
    c = start(membership, "c", place=2)
    c.seat._send("enter", c.seat._me, None, 0, c.seat._failed)
    until(lambda: membership.roster.generation.number == 1)
    c.seat.close()
    assert {a.group().size, b.group().size} == {2}


def test_members_that_cannot_connect_give_up(serve: Serve, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Door, generation: Generation, *_rest: Any) -> Group:
        raise GroupLost(f"generation {generation.number} did not form: duplicate GPU")

    monkeypatch.setattr(Door, "join", refuse)
    membership = serve(1)
    found = start(membership, "a").ask().result()
    assert isinstance(found, ResourceError)
    assert str(found) == "the workers cannot connect with each other: generation 3 did not form: duplicate GPU"


def test_a_step_waits_while_the_membership_does_not_answer(serve: Serve, start: Start) -> None:
    membership = serve(1, lease_s=0.5)
    a = start(membership, "a", lease_s=0.5).ask()
    a.group()
    with membership._lock:
        until(lambda: not a.seat._lease.valid(time.monotonic()))
        a.ask()
        time.sleep(0.3)
        assert a._result.generation == 1
        assert a._thread is not None
        assert a._thread.is_alive(), "it waits"
        assert a.clock.running()[0] == "wait"
    assert a.group().generation == 1


def test_who_is_dropped_while_it_waits_is_dismissed_and_may_come_as_another(serve: Serve, start: Start) -> None:
    membership = serve(2, minimum=2)
    a, b = (start(membership, name).ask() for name in "ab")
    a.group()
    b.group()
    b.seat.close()
    until(a.seat._lost.is_set)
    a.ask()
    until(lambda: membership.lines["a"].waits)
    with membership._lock:
        membership.roster._drop("a")
        membership.roster._settle()
    with pytest.raises(Dismissed) as dismissed:
        a.group()
    assert dismissed.value.again


def test_who_is_drained_is_dismissed_for_good(serve: Serve, start: Start) -> None:
    membership = serve(2)
    a, b = (start(membership, name).ask() for name in "ab")
    a.group()
    b.group()
    membership.drain(["b"])
    for member in (a, b):
        until(lambda member=member: member.seat.decision().change)  # type: ignore[misc]
        member.seat.change()
        member.ask()
    with pytest.raises(Dismissed) as dismissed:
        b.group()
    assert not dismissed.value.again
    assert isinstance(a.group(), Solo)


def test_the_end_of_the_membership_ends_every_wait(serve: Serve, start: Start) -> None:
    membership = serve(2)
    a, b = (start(membership, name).ask() for name in "ab")
    groups = [a.group(), b.group()]
    a.do(lambda: groups[0].all_reduce(torch.ones(2)))
    membership.close()
    assert isinstance(a.result(), GroupLost)
    for member in (a, b):
        member.seat.lost()
        member.ask()
        with pytest.raises(Dismissed, match="the membership is gone"):
            member.group()


def test_what_a_worker_was_told_is_its_decision(serve: Serve, start: Start) -> None:
    membership = serve(1)
    a = start(membership, "a").ask()
    a.group()
    assert a.seat.decision().flag() == 0.0
    membership.ask_stop()
    until(lambda: a.seat.decision().stop)
    membership.drain(["a"])
    until(lambda: a.seat.decision().commit)
    assert a.seat.decision().flag() == 7.0
    a.seat.change()
    a.ask()
    assert a.group().generation == 2
    assert a.seat.decision().stop, "a wish to stop outlives a generation"


def test_who_waits_says_so_whatever_it_waits_for(serve: Serve, start: Start) -> None:
    """Also outside of sums: an evaluation, a state that is handed out, the last barrier."""
    membership = serve(2, lease_s=2.0, timeout_s=0.5)
    a, b = (start(membership, name, place=place, lease_s=2.0).ask() for place, name in enumerate("ab"))
    groups = [a.group(), b.group()]
    for member in (a, b):
        member.clock.switch("evaluate")
    # Each waits for the other, since they do not call the same.
    a.do(lambda: groups[0].broadcast(torch.ones(2), groups[1].rank))
    b.do(lambda: groups[1].broadcast(torch.ones(2), groups[0].rank))
    assert isinstance(a.result(), GroupLost)
    assert isinstance(b.result(), GroupLost)


# --- in processes


ALONE = """
import sys, threading, time
sys.path.insert(0, {root!r})
import torch
from tests.elastic.test_seat import Member, served
membership = served(1, lease_s=5.0)
member = Member(membership, "a", lease_s=5.0)
member.seat._timeout_s = 0.5
print(member.seat.group(member.state).generation, flush=True)
def stand_still():
    time.sleep(60)
"""

STANDS = """
member.seat.has_stepped = True
member.clock.switch("compute")
stand_still()
"""

EVALUATES = """
member.seat.has_stepped = True
member.clock.switch("evaluate")
stand_still()
"""

SUMS = """
class Stuck:
    waits = time.perf_counter()
    def abandon(self):
        pass
member.seat._group = Stuck()
membership.drain(["nobody"])
with membership._lock:
    membership.roster.fail()
    membership._tell()
member.clock.switch("reduce")
stand_still()
"""

CLINGS = """
membership.drain(["nobody"])
with membership._lock:
    membership.roster.fail()
    membership._tell()
member.clock.switch("compute")
stand_still()
"""

WORKS = """
member.seat.has_stepped = True
membership.drain(["nobody"])
with membership._lock:
    membership.roster.fail()
    membership._tell()
for batch in range(8):
    member.clock.switch("evaluate")
    time.sleep(0.2)
member.clock.switch("other")
print("evaluated")
member.seat.close()
"""

GONE = """
membership.close()
stand_still()
"""

ENDS = """
membership.close()
member.seat.lost()
try:
    member.seat.group(member.state)
except Exception as error:
    print(type(error).__name__)
member.seat.close()
time.sleep(1.5)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run a worker in a process of its own."""
    whole = ALONE.format(root=str(Path(__file__).parents[2])) + code
    return subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.parametrize(
    "code", [STANDS, EVALUATES, CLINGS, SUMS, GONE], ids=["computes", "evaluates", "clings", "sums", "outlives the run"]
)
def test_a_process_whose_main_thread_stands_still_ends_and_says_where(code: str) -> None:
    done = run(code)
    assert done.returncode == HUNG, done.stderr
    assert "stand_still" in done.stderr
    assert "its threads were doing this" in done.stderr


def test_a_process_that_has_much_to_evaluate_is_left_alone_also_when_its_generation_is_over() -> None:
    done = run(WORKS)
    assert (done.returncode, done.stdout.split()) == (0, ["1", "evaluated"]), done.stderr


def test_a_process_that_ends_in_good_order_is_left_alone() -> None:
    done = run(ENDS)
    assert (done.returncode, done.stdout.split()) == (0, ["1", "Dismissed"]), done.stderr
