"""As much of groups over NCCL as can be had without a GPU; with one, `test_gpu.py` runs them."""

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.elastic.test_door import TOKEN, Party, at_once, until
from torch.distributed.distributed_c10d import ProcessGroupGloo

from elastrain.elastic.door import STORE
from elastrain.elastic.greeting import call
from elastrain.elastic.nccl import DoorStore, NcclGroup
from elastrain.training.reduce import GroupLost

ABORT_S = 1.0


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


def nccl(**options: Any) -> tuple[NcclGroup, threading.Event]:
    lost = threading.Event()
    return NcclGroup(Nccl(**options), (0, 2, 1), lost), lost


def test_nobody_waits_for_an_abort_of_nccl() -> None:
    """Neither the thread that beats, which calls for it, nor the one in the sum."""
    held = Nccl(ends=False)
    group = NcclGroup(held, (0, 2, 1), threading.Event())

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


# --- torch's own groups, which meet in a store at a door


def store_of(party: Party, number: int, rank: int) -> DoorStore:
    connection = call(party.doors[0].address, TOKEN)
    connection.send((STORE, number, rank))
    return DoorStore(connection)


class Gloo:
    """A group of gloo as torch's NCCL looks to its callers; to abort it is another thing there."""

    def __init__(self, *arguments: Any) -> None:
        group: Any = ProcessGroupGloo(*arguments)
        self.allreduce = group.allreduce

    def abort(self) -> None:
        """Nothing is under way."""


def formed(party: Party, number: int) -> list[NcclGroup]:
    """Groups as between GPUs, but of gloo: torch asks the store in the same way."""
    size, limit = len(party.doors), timedelta(seconds=60)
    stores = [store_of(party, number, rank) for rank in range(size)]
    made = at_once([partial(Gloo, stores[rank], rank, size, limit) for rank in range(size)])
    return [NcclGroup(made[rank], (rank, size, number), threading.Event(), stores[rank]) for rank in range(size)]


def test_torch_meets_in_a_store_that_asks_for_the_token() -> None:
    party = Party(3)
    for number in (1, 2):
        groups = formed(party, number)
        tensors = [torch.full((2,), float(rank)) for rank in range(3)]
        at_once([partial(group.all_reduce, tensor) for group, tensor in zip(groups, tensors, strict=True)])
        assert [tensor.tolist() for tensor in tensors] == [[3.0, 3.0]] * 3
        for group in groups:
            group.abandon()


def test_a_store_gives_what_was_put_into_it_in_its_generation() -> None:
    party = Party(2)
    first, second, other = (store_of(party, number, 0) for number in (1, 1, 2))
    first.set("a", b"\x00\xff")
    other.set("a", "another")
    assert second.get("a") == b"\x00\xff"
    assert second.multi_get(["a", "a"]) == [[0, 255]] * 2
    assert other.get("a") == b"another"
    waiting = threading.Thread(target=second.wait, args=(["later"],), daemon=True)
    waiting.start()
    first.set("later", b"")
    waiting.join(30)
    assert not waiting.is_alive()


def test_who_waits_for_a_value_of_a_generation_that_is_over_is_sent_away() -> None:
    party = Party(2)
    asking = store_of(party, 1, 1)

    def ask() -> None:
        with pytest.raises(EOFError):
            asking.get("never")

    waiting = threading.Thread(target=ask, daemon=True)
    waiting.start()
    party.join(2)
    waiting.join(30)
    assert not waiting.is_alive()


EXIT = """
import sys
sys.path.insert(0, {root!r})
from tests.elastic.test_nccl import Party, formed, at_once
import torch
groups = formed(Party(3), 1)
at_once([lambda g=g: g.all_reduce(torch.ones(4)) for g in groups])
for group in groups:
    group.abandon()
del group, groups
print("ends", flush=True)
sys.exit(3)
"""


def test_a_process_ends_while_groups_of_torch_are_being_destroyed() -> None:
    root = os.fspath(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", EXIT.format(root=root)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "ends\n"), done.stderr
