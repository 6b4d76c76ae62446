"""The membership over real sockets: the roster of the simulation decides, and connections tell of deaths."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import pytest

from elastrain.elastic.greeting import call
from elastrain.elastic.membership import Membership
from elastrain.elastic.protocol import Generation, Position, Reply, Roster, Verdict, Worker
from elastrain.elastic.recovery import Recovery

LEASE_S = 60.0  # no lease runs out unless a test wants it
WAIT_S = 20.0


def worker(name: str, arithmetic: str = "") -> Worker:
    return Worker(name=name, node=f"node-of-{name}", place=0, door=("", 0), cell="c", arithmetic=arithmetic)


class Line:
    """A worker's end of a connection: `heard` has what it was told, in order."""

    def __init__(self, served: Membership, name: str, arithmetic: str = "") -> None:
        self.name, self.worker = name, worker(name, arithmetic)
        self.connection = call(served.address, served.token)
        self.heard: list[tuple[Any, ...]] = []

    def say(self, *message: Any) -> None:
        """Send a message."""
        self.connection.send(message)

    def enter(self, position: Position | None = None, left: int = 0, *, failed: bool = False) -> None:
        """Ask for a place."""
        self.say("enter", self.worker, position, left, failed)

    def beat(self, generation: int, doing: str = "compute", since_s: float = 0.0) -> None:
        """Send a beat and take its answer, and what was said before it."""
        self.say("beat", generation, 0, doing, since_s, 7.0)
        while True:
            message = self.next()
            if message[0] == "reply" and message[2] == 7.0:
                return

    def next(self) -> tuple[Any, ...]:
        """Wait for the next message."""
        assert self.connection.poll(WAIT_S), f"{self.name} hears nothing"
        self.heard.append(self.connection.recv())
        return self.heard[-1]

    def reply(self) -> Reply:
        """Wait for the next thing that is said unasked."""
        kind, reply, sent_at, _ = self.next()
        assert (kind, sent_at) == ("reply", None)
        assert isinstance(reply, Reply)
        return reply

    def answer(self) -> Generation | Verdict:
        """Wait for the answer to the entry, past what was said before it."""
        while True:
            message = self.next()
            if message[0] == "answer":
                assert isinstance(message[2], Generation | Verdict)
                return message[2]

    def generation(self) -> Generation:
        """Wait for the answer, which is a generation."""
        found = self.answer()
        assert isinstance(found, Generation), found
        return found

    def is_ended(self) -> bool:
        """Hear what is left to hear, and then the end."""
        try:
            while True:
                self.next()
        except (EOFError, ConnectionError):
            return True

    def die(self) -> None:
        """End, as the kernel lets a killed process end."""
        self.connection.close()


class Served:
    """A membership and what it told the ledger."""

    def __init__(self, roster: Roster, **options: Any) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.membership = Membership(roster, self._event, **options)

    def _event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self.events.append((kind, dict(fields)))

    def lines(self, *names: str) -> list[Line]:
        """Let workers come and make the first generation."""
        lines = [self.come(name) for name in names]
        for line in lines:
            line.generation()
        return lines

    def come(self, name: str, arithmetic: str = "") -> Line:
        """Let a worker enter, and be heard."""
        line = Line(self.membership, name, arithmetic)
        line.enter()
        until(lambda: name in self.membership.lines)
        return line


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a membership whose first generation has `size` members."""
    started: list[Membership] = []

    def start(
        size: int,
        *,
        minimum: int = 1,
        maximum: int = 9,
        lease_s: float = LEASE_S,
        kind: type[Roster] = Roster,
        **options: Any,
    ) -> Served:
        made = Served(kind(minimum=minimum, maximum=maximum, initial=size, lease_s=lease_s), **options)
        started.append(made.membership)
        return made

    yield start
    for membership in started:
        membership.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is about to be."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- it is the machine of the simulation


class Written(Roster):
    """The roster, with each call that changes it or asks it written down."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]]

    def __post_init__(self) -> None:
        """Begin the list."""
        super().__post_init__()
        self.calls = []

    def __getattribute__(self, name: str) -> Any:
        """Return a method that writes down that it was called."""
        found = super().__getattribute__(name)
        if name not in {"enter", "beat", "died", "drain", "resize", "noted", "tick", "fail", "expect"}:
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, arguments, named, result := found(*arguments, **named)))
            return result

        return call


