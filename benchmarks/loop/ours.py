"""Ours: `training.loop.Loop` on blocks in memory; two workers are two processes, without Ray.

With `member` the workers have seats in a membership, as in a run: they beat, hear and are watched.
"""

import contextlib
import itertools
import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmarks.loop.work import Work, make_work, measured
from benchmarks.script import finish, in_ranks, options
from tests.training.meeting import meet  # noqa: TID251 -- one way to meet for tests and benchmarks

from elastrain.data.columns import Array
from elastrain.elastic.door import Door
from elastrain.elastic.membership import Membership
from elastrain.elastic.protocol import Roster, Worker
from elastrain.elastic.seat import MemberSeat
from elastrain.observe.ledger import Clock
from elastrain.training.batches import EPOCH, ROW, SLOT, STEP
from elastrain.training.loop import Decision, Loop, Seat, fix_threads
from elastrain.training.reduce import Group, GroupLost
from elastrain.training.state import Position, TrainState
from elastrain.training.task import make_task

LEASE_S = 10.0
INDEX = (EPOCH, STEP, SLOT, ROW)


class MemoryFeed:
    """Blocks made before the training starts."""

    def __init__(self, work: Work, slots: Sequence[int], steps: int) -> None:
        self._blocks: dict[tuple[int, int], dict[str, Array]] = {}
        for slot, block in itertools.product(slots, range(work.plan.block_of(steps - 1) + 1)):
            rows = work.plan.block(slot, block).rows(0, steps)
            index: dict[str, Array] = {
                "epoch": rows.epoch,
                "step": rows.step,
                "slot": rows.step * 0 + slot,
                "row": rows.row,
            }
            columns = {name: array[rows.row] for name, array in work.arrays.items()}
            self._blocks[slot, block] = {**{f"elastrain.{name}": v for name, v in index.items()}, **columns}

    def prefetch(self, slots: Sequence[int], block: int) -> None:
        """Nothing to do: all is there."""

    def take(self, slot: int, block: int) -> dict[str, Array] | None:
        """Return a block."""
        return self._blocks.pop((slot, block), None)

    def release_before(self, block: int) -> None:
        """Nothing to do: taken blocks are gone."""

    def evaluation(self, blocks: Sequence[int]) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield nothing: there is no evaluation."""
        del blocks
        yield from ()


class FixedSeat:
    """One group from beginning to end."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def group(self, state: TrainState) -> Group:
        """Return the group."""
        del state
        return self._group

    def decision(self) -> Decision:
        """Nothing is decided."""
        return Decision()

    def change(self) -> None:
        """Nothing changes."""

    def lost(self) -> None:
        """There is no other group."""
        raise GroupLost("a worker of the benchmark is gone")

    def noted(self, position: Position) -> None:
        """Nobody needs to know."""


class Lines:
    """Keeps the lines that the loop reports."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, ...]] = []

    def audit(self, step: int, slot: int, columns: Mapping[str, Array]) -> None:
        """No audit here."""

    def audited(self) -> None:
        """No audit here."""

    def settled(self) -> None:
        """Nothing is kept elsewhere."""

    def result(self, found: Mapping[str, Any]) -> None:
        """Nobody waits for it."""

    def report(self, status: Mapping[str, Any]) -> None:
        """Keep the lines of metrics."""
        self.lines += status["lines"]

    def event(self, kind: str, **fields: Any) -> None:
        """No ledger here."""


def train(rank: int, given: dict[str, Any], folder: str) -> list[tuple[float, ...]]:
    """Train as one worker; return the lines of its steps: (step, epoch, samples, loss, lr, norm, time)."""
    fix_threads(1.0)
    size, steps, device = given["workers"], given["steps"], torch.device("cpu")
    work = make_work(given["model"], size, steps)
    lines, clock = Lines(), Clock()
    state = TrainState(work.spec, make_task(work.spec, work.dataset), device)
    if given.get("member"):
        seat: Seat = take_seat(given["member"], rank, clock)
    else:
        group = meet(Path(folder), rank, size)
        state.share(group, 0)
        seat = FixedSeat(group)
    Loop(
        spec=work.spec,
        plan=work.plan,
        evaluation=None,
        eval_block_rows=1,
        num_steps=steps,
        run_url=folder,
        state=state,
        feed=MemoryFeed(work, [rank], steps),
        seat=seat,
        recorder=lines,
        clock=clock,
        info={},
    ).run()
    return lines.lines


def take_seat(membership: tuple[tuple[str, int], bytes], rank: int, clock: Clock) -> MemberSeat:
    """Return a seat as the workers of a run have, in a membership that another process serves."""
    address, token = membership
    door = Door(address[0], token)
    return MemberSeat(
        address,
        token,
        me=Worker(name=f"worker-{rank}", node="here", place=rank, door=door.address),
        door=door,
        device=torch.device("cpu"),
        clock=clock,
        lease_s=LEASE_S,
        timeout_s=60.0,
        restore=lambda *_: None,
    )


def serve(size: int, pipe: Connection) -> None:
    """Serve a membership, as a run's host does in a process of its own, until the other end of `pipe` speaks."""
    roster = Roster(minimum=size, maximum=size, initial=size, lease_s=LEASE_S)
    membership = Membership(roster, lambda *_: None)
    pipe.send((membership.address, membership.token))
    pipe.recv()
    membership.close()


@contextlib.contextmanager
def served(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the options, with the way to a membership where the side has its workers in one."""
    if not given.get("member"):
        yield given
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(given["workers"], theirs))
    process.start()
    yield {**given, "member": ours.recv()}
    ours.send("end")
    process.join()


def main() -> None:
    """Train with one process a worker."""
    with tempfile.TemporaryDirectory() as folder, served(options()) as given:
        lines = in_ranks(given["workers"], train, given, folder)[0]
    finish(*measured([line[6] for line in lines], [line[3] for line in lines]))


if __name__ == "__main__":
    main()
