"""A worker's seat in the membership: the group of each step, and the thread that keeps the seat.

The thread beats, hears what the membership has to say and, if the generation is over, wakes the main thread out of
whatever it waits for. It also watches the main thread: one that computes for longer than any step takes, or does not
let go of a generation that is over, ends the process; the others have long gone on by then, or are about to.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from elastrain.elastic.door import Door
from elastrain.elastic.greeting import call, hang_up
from elastrain.elastic.membership import WAITING
from elastrain.elastic.protocol import Generation, Lease, Position, Reply, Verdict, Worker
from elastrain.errors import ResourceError
from elastrain.observe.ledger import Clock
from elastrain.training.loop import Decision
from elastrain.training.reduce import Group, GroupLost
from elastrain.training.state import TrainState

BEAT_S = 0.1
HUNG = 70  # the exit code of a process that ended itself because its main thread stood still
CONNECT_TRIES = 3  # generations in a row that do not come about, though nobody in them is known to be gone
FIRST_STEP_FACTOR = 10.0  # compiling, first touches of memory: a process's first step may take so much longer


class Dismissed(Exception):  # noqa: N818 -- an event
    """The membership has no place for this worker; `again`: for this process, but a new one would be welcome."""

    def __init__(self, verdict: Verdict | None) -> None:
        super().__init__(verdict)  # as it is: Ray makes it anew in another process
        self.again = verdict in (Verdict.DROPPED, Verdict.DEAD)

    def __str__(self) -> str:
        verdict: Verdict | None = self.args[0]
        return verdict.value if verdict else "the membership is gone"


class MemberSeat:
    """A place in the membership at `address`, for worker `me`.

    `restore(state, generation)` loads what is in storage, if anything.

    `before_entering` is called whenever the worker leaves a generation: what it reported must then have arrived.
    """

    def __init__(  # noqa: PLR0913 -- each is named
        self,
        address: tuple[str, int],
        token: bytes,
        *,
        me: Worker,
        door: Door,
        device: torch.device,
        clock: Clock,
        lease_s: float,
        timeout_s: float,
        restore: Callable[[TrainState, int], None],
        before_entering: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection: Connection = call(address, token)
        self._me, self._door, self._device, self._clock = me, door, device, clock
        self._lease_s, self._timeout_s = lease_s, timeout_s
        self._restore, self._before_entering = restore, before_entering
        self._changed = threading.Condition()
        self._send_lock = threading.Lock()
        self._stop, self._gone, self._closed = False, False, False
        self._introduced = False
        self._number, self._entered = 0, False  # the generation that it is in or, once it has entered, comes from
        self._answer: Generation | Verdict | None = None
        self._reply = Reply(generation=0)
        self._lease = Lease(0, lease_s)
        self._lost = threading.Event()
        self._lost_at: float | None = None
        self._group: Group | None = None
        self._due = False  # a change was decided: the next call of `group` enters
        self._step, self._fresh = 0, False
        self.has_stepped = False  # a step has gone well in this process
        self._failed = False
        self._began: Position = (0, 0)
        self._whole = False  # the state counts: it came from the generation's source
        threading.Thread(target=self._keep, daemon=True, name="seat").start()

    # --- what the loop asks

    def group(self, state: TrainState) -> Group:
        """See `training.loop.Seat.group`; raises Dismissed if this worker has no place any more.

        Raises ResourceError if the members cannot connect, though they are all there.
        """
        self._step = state.step
        if self._fresh and self._group is not None and state.position() > self._began:
            self._fresh = False
            self.has_stepped = True
            self._send("stepped", self._number)
        if self._group is None or self._due:
            self._form(state)
        assert self._group is not None
        self._may_start()
        return self._group

    def decision(self) -> Decision:
        """Return what this worker has been told to ask the others for."""
        reply = self._reply
        known = reply.generation == self._number
        if not known or not reply.change:
            return Decision(stop=self._stop)
        return Decision(stop=self._stop, change=True, commit=reply.commit, leave=reply.leave)

    def change(self) -> None:
        """Enter at the next call of `group`: all members do."""
        self._due = True

    def lost(self) -> None:
        """Leave the group, which has failed; the next call of `group` enters."""
        self._leave(failed=True)

    def noted(self, position: Position) -> None:
        """Tell the membership that a checkpoint of this position is in storage."""
        self._send("noted", position)

    def close(self) -> None:
        """Leave the membership: the end of the connection says it."""
        self._closed = self._gone = True
        hang_up(self._connection)

    # --- from one generation to the next

    def _leave(self, *, failed: bool) -> None:
        group, self._group, self._failed = self._group, None, failed
        if group is not None and hasattr(group, "abandon"):
            group.abandon()

    def _form(self, state: TrainState) -> None:
        """Enter until a generation has formed in which all members have the state."""
        self._clock.switch("wait" if self._number else "start")
        if self._group is not None:
            self._leave(failed=False)
        self._due, tries = False, 0
        while True:
            self._before_entering()
            generation = self._enter(state, failed=self._failed)
            start = time.perf_counter()
            try:
                group = self._group = self._door.join(generation, self._me.name, self._device, self._lost)
                connected = time.perf_counter()
                self._share(state, group, generation)
            except GroupLost as error:
                tries = tries + 1 if self._group is None and not self._lost.is_set() else 0
                if tries == CONNECT_TRIES:
                    raise ResourceError(f"the workers cannot connect with each other: {error}") from error
                self._leave(failed=True)
                continue
            self._whole, self._failed = True, False
            self._began, self._fresh = state.position(), True
            if group.rank == 0:
                self._send("ready", self._number, connected - start, time.perf_counter() - connected)
            return

    def _enter(self, state: TrainState, *, failed: bool) -> Generation:
        """Ask for a place and wait for the answer."""
        with self._changed:
            self._entered, self._answer, self._lost_at = True, None, None
        position = state.position() if self._whole else None
        self._send("enter", self._me, position, self._number, failed)
        self._introduced = True  # from now on it beats, also while it waits for its first generation
        with self._changed:
            answer = self._awaited()
            if not isinstance(answer, Generation):
                raise Dismissed(answer)
            rank = answer.rank(self._me.name)
            assert rank is not None, "who is answered with a generation is a member"
            self._whole = self._whole and answer.members[rank].position is not None
            return answer

    def _awaited(self) -> Generation | Verdict | None:
        self._changed.wait_for(lambda: self._answer is not None or self._gone)
        return self._answer

    def _share(self, state: TrainState, group: Group, generation: Generation) -> None:
        """Give all members the state of the source; nothing to do where all have it."""
        positions = [member.position for member in generation.members]
        if generation.source is None and group.rank == 0:
            self._restore(state, generation.number)
        if None in positions or len(set(positions)) > 1:
            state.share(group, generation.source or 0)

    def _may_start(self) -> None:
        """Wait until the lease allows a step; raises GroupLost if the generation is over instead."""
        if self._lease.valid(time.monotonic()):
            return
        self._clock.switch("wait")
        with self._changed:
            while not self._lease.valid(time.monotonic()):
                if self._lost.is_set() or self._gone:
                    raise GroupLost("the membership ended the generation")
                self._changed.wait(BEAT_S)

    # --- the thread that keeps the seat

    def _keep(self) -> None:
        due = 0.0
        try:
            while not self._gone:
                now = time.monotonic()
                if now >= due:
                    self._beat(now)
                    due = now + BEAT_S
                    self._watch(now)
                if self._connection.poll(max(0.0, due - time.monotonic())):
                    self._hear(*self._connection.recv())
        except (OSError, EOFError):
            pass
        finally:  # without this thread nobody would wake or watch the main thread
            self._connection.close()
            with self._changed:
                self._gone = True
                self._end_generation()
                self._changed.notify_all()
        self._ends_if_stuck()

    def _end_generation(self) -> None:
        """Wake the main thread out of whatever it waits for in its group."""
        self._lost_at = self._lost_at or time.monotonic()
        self._lost.set()
        if self._group is not None and hasattr(self._group, "abandon"):
            self._group.abandon()

    def _send(self, *message: Any) -> None:
        with self._send_lock, contextlib.suppress(OSError):
            self._connection.send(message)

    def _beat(self, now: float) -> None:
        if self._introduced:
            doing, since = self._clock.running()
            waits = getattr(self._group, "waits", None)
            if waits is not None:  # for the others, whatever the time is booked under
                doing, since = WAITING, waits
            self._send("beat", self._number, self._step, doing, time.perf_counter() - since, now)

    def _hear(self, kind: str, *arguments: Any) -> None:
        with self._changed:
            if kind == "answer":
                self._answered(*arguments)
            else:
                self._replied(*arguments)
            self._changed.notify_all()

    def _answered(self, left: int, answer: Generation | Verdict) -> None:
        if not self._entered or left != self._number:
            return
        self._answer = answer
        if isinstance(answer, Generation):
            self._number, self._entered = answer.number, False
            self._lease = Lease(answer.number, self._lease_s)
            self._reply = Reply(generation=answer.number)
            self._lost = threading.Event()
            self._beat(time.monotonic())

    def _replied(self, reply: Reply, sent_at: float | None, stop: bool) -> None:  # noqa: FBT001 -- as sent
        self._stop = self._stop or stop
        if reply.generation != self._number:
            return
        if self._entered:
            if reply.dropped:
                self._answer = Verdict.DROPPED
            return
        self._reply = reply
        self._lease.renewed(reply, float("-inf") if sent_at is None else sent_at)
        if (reply.dropped or reply.abort) and not self._lost.is_set():
            self._end_generation()

    def _watch(self, now: float) -> None:
        """End the process if the main thread stands still."""
        doing, since = self._clock.running()
        limit = self._timeout_s * (1.0 if self.has_stepped else FIRST_STEP_FACTOR)
        works, works_s = doing in ("compute", "evaluate"), time.perf_counter() - since
        computes = works and works_s > limit
        lost_s = 0.0 if self._lost_at is None else now - self._lost_at
        waits = getattr(self._group, "waits", None) is not None  # in a sum that does not let go of it
        clings = self._timeout_s < (min(works_s, lost_s) if works else lost_s if waits else 0.0)
        if computes or clings:
            self._die(f"a worker stood still in step {self._step} for {limit if computes else self._timeout_s:g} s")

    def _ends_if_stuck(self) -> None:
        """The membership is gone; give the main thread the time to notice, then end the process."""
        threading.Event().wait(2 * self._timeout_s)
        if not self._closed:
            self._die("a worker did not end after its run had ended")

    def _die(self, why: str) -> None:
        sys.stderr.write(f"elastrain: {why}; its threads were doing this:\n")
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(HUNG)