def test_what_comes_over_sockets_is_decided_by_the_machine_of_the_simulation(serve: Serve) -> None:
    served = serve(2, kind=Written)
    a, b = served.lines("a", "b")
    c = served.come("c")
    a.beat(1)
    a.enter((4, 1), 1)
    b.enter((4, 1), 1)
    made = [line.generation() for line in (a, b, c)]
    served.membership.drain(["a"])
    b.beat(2)
    c.die()
    for line in (a, b):
        while not line.reply().abort:
            pass
        line.enter((5, 1), 2, failed=True)
    made += [b.generation()]
    assert a.answer() is Verdict.LEAVE
    served.membership.resize(1, 3)
    roster = served.membership.roster
    assert isinstance(roster, Written)
    calls = list(roster.calls)
    assert {name for name, *_ in calls} >= {"enter", "beat", "died", "drain", "resize"}
    again = Roster(minimum=1, maximum=9, initial=2, lease_s=LEASE_S)
    for name, arguments, named, result in calls:
        assert getattr(again, name)(*arguments, **named) == result
    assert again.generation == roster.generation == made[-1]
    assert (again.dead, again.released, again.seats.keys()) == (roster.dead, roster.released, roster.seats.keys())


# --- connections


def test_a_wrong_token_gets_nothing(serve: Serve) -> None:
    served = serve(1)
    with pytest.raises(AuthenticationError):
        call(served.membership.address, b"guessed")
    lines = served.lines("a")
    assert lines
    assert set(served.membership.roster.seats) == {"a"}


