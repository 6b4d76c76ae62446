"""Groups of real workers: each is left at once, from any thread, nothing of it stays, and no stranger comes in."""

import contextlib
import gc
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import pytest
import torch

from elastrain.cluster.doors import listeners
from elastrain.elastic.door import MEMBER, Door
from elastrain.elastic.greeting import call
from elastrain.elastic.mesh import CHUNK, SMALL, Mesh
from elastrain.elastic.protocol import Generation, Member, Worker
from elastrain.training.reduce import Group, GroupLost, Solo

CPU = torch.device("cpu")
TOKEN = b"known to the members"


class Party:
    """Members of generations that live in this process, each with a door of its own."""

    def __init__(self, size: int) -> None:
        self.doors = [Door("127.0.0.1", TOKEN) for _ in range(size)]
        self.lost = [threading.Event() for _ in range(size)]

    def generation(self, number: int, *, absent: int = 0) -> Generation:
        """A generation of all, and of some who never come."""
        places = [door.address for door in self.doors] + [("127.0.0.1", 1)] * absent
        workers = [Worker(name=f"w{i}", node="n", place=i, door=place) for i, place in enumerate(places)]
        members = tuple(Member(worker=worker, position=(0, 0)) for worker in workers)
        return Generation(number=number, members=members, source=0)

    def join(self, number: int) -> list[Mesh]:
        """Let all of them join generation `number`."""
        self.lost = [threading.Event() for _ in self.doors]
        made = self.generation(number)
        found = at_once([partial(door.join, made, f"w{i}", CPU, self.lost[i]) for i, door in enumerate(self.doors)])
        assert all(isinstance(group, Mesh) for group in found), found
        return found


def at_once(works: Sequence[Callable[[], object]]) -> list[Any]:
    """Run functions side by side; return what they return, or the GroupLost that they raise."""
    results: list[Any] = [None] * len(works)

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except GroupLost as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "somebody waits for ever"
    return results


def settled(measure: Callable[[], int], most: int) -> int:
    """Wait until a number has come down to `most`; return it."""
    deadline = time.monotonic() + 30
    while (now := measure()) > most and time.monotonic() < deadline:
        gc.collect()  # the errors that `at_once` keeps hold each other
        time.sleep(0.02)
    return now


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def operations(group: Group) -> dict[str, Callable[[], None]]:
    ones, two = torch.ones(4), torch.zeros(2)
    return {
        "all_reduce": lambda: group.all_reduce(ones),
        "broadcast": lambda: group.broadcast(ones, 1),
        "all_to_all": lambda: group.all_to_all(torch.zeros(4), ones, [2, 2], [2, 2]),
        "all_gather": lambda: group.all_gather(torch.zeros(4), two),
    }


def test_a_generation_of_one_needs_no_connection() -> None:
    party = Party(1)
    group = party.doors[0].join(party.generation(3), "w0", CPU, party.lost[0])
    assert isinstance(group, Solo)
    assert group.generation == 3


def test_what_workers_open_listens_on_the_nodes_own_address_alone() -> None:
    before = set(listeners([], [os.getpid()]))
    party = Party(2)
    groups = party.join(1)
    opened = set(listeners([], [os.getpid()])) - before
    assert {each.port for each in opened} == {door.address[1] for door in party.doors}, "and nothing else is opened"
    assert {each.address for each in opened} == {"127.0.0.1"}
    for group in groups:
        group.abandon()


def test_members_compute_together_in_one_generation_after_the_other() -> None:
    party = Party(3)
    for number in (1, 2, 5):
        groups = party.join(number)
        assert [(g.rank, g.size, g.generation) for g in groups] == [(rank, 3, number) for rank in range(3)]
        tensors = [torch.full((2,), float(rank)) for rank in range(3)]
        at_once([partial(g.all_reduce, t) for g, t in zip(groups, tensors, strict=True)])
        assert [t.tolist() for t in tensors] == [[3.0, 3.0]] * 3
        gathered = [torch.zeros(3) for _ in groups]
        at_once(
            [partial(g.all_gather, o, torch.tensor([float(g.rank)])) for g, o in zip(groups, gathered, strict=True)]
        )
        assert [o.tolist() for o in gathered] == [[0.0, 1.0, 2.0]] * 3


