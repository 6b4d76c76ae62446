"""Histories of runs on bare processes: a real membership, real seats, real groups, real signals. No Ray is started.

`History(…).run()` plays one: it seats workers, lets its events happen, begins anew from storage when nobody is left,
and raises `Violation` where something happened that must not; `check` compares what came of it with one worker that
nobody disturbed. Workers wait at each place where an event may come (see `process_worker`), so a history is exact: in
this step, at this place, to this worker. What is not exact, such as who wins a race, is what it is there to try.
"""

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
from tests.elastic.process_worker import RAISED, Job, in_process, setup_of

from elastrain.elastic.host import AUDIT, METRICS, Host
from elastrain.elastic.protocol import Roster
from elastrain.elastic.seat import HUNG
from elastrain.observe.ledger import read_ledger, read_steps
from elastrain.training.manifests import newest_whole, read_manifest

LEASE_S, TIMEOUT_S = 1.0, 2.0
BOUND_S = 30.0  # a history that takes longer hangs
HOLD_S = 1.0  # the longest that workers are held at a place; less than what the watchdog allows
END_S = 10.0  # within which everybody is gone once the run is over
ATTEMPTS = 9


class Violation(AssertionError):  # noqa: N818 -- a finding
    """Something that must not happen."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """In `step` or later, when a worker that is `who` stands at `place`: what happens, and how many workers are new.

    To it: kill, stop (SIGSTOP), wake (SIGSTOP, SIGCONT after its lease), pause (SIGSTOP, SIGCONT before), raise, hang,
    slow, drain. To others: kill_two (it and another), kill_lead, kill_others, kill_all, kill_waiting, drain_all, stop_run,
    resize to `limits`. Nothing: grow.
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
    seated: threading.Event = field(default_factory=threading.Event)
    job: tuple[Job, int] | None = None
    thread: threading.Thread | None = None
    name: str = ""
    harm: str = ""
    end: str = ""
    steps: set[int] = field(default_factory=set)
    settled: bool = False

    def signal(self, number: int) -> None:
        """Send a signal to this process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


@dataclass(kw_only=True)
class History:
    """A run of a kind from `process_worker.KINDS` that begins with `size` workers; `changes` are those of its spec.

    `newest_first`: a newcomer's place is before those of the others.
    """

    kind: str = "mlp"
    size: int = 3
    events: tuple[Event, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    limits: tuple[int, int] = (1, 9)
    variant: str = ""
    newest_first: bool = False
    seen: Counter[str] = field(default_factory=Counter)
    result: dict[str, Any] = field(default_factory=dict)
    lines: pa.Table | None = None
    audit: pa.Table | None = None
    ledger: list[dict[str, Any]] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)

    def run(self) -> "History":
        """Play it; returns itself."""
        self._lock, self._due = threading.RLock(), list(self.events)
        self._begun, self._wrong, self._hold = time.monotonic(), "", 0.0
        self._timers: list[threading.Timer] = []
        with tempfile.TemporaryDirectory(prefix="history-") as folder:
            self._url = folder
            self._setup = setup_of(self.kind, folder, **self.changes)
            try:
                self._spare(self.size + sum(event.newcomers for event in self.events))
                self._attempts()
                self.audit, self.lines = (read_steps(str(Path(folder, name))) for name in ("audit", "metrics"))
                self.ledger = read_ledger(folder)
                self._check_end()
            finally:
                self._clear()
        return self

    # --- attempts

    def _attempts(self) -> None:
        limits = self.limits
        for attempt in range(ATTEMPTS):
            resume = newest_whole(self._url, warn=self._fail)
            self._step, self._spans = resume or 0, {}
            self._host = self._opened(attempt, resume, limits)
            self._job = Job(
                setup=self._setup,
                address=self._host.membership.address,
                token=self._host.membership.token,
                resume=resume,
                lease_s=LEASE_S,
                timeout_s=TIMEOUT_S,
                variant=self.variant,
            )
            self._seat(self.size)
            try:
                found = self._watch()
            finally:
                self._host.close("done" if self.result else "failed", {})
            self._check_steps(resume or 0)
            if found is not None and not found["stopped"]:
                self.result = found
                return
            self.seen["attempt"] += 1
            for member in self.members:
                if member.seated.is_set():
                    self._kill(member)
        self._fail(f"{ATTEMPTS} attempts came to nothing")

    def _opened(self, attempt: int, resume: int | None, limits: tuple[int, int]) -> Host:
        least, most = limits[0], min(limits[1], self._setup.spec.num_slots)
        initial = min(max(self.size, least), most)
        roster = Roster(minimum=least, maximum=most, initial=initial, lease_s=LEASE_S)
        host = Host(self._url, attempt, roster, resume or 0, alike=True, timeout_s=TIMEOUT_S)
        host.open()
        return host

    def _watch(self) -> dict[str, Any] | None:
        """See to it that enough workers are there; return the result, None if nobody has the state any more."""
        while True:
            now = self._host.poll()
            self._tend(now)
            if now["outcome"]:
                self._wait_for_the_end()
                found: dict[str, Any] = now["outcome"]
                return found
            if now["failure"]:
                self._fail(f"the run failed: {now['failure']}")
            if now["lost"]:
                self._check_lost()
                return None
            if time.monotonic() - self._begun > BOUND_S:
                for member in self._living():
                    member.signal(signal.SIGUSR1)
                time.sleep(0.5)
                self._fail(f"no end: {now}")
            time.sleep(0.01)

    def _tend(self, now: dict[str, Any]) -> None:
        for member in self.members:
            if member.name in self._host.membership.dropped and member.harm not in ("killed", "woken"):
                self.seen["late"] += member.harm != "stopped"
                self._kill(member)
            if member.seated.is_set() and not member.settled and not member.process.is_alive():
                self._check_ended(member)
        there = {name for kind in ("members", "waiting") for name, _, _ in now[kind]}
        coming = [
            m for m in self.members if m.seated.is_set() and not m.settled and m.name not in there and not m.steps
        ]
        coming = [m for m in coming if not m.harm and not m.end]
        self._seat(now["missing"] - len(coming))
        if self._wrong:
            raise Violation(self._wrong)

    def _wait_for_the_end(self) -> None:
        deadline = time.monotonic() + END_S
        for member in self.members:
            if member.harm in ("stopped", "paused", "hung"):
                self._kill(member)
            if member.seated.is_set():
                member.process.join(max(0.0, deadline - time.monotonic()))
                if member.process.is_alive():
                    self._fail(f"{member.name} is still there though the run is over ({member.harm or 'unharmed'})")
                self._check_ended(member)

    def _clear(self) -> None:
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

    # --- processes

    def _spare(self, count: int) -> None:
        """Start processes that wait to be seated."""
        context = get_context("forkserver")
        for _ in range(count):
            pipe, theirs = context.Pipe()
            process = context.Process(target=in_process, args=(theirs, len(self.members)))
            process.start()
            theirs.close()
            member = Member(process, pipe, name=f"{len(self.members)}-{process.pid}")
            member.thread = threading.Thread(target=self._serve, args=(member,), daemon=True)
            self.members.append(member)
            member.thread.start()

    def _seat(self, count: int) -> list[Member]:
        with self._lock:
            free = [member for member in self.members if not member.seated.is_set()]
            if len(free) < count:
                self._spare(count - len(free))
                free = [member for member in self.members if not member.seated.is_set()]
            for member in free[: max(0, count)]:
                number = self.members.index(member)
                member.job = (self._job, 100 - number if self.newest_first else number)
                member.seated.set()
            return free[: max(0, count)]

    def _kill(self, member: Member) -> None:
        member.harm = "killed"  # what it told and nobody has heard is lost
        member.signal(signal.SIGKILL)

    def _serve(self, member: Member) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, asked, arguments = member.pipe.recv()
                if member.harm == "killed" and not member.settled:
                    continue
                try:
                    answer = getattr(self, f"_hear_{kind}")(member, *arguments)
                except (EOFError, OSError):
                    raise
                except BaseException as error:  # noqa: BLE001 -- brought to the test
                    self._note_wrong(f"{kind} of {member.name}: {error!r}")
                    return
                if asked:
                    member.pipe.send(answer)

    # --- what workers say

    def _hear_seat(self, member: Member) -> tuple[Job, int] | None:
        member.seated.wait()
        return member.job

    def _hear_audit(self, member: Member, lines: Any, generation: int) -> None:
        with self._lock:
            if member.harm != "killed" and self._host.membership.accepts(generation):
                steps = {step for step, _, _ in lines}
                member.steps |= steps
                span = self._spans.setdefault(generation, set())
                span |= steps
            self._host.audit(lines)

    def _hear_arrived(self, member: Member) -> None:
        pass

    def _hear_sync(self, member: Member, name: str) -> bool:
        with self._lock:
            return self._host.sync(name)

    def _hear_report(self, member: Member, name: str, status: Any) -> None:
        self._host.report(name, status)

    def _hear_result(self, member: Member, found: Any) -> None:
        with self._lock:
            self._host.result(found)

    def _hear_event(self, member: Member, kind: str, fields: Any) -> None:
        self._host.event(kind, fields)

    def _hear_dismissed(self, member: Member, why: str, again: bool) -> None:
        member.end = f"dismissed: {why}"

    def _hear_finished(self, member: Member) -> None:
        member.end = "finished"

    def _hear_raised(self, member: Member, name: str, passes: bool, text: str) -> bool:
        """A worker ends with an exception; as in a run, it ends the run unless another process might not meet it."""
        if member.harm == "raised" and passes:
            return self._host.tripped(name, max(member.steps, default=-1), "ElastrainError", text)
        member.end = text
        self._host.fail(name, "ElastrainError", text)
        return True

    # --- events

    def _hear_at(self, member: Member, place: str, step: int, generation: int) -> str:
        """A worker stands at a place: let what is due there happen."""
        while time.monotonic() < self._hold and member.harm != "killed":
            time.sleep(0.005)
        with self._lock:
            lead = self._rank(member) == 0
            kinds = {"any", "lead" if lead else "other", *(() if member.steps else ("newcomer",))}
            event = next((e for e in self._due if e.place == place and step >= e.step and e.who in kinds), None)
            if event is None or member.harm or not self._host.membership.accepts(generation):
                return ""
            self._due.remove(event)
            self.seen[event.action] += 1
            self.seen[place] += 1
            new = self._seat(event.newcomers)
        self._await_entered(new)
        if event.action in ("raise", "hang", "slow"):
            return self._told(member, event.action)
        if event.delay_s:
            timer = threading.Timer(event.delay_s, self._happens, (member, event))
            self._timers.append(timer)
            timer.start()
        else:
            self._happens(member, event)
        return ""

    def _await_entered(self, members: list[Member]) -> None:
        """Wait until newcomers ask for a place."""
        deadline = time.monotonic() + HOLD_S
        while time.monotonic() < deadline:
            if all(m.name in self._host.membership.roster.seats or not m.process.is_alive() for m in members):
                return
            time.sleep(0.005)

    def _told(self, member: Member, action: str) -> str:
        if action == "slow":
            return action
        if (
            len(member.steps) < 3
        ):  # what fails in a process's first step ends the run, and it may take ten times as long
            self._kill(member)
        member.harm = member.harm or {"raise": "raised", "hang": "hung"}[action]
        return action

    def _rank(self, member: Member) -> int | None:
        return self._host.membership.roster.generation.rank(member.name)

    def _living(self) -> list[Member]:
        return [m for m in self.members if m.seated.is_set() and m.process.is_alive() and not m.harm and not m.end]

    def _happens(self, member: Member, event: Event) -> None:
        with self._lock:
            if self._host.membership.roster.ended or self._host.poll()["outcome"]:
                return
            act: Callable[[Member], None] = getattr(self, f"_do_{event.action}", self._do_nothing)
            if event.action == "resize":
                least, most = (min(limit, self._setup.spec.num_slots) for limit in event.limits)
                self._host.membership.resize(least, most)
            act(member)

    def _do_nothing(self, member: Member) -> None:
        pass

    def _do_kill(self, member: Member) -> None:
        self._kill(member)

    def _do_kill_two(self, member: Member) -> None:
        for other in [member, *(m for m in self._living() if m is not member)][:2]:
            self._kill(other)

    def _do_kill_lead(self, member: Member) -> None:
        for other in [m for m in self._living() if self._rank(m) == 0]:
            self._kill(other)

    def _do_kill_others(self, member: Member) -> None:
        for other in self._living():
            if other is not member:
                self._kill(other)

    def _do_kill_all(self, member: Member) -> None:
        for other in self._living():
            self._kill(other)

    def _do_kill_waiting(self, member: Member) -> None:
        for other in self._living():
            if self._rank(other) is None:
                self._kill(other)

    def _do_stop(self, member: Member) -> None:
        self._stop(member, "stopped", None)

    def _do_pause(self, member: Member) -> None:
        self._stop(member, "paused", 0.3 * LEASE_S)

    def _do_wake(self, member: Member) -> None:
        self._stop(member, "woken", 1.4 * LEASE_S)

    def _stop(self, member: Member, harm: str, seconds: float | None) -> None:
        member.harm = harm
        member.signal(signal.SIGSTOP)
        if seconds is not None:
            timer = threading.Timer(seconds, self._go_on, (member,))
            self._timers.append(timer)
            timer.start()
        if harm == "woken":
            timer = threading.Timer(1.05 * LEASE_S, self._hold_all)
            self._timers.append(timer)
            timer.start()

    def _hold_all(self) -> None:
        """Let the others wait until one that has lost its lease is awake again."""
        self._hold = time.monotonic() + 0.5 * LEASE_S

    def _go_on(self, member: Member) -> None:
        with self._lock:
            if member.harm == "paused":
                member.harm = ""
            member.signal(signal.SIGCONT)

    def _do_drain(self, member: Member) -> None:
        self._host.membership.drain([member.name])

    def _do_drain_all(self, member: Member) -> None:
        self._host.membership.drain([m.name for m in self._living()])

    def _do_stop_run(self, member: Member) -> None:
        self._host.membership.ask_stop()

    # --- what must not happen

    def _note_wrong(self, what: str) -> None:
        self._wrong = self._wrong or what

    def _fail(self, what: str) -> None:
        raise Violation(what)

    def _check_ended(self, member: Member) -> None:
        """A process has ended: somebody must have ended it, or told it to."""
        assert member.thread is not None
        member.process.join()
        member.thread.join()
        member.settled = True
        code, why = member.process.exitcode, member.end
        reasons = {"killed": -signal.SIGKILL, "raised": RAISED, "hung": HUNG}
        if reasons.get(member.harm) == code or why == "finished":
            return
        if (
            member.harm == "killed"
            or member.name in self._host.membership.dropped
            or (why.startswith("dismissed") and self._may_be_dismissed(member))
        ):
            return
        self._fail(f"{member.name} ended by itself, with code {code}: {why or 'without a word'}")

    def _may_be_dismissed(self, member: Member) -> bool:
        roster = self._host.membership.roster
        left = member.name in roster.released and bool(
            self.seen["drain"] + self.seen["drain_all"] + self.seen["resize"]
        )
        left = left or member.name in roster.released and "not needed" in member.end
        return (
            left or roster.ended or member.name in self._host.membership.dropped or bool(self._host.poll()["outcome"])
        )

    def _check_lost(self) -> None:
        """Nobody has the state: then nobody who trained was left in peace."""
        for member in self.members:
            if member.steps & set().union(*self._spans.values()) and member in self._living():
                self._fail(f"the run is lost though {member.name} has its state")
        if not self._spans:
            self._fail("the run is lost before its first step")

    def _check_steps(self, resume: int) -> None:
        """A generation begins with the step that was in flight, or the one after."""
        last = resume
        for generation in sorted(self._spans):
            first = min(self._spans[generation])
            if not last <= first <= last + 1:
                self._fail(f"generation {generation} goes on with step {first}, after {last}")
            self.seen["redone"] += first == last and generation > min(self._spans)
            last = max(self._spans[generation])

    def _check_end(self) -> None:
        steps = self._setup.steps
        step = newest_whole(self._url, warn=self._fail)
        if step != steps or self.result["step"] != steps:
            self._fail(f"the run ends at step {self.result['step']}, and the newest checkpoint is {step}")
        info = read_manifest(self._url, steps)["info"]
        for name in ("weights_sha256", "metrics", "samples"):
            if info[name] != self.result[name]:
                self._fail(f"{name}: {info[name]} in the checkpoint, {self.result[name]} in the result")


def check(history: History, alone: History) -> None:
    """Compare a history with the undisturbed run of one worker; raises Violation."""
    assert history.audit is not None and alone.audit is not None  # noqa: PT018
    assert history.lines is not None and alone.lines is not None  # noqa: PT018
    for name in ("weights_sha256", "metrics", "samples", "step"):
        if history.result[name] != alone.result[name]:
            raise Violation(f"{name}: {history.result[name]}, undisturbed {alone.result[name]}")
    if not history.audit.equals(alone.audit):
        raise Violation("the audit is not the one of the undisturbed run")
    found = [table.select(METRICS.names[:6]) for table in (history.lines, alone.lines)]
    if not found[0].equals(found[1]):
        wrong = [pair for pair in zip(found[0].to_pylist(), found[1].to_pylist(), strict=False) if pair[0] != pair[1]]
        raise Violation(
            f"lines of metrics: {found[0].num_rows} of {found[1].num_rows}; the first that differs: {wrong[:1]}"
        )
    check_audit(history.audit, rows=100, epochs=3)


def check_audit(audit: pa.Table, *, rows: int, epochs: int) -> None:
    """Every sample of every epoch exactly once."""
    pairs = sorted(zip(audit["epoch"].to_pylist(), audit["row"].to_pylist(), strict=True))
    if audit.schema.names != AUDIT.names or pairs != [(epoch, row) for epoch in range(epochs) for row in range(rows)]:
        raise Violation("the audit does not have every sample of every epoch once")