def test_who_says_nothing_holds_nobody_up_and_is_sent_away(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastrain.elastic.greeting.GREETING_S", 0.1)
    served = serve(1)
    with socket.create_connection(served.membership.address) as silent:
        served.lines("a")
        silent.settimeout(WAIT_S)
        while silent.recv(1024):
            pass  # the challenge, then the end


def test_nonsense_ends_a_connection_and_no_more(serve: Serve) -> None:
    served = serve(1)
    with socket.create_connection(served.membership.address) as stranger:
        stranger.sendall(b"\0\0\0\4nope" * 8)
        stranger.settimeout(WAIT_S)
        with contextlib.suppress(ConnectionError):
            while stranger.recv(1024):
                pass
    served.lines("a")


def test_the_end_of_the_membership_is_heard_at_once(serve: Serve) -> None:
    served = serve(2)
    lines = served.lines("a", "b")
    served.membership.close()
    for line in lines:
        assert line.is_ended()


def test_a_worker_that_reads_nothing_holds_nobody_up(serve: Serve) -> None:
    served = serve(2)
    a, b = served.lines("a", "b")
    with socket.socket(fileno=os.dup(a.connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def tell() -> None:
        while "a" in served.membership.roster.seats:
            served.membership.ask_stop()

    told = threading.Thread(target=tell, daemon=True)
    told.start()
    while not b.next()[1].abort:
        pass
    told.join(WAIT_S)
    assert served.membership.roster.dead == {"a"}, "what it misses cannot be told to it any more"


# --- losses


def test_the_end_of_a_connection_is_a_death_of_which_the_others_hear_before_anything_else(serve: Serve) -> None:
    served = serve(3)
    a, b, c = served.lines("a", "b", "c")
    a.die()
    assert b.reply() == c.reply() == Reply(generation=1, abort=True)
    for line in (b, c):
        line.enter((3, 1), 1, failed=True)
    made = b.generation()
    assert [member.worker.name for member in made.members] == ["b", "c"]
    assert c.generation() == made
    assert served.membership.roster.dead == {"a"}
    assert served.membership.dropped == [], "nothing is left that has to be killed"


CHILD = """
import sys, time
sys.path.insert(0, {root!r})
from tests.elastic.test_membership import worker
from multiprocessing.connection import Client
connection = Client({address!r}, authkey=bytes.fromhex({token!r}))
connection.send(("enter", worker("child"), None, 0, False))
print(connection.recv()[0], flush=True)
time.sleep(600)
"""


def test_a_process_that_is_killed_is_a_death(serve: Serve) -> None:
    served = serve(2)
    a = Line(served.membership, "a")
    a.enter()
    code = CHILD.format(
        root=str(Path(__file__).parents[2]), address=served.membership.address, token=served.membership.token.hex()
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "answer\n"
        a.generation()
        os.kill(child.pid, signal.SIGKILL)
        assert a.reply().abort
    assert served.membership.roster.dead == {"child"}


def test_who_is_silent_loses_its_lease(serve: Serve) -> None:
    served = serve(2, lease_s=0.4)
    a, b = served.lines("a", "b")

    def others_go_on() -> bool:
        a.beat(1)
        time.sleep(0.05)
        return served.membership.dropped == ["b"]

    until(others_go_on)
    a.beat(1)
    assert a.heard[-1][1].abort
    b.beat(1)
    assert any(message[1].dropped for message in b.heard if message[0] == "reply")
    assert b.name in served.membership.roster.dead, "what is left of it is killed: it shall not come again before"


def test_who_is_late_is_not_dropped(serve: Serve) -> None:
    served = serve(2, lease_s=0.4)
    a, b = served.lines("a", "b")
    a.enter((3, 1), 1, failed=True)
    for _ in range(20):  # two seconds, five leases
        a.beat(1)
        b.beat(1)
        time.sleep(0.1)
    assert served.membership.dropped == []
    b.enter((3, 1), 1, failed=True)
    assert a.generation() == b.generation()


def test_all_members_that_wait_for_each_other_for_too_long_end_their_generation(serve: Serve) -> None:
    served = serve(2, lease_s=0.4, timeout_s=3.0)
    a, b = served.lines("a", "b")

    def beats(since_a: float, since_b: float) -> bool:
        a.beat(1, "reduce", since_a)
        b.beat(1, "reduce", since_b)
        time.sleep(0.03)
        return served.membership.roster.broken

    for _ in range(5):
        assert not beats(9.0, 0.0), "b has come a moment ago"
    until(lambda: beats(9.0, 9.0))
    for line in (a, b):
        line.beat(1)
        assert line.heard[-1][1] == Reply(generation=1, abort=True)
        line.enter((3, 1), 1, failed=True)
    assert len(a.generation().members) == 2, "nobody is dropped for it"


def test_one_member_alone_waits_for_nobody(serve: Serve) -> None:
    served = serve(1, lease_s=0.4, timeout_s=0.1)
    (a,) = served.lines("a")
    for _ in range(5):
        a.beat(1, "reduce", 9.0)
        time.sleep(0.03)
    assert not served.membership.roster.broken


def test_where_all_are_lost_it_says_so_at_once(serve: Serve) -> None:
    served = serve(2)
    for line in served.lines("a", "b"):
        line.die()
    until(lambda: bool(served.membership.lost))
    assert served.membership.lost == "all 2 workers were lost"
    c = Line(served.membership, "c")
    c.enter()
    assert c.answer() is Verdict.ENDED


def test_a_checkpoint_does_not_bring_back_who_was_lost(serve: Serve) -> None:
    served = serve(1)
    (a,) = served.lines("a")
    a.say("noted", (3, 1))
    a.die()
    until(lambda: served.membership.lost == "a worker was lost")


def test_where_all_are_drained_the_next_ones_go_on_from_the_checkpoint(serve: Serve) -> None:
    served = serve(2, maximum=2)
    a, b = served.lines("a", "b")
    served.membership.drain(["a", "b"])
    told = [line.reply() for line in (a, b)]
    assert told == [Reply(generation=1, change=True, commit=True, leave=True)] * 2
    a.say("noted", (4, 1))
    for line in (a, b):
        line.enter((4, 1), 1)
    assert a.answer() is b.answer() is Verdict.LEAVE
    a.die()
    b.die()
    c = Line(served.membership, "c")
    c.enter()
    assert (c.generation().source, served.membership.lost) == (None, "")
    c.beat(2)
    c.say("ready", 2, 0.1, 0.2)
    c.say("stepped", 2)
    until(lambda: bool(served.events))
    ((kind, fields),) = served.events
    assert (kind, fields["left"], fields["joined"], fields["step"]) == ("preemption", ["a", "b"], ["c"], 4)


# --- unlike workers


def test_workers_that_compute_unlike_each_other_begin_nothing(serve: Serve) -> None:
    served = serve(2, alike=True)
    a, b = served.come("a", "avx2"), served.come("b", "avx512")
    assert a.answer() is b.answer() is Verdict.ENDED
    assert served.membership.failure is not None
    name, message = served.membership.failure
    assert name == "ResourceError"
    assert "node-of-a: avx2" in message
    assert "node-of-b: avx512" in message


def test_a_newcomer_unlike_the_others_is_sent_away_once(serve: Serve) -> None:
    served = serve(1, alike=True)
    a = Line(served.membership, "a", "avx2")
    a.enter()
    a.generation()
    b = Line(served.membership, "b", "avx512")
    b.enter()
    assert b.answer() is Verdict.LEAVE
    served.membership.drain(["nobody"])  # everybody is told what is new
    served.membership.close()
    assert b.is_ended()
    assert [message[0] for message in b.heard] == ["answer"], "it is told once"
    assert served.membership.failure is None
    assert [kind for kind, _ in served.events] == ["refused"]


def test_where_workers_need_not_be_alike_all_may_come(serve: Serve) -> None:
    served = serve(2)
    lines = [Line(served.membership, name, name) for name in "ab"]
    for line in lines:
        line.enter()
    assert lines[0].generation() == lines[1].generation()


# --- what is said unasked


def test_a_stop_is_told_at_once_and_to_whoever_comes_later(serve: Serve) -> None:
    served = serve(1)
    (a,) = served.lines("a")
    served.membership.ask_stop()
    assert a.next() == ("reply", Reply(generation=1), None, True)
    b = Line(served.membership, "b")
    b.enter()
    assert a.reply().change
    a.enter((2, 1), 1)
    b.generation()
    b.beat(2)
    assert b.heard[-1][3] is True


def test_a_stop_lets_those_go_on_who_wait_for_more(serve: Serve) -> None:
    """Only a step can tell everybody of it; and nobody would come any more."""
    served = serve(2, minimum=2)
    a, b = served.lines("a", "b")
    b.die()
    assert a.reply().abort
    a.enter((3, 1), 1, failed=True)
    until(lambda: served.membership.view()["missing"] == 1)
    served.membership.ask_stop()
    assert [member.worker.name for member in a.generation().members] == ["a"]


def test_a_change_is_told_at_once_and_only_once(serve: Serve) -> None:
    served = serve(2)
    a, b = served.lines("a", "b")
    c = served.come("c")
    assert a.reply() == b.reply() == Reply(generation=1, change=True)
    d = served.come("d")
    assert {"c", "d"} == {line.name for line in (c, d)}
    a.say("beat", 1, 5, "compute", 0.0, 3.0)
    assert a.next() == ("reply", Reply(generation=1, change=True), 3.0, False)


def test_the_driver_sees_members_newcomers_and_steps(serve: Serve) -> None:
    served = serve(1, maximum=1)
    (a,) = served.lines("a")
    b = Line(served.membership, "b")
    b.enter()
    a.say("beat", 1, 12, "compute", 0.0, 0.0)
    until(lambda: served.membership.view()["step"] == 12 and bool(served.membership.view()["waiting"]))
    seen = served.membership.view()
    assert seen["members"] == [("a", "node-of-a", "c")]
    assert seen["waiting"] == [("b", "node-of-b", "c")]
    assert (seen["generation"], seen["missing"]) == (1, 0)


def test_the_first_error_ends_the_run(serve: Serve) -> None:
    served = serve(1)
    (a,) = served.lines("a")
    served.membership.fail("DataError", "first")
    served.membership.fail("SpecError", "second")
    assert served.membership.failure == ("DataError", "first")
    a.enter((1, 1), 1)
    assert a.answer() is Verdict.ENDED


# --- what recoveries cost


def goes_on(lines: list[Line], left: int, position: Position, *, failed: bool = True) -> None:
    """Let members enter, form the next generation, and make a step in it."""
    for line in lines:
        line.enter(position, left, failed=failed)
    numbers = {line.generation().number for line in lines}
    (number,) = numbers
    lines[0].say("ready", number, 0.25, 0.5)
    lines[0].beat(number)  # its answer says that the word before it was heard
    lines[-1].say("stepped", number)
    lines[-1].beat(number)


def test_a_loss_is_told_with_what_it_cost(serve: Serve) -> None:
    served = serve(3)
    a, b, c = served.lines("a", "b", "c")
    c.die()
    assert a.reply().abort
    goes_on([a, b], 1, (7, 1))
    ((kind, fields),) = served.events
    assert kind == "worker_lost"
    told = {name: fields[name] for name in ("worker", "node", "why", "step", "steps_redone", "workers")}
    assert told == {
        "worker": "c",
        "node": "node-of-c",
        "why": "its process ended",
        "step": 7,
        "steps_redone": 1,
        "workers": 2,
    }
    assert (fields["connect_s"], fields["state_s"]) == (0.25, 0.5)
    assert all(fields[name] >= 0 for name in ("recovery_s", "detect_s", "agree_s", "step_s"))


def test_losses_before_the_next_step_are_told_together(serve: Serve) -> None:
    served = serve(4)
    a, b, c, d = served.lines("a", "b", "c", "d")
    d.die()
    assert a.reply().abort
    for line in (a, b, c):
        line.enter((7, 1), 1, failed=True)
    assert a.generation() == b.generation()
    c.die()  # in the middle of the recovery
    while not a.reply().abort:
        pass
    goes_on([a, b], 2, (7, 1))
    assert [(kind, fields["worker"], fields["step"], fields["workers"]) for kind, fields in served.events] == [
        ("worker_lost", "d", 7, 2),
        ("worker_lost", "c", 7, 2),
    ]
    first, second = (fields for _, fields in served.events)
    assert first["recovery_s"] > second["recovery_s"]
    assert first["agree_s"] > second["agree_s"] >= 0
    goes_on([a, b], 3, (9, 1), failed=True)
    assert len(served.events) == 2, "what was told is over"


def test_a_join_is_a_resize(serve: Serve) -> None:
    served = serve(1)
    (a,) = served.lines("a")
    b = Line(served.membership, "b")
    b.enter()
    assert a.reply().change
    a.enter((3, 1), 1)
    assert a.generation() == b.generation()
    a.say("ready", 2, 0.1, 0.1)
    a.say("stepped", 2)
    a.beat(2)
    ((kind, fields),) = served.events
    assert (kind, fields["before"], fields["workers"], fields["joined"], fields["left"]) == ("resize", 1, 2, ["b"], [])
    assert (fields["step"], fields["steps_redone"]) == (3, 0)
    assert fields["recovery_s"] >= fields["pause_s"] >= 0


def test_a_smaller_maximum_is_a_resize_and_a_drain_a_preemption(serve: Serve) -> None:
    served = serve(3)
    a, b, c = served.lines("a", "b", "c")
    served.membership.resize(1, 2)
    for line in (a, b, c):
        assert line.reply().change
        line.enter((3, 1), 1)
    assert c.answer() is Verdict.LEAVE
    assert a.generation() == b.generation()
    a.say("ready", 2, 0.1, 0.1)
    a.say("stepped", 2)
    served.membership.drain(["b"])
    for line in (a, b):
        while not line.reply().change:
            pass
        line.enter((5, 1), 2)
    assert b.answer() is Verdict.LEAVE
    a.generation()
    a.say("ready", 3, 0.1, 0.1)
    a.say("stepped", 3)
    a.beat(3)
    assert [(kind, fields["left"], fields["step"]) for kind, fields in served.events] == [
        ("resize", ["c"], 3),
        ("preemption", ["b"], 5),
    ]


def recovery(events: list[tuple[str, Mapping[str, Any]]]) -> Recovery:
    made = Recovery(lambda kind, fields: events.append((kind, fields)))
    made.formed(generation(1, "a", "b", "c"), 0.0)
    made.ready(1.0, 0.5, 0.25)
    made.stepped(2.0)
    return made


def generation(number: int, *names: str) -> Generation:
    from elastrain.elastic.protocol import Member

    return Generation(number=number, members=tuple(Member(worker=worker(n), position=None) for n in names), source=0)


def test_the_parts_of_a_recovery_are_its_sum() -> None:
    events: list[tuple[str, Mapping[str, Any]]] = []
    made = recovery(events)
    assert events == [], "a beginning is none"
    made.lost(worker("c"), "its lease ran out", 10.0, 13.0)
    made.entered("a", (7, 1), 13.5, failed=True)
    made.entered("b", (7, 2), 13.5, failed=True)
    made.formed(generation(2, "a", "b"), 14.0)
    made.ready(14.75, 0.5, 0.25)
    made.stepped(16.0)
    ((_, fields),) = events
    parts = {"detect_s": 3.0, "agree_s": 1.0, "connect_s": 0.5, "state_s": 0.25, "step_s": 1.25}
    assert {name: fields[name] for name in parts} == parts
    assert fields["recovery_s"] == sum(parts.values()) == 6.0
    assert (fields["step"], fields["steps_redone"]) == (7, 1)


def test_where_the_best_state_came_in_good_order_nothing_is_redone() -> None:
    events: list[tuple[str, Mapping[str, Any]]] = []
    made = recovery(events)
    made.lost(worker("c"), "its process ended", 10.0, 10.0)
    made.entered("a", (8, 1), 10.5, failed=False)
    made.entered("b", (7, 1), 10.5, failed=True)
    made.formed(generation(2, "a", "b"), 11.0)
    made.ready(11.5, 0.5, 0.0)
    made.stepped(12.0)
    assert events[0][1]["steps_redone"] == 0
