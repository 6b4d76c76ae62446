"""Who trains together, as a state machine: what happens goes in, what is known comes out. It has no clock of its own.

Workers enter, beat and enter again; a `Roster` hands out generations, and in each generation its members only train
together: no step without a contribution of every one of them.

```
worker:  enter ─► answer: a Generation ─► connect ─► state from the source ─► step, step, … ─► enter ─► …
                  or a Verdict                        beat ─► Reply: go on · abort · change · dropped
```

What keeps two generations from training at once, and a step from being lost, is that

- entering is a promise: who has entered contributes nothing more to the generation that it comes from;
- the next generation forms when every member of the current one has entered or is dropped: because its process is
  known dead, or because its lease ran out. Nobody is dropped because it is late;
- a worker starts a step only while its own `Lease` holds. That one counts from when the worker sent a beat, the
  roster's from when it heard it: so the worker's always ends first. Both clocks need only run at the same speed; the
  few millionths by which they do not are neglected;
- what reports, lines and checkpoints say counts only if it comes from the newest generation (`accepts`). A step that
  was under way when its worker's lease ran out comes to nothing, and so does one of a process falsely called dead;
- the state of a generation comes from its most advanced member, and no member is let go while nobody else has what it
  has.

The rules that stand outside:

- a worker names its position only while its state is whole: not half received, not in the middle of an update. One that
  its generation lists without a position forgets the state that it may still have;
- what a worker reports has arrived before it enters;
- it beats at once when it learns of its generation, then at least four times in a lease. A beat's answer counts only
  for the generation it names, an entry's only for the last one sent;
- a worker that waits in a collective for too long enters as failed; one that computes for too long ends itself.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum

Position = tuple[int, int]
"""Step and phase: what the state has behind it; the later one is the greater."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """What a worker says of itself. A name is one process: no other ever bears it."""

    name: str
    node: str
    place: int
    door: tuple[str, int]
    cell: str = ""
    arithmetic: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A worker in a generation, with its position when it entered; None: it had no state, or only a part of it."""

    worker: Worker
    position: Position | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """Who trains together: members in rank order, and the rank whose state all others take; None: it is in storage."""

    number: int
    members: tuple[Member, ...]
    source: int | None

    def rank(self, name: str) -> int | None:
        """Return the rank of a worker, None if it is not a member."""
        return next((rank for rank, member in enumerate(self.members) if member.worker.name == name), None)


class Verdict(Enum):
    """What an entry is answered with when it is not a generation."""

    WAIT = "the next generation has not formed yet"
    DROPPED = "not known: the lease ran out, or it never entered; enter (again)"
    LEAVE = "not needed any more: exit"
    DEAD = "known as dead: exit, a new process needs a new name"
    ENDED = "the run is over: exit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a beat is answered with: about the generation that the beat named, and about no other.

    `dropped`: stop training at once, then exit, or enter again (with the state, if it is whole).
    `abort`: the generation is broken: abort the pending collective and enter. No matter while waiting for an answer.
    `change`: bring everybody to the next step boundary, and enter there.
    `commit`: before entering there, write a checkpoint and have it noted: nobody who stays will hold the state.
    `leave`: this worker is asked to leave; its next entry is answered by LEAVE once its state is in other hands.
    """

    generation: int
    dropped: bool = False
    abort: bool = False
    change: bool = False
    commit: bool = False
    leave: bool = False


class Lease:
    """A member's own half of its lease, for one generation: made when it learns of it, thrown away when it enters."""

    def __init__(self, generation: int, lease_s: float) -> None:
        self.generation, self.lease_s = generation, lease_s
        self._until, self._over = float("-inf"), False

    def renewed(self, reply: Reply, sent_at: float) -> None:
        """Take the answer to the beat sent at `sent_at`; once the generation is over, it stays over."""
        if reply.generation == self.generation:
            self._over = self._over or reply.dropped or reply.abort
            self._until = max(self._until, sent_at + self.lease_s)

    def valid(self, now: float) -> bool:
        """Say whether a step may start; if not, the next answer decides."""
        return not self._over and now < self._until


@dataclass(kw_only=True, slots=True, eq=False)
class Seat:
    """What is known of a live worker. `generation`: the one it is in; once it has entered, the one it comes from."""

    worker: Worker
    deadline: float
    generation: int = -1
    entered: bool = False
    position: Position | None = None


