"""The desk: where trials wait for cells, cells for trials, and what both have to say is written down.

One actor of one event loop beside the driver. Nothing in it waits for storage: that is done in threads.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from elastrain.elastic.protocol import Worker
from elastrain.errors import ElastrainError, SpecError
from elastrain.lease import Hold
from elastrain.observe.ledger import Ledger
from elastrain.sweeps.orders import Blueprint, Order, Task

FLUSH_S = 1.0
LOOK_S = 1.0  # how long a worker's question whether to stop is held back
MAX_LOSSES = 3  # of a trial's workers in a row without an evaluation in between: then it is the trial's fault
GO_ON, STOP = "go on", "stop"

Message = dict[str, Any]


@dataclass(slots=True, eq=False)
class Cell:
    """A cell's workers by rank, those of them that wait for an order, and the trial that it runs."""

    name: str
    size: int
    members: dict[int, Worker] = field(default_factory=dict)
    waiting: dict[int, asyncio.Future[Task | None]] = field(default_factory=dict)
    generation: int = 0
    trial: str = ""
    beat: float = field(default_factory=time.monotonic)
    step: int = 0
    stopping: bool = False  # at the next boundary, after a commit
    drains: bool = False  # it gets no other trial

    def is_ready(self) -> bool:
        """Say whether all workers wait for an order."""
        return len(self.members) == self.size == len(self.waiting)


@dataclass(slots=True, eq=False)
class Entry:
    """A trial that is under way: its order, what Tune's side has not taken yet, and the worker that waits for a word.

    `step`, `value` and `device_s` are those of its last evaluation.
    """

    order: Order
    cell: str = ""
    inbox: deque[Message] = field(default_factory=deque)
    reader: asyncio.Future[None] | None = None
    decision: asyncio.Future[str] | None = None
    decided: int = 0
    step: int = 0
    value: float | None = None
    device_s: float = 0.0
    losses: int = 0

    def told(self, outcome: str, error: str = "") -> Message:
        """Return what Tune's side is told: an evaluation to decide on, or with an outcome the end."""
        where = {"run": self.order.run_url, "step": self.step, "device_s": self.device_s}
        return {**where, "value": self.value, "outcome": outcome, "error": error}


