"""What happens to the workers of a history, and the processes to which it happens.

A worker asks at each place (see `process_worker`) what is to happen there; the first event that is due answers, and
acts: on that worker, on others, on the membership.
"""

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from tests.elastic.process_worker import Job, in_process

LEASE_S, TIMEOUT_S = 1.0, 2.0
HOLD_S = 1.0  # the longest that workers are held at a place
PASSED_ON = ("sync", "report", "result", "event")  # as they are, to the host
RAMPED = 3  # steps after which a process may fail and hang like any other; in its first, other rules hold


@dataclass(frozen=True, kw_only=True)
class Event:
    """In `step` or later, when a worker that is `who` stands at `place`: what happens, and how many workers are new.

    To it: kill, stop (SIGSTOP), wake (SIGSTOP, SIGCONT after its lease), pause (SIGSTOP, SIGCONT before), raise, hang,
    slow, drain. To others: kill_two (it and another), kill_lead, kill_others, kill_all, kill_waiting, drain_all,
    stop_run, resize to `limits`. To nobody: grow. Places: audited, phase 0, phase 1, evaluation, commit, join,
    broadcast.
    """

    action: str
    step: int = 0
    place: str = "audited"
    who: str = "any"  # or lead, other, newcomer
    newcomers: int = 0
    delay_s: float = 0.0
    limits: tuple[int, int] = (1, 9)


@dataclass(slots=True, eq=False)
class Member:
    """A worker as the test sees it. `harm`: what was done to it; `end`: how it ended, in its own words."""

    process: Any
    pipe: Connection
    name: str
    seated: threading.Event = field(default_factory=threading.Event)
    job: tuple[Job, int] | None = None
    thread: threading.Thread | None = None
    harm: str = ""
    end: str = ""
    steps: set[int] = field(default_factory=set)
    settled: bool = False

    def signal(self, number: int) -> None:
        """Send a signal to this process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it; what it told and nobody has heard is lost."""
        self.harm = "killed"
        self.signal(signal.SIGKILL)

    def is_well(self) -> bool:
        """Say whether it trains, and nothing was done to it."""
        return self.seated.is_set() and self.process.is_alive() and not self.harm and not self.end


