"""The membership of a run: a `Roster` behind a socket. No Ray, no torch.

Each worker keeps one connection to it, over which it enters, beats and is told what matters to it at once: that its
generation is over, that a change is due, that a stop is wished. The end of the connection is the end of the process:
the kernel closes it, so a death is known within a millisecond. Who is silent without an end loses its lease.

The messages, each a tuple whose first item is its name:

```
worker ─► enter (Worker, Position | None, left, failed)      beat (generation, step, doing, since_s, sent_at)
          ready (generation, connect_s, state_s)             stepped (generation)        noted (Position)
       ◄─ answer (left, Generation | Verdict)                reply (Reply, sent_at | None, stop)
```
"""

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

from elastrain.elastic.greeting import admit, hang_up, listen
from elastrain.elastic.protocol import Generation, Position, Reply, Roster, Verdict, Worker
from elastrain.elastic.recovery import Recovery
from elastrain.errors import ResourceError

SEND_S = 0.1  # whose buffers are full for so long is cut off: nothing is sent but what a worker reads at once
WAITING = "reduce"  # what a worker says that it does while it waits for the others


@dataclass(slots=True, eq=False)
class Line:
    """A worker's connection, and what it has been told."""

    connection: Connection
    name: str = ""
    left: int = 0  # the generation that it comes from, while it waits for an answer
    waits: bool = False
    generation: int = 0
    told: Reply | None = None
    step: int = 0
    doing: str = ""
    since: float = 0.0

    def send(self, *message: Any) -> None:
        """Send; that nobody listens any more, or can be told anything, is found out by whoever receives."""
        try:
            self.connection.send(message)
        except OSError:
            hang_up(self.connection)


