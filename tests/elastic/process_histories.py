"""Histories of runs on bare processes: a real membership, real seats, real groups, real signals. No Ray is started.

`History(…).run()` plays one: it seats workers, lets its events happen, begins anew from storage when nobody is left,
and raises `Violation` where something happened that must not; `check` compares what came of it with one worker that
nobody disturbed. Workers wait at each place where an event may come (see `process_worker`), so a history is exact: in
this step, at this place, to this worker. What is not exact, such as who wins a race, is what it is there to try.
"""

import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pyarrow as pa
from tests.elastic.process_stage import LEASE_S, TIMEOUT_S, Event, Member, Stage
from tests.elastic.process_worker import KINDS, RAISED, Job, setup_of
from tests.training.harness import Setup

from elastrain.elastic.host import METRICS, Host
from elastrain.elastic.protocol import Roster
from elastrain.elastic.seat import HUNG
from elastrain.lease import Hold
from elastrain.observe.ledger import read_ledger, read_steps
from elastrain.training.manifests import newest_whole, read_manifest

BOUND_S = 180.0  # a history that takes longer hangs; on a busy machine it is a matter of starting processes
END_S = 10.0  # within which everybody is gone once the run is over
ATTEMPTS = 9
undisturbed: dict[tuple[Any, ...], "History"] = {}
COMPARED = METRICS.names[:6]  # of a line of metrics: what is not a time


class Violation(AssertionError):  # noqa: N818 -- a finding
    """Something that must not happen."""