@dataclass(kw_only=True)
class Stage:
    """Processes, and events that happen to them. `newest_first`: a newcomer's place is before those of the others."""

    events: tuple[Event, ...] = ()
    newest_first: bool = False
    slots: int = 6
    seen: Counter[str] = field(default_factory=Counter)
    members: list[Member] = field(default_factory=list)
    host: Any = field(init=False)  # a Host; Ray's types take its methods for those of an actor
    job: Job = field(init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _due: list[Event] = field(init=False)
    _hold: float = 0.0
    _timers: list[threading.Timer] = field(default_factory=list)
    _wrong: str = ""

    def __post_init__(self) -> None:
        self._due = list(self.events)

    # --- processes

    def spare(self, count: int) -> None:
        """Start processes that wait to be seated."""
        context = get_context("forkserver")
        for _ in range(count):
            pipe, theirs = context.Pipe()
            process = context.Process(target=in_process, args=(theirs, len(self.members)))
            process.start()
            theirs.close()
            member = Member(process, pipe, f"{len(self.members)}-{process.pid}")
            member.thread = threading.Thread(target=self._serve, args=(member,), daemon=True)
            self.members.append(member)
            member.thread.start()

    def seat(self, count: int) -> list[Member]:
        """Let processes ask for a place; return them."""
        with self._lock:
            self.spare(count - sum(not member.seated.is_set() for member in self.members))
            new = [member for member in self.members if not member.seated.is_set()][: max(0, count)]
            for member in new:
                number = self.members.index(member)
                member.job = (self.job, 100 - number if self.newest_first else number)
                member.seated.set()
            return new

    def clear(self) -> None:
        """End all processes."""
        for timer in self._timers:
            timer.cancel()
        for member in self.members:
            member.process.kill()
            member.process.join()
            member.seated.set()
            if member.thread is not None:
                member.thread.join()
            member.pipe.close()
            member.process.close()

    def _serve(self, member: Member) -> None:
        """Hear a worker until its process ends; the first finding is kept for the history."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, asked, arguments = member.pipe.recv()
                if member.harm == "killed":
                    continue
                answer = self._heard(kind, member, arguments)
                if asked:
                    member.pipe.send(answer)

    def _heard(self, kind: str, member: Member, arguments: tuple[Any, ...]) -> Any:
        try:
            if kind in PASSED_ON:
                with self._lock:
                    return getattr(self.host, kind)(*arguments)
            return None if kind == "arrived" else getattr(self, f"hear_{kind}")(member, *arguments)
        except Exception as error:  # noqa: BLE001 -- brought to the test
            self._wrong = self._wrong or f"{kind} of {member.name}: {error!r}"

    def hear_seat(self, member: Member) -> tuple[Job, int] | None:
        """Let a process wait until it is seated."""
        member.seated.wait()
        return member.job

    # --- events

    def hear_at(self, member: Member, place: str, step: int, generation: int) -> str:
        """A worker stands at a place: let what is due there happen, and answer what it has to do."""
        while time.monotonic() < self._hold and member.harm != "killed":
            time.sleep(0.005)
        with self._lock:
            kinds = {"any", "lead" if self._leads(member) else "other", *(() if member.steps else ("newcomer",))}
            event = next((e for e in self._due if e.place == place and step >= e.step and e.who in kinds), None)
            if event is None or member.harm or not self.host.membership.accepts(generation):
                return ""
            self._due.remove(event)
            self.seen += Counter({event.action: 1, place: 1})
            new = self.seat(event.newcomers)
        self._await_entered(new)
        if event.action in ("raise", "hang", "slow"):
            return self._told(member, event.action)
        if event.delay_s:
            self._later(event.delay_s, self._happens, member, event)
        else:
            self._happens(member, event)
        return ""

    def _await_entered(self, members: list[Member]) -> None:
        """Wait until newcomers ask for a place."""
        deadline = time.monotonic() + HOLD_S
        while time.monotonic() < deadline:
            if all(m.name in self.host.membership.roster.seats or not m.process.is_alive() for m in members):
                return
            time.sleep(0.005)

    def _told(self, member: Member, action: str) -> str:
        with self._lock:
            if action == "slow" or member.harm:
                return action
            if len(member.steps) < RAMPED:
                member.kill()
            else:
                member.harm = {"raise": "raised", "hang": "hung"}[action]
            return action

    def _later(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        timer = threading.Timer(seconds, call, arguments)
        self._timers.append(timer)
        timer.start()

    def _leads(self, member: Member) -> bool:
        return bool(self.host.membership.roster.generation.rank(member.name) == 0)

    def _happens(self, member: Member, event: Event) -> None:
        with self._lock:
            if self.host.membership.roster.ended:
                return
            if event.action == "resize":
                self.host.resize(*(min(limit, self.slots) for limit in event.limits))
            elif event.action == "stop_run":
                self.host.ask_stop()
            elif event.action.startswith("drain"):
                chosen = [member] if event.action == "drain" else self._well()
                self.host.drain([other.name for other in chosen])
            elif event.action.startswith("kill"):
                for other in self._victims(member, event.action):
                    other.kill()
            elif event.action != "grow" and not member.harm:
                self._stop(member, event.action)

    def _well(self) -> list[Member]:
        return [member for member in self.members if member.is_well()]

    def _victims(self, member: Member, action: str) -> list[Member]:
        others = [other for other in self._well() if other is not member]
        generation = self.host.membership.roster.generation
        chosen: dict[str, list[Member]] = {
            "kill": [member],
            "kill_two": [member, *others[:1]],
            "kill_others": others,
            "kill_all": [member, *others],
            "kill_lead": [other for other in self._well() if self._leads(other)],
            "kill_waiting": [other for other in others if generation.rank(other.name) is None],
        }
        return chosen[action]

    def _stop(self, member: Member, action: str) -> None:
        member.harm = {"stop": "stopped", "pause": "paused", "wake": "woken"}[action]
        member.signal(signal.SIGSTOP)
        if action == "pause":
            self._later(0.3 * LEASE_S, self._go_on, member)
        if action == "wake":  # the others wait for it, so that it is awake again while they train
            self._later(1.05 * LEASE_S, self._hold_all)
            self._later(1.4 * LEASE_S, self._go_on, member)

    def _hold_all(self) -> None:
        self._hold = time.monotonic() + 0.5 * LEASE_S

    def _go_on(self, member: Member) -> None:
        with self._lock:
            if member.harm == "paused":
                member.harm = ""
            member.signal(signal.SIGCONT)