@pytest.mark.parametrize("name", ["all_reduce", "broadcast", "all_to_all", "all_gather"])
@pytest.mark.parametrize("how", ["abandoned", "lost"])
def test_who_waits_in_an_operation_is_woken_from_another_thread(name: str, how: str) -> None:
    party = Party(2)
    groups = party.join(1)
    began = threading.Event()

    def wait() -> None:
        began.set()
        operations(groups[0])[name]()

    def end() -> None:
        began.wait()
        time.sleep(0.05)  # so that it waits by now; it is woken in any case
        groups[0].abandon() if how == "abandoned" else party.lost[0].set()

    woken, _ = at_once([wait, end])
    assert isinstance(woken, GroupLost)


def test_nothing_begins_in_a_group_that_is_over() -> None:
    party = Party(2)
    first, second = party.join(1)
    first.abandon()
    party.lost[1].set()
    for group in (first, second):
        for operation in operations(group).values():
            with pytest.raises(GroupLost):
                operation()


def test_who_has_left_fails_the_operations_of_the_others() -> None:
    party = Party(2)
    first, second = party.join(1)
    first.abandon()
    with pytest.raises(GroupLost):
        second.all_reduce(torch.ones(2))


def test_connecting_is_interrupted() -> None:
    party = Party(2)
    made = party.generation(1, absent=1)
    outcomes = at_once(
        [
            lambda: party.doors[0].join(made, "w0", CPU, party.lost[0]),
            lambda: party.doors[1].join(made, "w1", CPU, party.lost[1]),
            *(lost.set for lost in party.lost),
        ]
    )
    assert all(isinstance(found, GroupLost) for found in outcomes[:2])
    assert all(group.generation == 2 for group in party.join(2)), "the next one is not disturbed"


def test_a_member_that_does_not_come_is_a_lost_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastrain.elastic.door.CONNECT_S", 0.2)
    door = Door("127.0.0.1", TOKEN)
    members = tuple(
        Member(worker=Worker(name=name, node="n", place=place, door=where), position=None)
        for place, (name, where) in enumerate({"gone": ("127.0.0.1", 1), "me": door.address}.items())
    )
    with pytest.raises(GroupLost, match="generation 1 did not form"):
        door.join(Generation(number=1, members=members, source=None), "me", CPU, threading.Event())


def test_nothing_of_an_abandoned_group_stays() -> None:
    """Though in each of them operations are under way, which wait for each other; a third member has died."""
    party = Party(3)
    party.join(1)[0].abandon()
    most_threads, most_files = threads(), files()
    for number in range(2, 32):
        groups = party.join(number)
        waits = [partial(g.all_reduce, torch.ones(8)) for g in groups[:2]]
        at_once([*waits, *[lost.set for lost in party.lost]])
        for group in groups:
            group.abandon()
            group.abandon()
        del groups, group, waits
    assert settled(threads, most_threads) <= most_threads
    assert settled(files, most_files) <= most_files


def test_whoever_fails_in_a_group_does_not_wait_for_its_end() -> None:
    """The error holds the frames that hold the group: not even then is it the main thread that destroys it."""
    party = Party(3)
    groups = party.join(1)
    waiting = threading.Thread(target=lambda: at_once([lambda: groups[1].all_reduce(torch.ones(2))]), daemon=True)
    waiting.start()
    threading.Timer(0.05, groups[0].abandon).start()
    try:
        groups[0].all_reduce(torch.ones(2))
    except GroupLost as error:
        groups[0].abandon()
        kept = error
    assert kept.__traceback__ is not None
    del kept
    groups[2].abandon()
    waiting.join(30)
    assert not waiting.is_alive()


# --- what members do together


