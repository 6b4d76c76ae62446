"""Groups of real workers: each is left at once, from any thread, and nothing of it stays."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from elastrain.cluster.doors import listeners
from elastrain.elastic.group import Door, TorchGroup
from elastrain.elastic.protocol import Generation, Member, Worker
from elastrain.training.reduce import Group, GroupLost, Solo

CPU = torch.device("cpu")
ABORT_S = 1.0


class Party:
    """Members of generations that live in this process, each with a door of its own."""

    def __init__(self, size: int) -> None:
        self.doors = [Door("127.0.0.1") for _ in range(size)]
        self.lost = [threading.Event() for _ in range(size)]

    def generation(self, number: int, *, absent: int = 0) -> Generation:
        """A generation of all, and of some who never come."""
        doors = [door.address for door in self.doors] + [("127.0.0.1", 1)] * absent
        workers = [Worker(name=f"w{i}", node="n", place=i, store=store) for i, store in enumerate(doors)]
        members = tuple(Member(worker=worker, position=(0, 0)) for worker in workers)
        return Generation(number=number, members=members, source=0)

    def join(self, number: int) -> list[TorchGroup]:
        """Let all of them join generation `number`."""
        self.lost = [threading.Event() for _ in self.doors]
        made = self.generation(number)
        found = at_once([partial(door.join, made, f"w{i}", CPU, self.lost[i]) for i, door in enumerate(self.doors)])
        assert all(isinstance(group, TorchGroup) for group in found), found
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


def test_what_torch_opens_listens_on_the_nodes_own_address_alone() -> None:
    """Its protocols ask for no token: on loopback nobody reaches them from elsewhere."""
    before = set(listeners([], [os.getpid()]))
    party = Party(2)
    groups = party.join(1)
    opened = set(listeners([], [os.getpid()])) - before
    assert len(opened) >= len(party.doors)
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


def test_a_store_that_is_gone_is_a_lost_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastrain.elastic.group.CONNECT_S", 0.2)
    door = Door("127.0.0.1")
    members = tuple(
        Member(worker=Worker(name=name, node="n", place=place, store=store), position=None)
        for place, (name, store) in enumerate({"gone": ("127.0.0.1", 1), "me": door.address}.items())
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


class Nccl:
    """As much of a group and its one operation as can be had without a GPU: what torch 2.13's NCCL does and does not.

    Its wait orders streams and raises what went wrong; to abort it ends an operation, without an error, but takes its
    time; whether it went well cannot be asked, and whether it is over not during an abort: no thread would go on.
    """

    def __init__(self, *, ends: bool, error: str = "") -> None:
        self._ended, self._error = threading.Event(), error
        self.aborting, self.stood_still = threading.Event(), False
        if ends:
            self._ended.set()

    def allreduce(self, _: list[torch.Tensor]) -> "Nccl":
        """Begin the operation."""
        return self

    def is_completed(self) -> bool:
        """Tell whether it is over."""
        self.stood_still |= self.aborting.is_set()
        return self._ended.is_set()

    def wait(self) -> None:
        """Order the streams."""
        if self._error:
            raise RuntimeError(self._error)

    def abort(self) -> None:
        """End it."""
        self.aborting.set()
        time.sleep(ABORT_S)
        self._ended.set()


def nccl(**options: Any) -> tuple[TorchGroup, threading.Event]:
    lost = threading.Event()
    return TorchGroup(Nccl(**options), (0, 2, 1), lost, wakes=True), lost


def test_nobody_waits_for_an_abort_of_nccl() -> None:
    """Neither the thread that beats, which calls for it, nor the one in the sum."""
    held = Nccl(ends=False)
    group = TorchGroup(held, (0, 2, 1), threading.Event(), wakes=True)

    def end() -> None:
        until(lambda: group.waits is not None)
        group.abandon()

    assert isinstance(at_once([lambda: group.all_reduce(torch.ones(1)), end])[0], GroupLost)
    assert not held._ended.is_set(), "both are back before it has ended"
    until(held.aborting.is_set)
    assert not held.stood_still


def test_an_operation_of_nccl_is_over_when_it_says_so_and_wait_raises_nothing() -> None:
    nccl(ends=True)[0].all_reduce(torch.ones(1))
    with pytest.raises(GroupLost, match="remote process exited"):
        nccl(ends=True, error="remote process exited")[0].all_reduce(torch.ones(1))


@pytest.mark.parametrize("how", ["aborted", "pending"])
def test_what_an_abort_leaves_of_an_operation_of_nccl_is_no_sum(how: str) -> None:
    group, lost = nccl(ends=False)

    def end() -> None:
        until(lambda: group.waits is not None)
        lost.set()
        if how == "aborted":
            group.abandon()

    assert isinstance(at_once([lambda: group.all_reduce(torch.ones(1)), end])[0], GroupLost)


EXIT = """
import sys, threading
sys.path.insert(0, {root!r})
from tests.elastic.test_group import Party, at_once
import torch
party = Party(3)
groups = party.join(1)
for group, lost in zip(groups[:2], party.lost):
    threading.Timer(0.1, lost.set).start()
at_once([lambda g=g: g.all_reduce(torch.ones(4)) for g in groups[:2]])
for group in groups[:{left}]:
    group.abandon()
del group
print("ends", flush=True)
sys.exit(3)
"""


@pytest.mark.parametrize("left", [2, 3])
def test_a_process_ends_while_groups_are_being_destroyed(left: int) -> None:
    """With `left` of three abandoned: the operations of two are under way until the third closes, maybe at the exit."""
    root = os.fspath(Path(__file__).parents[2])
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", EXIT.format(root=root, left=left)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (3, "ends\n"), done.stderr