@dataclass(kw_only=True, slots=True)
class Roster:
    """The state machine. `initial` workers make the first generation, `minimum` to `maximum` every other one.

    All times are seconds of one clock. `tick` wants to be called at least four times in a lease.
    """

    minimum: int
    maximum: int
    initial: int
    lease_s: float
    generation: Generation = field(default_factory=lambda: Generation(number=0, members=(), source=None))
    broken: bool = False  # the generation cannot go on
    ended: bool = False
    seats: dict[str, Seat] = field(default_factory=dict)  # in the order in which the workers came
    leaving: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    stored: Position | None = None  # of the newest checkpoint
    _change: bool = False  # the next generation would be another one
    _commit: bool = False
    _told: bool = False  # a member knows of the change: whoever enters now does so because it was asked to
    _since: float | None = None  # the first member entered
    _ticked: float | None = None

    def __post_init__(self) -> None:
        assert 1 <= self.minimum <= self.initial <= self.maximum, "1 <= minimum <= initial <= maximum"

    # --- what workers say

    def enter(
        self, worker: Worker, position: Position | None, now: float, *, left: int = 0, failed: bool = False
    ) -> None:
        """Ask for a place in the generation after `left`, the last one that this worker was in; 0: it was in none.

        `failed`: it comes because the generation failed, not because of a change. The same entry may be sent any
        number of times and arrive at any time: from one generation a worker enters once, and what it says is a fact.
        """
        name, number = worker.name, self.generation.number
        if name in self.dead or name in self.released:
            return
        left = left if left <= number else 0  # a higher one is of another roster
        seat = self.seats.setdefault(name, Seat(worker=worker, deadline=now))
        seat.deadline = max(seat.deadline, now + self.lease_s)
        if left < seat.generation:
            return  # a late copy of an entry that has been answered
        if self._is_member(seat):
            self.broken = self.broken or failed or not self._told
            self._since = now if self._since is None else self._since
        # Who returns from an older generation may hold what has been done again since: its state counts no more.
        seat.entered, seat.generation, seat.position = True, left, position if left == number else None
        self._settle()

    def beat(self, name: str, generation: int, now: float) -> Reply:
        """Renew a worker's lease. `generation`: the one it is in, or while it waits for an answer, comes from."""
        seat = self.seats.get(name)
        if seat is not None:
            seat.deadline = max(seat.deadline, now + self.lease_s)
        return self.reply(name, generation)

    def reply(self, name: str, generation: int) -> Reply:
        """Return what a beat would be answered with now; whoever is told it has been told."""
        seat = self.seats.get(name)
        if seat is None:
            return Reply(generation=generation, dropped=True)
        if generation != seat.generation or (self.broken and not seat.entered):
            return Reply(generation=generation, abort=True)
        if seat.entered:
            return Reply(generation=generation)
        self._told = self._told or self._change
        leave = name in self.leaving
        return Reply(generation=generation, change=self._told, commit=self._commit, leave=leave)

    def answer(self, name: str, left: int) -> Generation | Verdict:
        """Return what the entry of a worker that comes from generation `left` has led to."""
        if name in self.dead:
            return Verdict.DEAD
        if name in self.released:
            return Verdict.LEAVE
        if self.ended:
            return Verdict.ENDED
        seat = self.seats.get(name)
        if seat is None:
            return Verdict.DROPPED
        return self.generation if not seat.entered and seat.generation > left else Verdict.WAIT

    # --- what the rest of the world says

    def died(self, name: str) -> None:
        """Note that a worker's process is known dead."""
        self.dead.add(name)
        self._drop(name)
        self._settle()

    def fail(self) -> None:
        """Note that the generation cannot go on, though everybody in it lives: its members wait for each other."""
        self.broken = True

    def drain(self, names: Iterable[str]) -> None:
        """Ask workers, also ones that have not come yet, to leave at the next step boundary."""
        self.leaving.update(names)
        self._settle()

    def resize(self, minimum: int, maximum: int) -> None:
        """Set the size limits of the generations to come; one at work that does not keep to them ends at a boundary."""
        assert 1 <= minimum <= maximum, "1 <= minimum <= maximum"
        self.minimum, self.maximum = minimum, maximum
        self.expect(self.initial)

    def expect(self, initial: int) -> None:
        """Set how many workers make the first generation, within the limits."""
        self.initial = min(max(initial, self.minimum), self.maximum)
        self._settle()

    def noted(self, position: Position) -> None:
        """Note that a checkpoint of this position is committed."""
        self.stored = position if self.stored is None else max(self.stored, position)
        self._settle()

    def end(self) -> None:
        """Let nothing form any more."""
        self.ended = True

    def tick(self, now: float) -> list[str]:
        """Drop workers whose lease has run out, and return their names.

        A roster that slept heard no beat meanwhile, and its own hiccup shall drop nobody: a tick that comes late drops
        nobody, so that what came meanwhile is heard first, and makes the leases longer by the time it is late.
        """
        late = float("inf") if self._ticked is None else max(0.0, now - self._ticked - self.lease_s / 4)
        self._ticked = now
        for seat in self.seats.values():
            seat.deadline = min(seat.deadline + late, now + self.lease_s)
        expired = [] if late else [name for name, seat in self.seats.items() if now >= seat.deadline]
        for name in expired:
            self._drop(name)
        # Members come to a change by themselves. If one does not, it missed the last sum, and waits for those who left.
        if self._since is not None and now - self._since >= self.lease_s:
            self.broken = True
        if expired:
            self._settle()
        return expired

    # --- what is known

    def accepts(self, generation: int) -> bool:
        """Say whether a record of this generation may count: none has formed after it."""
        return generation == self.generation.number > 0

    def missing(self) -> int:
        """Return how many workers the next generation lacks; 0 while members are at work."""
        if any(not seat.entered for seat in self._members()):
            return 0
        return max(0, self._needed() - len(self._choose(self._leads(), stored=self._in_storage_only())))

    # --- how it decides

    def _members(self) -> list[Seat]:
        """The live members of the generation, those that have entered included."""
        return [seat for seat in self.seats.values() if self._is_member(seat)]

    def _is_member(self, seat: Seat) -> bool:
        return seat.generation == self.generation.number > 0

    def _needed(self) -> int:
        return self.minimum if self.generation.number else self.initial

    def _lead(self) -> str:
        """The name of rank 0, empty before the first generation."""
        return self.generation.members[0].worker.name if self.generation.members else ""

    def _best(self) -> Position | None:
        return max((seat.position for seat in self._members() if seat.position is not None), default=None)

    def _leads(self) -> set[str]:
        """The members with the most advanced state."""
        best = self._best()
        return {seat.worker.name for seat in self._members() if best is not None and seat.position == best}

    def _in_storage_only(self) -> bool:
        """Whether a checkpoint is as good as the best member's state, and nobody who stays holds any."""
        best, staying = self._best(), [s for s in self._members() if s.worker.name not in self.leaving]
        covered = best is not None and self.stored is not None and self.stored >= best
        return covered and all(seat.position is None for seat in staying)

    def _choose(self, leads: Collection[str], *, stored: bool) -> list[Seat]:
        """Return who makes the next generation: members that stay, then newcomers, in the order in which they came.

        Of those who leave, one is kept for another generation if the most advanced state would go with them.
        """
        members = self._members()
        stay = [seat for seat in members if seat.worker.name not in self.leaving]
        lead = self._lead()  # where not all have room, the state has, and then who leads
        stay.sort(key=lambda seat: (seat.worker.name not in leads, seat.worker.name != lead))
        keep = [seat for seat in members if seat.worker.name in leads and seat.worker.name in self.leaving][:1]
        if stored or any(seat.worker.name in leads for seat in stay):
            keep = []
        new = [s for s in self.seats.values() if not self._is_member(s) and s.worker.name not in self.leaving]
        return [*keep, *stay, *new][: self.maximum]

    def _settle(self) -> None:
        """Let go whom nobody needs, form the next generation if everybody who has to be there is, and look ahead."""
        if self.ended:
            return
        members = self._members()
        for name in [name for name, seat in self.seats.items() if name in self.leaving and not self._is_member(seat)]:
            self._release(name)
        if all(seat.entered for seat in members):
            chosen = self._choose(self._leads(), stored=self._in_storage_only())
            for seat in members:
                if seat not in chosen:
                    self._release(seat.worker.name)
            if len(chosen) >= self._needed():
                self._form(chosen)
        self._look_ahead()

    def _form(self, chosen: list[Seat]) -> None:
        leads, number = self._leads(), self.generation.number + 1
        workers = {worker.name: worker for worker in ranked((seat.worker for seat in chosen), self._lead())}
        members = tuple(Member(worker=workers[name], position=self.seats[name].position) for name in workers)
        source = next((rank for rank, name in enumerate(workers) if name in leads), None)
        for seat in chosen:
            seat.entered, seat.generation, seat.position = False, number, None
        self.generation = Generation(number=number, members=members, source=source)
        self.broken, self._told, self._since = False, False, None

    def _look_ahead(self) -> None:
        """See whether the next generation would be another one, if everybody came with the same state now."""
        members = self._members()
        names = [seat.worker.name for seat in members]
        chosen = [seat.worker.name for seat in self._choose(names, stored=False)]
        goes = not set(names) <= set(chosen)
        comes = not set(chosen) <= set(names) and len(chosen) >= self.minimum
        self._commit = bool(names) and self.leaving.issuperset(names) and not comes
        short = 0 < len(names) < self.minimum
        self._change = goes or comes or short or self._commit

    def _drop(self, name: str) -> None:
        seat = self.seats.pop(name, None)
        if seat is not None and self._is_member(seat):
            self.broken = True

    def _release(self, name: str) -> None:
        del self.seats[name]
        self.released.add(name)


def ranked(workers: Iterable[Worker], lead: str = "") -> list[Worker]:
    """Return workers in rank order: those of a node side by side, nodes in the order of their first places.

    `lead` comes first, with its node: who has led goes on to, as a checkpoint may be under way.
    """
    workers = list(workers)
    first: dict[str, int] = {}
    for worker in workers:
        first[worker.node] = min(worker.place, first.get(worker.node, worker.place))
    home = {worker.node for worker in workers if worker.name == lead}
    return sorted(workers, key=lambda w: (w.node not in home, first[w.node], w.node, w.name != lead, w.place, w.name))