@dataclass(slots=True, eq=False)
class Membership:
    """Serves a roster at `address` to whoever knows the `token`.

    `alike`: workers must name the same arithmetic. `timeout_s`: after so many seconds in which all members wait for
    each other their generation is over. `failure` is (error class name, message) of what ended the run; `lost` says
    that no member is left whose state could go on. `event(kind, fields)` is called for what belongs into the ledger.
    """

    roster: Roster
    event: Callable[[str, Mapping[str, Any]], None]
    alike: bool = False
    timeout_s: float = 60.0
    host: str = "127.0.0.1"
    token: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    stop: bool = False
    failure: tuple[str, str] | None = None
    lost: str = ""
    dropped: list[str] = field(default_factory=list)  # whose lease ran out: what is left of them is to be killed
    lines: dict[str, Line] = field(default_factory=dict)
    _recovery: Recovery = field(init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _closing: threading.Event = field(default_factory=threading.Event)
    _door: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self._door = listen(self.host)
        self._recovery = Recovery(self.event)
        for work in (self._accept, self._tick):
            threading.Thread(target=work, daemon=True, name=f"membership{work.__name__}").start()

    @property
    def address(self) -> tuple[str, int]:
        """Where workers connect."""
        return self.host, int(self._door.getsockname()[1])

    def close(self) -> None:
        """Hear and tell nothing any more."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        with self._lock:
            for line in self.lines.values():
                hang_up(line.connection)

    # --- what the driver says

    def ask_stop(self) -> None:
        """Ask the workers to stop at the next step boundary, after a commit."""
        with self._lock:
            self.stop = True
            # It is a step that tells all workers: who waits for more of them makes it without.
            self.roster.resize(1, self.roster.maximum)
            self.roster.expect(1)
            for line in self.lines.values():
                line.told = None  # the stop is news to everybody
            self._tell()

    def drain(self, names: Iterable[str]) -> None:
        """See `Roster.drain`."""
        with self._lock:
            self._recovery.drained.update(names)
            self.roster.drain(names)
            self._tell()

    def resize(self, minimum: int, maximum: int) -> None:
        """See `Roster.resize`."""
        with self._lock:
            self.roster.resize(minimum, maximum)
            self._tell()

    def expect(self, initial: int) -> None:
        """See `Roster.expect`."""
        with self._lock:
            self.roster.expect(initial)
            self._tell()

    def fail(self, name: str, message: str) -> None:
        """End the run with an error; the first one counts, since the others follow from it."""
        with self._lock:
            self.failure = self.failure or (name, message)
            self.end()

    def end(self) -> None:
        """Send everybody home."""
        with self._lock:
            self.roster.end()
            self._tell()

    def accepts(self, generation: int) -> bool:
        """See `Roster.accepts`."""
        with self._lock:
            return self.roster.accepts(generation)

    def trusts(self, name: str) -> bool:
        """Say whether a worker belongs to the newest generation, or left in good order: its checkpoint may count.

        The generation does not tell: one may have formed, with this worker in it, since the checkpoint was begun.
        """
        with self._lock:
            roster = self.roster
            members = {member.worker.name for member in roster.generation.members}
            return name in roster.released or (name in roster.seats and name in members)

    def view(self) -> dict[str, Any]:
        """Return who is there: `members` at work and `waiting` workers, as (name, node, cell); `missing` and `step`."""
        with self._lock:
            roster = self.roster
            names = [member.worker.name for member in roster.generation.members]
            live = {name: seat.worker for name, seat in roster.seats.items()}
            members = [live[name] for name in names if name in live]
            others = [worker for name, worker in live.items() if name not in names]
            steps = [self.lines[name].step for name in names if name in self.lines]
            return {
                "generation": roster.generation.number,
                "members": [(worker.name, worker.node, worker.cell) for worker in members],
                "waiting": [(worker.name, worker.node, worker.cell) for worker in others],
                "missing": roster.missing(),
                "step": max(steps, default=0),
            }

    # --- what workers say

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True, name="membership-line").start()

    def _serve(self, sock: socket.socket) -> None:
        """Hear one worker until its connection ends."""
        try:
            # A worker that is stopped or cut off reads nothing, and everybody else would wait for the lock behind it.
            line = Line(admit(sock, self.token, send_s=SEND_S))
        except (OSError, EOFError, AuthenticationError):
            return
        try:
            while not self._closing.is_set():
                kind, *arguments = line.connection.recv()
                with self._lock:
                    getattr(self, f"_hear_{kind}")(line, *arguments)
        except (OSError, EOFError, TypeError):
            pass
        finally:
            with self._lock:
                line.connection.close()
                self._gone(line)

    def _hear_enter(self, line: Line, worker: Worker, position: Position | None, *rest: Any) -> None:
        left, failed = rest
        line.name, line.left, line.waits, line.told = worker.name, left, True, None
        self.lines[worker.name] = line
        if self._is_unlike(worker):
            return
        now = time.monotonic()
        members = {member.worker.name for member in self.roster.generation.members}
        if worker.name in members and left == self.roster.generation.number:
            self._recovery.entered(worker.name, position, now, failed=failed)
        self.roster.enter(worker, position, now, left=left, failed=failed)
        self._tell()

    def _hear_beat(self, line: Line, generation: int, step: int, doing: str, since_s: float, sent_at: float) -> None:
        now = time.monotonic()
        line.step, line.doing, line.since = step, doing, now - since_s
        reply = self.roster.beat(line.name, generation, now)
        line.told = reply if generation == line.generation else line.told
        line.send("reply", reply, sent_at, self.stop)

    def _hear_ready(self, _: Line, generation: int, connect_s: float, state_s: float) -> None:
        if generation == self.roster.generation.number:
            self._recovery.ready(time.monotonic(), connect_s, state_s)

    def _hear_stepped(self, _: Line, generation: int) -> None:
        if generation == self.roster.generation.number:
            self._recovery.stepped(time.monotonic())

    def _hear_noted(self, _: Line, position: Position) -> None:
        self.roster.noted(position)
        self._tell()

    def _gone(self, line: Line) -> None:
        """A connection has ended: so has its process."""
        if self.lines.get(line.name) is not line or self._closing.is_set():
            return
        del self.lines[line.name]
        seat = self.roster.seats.get(line.name)
        if seat is not None and not self.roster.ended:
            self._lose(seat.worker, "its process ended", time.monotonic())
            self.roster.died(line.name)
            self._tell()

    def _is_unlike(self, worker: Worker) -> bool:
        """Say whether a worker would compute other bits than the others: it cannot take part."""
        other = next((seat.worker for seat in self.roster.seats.values()), None)
        if not self.alike or other is None or other.arithmetic == worker.arithmetic:
            return False
        kinds = sorted([(w.node[:12], w.arithmetic) for w in (other, worker)])
        named = "; ".join(f"node {node}: {kind}" for node, kind in kinds)
        message = f"consistency: bitwise needs workers that compute alike ({named}); use nodes of one kind, or sample"
        if self.roster.generation.number == 0:
            self.fail(ResourceError.__name__, message)
        else:
            self.event("refused", {"step": self.view()["step"], "worker": worker.name, "reason": message})
            line = self.lines[worker.name]
            line.waits = False  # else it would be told to come again, too
            line.send("answer", line.left, Verdict.LEAVE)
        return True

    # --- what follows

    def _lose(self, worker: Worker, why: str, since: float) -> None:
        """Note a loss; `since`: when it happened, as far as one can know.

        The roster may have formed the next generation at once, without it: it was a member of the one before.
        """
        if worker.name in self._recovery.members:
            self._recovery.lost(worker, why, since, time.monotonic())

    def _tell(self) -> None:
        """Tell everybody what has changed for them."""
        self._look()
        for line in list(self.lines.values()):
            if line.waits:
                answer = self.roster.answer(line.name, line.left)
                if answer is not Verdict.WAIT:
                    line.waits = False
                    if isinstance(answer, Generation):
                        line.generation, line.doing = answer.number, ""
                    line.send("answer", line.left, answer)
            elif line.name in self.roster.seats:
                reply = self.roster.reply(line.name, line.generation)
                if reply != line.told:
                    line.told = reply
                    line.send("reply", reply, None, self.stop)

    def _look(self) -> None:
        """See whether a generation has formed, and whether there is a state to go on from."""
        made, before = self.roster.generation, self._recovery.members
        if made.number == self._recovery.generation:
            # What they had is gone, whoever comes next: nobody need wait for that.
            over = self._recovery.has_losses() and not any(name in self.roster.seats for name in before)
        else:
            self._recovery.formed(made, time.monotonic())
            goes_on = made.source is not None or self._recovery.is_stored(self.roster.stored)
            # Who was lost before anybody had the state has taken nothing along.
            begins = not self._recovery.has_begun() and any(made.rank(name) is not None for name in before)
            over = bool(before) and not goes_on and not begins
        if over and not self.roster.ended:
            self.lost = f"all {len(before)} workers were lost" if len(before) > 1 else "a worker was lost"
            self.roster.end()

    def _tick(self) -> None:
        """Let leases run out, and end generations in which everybody waits."""
        pause = self.roster.lease_s / 16
        while not self._closing.wait(pause):
            with self._lock:
                now = time.monotonic()
                known = {name: seat.worker for name, seat in self.roster.seats.items()}
                since = now - self.roster.lease_s
                names = self.roster.tick(now)
                for name in names:
                    self._lose(known[name], "its lease ran out", since)
                    self.dropped.append(name)
                    self.roster.died(name)  # it is about to be killed: let it not come back just before
                if self._all_wait(now):
                    self.roster.fail()
                    names.append("")
                if names or self.roster.broken:
                    self._tell()

    def _all_wait(self, now: float) -> bool:
        """Say whether all members wait in a collective, longer than any takes."""
        names = [member.worker.name for member in self.roster.generation.members]
        lines = [self.lines[name] for name in names if name in self.lines]
        waiting = [line for line in lines if line.doing == WAITING and now - line.since > self.timeout_s]
        return len(names) > 1 and len(waiting) == len(names) and not self.roster.broken
