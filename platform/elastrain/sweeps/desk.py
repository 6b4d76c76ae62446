"""The desk: where trials wait for cells, cells for trials, and what both have to say is written down.

One actor of one event loop beside the driver. Nothing in it waits for storage: that is done in threads.
"""

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from elastrain.elastic.protocol import Worker
from elastrain.errors import ElastrainError, SpecError, ours
from elastrain.lease import Hold
from elastrain.observe.ledger import Ledger
from elastrain.sweeps.orders import Blueprint, Task
from elastrain.sweeps.places import Cell, Entry, Message

FLUSH_S = 1.0
LOOK_S = 1.0  # how long a worker's question what has become of its trial is held back
MAX_LOSSES = 3  # of a trial's workers in a row without an evaluation in between: then it is the trial's fault
GO_ON, STOP, LEAVE = "go on", "stop", "leave"


class Desk:
    """Brings trials and cells together; see the module."""

    def __init__(self, hold: Hold, attempt: int, blueprint: Blueprint, newest: Callable[[str], int | None]) -> None:
        """Begin the ledger of an attempt; `newest(run)` says which step of a trial's run can be gone on from."""
        self._ledger, self._hold = Ledger(hold.folder, attempt), hold
        self._blueprint, self._newest = blueprint, newest
        self._cells: dict[str, Cell] = {}
        self._entries: dict[str, Entry] = {}
        self._paused: dict[str, Entry] = {}
        self._gone: set[str] = set()  # cells that were dropped: what is left of them gets nothing
        self._queue: deque[str] = deque()  # trials that wait for a cell
        self._events: list[Mapping[str, Any]] = []
        self._finished = False
        self._failure: tuple[str, str] | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._writing: asyncio.Lock | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._token = secrets.token_bytes(32)

    # --- Tune's side

    async def next(self, trial: str, begin: Mapping[str, Any] | None) -> Message:
        """Begin a trial (see `Blueprint.order`) or let it go on; return what is to be decided next, or its end."""
        if begin is not None and (ended := self._begin(trial, begin)) is not None:
            return ended
        entry = self._entries[trial]
        if not entry.inbox:  # else the word is on what was told before: its cell was lost meanwhile
            self._decide(entry, GO_ON)
        while not entry.inbox and not self._finished:
            entry.reader = asyncio.get_running_loop().create_future()
            await entry.reader
        message = entry.inbox.popleft() if entry.inbox else entry.told("interrupted")
        if entry.ended and not entry.inbox:
            self._entries.pop(trial, None)
        return message

    async def leave(self, trial: str, outcome: str) -> None:
        """Stop a trial, since it was decided so: for good with an outcome, for now with none; one that pauses, too."""
        entry = self._entries.pop(trial, None) or self._paused.pop(trial, None)
        if entry is None:
            return
        if entry.ended:  # meanwhile: the word is on what was told before that
            if not outcome:
                self._paused[trial] = entry
            return
        with contextlib.suppress(ValueError):
            self._queue.remove(trial)
        if entry.decision is None and entry.cell:
            self._cells[entry.cell].stopping = True
        self._decide(entry, STOP)
        entry.cell = ""
        if not outcome:
            self._paused[trial] = entry
            return
        self._note_end(entry, outcome, {"error": "its place in Ray Tune was lost"} if outcome == "failed" else {})

    # --- workers

    async def token(self) -> bytes:
        """Return what a worker's peers have to know to be let in."""
        return self._token

    async def join(self, cell: str, rank: int, size: int, worker: Worker) -> None:
        """Take in a worker; one that stands in for another ends what the cell did."""
        if cell in self._gone:
            return
        place = self._cells.setdefault(cell, Cell(cell, size))
        if rank in place.members:
            place.broken = place.generation
            self._lose(place, f"worker {rank} was replaced")
        place.waiting.pop(rank, None)
        place.held.pop(rank, None)
        place.members[rank] = worker

    async def take(self, cell: str, rank: int, held: int | None) -> Task | None:
        """Wait for an order, as one who is in the group of generation `held`; None: there is nothing more to do."""
        place = self._cells.get(cell)
        if place is None or self._finished:
            return None
        order: asyncio.Future[Task | None] = asyncio.get_running_loop().create_future()
        place.waiting[rank], place.held[rank] = order, held
        if place.is_ready():
            self._lose(place, "its workers broke off")  # or it has ended, and this does nothing
            self._release(place)
            self._match()
        return await order

    async def evaluated(self, cell: str, trial: str, fields: Mapping[str, Any]) -> None:
        """Note an evaluation, unless the trial has been taken from the cell."""
        self._evaluated(cell, trial, fields)

    async def decide(self, cell: str, trial: str, fields: Mapping[str, Any]) -> str:
        """Note an evaluation, tell Tune's side of it and wait for the word: go on, or stop."""
        entry = self._evaluated(cell, trial, fields)
        if entry is None:
            return STOP
        if self._finished:
            return GO_ON  # to the next boundary, where it commits and stops
        entry.decided = entry.step
        entry.decision = asyncio.get_running_loop().create_future()
        self._tell(entry, entry.told(""))
        return await entry.decision

    async def over(self, cell: str, trial: str, outcome: str, fields: Mapping[str, Any]) -> None:
        """Note that a trial has ended: finished, diverged, failed, or "" as it was told to; the first word counts.

        `hopeless`: of what would end all others, too. It ends the sweep, and the trial goes on with the next one.
        """
        place, entry = self._cells.get(cell), self._entries.get(trial)
        if place is None or place.trial != trial:
            return
        place.trial = ""
        if outcome in ("failed", "hopeless"):
            place.broken = place.generation  # who failed leaves its group; the others are not to wait for it
        if entry is not None and entry.cell == cell and outcome:
            entry.cell = ""
            if outcome == "hopeless":
                self._fail(fields["error_kind"], f"{trial}: {fields['error']}")
            else:
                self._note_end(entry, outcome, fields)

    async def lost(self, cell: str, trial: str, why: str) -> None:
        """Note that a worker cannot go on with a trial: its group is broken, or it was told to stop."""
        place = self._cells.get(cell)
        if place is not None and place.trial == trial:
            place.broken = place.generation
            self._lose(place, why)

    async def beat(self, cell: str, trial: str, step: int, device_s: float) -> None:
        """Note a sign of life of a trial, and what it has come to."""
        place = self._cells.get(cell)
        if place is not None and place.trial == trial:
            place.beat, place.step, place.device_s = time.monotonic(), step, device_s

    async def look(self, cell: str, trial: str, generation: int) -> str:
        """Say what has become of a trial in a cell; held back for a second while there is nothing to say.

        STOP: commit and stop at the next boundary. LEAVE: the group of this generation lacks a member; leave it.
        """
        deadline = time.monotonic() + LOOK_S
        while time.monotonic() < deadline:
            place = self._cells.get(cell)
            if place is None or generation <= place.broken:
                return LEAVE
            if place.trial != trial:
                return GO_ON
            if place.stopping:
                return STOP
            await asyncio.sleep(0.02)
        return GO_ON

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
        """Have a cell stop its trial at the next boundary, after a commit, and end."""
        if place := self._cells.get(cell):
            place.stopping = place.drains = True
            self._release(place)

    async def drop(self, cell: str, why: str) -> None:
        """Forget a cell that is no more; its trial goes on elsewhere."""
        self._gone.add(cell)
        place = self._cells.pop(cell, None)
        if place is not None:
            self._lose(place, why)
            place.answer(None)
            self._match()

    async def finish(self) -> None:
        """Stop all trials and send all workers home: those that run stop at the next boundary, after a commit."""
        self._finished = True
        for place in self._cells.values():
            place.stopping = True
            place.answer(None)
        for entry in list(self._entries.values()):
            self._decide(entry, GO_ON)  # to the next boundary: nothing is committed where a decision is waited for
            self._wake(entry)

    async def close(self, outcome: str, fields: Mapping[str, Any]) -> None:
        """Note the end and write everything; raises StorageError."""
        self._note("end", outcome=outcome, **fields)
        if self._flushing is not None:
            self._flushing.cancel()
        await self._flush()

    # --- what follows

    def _begin(self, trial: str, begin: Mapping[str, Any]) -> Message | None:
        """Queue a trial; return its end if it has ended before it was paused, or its run refuses its point."""
        paused = self._paused.pop(trial, None)
        if paused is not None and paused.ended:
            return paused.inbox[-1]
        try:
            order = self._blueprint.order(trial, begin)
        except SpecError as error:
            step, spent_s = begin["resume"][1] if begin["resume"] else 0, begin["spent_s"]
            ended = {"step": step, "device_s": spent_s, "error": str(error), "error_kind": SpecError.__name__}
            self._note("ended", trial=trial, outcome="failed", **ended)
            return {**ended, "run": "", "value": None, "outcome": "failed"}
        self._entries[trial] = Entry(order, decided=order.decided, device_s=order.spent_s)
        self._entries[trial].step = order.resume[1] if order.resume else 0
        self._queue.append(trial)
        self._match()
        return None

    def _note(self, kind: str, **fields: Any) -> None:
        self._ledger.event(kind, **fields)
        self._events.append({"kind": kind, **fields})

    def _evaluated(self, cell: str, trial: str, fields: Mapping[str, Any]) -> Entry | None:
        entry = self._entries.get(trial)
        if entry is None or entry.cell != cell:
            return None
        self._note("eval", trial=trial, **fields)
        entry.step, entry.value, entry.device_s = fields["step"], fields["value"], fields["device_s"]
        entry.losses = 0
        if entry.order.untold:
            entry.order = replace(entry.order, untold=False)
        return entry

    @staticmethod
    def _release(place: Cell) -> None:
        """Send a cell's workers home that is to take no trial any more, once all of them wait."""
        if place.drains and place.is_ready():
            place.answer(None)

    def _match(self) -> None:
        """Give waiting trials to cells that have nothing to do."""
        for place in self._cells.values():
            if not self._queue or self._finished:
                return
            if place.trial or place.drains or not place.is_ready():
                continue
            entry = self._entries[self._queue.popleft()]
            place.trial, place.stopping, place.beat = entry.order.trial, False, time.monotonic()
            place.step, place.device_s = entry.step, entry.device_s
            entry.cell = place.name
            members = tuple(place.members[rank] for rank in range(place.size))
            place.answer(Task(order=entry.order, generation=place.renew(), members=members))

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
            spent = {"step": max(entry.step, place.step), "device_s": max(entry.device_s, place.device_s)}
            self._note_end(entry, "failed", {"error": error, **spent})
        else:
            task = asyncio.get_running_loop().create_task(self._requeue(entry))
            self._tasks.add(task)  # or it might be collected
            task.add_done_callback(self._tasks.discard)

    async def _requeue(self, entry: Entry) -> None:
        """Put a trial back into the queue, first of all, from its newest checkpoint."""
        order = entry.order
        try:
            step = await asyncio.to_thread(self._newest, order.run_url)
        except Exception as error:  # noqa: BLE001 -- the sweep ends, or nobody would ever run the trial
            if self._entries.get(order.trial) is entry:
                self._fail(type(ours(error) or ElastrainError()).__name__, str(error) or repr(error))
            return
        if self._entries.get(order.trial) is not entry:
            return
        if step is not None and (order.resume is None or step > order.resume[1]):
            spent_s = entry.device_s if entry.step <= step else entry.device_s * step / entry.step
            resume, untold = (order.run_url, step), step > entry.step
            entry.order = order = replace(order, resume=resume, untold=untold, spent_s=spent_s)
        entry.order = replace(order, decided=entry.decided)  # nothing is decided on twice
        self._queue.appendleft(order.trial)
        self._match()

    def _note_end(self, entry: Entry, outcome: str, fields: Mapping[str, Any]) -> None:
        ended = {"step": entry.step, "device_s": entry.device_s, "error": "", "error_kind": "", **fields}
        entry.ended, entry.step, entry.device_s = True, ended["step"], ended["device_s"]
        self._note("ended", trial=entry.order.trial, outcome=outcome, **ended)
        self._tell(entry, entry.told(outcome, ended["error"]))

    def _fail(self, kind: str, error: str) -> None:
        """Have the driver end the sweep with an error; the first one counts."""
        self._failure = self._failure or (kind, error)

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
            except Exception as error:  # noqa: BLE001 -- the driver has to hear of it
                self._fail(type(ours(error) or ElastrainError()).__name__, str(error) or repr(error))
                return

    async def _flush(self) -> None:
        self._writing = self._writing or asyncio.Lock()
        async with self._writing:
            await asyncio.to_thread(self._hold.check)
            await asyncio.to_thread(self._ledger.flush)