@dataclass(kw_only=True)
class History(Stage):
    """A run of a kind of `process_worker.KINDS` that begins with `size` workers; `changes` are those of its spec.

    `limits`: the fewest and most workers. `variant`: what is wrong with the workers, in controls. `device`: theirs.
    """

    kind: str = "mlp"
    size: int = 3
    changes: dict[str, Any] = field(default_factory=dict)
    limits: tuple[int, int] = (1, 9)
    variant: str = ""
    device: str = "cpu"
    result: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[bytes, ...]] = field(default_factory=list)
    audit: list[tuple[int, ...]] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    _setup: Setup = field(init=False)
    _url: str = ""
    _steps: dict[int, set[int]] = field(default_factory=dict)  # of each generation, those that were begun in it

    def run(self) -> "History":
        """Play it; returns itself."""
        self._until = time.monotonic() + BOUND_S
        with tempfile.TemporaryDirectory(prefix="history-") as folder:
            self._url, self._setup = folder, setup_of(self.kind, folder, self.device, **self.changes)
            self.slots = self._setup.spec.num_slots
            try:
                self.spare(self.size + sum(event.newcomers for event in self.events))
                self._try()
                self._check_end()
            finally:
                self.clear()
            audit, lines = (read_steps(str(Path(folder, name))) for name in ("audit", "metrics"))
            self.audit = list(zip(*(column.to_pylist() for column in audit.columns), strict=True))
            self.lines = bits(lines.select(COMPARED))
            self.ledger = read_ledger(folder)
        return self

    # --- attempts

    def _try(self) -> None:
        for attempt in range(ATTEMPTS):
            resume = newest_whole(self._url, warn=self._fail)
            self._open(attempt, resume)
            self.seat(self.size)
            try:
                found = self._watch()
            finally:
                self.host.close("closed", {})
            self._check_steps(resume or 0)
            if found is not None and not found["stopped"]:
                self.result = found
                return
            self.seen["attempt"] += 1
            for member in self.members:
                if member.seated.is_set():
                    member.kill()
        self._fail(f"{ATTEMPTS} attempts came to nothing")

    def _open(self, attempt: int, resume: int | None) -> None:
        least, most = (min(limit, self.slots) for limit in self.limits)
        roster = Roster(minimum=least, maximum=most, initial=min(max(self.size, least), most), lease_s=LEASE_S)
        self.host = Host(Hold(self._url), attempt, roster, resume or 0, alike=True, timeout_s=TIMEOUT_S)
        self.host.open()
        self._steps = {}
        self.job = Job(
            setup=self._setup,
            address=self.host.membership.address,
            token=self.host.membership.token,
            resume=resume,
            lease_s=LEASE_S,
            timeout_s=TIMEOUT_S,
            variant=self.variant,
        )

    def _watch(self) -> dict[str, Any] | None:
        """See to it that enough workers are there; return the result, None if nobody has the state any more."""
        while True:
            now = self.host.poll()
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
            if time.monotonic() > self._until:
                for member in self._well():
                    member.signal(signal.SIGUSR1)
                time.sleep(0.5)
                self._fail(f"no end: {self.host.membership.roster}")
            time.sleep(0.01)

    def _tend(self, now: dict[str, Any]) -> None:
        """Kill who was given up, as the host does, and seat workers where they are missing, as Ray and the fleet do."""
        for member in self.members:
            if member.name in self.host.membership.dropped and member.harm not in ("killed", "woken"):
                self.seen["late"] += member.harm != "stopped"
                member.kill()
            if member.seated.is_set() and not member.settled and not member.process.is_alive():
                self._check_ended(member)
        there = {name for kind in ("members", "waiting") for name, _, _ in now[kind]}
        coming = [member for member in self._well() if member.name not in there and not member.steps]
        self.seat(now["missing"] - len(coming))
        if self._wrong:
            self._fail(self._wrong)

    def _wait_for_the_end(self) -> None:
        deadline = time.monotonic() + END_S
        for member in self.members:
            if member.harm in ("stopped", "paused", "hung"):
                member.kill()
            if member.seated.is_set():
                member.process.join(max(0.0, deadline - time.monotonic()))
                if member.process.is_alive():
                    self._fail(f"{member.name} is still there though the run is over ({member.harm or 'unharmed'})")
                self._check_ended(member)

    # --- what workers say

    def hear_audit(self, member: Member, lines: Any, generation: int) -> None:
        """Samples of a step, before its sum."""
        with self._lock:
            if self.host.membership.accepts(generation):
                steps = {step for step, _, _ in lines}
                member.steps |= steps
                self._steps[generation] = self._steps.get(generation, set()) | steps
            self.host.audit(lines)

    def hear_dismissed(self, member: Member, why: str) -> None:
        """It was told to go."""
        member.end = f"dismissed: {why}"

    def hear_finished(self, member: Member) -> None:
        """Its loop has returned."""
        member.end = "finished"

    def hear_raised(self, member: Member, cause: str, text: str) -> bool:
        """It ends with an exception; as in a run, this ends the run unless another process might not meet it."""
        if member.harm == "raised" and cause == RuntimeError.__name__:
            return bool(self.host.tripped(member.name, max(member.steps, default=-1), "ElastrainError", text))
        member.end = text
        self.host.fail(member.name, "ElastrainError", text)
        return True

    # --- what must not happen

    def _fail(self, what: str) -> NoReturn:
        raise Violation(what)

    def _check_ended(self, member: Member) -> None:
        """A process has ended: somebody must have ended it, or told it to."""
        assert member.thread is not None
        member.process.join()
        member.thread.join()
        member.settled = True
        code, why = member.process.exitcode, member.end
        codes = {"raised": RAISED, "hung": HUNG}
        given_up = member.harm == "killed" or member.name in self.host.membership.dropped
        if given_up or why == "finished" or code == codes.get(member.harm):
            return
        roster = self.host.membership.roster
        if why.startswith("dismissed") and (roster.ended or member.name in roster.released):
            return
        self._fail(f"{member.name} ended by itself, with code {code}: {why or 'without a word'}")

    def _check_lost(self) -> None:
        """Nobody has the state: then nobody who trained was left in peace."""
        for member in self._well():
            if member.steps & set().union(*self._steps.values()):
                self._fail(f"the run is lost though {member.name} has its state")
        names = {each.worker.name for each in self.host.membership.roster.generation.members}
        if not self._steps and any(member.name in names for member in self._well()):
            self._fail("the run is lost before its first step, though a member is left")

    def _check_steps(self, resume: int) -> None:
        """A generation begins with the step that was in flight, or the one after."""
        last = resume
        for generation in sorted(self._steps):
            first = min(self._steps[generation])
            if not last <= first <= last + 1:
                self._fail(f"generation {generation} goes on with step {first}, after {last}")
            self.seen["redone"] += first == last and generation > min(self._steps)
            last = max(self._steps[generation])

    def _check_end(self) -> None:
        steps, step = self._setup.steps, newest_whole(self._url, warn=self._fail)
        if step != steps or self.result["step"] != steps:
            self._fail(f"the run ends at step {self.result['step']}, and the newest checkpoint is {step}")
        info = read_manifest(self._url, steps)["info"]
        for name in ("weights_sha256", "metrics", "samples"):
            if info[name] != self.result[name]:
                self._fail(f"{name}: {info[name]} in the checkpoint, {self.result[name]} in the result")
        if not info["complete"]:
            self._fail("the newest checkpoint is not the run's end")