def turned(values: list[torch.Tensor], size: int) -> list[list[torch.Tensor]]:
    """What each member gets of an exchange of as even parts as can be: those of its rank, of all members."""
    cuts = [value.tensor_split(size) for value in values]
    return [[cuts[source][rank] for source in range(size)] for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 5, SMALL // 4 + 1, 2 * CHUNK // 4 + 3])
def test_sums_and_exchanges_are_what_they_say(size: int, length: int) -> None:
    groups = Party(size).join(1)
    chance = torch.Generator().manual_seed(length)
    values = [torch.randn(length, generator=chance) for _ in range(size)]
    expected = values[0].clone()
    for value in values[1:]:
        expected += value
    sums = [value.clone() for value in values]
    at_once([partial(group.all_reduce, value) for group, value in zip(groups, sums, strict=True)])
    assert all(torch.equal(value, expected) for value in sums), "added in the order of the ranks, the same on all"
    given = [value.clone() for value in values]
    at_once([partial(group.broadcast, value, 1) for group, value in zip(groups, given, strict=True)])
    assert all(torch.equal(value, values[1]) for value in given)
    gathered = [torch.empty(size * length) for _ in values]
    at_once([partial(g.all_gather, out, v) for g, out, v in zip(groups, gathered, values, strict=True)])
    assert all(torch.equal(out, torch.cat(values)) for out in gathered)
    parts, lengths = turned(values, size), [len(part) for part in values[0].tensor_split(size)]
    outputs = [torch.empty(size * lengths[rank]) for rank in range(size)]
    works = [partial(groups[r].all_to_all, outputs[r], values[r], [lengths[r]] * size, lengths) for r in range(size)]
    assert at_once(works) == [None] * size
    assert all(torch.equal(outputs[rank], torch.cat(parts[rank])) for rank in range(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8])
def test_tensors_of_all_kinds_are_sent(dtype: torch.dtype) -> None:
    groups = Party(2).join(1)
    values = [torch.arange(6).to(dtype).view(2, 3), torch.arange(6, 12).to(dtype).view(2, 3)]
    expected = values[0] + values[1]
    at_once([partial(group.all_reduce, value) for group, value in zip(groups, values, strict=True)])
    assert all(torch.equal(value, expected) for value in values)
    single = [torch.tensor(rank, dtype=dtype) for rank in range(2)]
    at_once([partial(group.broadcast, value, 1) for group, value in zip(groups, single, strict=True)])
    assert [value.item() for value in single] == [1, 1]


def test_members_that_are_not_in_step_are_found_out() -> None:
    """What one sends and another one awaits must be the same exchange, or numbers would be taken for others."""
    groups = Party(2).join(1)
    found = at_once([partial(group.all_reduce, torch.ones(3 + group.rank)) for group in groups])
    assert all(isinstance(each, GroupLost) for each in found)
    assert any("of 12" in str(each) and "of 16" in str(each) for each in found)


def test_a_sum_takes_no_more_than_a_chunk_a_member_besides() -> None:
    groups = Party(2).join(1)
    values = [torch.ones(10 * CHUNK // 4) for _ in groups]
    at_once([partial(group.all_reduce, value) for group, value in zip(groups, values, strict=True)])
    assert all(group._kept.nbytes <= 2 * CHUNK for group in groups)


# --- strangers


def test_who_does_not_know_the_token_is_not_let_in_and_disturbs_nobody() -> None:
    party = Party(2)
    address = party.doors[0].address
    with pytest.raises(AuthenticationError):
        call(address, b"guessed")
    silent = socket.create_connection(address)
    rude = socket.create_connection(address)
    rude.sendall(pickle.dumps((MEMBER, 1, 1)) * 9)
    hasty = socket.create_connection(address)
    hasty.close()
    groups = party.join(1)
    assert party.doors[0]._came == {}
    tensors = [torch.ones(2), torch.ones(2)]
    at_once([partial(group.all_reduce, tensor) for group, tensor in zip(groups, tensors, strict=True)])
    assert tensors[0].tolist() == [2.0, 2.0]
    rude.settimeout(30)
    with rude, silent, contextlib.suppress(ConnectionResetError):
        while rude.recv(1024):
            pass  # its challenge, then the end


def test_who_comes_too_late_or_twice_is_dropped() -> None:
    party = Party(2)
    door = party.doors[0]
    early = [call(door.address, TOKEN) for _ in range(3)]
    for connection, number in zip(early, (1, 1, 2), strict=True):
        connection.send((MEMBER, number, 1))
    until(lambda: len(door._came) == 2)
    groups = party.join(5)
    late = call(door.address, TOKEN)
    late.send((MEMBER, 4, 1))
    for connection in (*early, late):
        with connection, pytest.raises((EOFError, ConnectionResetError)):
            connection.recv()
    assert door._came == {}
    for group in groups:
        group.abandon()


def test_a_process_ends_while_it_waits_in_a_group() -> None:
    root = os.fspath(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", EXIT.format(root=root)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (3, "ends\n"), done.stderr


EXIT = """
import sys, threading
sys.path.insert(0, {root!r})
from tests.elastic.test_door import Party, until
import torch
groups = Party(3).join(1)
threading.Thread(target=lambda: groups[0].all_reduce(torch.ones(4)), daemon=True).start()
until(lambda: groups[0].waits is not None)
groups[1].abandon()
print("ends", flush=True)
sys.exit(3)
"""
