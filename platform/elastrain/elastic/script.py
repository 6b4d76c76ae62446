"""A history as it is carried out: what the driver sees goes in, what is to be done comes out. No Ray, no clock.

The run asks its `Script` at each poll what to do about the number of workers; what a script does to processes and nodes
is its own affair.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from elastrain.elastic.histories import Event, History, Word


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A worker that trains: the name of its process, the id of its Ray node, and its pid there."""

    name: str
    node: str
    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What the driver sees: the steps that the most advanced member has done, and who trains: the living, by rank."""

    step: int
    members: Sequence[Member]


@dataclass(frozen=True, slots=True)
class Resize:
    """From the next step boundary on train with at most `maximum` workers, and stand still there below `minimum`."""

    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Strike:
    """Do to a worker, or to its node, what `word` says."""

    word: Word
    member: Member


class Script(Protocol):
    """What happens to a run while it trains."""

    @property
    def first(self) -> int:
        """Workers that make the first generation."""

    @property
    def wanted(self) -> int:
        """Workers that are to be there, at work or waiting to be called."""

    def act(self, seen: Seen) -> list[Resize]:
        """Do what is due, and return what the run has to do about its size, in order; called at each poll."""


@dataclass(kw_only=True, slots=True)
class Act:
    """An event that has been carried out at step `step` and time `at`; `done` is the time at which it was over."""

    event: Event
    step: int
    at: float
    before: tuple[Member, ...]
    victims: frozenset[str]
    lowest: int  # the fewest steps done that were seen since: below `step` if some were lost
    since: int | None = None  # the steps done when things first stood as they should
    done: float | None = None
    after: tuple[Member, ...] = ()

    @property
    def survivors(self) -> int:
        """How many workers should have gone on, in the processes that they had."""
        left = len(self.before) - len(self.victims)
        return left if self.event.word else min(left, self.event.number)

    @property
    def kept(self) -> int:
        """How many workers did go on so."""
        return len({(m.name, m.pid) for m in self.before} & {(m.name, m.pid) for m in self.after})


class Play:
    """A history on its way through a run of `steps` steps. `acts` are the events carried out so far."""

    def __init__(self, history: History, steps: int) -> None:
        self.history = history
        self.acts: list[Act] = []
        self._steps = steps
        self._latest = _latest(history, steps)
        self._held = False

    @property
    def left(self) -> tuple[Event, ...]:
        """The events that have not been carried out; a number has been once that many train, a loss at once.

        A loss after the last step is none: whoever is hit then has nothing left to do.
        """
        last = self.acts[-1] if self.acts else None
        open_still = last is not None and last.done is None and (not last.event.word or last.step >= self._steps)
        return self.history.events[len(self.acts) - open_still :]

    @property
    def wanted(self) -> int:
        """The largest number of workers that is asked for now or later."""
        return max(self.history.sizes[max(0, len(self.acts) - 1) :])

    def next(self, seen: Seen, now: float) -> list[Resize | Strike]:
        """Return what is to be done now, at most one event; to be called at each poll."""
        commands: list[Resize | Strike] = []
        if self.acts and self.acts[-1].done is None:
            act = self.acts[-1]
            self._watch(act, seen, now)
            if act.done is None:
                return self._hold(act, seen)
            if self._held:  # that many were there: a loss shall not make those who are left stand still
                self._held = False
                commands.append(Resize(1, self.history.sizes[len(self.acts) - 1]))
        if len(self.acts) < len(self.history.events):
            event = self.history.events[len(self.acts)]
            if not event.word or (seen.members and seen.step >= event.number):
                commands.append(self._begin(event, seen, now))
        return commands

    def _begin(self, event: Event, seen: Seen, now: float) -> Resize | Strike:
        struck = seen.members[_draw(self.history, len(self.acts)) % len(seen.members)] if event.word else None
        hit: list[Member] = []
        if struck is not None:
            on_node = event.word in ("drain", "node")
            hit = [m for m in seen.members if m.name == struck.name or (on_node and m.node == struck.node)]
        self.acts.append(
            Act(
                event=event,
                step=seen.step,
                at=now,
                before=tuple(seen.members),
                victims=frozenset(member.name for member in hit),
                lowest=seen.step,
            )
        )
        return Strike(event.word, struck) if event.word and struck is not None else Resize(1, event.number)

    def _watch(self, act: Act, seen: Seen, now: float) -> None:
        """Note how an event goes; it is done once a step has been trained in the state that it leads to."""
        act.lowest = min(act.lowest, seen.step)
        names = {member.name for member in seen.members}
        stands = bool(names) and not names & act.victims if act.event.word else len(names) == act.event.number
        if not stands:
            act.since = None
        elif act.since is None:
            act.since = seen.step
        elif seen.step > max(act.since, act.step):
            act.done, act.after = now, tuple(seen.members)

    def _hold(self, act: Act, seen: Seen) -> list[Resize | Strike]:
        """Workers join while others train; only when it gets late for what follows do those stand still and wait."""
        late = seen.step >= self._latest[len(self.acts) - 1]
        if act.event.word or self._held or not late or len(seen.members) >= act.event.number:
            return []
        self._held = True
        return [Resize(act.event.number, act.event.number)]


def _latest(history: History, steps: int) -> list[int]:
    """For each event the step up to which workers may keep it waiting: evenly spread up to the next loss, or the end.

    >>> from elastrain.elastic.histories import parse_history
    >>> _latest(parse_history("4, kill@30, 2, 3, drain@80, 1", slots=6, steps=200), 200)
    [15, 30, 46, 63, 80, 140]
    """
    found: list[int] = []
    at, run = 0, 0  # the last loss, and how many numbers follow it
    for event in (*history.events, Event("node", steps)):
        if event.word is None:
            run += 1
            continue
        found += [at + (event.number - at) * (n + 1) // (run + 1) for n in range(run)]
        found.append(event.number)
        at, run = event.number, 0
    return found[:-1]


def _draw(history: History, index: int) -> int:
    """A number that only history and event decide, so that the same history always hits the same ranks."""
    return int.from_bytes(hashlib.sha256(f"{history}/{index}".encode()).digest()[:8], "big")