class Desk:
    """Brings trials and cells together; see the module."""

    def __init__(self, hold: Hold, attempt: int, blueprint: Blueprint, newest: Callable[[str], int | None]) -> None:
        """Begin the ledger of an attempt; `newest(run)` says which step of a trial's run can be gone on from."""
        self._ledger, self._hold = Ledger(hold.folder, attempt), hold
        self._blueprint, self._newest = blueprint, newest
        self._cells: dict[str, Cell] = {}
        self._entries: dict[str, Entry] = {}
        self._queue: deque[str] = deque()  # trials that wait for a cell
        self._events: list[Mapping[str, Any]] = []
        self._finished = False
        self._failure: tuple[str, str] | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._writing: asyncio.Lock | None = None

    # --- Tune's side

    async def next(self, trial: str, begin: Mapping[str, Any] | None) -> Message:
        """Begin a trial (see `Blueprint.order`) or let it go on; return what is to be decided next, or its end."""
        if begin is not None:
            try:
                order = self._blueprint.order(trial, begin)
            except SpecError as error:
                nothing = {"run": "", "step": 0, "device_s": 0.0, "value": None}
                ended = {"step": 0, "device_s": 0.0, "error": str(error), "error_kind": SpecError.__name__}
                self._note("ended", trial=trial, outcome="failed", **ended)
                return {**nothing, "outcome": "failed", "error": str(error)}
            self._entries[trial] = Entry(order, decided=order.decided, step=order.decided, device_s=order.spent_s)
            self._queue.append(trial)
            self._match()
        entry = self._entries[trial]
        self._decide(entry, GO_ON)
        while not entry.inbox and not self._finished:
            entry.reader = asyncio.get_running_loop().create_future()
            await entry.reader
        message = entry.inbox.popleft() if entry.inbox else entry.told("interrupted")
        if message["outcome"]:
            self._entries.pop(trial, None)
        return message

    async def leave(self, trial: str, outcome: str) -> None:
        """Stop a trial, since it was decided so: for good with an outcome, for now with none."""
        entry = self._entries.pop(trial, None)
        if entry is None:
            return
        with contextlib.suppress(ValueError):
            self._queue.remove(trial)
        if entry.decision is None and entry.cell:
            self._cells[entry.cell].stopping = True
        self._decide(entry, STOP)
        if outcome:
            self._note_end(entry, outcome, {})

    # --- workers

    async def join(self, cell: str, rank: int, size: int, worker: Worker) -> None:
        """Take in a worker; one that stands in for another ends what the cell did."""
        place = self._cells.setdefault(cell, Cell(cell, size))
        place.generation += 1
        if rank in place.members:
            self._lose(place, f"worker {rank} was replaced")
        place.waiting.pop(rank, None)
        place.members[rank] = worker

    async def take(self, cell: str, rank: int) -> Task | None:
        """Wait for an order; None: there is nothing more to do."""
        place = self._cells.get(cell)
        if place is None or self._finished:
            return None
        order: asyncio.Future[Task | None] = asyncio.get_running_loop().create_future()
        place.waiting[rank] = order
        if place.is_ready():
            self._lose(place, "its workers broke off")  # or it has ended, and this does nothing
            self._match()
        return await order

    async def evaluated(self, trial: str, fields: Mapping[str, Any]) -> None:
        """Note an evaluation."""
        self._note("eval", trial=trial, **fields)
        if entry := self._entries.get(trial):
            entry.step, entry.value, entry.device_s = fields["step"], fields["value"], fields["device_s"]
            entry.losses = 0

    async def decide(self, trial: str, fields: Mapping[str, Any]) -> str:
        """Note an evaluation, tell Tune's side of it and wait for the word: go on, or stop."""
        await self.evaluated(trial, fields)
        entry = self._entries.get(trial)
        if entry is None:
            return STOP
        entry.decided = entry.step
        entry.decision = asyncio.get_running_loop().create_future()
        self._tell(entry, entry.told(""))
        return await entry.decision

    async def over(self, cell: str, trial: str, outcome: str, fields: Mapping[str, Any]) -> None:
        """Note that a trial has ended: finished, diverged, failed, or "" as it was told to; the first word counts."""
        place, entry = self._cells.get(cell), self._entries.get(trial)
        if place is None or place.trial != trial:
            return
        place.trial = ""
        place.generation += outcome == "failed"  # who failed has left its group, so that the others need not wait
        if entry is not None and entry.cell == cell and outcome:
            entry.cell = ""
            self._note_end(entry, outcome, fields)

    async def lost(self, cell: str, trial: str, why: str) -> None:
        """Note that a worker cannot go on with a trial: its group is broken, or it was told to stop."""
        place = self._cells.get(cell)
        if place is not None and place.trial == trial:
            place.generation += 1
            self._lose(place, why)

    async def beat(self, cell: str, step: int) -> None:
        """Note a sign of life."""
        if place := self._cells.get(cell):
            place.beat, place.step = time.monotonic(), step

    async def is_stopping(self, cell: str, trial: str) -> bool:
        """Say whether a trial is to commit and stop at the next boundary; held back for a second while not."""
        deadline = time.monotonic() + LOOK_S
        while time.monotonic() < deadline:
            place = self._cells.get(cell)
            if place is None or place.trial != trial:
                return False
            if place.stopping:
                return True
            await asyncio.sleep(0.02)
        return False

    async def settled(self) -> None:
        """Write what has been noted to storage; raises ConflictError, StorageError."""
        await self._flush()

    # --- the driver

    async def open(self) -> None:
        """Begin to write down what is noted, every second."""
        self._flushing = asyncio.create_task(self._keep_flushing())

    async def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Note something in the ledger."""
        self._note(kind, **fields)

    async def events(self, since: int) -> list[Mapping[str, Any]]:
        """Return what was noted, from the event of number `since` on."""
        return self._events[since:]

    async def view(self) -> dict[str, Any]:
        """Return the cells (workers there, node, trial, step, since when silent), what waits, and what failed."""
        now = time.monotonic()
        cells = {
            name: {
                "joined": len(place.members),
                "node": next((worker.node for worker in place.members.values()), None),
                "trial": place.trial,
                "step": place.step,
                "silent_s": now - place.beat if place.trial else 0.0,
            }
            for name, place in self._cells.items()
        }
        return {"cells": cells, "queued": len(self._queue), "failure": self._failure}

    async def drain(self, cell: str) -> None:
        """Have a cell stop its trial at the next boundary, after a commit, and take no other."""
        if place := self._cells.get(cell):
            place.stopping = place.drains = True

    async def drop(self, cell: str, why: str) -> None:
        """Forget a cell that is no more; its trial goes on elsewhere."""
        place = self._cells.pop(cell, None)
        if place is not None:
            self._lose(place, why)
            for waiting in place.waiting.values():
                if not waiting.done():
                    waiting.set_result(None)
            self._match()

    async def finish(self) -> None:
        """Stop all trials and send all workers home: those that run stop at the next boundary, after a commit."""
        self._finished = True
        for place in self._cells.values():
            place.stopping = True
            for waiting in place.waiting.values():
                if not waiting.done():
                    waiting.set_result(None)
        for entry in list(self._entries.values()):
            self._decide(entry, STOP)
            self._wake(entry)

    async def close(self, outcome: str, fields: Mapping[str, Any]) -> None:
        """Note the end and write everything; raises StorageError."""
        self._note("end", outcome=outcome, **fields)
        if self._flushing is not None:
            self._flushing.cancel()
        await self._flush()

    # --- what follows

    def _note(self, kind: str, **fields: Any) -> None:
        self._ledger.event(kind, **fields)
        self._events.append({"kind": kind, **fields})

    def _match(self) -> None:
        """Give waiting trials to cells that have nothing to do."""
        for place in self._cells.values():
            if not self._queue or self._finished:
                return
            if place.trial or place.drains or not place.is_ready():
                continue
            entry = self._entries[self._queue.popleft()]
            place.trial, place.stopping, place.beat = entry.order.trial, False, time.monotonic()
            entry.cell = place.name
            members = tuple(place.members[rank] for rank in range(place.size))
            task = Task(order=entry.order, generation=place.generation, members=members)
            for waiting in place.waiting.values():
                waiting.set_result(task)
            place.waiting = {}

    def _lose(self, place: Cell, why: str) -> None:
        """Put the trial that a cell has not ended back into the queue, first of all, from its newest checkpoint."""
        trial, place.trial = place.trial, ""
        entry = self._entries.get(trial)
        if entry is None or entry.cell != place.name or self._finished:
            return
        self._decide(entry, STOP)
        entry.cell, entry.losses = "", entry.losses + (0 if place.stopping else 1)
        self._note("lost", trial=trial, cell=place.name, reason=why)
        if entry.losses >= MAX_LOSSES:
            error = f"{why}, {entry.losses} times since its last evaluation; see to its memory, or mend its task"
            self._note_end(entry, "failed", {"error": error})
        else:
            asyncio.get_running_loop().create_task(self._requeue(entry))

    async def _requeue(self, entry: Entry) -> None:
        """Put a trial back into the queue, first of all, from its newest checkpoint."""
        order = entry.order
        step = await asyncio.to_thread(self._newest, order.run_url)
        if self._entries.get(order.trial) is not entry:
            return
        if step is not None and (order.resume is None or step > order.resume[1]):
            spent_s = entry.device_s if entry.step <= step else entry.device_s * step / entry.step
            decided = min(step, entry.decided)
            entry.order = replace(order, resume=(order.run_url, step), decided=decided, spent_s=spent_s)
        self._queue.appendleft(order.trial)
        self._match()

    def _note_end(self, entry: Entry, outcome: str, fields: Mapping[str, Any]) -> None:
        ended = {"step": entry.step, "device_s": entry.device_s, "error": "", "error_kind": "", **fields}
        self._note("ended", trial=entry.order.trial, outcome=outcome, **ended)
        self._tell(entry, entry.told(outcome, ended["error"]))

    @staticmethod
    def _decide(entry: Entry, word: str) -> None:
        if entry.decision is not None and not entry.decision.done():
            entry.decision.set_result(word)
        entry.decision = None

    def _tell(self, entry: Entry, message: Message) -> None:
        entry.inbox.append(message)
        self._wake(entry)

    @staticmethod
    def _wake(entry: Entry) -> None:
        if entry.reader is not None and not entry.reader.done():
            entry.reader.set_result(None)

    async def _keep_flushing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self._flush()
            except ElastrainError as error:
                self._failure = (type(error).__name__, str(error))
                return

    async def _flush(self) -> None:
        self._writing = self._writing or asyncio.Lock()
        async with self._writing:
            await asyncio.to_thread(self._hold.check)
            await asyncio.to_thread(self._ledger.flush)