def bits(table: pa.Table) -> list[tuple[bytes, ...]]:
    """Return the rows of a table of numbers as bytes: a NaN is the same as another."""
    columns = [column.to_numpy() for column in table.columns]
    return list(zip(*([value.tobytes() for value in column] for column in columns), strict=True))


def check(history: History, alone: History) -> None:
    """Compare a history with the undisturbed run of one worker; raises Violation."""
    for name in ("weights_sha256", "metrics", "samples", "step"):
        if history.result[name] != alone.result[name]:
            raise Violation(f"{name}: {history.result[name]}, undisturbed {alone.result[name]}")
    if history.lines != alone.lines:
        missing = [step for step, line in enumerate(alone.lines) if line not in history.lines]
        raise Violation(f"{len(history.lines)} lines of metrics; missing or wrong: those of steps {missing}")
    if history.audit != alone.audit:
        raise Violation("the audit is not that of the undisturbed run")
    every = [(epoch, row) for epoch in range(3) for row in range(100)]
    if sorted((epoch, row) for epoch, _, _, row in history.audit) != every:
        raise Violation("the audit does not have every sample of every epoch once")


def alone(kind: str, changes: dict[str, Any], device: str = "cpu") -> History:
    """Return the run of one worker that nobody disturbs."""
    key = (kind, device, *sorted(changes.items()))
    if key not in undisturbed:
        undisturbed[key] = History(kind=kind, size=1, changes=changes, device=device).run()
    return undisturbed[key]


def play(*events: Event, **settings: Any) -> History:
    """Play a history, and hold it against the run of one worker."""
    history = History(events=events, **settings).run()
    print(*told(history, "worker_lost"), sep="\n")  # noqa: T201 -- for who reads of a failure
    check(history, alone(history.kind, history.changes, history.device))
    assert not history._due, "each event has happened"
    return history


def told(history: History, kind: str) -> list[dict[str, Any]]:
    """Return the events of a kind in the run's ledger."""
    return [record for record in history.ledger if record["kind"] == kind]


# --- by chance

ACTIONS = (
    *("kill", "kill", "kill", "kill_lead", "kill_lead", "kill_two", "kill_others", "kill_waiting", "kill_all"),
    *("stop", "wake", "pause", "raise", "hang", "slow", "slow"),
    *("drain", "drain", "drain_all", "resize", "resize", "grow", "grow", "stop_run"),
)
PLACES = ("audited", "audited", "phase 0", "phase 0", "phase 1", "evaluation", "commit", "join", "broadcast")


def random_history(seed: int) -> History:
    """Return the history of a seed."""
    rng = Random(seed)  # noqa: S311 -- a history has to be the same again
    slots = rng.randint(5, 8)
    size = rng.randint(1, slots)
    events = sorted((random_event(rng, slots) for _ in range(rng.randint(1, 5))), key=lambda event: event.step)
    return History(
        kind=rng.choice([*KINDS, "gan"]),
        size=size,
        events=tuple(events),
        changes={"data.slots": slots, "precision": rng.choice(["fp32", "fp32", "bf16", "fp16"])},
        limits=(rng.choice([1, 1, rng.randint(1, size)]), slots),
        newest_first=rng.random() < 0.5,
    )


def random_event(rng: Random, slots: int) -> Event:
    """Return any event."""
    action, place = rng.choice(ACTIONS), rng.choice(PLACES)
    if action == "hang":
        place = rng.choice(["phase 0", "phase 1"])  # what is computed for too long; other waits are not watched
    elif action == "slow":
        place = rng.choice(["commit", "commit", "join", "audited"])
    elif action == "raise" and place == "commit":
        place = "audited"  # in the thread that writes it would be an error of the storage
    least = rng.randint(1, slots)
    return Event(
        action=action,
        step=rng.randint(0, 13),
        place=place,
        who=rng.choice(["any", "any", "any", "lead", "other", "newcomer"]),
        newcomers=rng.choice([0, 0, 1, 1, 2, 3]),
        delay_s=0.0 if action in ("raise", "hang", "slow") else rng.choice([0.0, 0.0, 0.0, 0.002, 0.01, 0.03]),
        limits=(least, rng.randint(least, slots)),
    )
