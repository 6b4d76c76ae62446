"""Seeded histories of a run: a roster, workers as small state machines, and a world that loses, delays and kills.

`World(seed).run()` plays one history and raises `Violation` if something happened that must not; the same seed plays
the same history again, `World(seed, trace=True)` writes it down in `world.lines`. Faults begin in the first seconds,
each is mended in time; after the last one the world sees to it that enough workers are there, and waits for a new step.

A worker's weights are a chain of hashes over its phases: one done twice, left out, or done on the wrong weights shows.
What the roster says without being asked gets lost, late and out of order like everything else. The roster itself is
reliable here (it may stop for a while): its death is a restart from storage.
"""

from collections import Counter
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any, NoReturn

from elastrain.elastic.protocol import Generation, Lease, Position, Reply, Roster, Verdict, Worker

LEASE_S, BEAT_S, TICK_S = 1.0, 0.25, 0.2
WAIT_S = 1.5  # a worker that computes for longer ends itself; in half of the histories nobody waits longer for others
AGAIN_S = 0.6  # an entry without an answer is sent again
FAULTS_S = 2.5  # faults begin within
BOUND_S = 30.0  # after the last fault, within which a new step has to be accepted
SHORT_S = 2.5  # after this, a generation that has become too small has come to a boundary
CONNECT, STATE = -2, -1  # collectives before the first step; those of the steps have their index
GARBAGE = -1

chain = [1]  # the weights after 0, 1, 2, … phases


class Violation(AssertionError):  # noqa: N818 -- a finding
    """Something that the protocol promises never to happen, or always to happen in time."""


def advance(weights: int, index: int) -> int:
    return (weights * 6364136223846793005 + index * 1442695040888963407 + 1) % (1 << 61)


def true_weights(index: int) -> int:
    while len(chain) <= index:
        chain.append(advance(chain[-1], len(chain) - 1))
    return chain[index]


class Process:
    """A worker: a main thread that enters, connects, takes the state and steps, and a thread that beats."""

    def __init__(self, world: "World", worker: Worker) -> None:
        self.world, self.worker, self.name = world, worker, worker.name
        self.alive, self.stopped, self.stuck, self.falsely_dead = True, False, False, False
        self.backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.generation, self.rank, self.doing = 0, 0, "waiting"
        self.group: Group | None = None
        self.lease: Lease | None = None
        self.weights, self.index, self.whole = GARBAGE, 0, False
        self.call, self.failed, self.doomed = 0, False, False
        self.awaits: int | None = None
        self.since = self.heard = self.late_s = 0.0
        self.overdue = False  # it was silent for a lease, and the roster has not taken what it heard after that
        self.came_from = (
            -1
        )  # the generation that the entry was from which the roster has heard, since it knows this worker
        self.flag = 0  # 1: a change is asked for; 2: with a checkpoint before

    # --- events: nothing happens to the dead, what happens to the stopped happens later

    def take(self, call: Callable[..., None], *arguments: Any) -> None:
        """Let something happen to the thread that beats."""
        if self.stopped:
            self.backlog.append((call, arguments))
        elif self.alive:
            call(*arguments)

    def main(self, call: Callable[..., None], *arguments: Any) -> None:
        """Let something happen to the main thread."""
        if not self.stuck:
            self.take(call, *arguments)

    def go_on(self) -> None:
        """Continue after a stop; what came meanwhile is taken in any order."""
        self.stopped = False
        backlog, self.backlog = self.backlog, []
        self.world.rng.shuffle(backlog)
        for call, arguments in backlog:
            self.take(call, *arguments)

    def quit(self) -> None:
        """End in good order."""
        self.world.end(self, loud=True)

    # --- the thread that beats

    def on_timer(self) -> None:
        """Beat; give up waiting, or send an entry again, where it has been too long."""
        world = self.world
        world.at(BEAT_S, self.take, self.on_timer)
        self.beat()
        waited = world.now - self.since
        if self.doing == "waiting" and waited > AGAIN_S:
            self.send_entry()
        elif self.doing == "saving" and waited > WAIT_S:
            self.enter(failed=False)
        elif self.awaits is not None and waited > world.wait_s:
            self.enter(failed=True)

    def beat(self) -> None:
        """Send a beat; it also says since when this worker waits for others."""
        waits = None if self.awaits is None else self.since
        self.world.to_roster(self, self.world.on_beat, self.generation, self.world.now, waits)

    def on_push(self, reply: Reply) -> None:
        """Act on what the roster says without being asked: it answers no beat, so the lease grows no longer."""
        if self.doing == "waiting" and reply.dropped and reply.generation == self.generation:
            self.on_answer(Verdict.DROPPED, self.call)
        else:
            self.on_reply(reply, float("-inf"))

    def on_reply(self, reply: Reply, sent_at: float) -> None:
        """Act on the answer to a beat."""
        if self.doing == "waiting":
            if reply.dropped and sent_at > self.since:
                self.send_entry()
            return
        if reply.generation != self.generation or self.lease is None:
            return
        self.lease.renewed(reply, sent_at)
        if reply.dropped and self.world.random() < 0.3:
            self.quit()
        elif reply.dropped or reply.abort:
            self.doomed = True
            if self.awaits is not None or self.doing in ("stalled", "saving"):
                self.enter(failed=True)
        else:
            self.flag = int(reply.change) + int(reply.change and reply.commit)
            if self.doing == "stalled":
                self.main(self.start)

    # --- the main thread

    def enter(self, *, failed: bool) -> None:
        """Leave the group, and ask for a place in the next generation."""
        if self.stuck:
            return  # it is the main thread that enters
        if self.group is not None:
            self.group.close(self, crashed=False)
        self.group, self.lease, self.awaits, self.doing, self.failed = None, None, None, "waiting", failed
        self.send_entry()

    def claim(self) -> Position | None:
        """Say what state it holds."""
        return self.world.position(self.index) if self.whole else None

    def send_entry(self) -> None:
        """Send the entry, for the first time or again; only the answer to the last one counts."""
        if self.stuck:
            return
        self.call, self.since = self.call + 1, self.world.now
        self.world.to_roster(self, self.world.on_enter, self.call, (self.claim(), self.generation, self.failed))

    def on_answer(self, answer: Generation | Verdict, call: int) -> None:
        """Join a generation, exit, or enter again."""
        if self.doing != "waiting" or call != self.call:
            return
        if isinstance(answer, Generation):
            rank = answer.rank(self.name)
            if rank is None:
                self.world.fail(f"{self.name} is answered with generation {answer.number}, in which it is not")
            self.generation, self.rank, self.flag, self.doomed = answer.number, rank, 0, False
            self.lease, self.doing = Lease(answer.number, LEASE_S), "training"
            self.whole = self.whole and answer.members[rank].position is not None  # what does not count is forgotten
            self.group = self.world.group_of(answer)
            self.beat()
            self.contribute(CONNECT, None)
        elif answer is Verdict.DROPPED and self.world.random() < 0.7:
            self.send_entry()
        else:
            self.quit()

    def contribute(self, label: int, value: Any) -> None:
        """Give this worker's part in a collective, and wait for the others."""
        assert self.group is not None
        self.awaits, self.since = label, self.world.now
        self.group.contribute(self, label, value)

    def on_failed(self, group: "Group", label: int) -> None:
        """See a collective fail: enter."""
        if group is self.group and label == self.awaits:
            self.enter(failed=True)

    def on_done(self, group: "Group", label: int) -> None:
        """Go on after a collective."""
        if group is not self.group or label != self.awaits:
            return
        self.awaits = None
        if self.doomed:
            self.enter(failed=True)
        elif label == CONNECT:
            self.share(group)
        elif label == STATE:
            self.index, self.weights = group.calls[STATE][group.source]
            self.whole = True
            self.start()
        else:
            self.step(group, label)

    def share(self, group: "Group") -> None:
        """Give the state, or take it; it is not whole until all of it is there."""
        positions = [member.position for member in group.generation.members]
        if group.generation.source is None and self.rank == 0:
            self.index, self.weights, self.whole = self.world.saved, true_weights(self.world.saved), True
        if None not in positions and len(set(positions)) == 1:
            self.start()
        elif self.name == group.source:
            self.contribute(STATE, (self.index, self.weights))
        else:
            source = group.generation.members[group.generation.source or 0].position
            if source is None or positions[self.rank] != source:
                self.whole, self.weights = False, GARBAGE
                self.index = self.world.index(source) if source else 0
            self.contribute(STATE, None)

    def holds(self, generation: int) -> bool:
        """Say whether it has the state, and the roster's word that it counts: it came from the newest generation."""
        return self.whole and self.generation == self.came_from == generation

    def may_start(self) -> bool:
        """Say whether the lease allows a step."""
        return self.lease is not None and self.lease.valid(self.world.now)

    def start(self) -> None:
        """Start a phase, or wait until the lease holds."""
        if not self.may_start():
            self.doing = "stalled"
            return
        self.doing = "training"
        self.world.check_start(self)
        seconds, self.late_s = 0.05 + 0.1 * self.world.random() + self.late_s, 0.0
        self.world.at(seconds, self.main, self.on_computed, self.group)

    def on_computed(self, group: "Group") -> None:
        """Contribute to the sum of the phase."""
        if group is self.group and self.doomed:
            self.enter(failed=True)
        elif group is self.group:
            self.contribute(self.index, (self.weights, self.flag))

    def step(self, group: "Group", label: int) -> None:
        """Update the weights, go on to the next phase or to the boundary."""
        values = group.calls[label]
        alike = all(weights == self.weights for weights, _ in values.values())
        self.weights = advance(self.weights, self.index) if alike else GARBAGE
        self.index += 1
        self.world.check_weights(self)
        if self.index % self.world.phases:
            self.start()
            return
        flag = values[group.names[0]][1]
        if self.rank == 0:
            self.world.report(self, saving=flag == 2)
        if flag == 2 and self.rank == 0:
            self.doing, self.since = "saving", self.world.now
        elif flag:
            self.enter(failed=False)
        else:
            self.start()

    def on_saved(self) -> None:
        """Enter, now that the checkpoint is noted."""
        if self.doing == "saving":
            self.enter(failed=False)


class Group:
    """The connections of one generation: a collective can end well for a member only once every member contributed."""

    def __init__(self, world: "World", generation: Generation) -> None:
        self.world, self.generation = world, generation
        self.names = [member.worker.name for member in generation.members]
        self.source = self.names[generation.source or 0]
        self.calls: dict[int, dict[str, Any]] = {}
        self.closed: set[str] = set()
        self.lost: dict[tuple[str, int], bool] = {}  # (member, collective): nobody tells it
        self.jammed = False  # no collective ends any more, well or otherwise

    def contribute(self, process: Process, label: int, value: Any) -> None:
        """Take a member's part; the last one lets the collective end, for each member in its own time."""
        world, call = self.world, self.calls.setdefault(label, {})
        call[process.name] = value
        if len(call) == len(self.names):
            for name in self.names:
                world.at(0.01 + 0.03 * world.random(), self.deliver, world.processes[name], label)
        elif not self.closed <= call.keys():
            world.at(0.02 * world.random(), process.main, process.on_failed, self, label)

    def deliver(self, process: Process, label: int) -> None:
        """Let a collective end for a member, as soon as the members can see each other."""
        if self.jammed:
            return
        if self.world.cuts and self.world.splits(self.names):
            self.world.at(0.1, self.deliver, process, label)
        elif (process.name, label) not in self.lost:
            process.main(process.on_done, self, label)
        elif not self.lost[process.name, label]:
            process.main(process.on_failed, self, label)

    def close(self, process: Process, *, crashed: bool) -> None:
        """Close a member's connections: who still needs something of it sees that, unless they are cut apart."""
        self.closed.add(process.name)
        world = self.world
        cut = bool(world.cuts) and world.splits(self.names)
        for other in (world.processes[name] for name in self.names):
            if other.group is not self or other.awaits is None or other is process:
                continue
            if process.name in self.calls[other.awaits]:  # what it sent last may still get lost
                if world.random() < (0.5 if crashed or cut else 0.05):
                    self.lost[other.name, other.awaits] = cut
            elif not cut:
                world.at(0.05 * world.random(), other.main, other.on_failed, self, other.awaits)


class World:
    """Time, the network, the roster with its fence, the faults and the checks of one history."""

    def __init__(
        self, seed: int, *, roster: type[Roster] = Roster, process: type[Process] = Process, trace: bool = False
    ) -> None:
        self.seed, self.kind = seed, process
        self.rng = Random(seed)  # noqa: S311 -- a history has to be the same again
        self.random = self.rng.random
        self.lines: list[str] | None = [] if trace else None
        self.now, self.events, self.seen = 0.0, 0, Counter[str]()
        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.scheduled = 0
        self.phases = self.pick(1, 2)
        self.wait_s = WAIT_S if self.random() < 0.5 else float("inf")
        minimum = self.pick(1, 2)
        maximum = self.pick(minimum, 5)
        initial = self.pick(minimum, maximum)
        self.roster = roster(minimum=minimum, maximum=maximum, initial=initial, lease_s=LEASE_S)
        self.processes: dict[str, Process] = {}
        self.groups: dict[int, Group] = {}
        self.calls: dict[str, tuple[Process, int, int]] = {}
        self.told: dict[str, tuple[int, Reply | None]] = {}  # the generation that a worker knows of, the last push
        self.waits: dict[str, tuple[int, float | None]] = {}  # from a worker's last beat: since when it waits
        self.cuts: list[tuple[frozenset[str], bool, bool]] = []  # who, from the roster, from each other
        self.asleep_until, self.troubles, self.calm_at = 0.0, 1, float("inf")
        self.drained: set[str] = set()
        self.shrunk, self.finished = False, False
        self.short: tuple[int, float] | None = None  # a generation that is too small, and since when
        self.saved = self.committed = self.reached = 0  # how far checkpoints, accepted records, done steps have come

    # --- the run of a history

    def run(self) -> "World":
        """Play the history to its end."""
        for _ in range(self.roster.initial):
            self.at(0.2 * self.random(), self.spawn)
        self.at(TICK_S, self.tick)
        for _ in range(self.pick(1, 6)):
            self.trouble(FAULTS_S * self.random(), FAULTS[int(self.random() * len(FAULTS))])
        self.at(FAULTS_S, self.over)
        queue = self.queue
        while not self.finished:
            self.now, _, call, arguments = heappop(queue)
            call(*arguments)
            self.events += 1
            if self.now > self.calm_at + BOUND_S:
                self.fail(f"no new step within {BOUND_S:g} s of the last fault")
        return self

    def at(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        """Let something happen later."""
        self.scheduled += 1
        heappush(self.queue, (self.now + delay, self.scheduled, call, arguments))

    def pick(self, low: int, high: int) -> int:
        """Return a number from low to high."""
        return low + int(self.random() * (high - low + 1))

    def log(self, text: str) -> None:
        """Write a line of the trace."""
        if self.lines is not None:
            self.lines.append(f"{self.now:7.3f} {text}")

    def fail(self, text: str) -> NoReturn:
        """Raise a violation."""
        self.log(text)
        raise Violation(f"seed {self.seed}, {self.now:.3f} s: {text}")

    def position(self, index: int) -> Position:
        """Return the position of a state that has `index` phases behind it."""
        return divmod(index, self.phases)

    def index(self, position: Position) -> int:
        """Return how many phases a position has behind it."""
        return position[0] * self.phases + position[1]

    def group_of(self, generation: Generation) -> Group:
        """Return the connections of a generation."""
        if generation.number not in self.groups:
            self.groups[generation.number] = Group(self, generation)
        return self.groups[generation.number]

    # --- the network

    def to_roster(self, process: Process, call: Callable[..., None], *arguments: Any) -> None:
        """Send a message to the roster: it may get lost, be late or arrive twice."""
        if self.cuts and self.is_cut(process):
            return
        delay, luck = 0.002 + 0.02 * self.random(), self.random()
        if luck < 0.04:
            if luck < 0.01:
                return
            if luck < 0.02:
                self.at(delay + 2 * self.random(), self.arrive, process, call, arguments)
            else:
                delay += 1.5 * self.random()
        self.at(delay, self.arrive, process, call, arguments)

    def arrive(self, process: Process, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Hand a message to the roster, when it is awake."""
        if self.cuts and self.is_cut(process):
            return
        if call == self.on_beat or call == self.on_enter:
            process.overdue = process.overdue or self.now - process.heard >= LEASE_S
            process.heard = self.now
        if self.now < self.asleep_until:
            self.at(self.asleep_until - self.now + 0.01 * self.random(), call, process, *arguments)
        else:
            call(process, *arguments)

    def to_process(self, process: Process, call: Callable[..., None], *arguments: Any) -> None:
        """Send an answer to a worker."""
        if not self.cuts or not self.is_cut(process):
            delay = 0.002 + 0.02 * self.random()
            self.at(delay if self.random() > 0.01 else 1.5 * self.random(), process.take, call, *arguments)

    def is_cut(self, process: Process) -> bool:
        """Say whether the roster and a worker are cut apart."""
        return any(roster and process.name in names for names, roster, _ in self.cuts)

    def splits(self, group: list[str]) -> bool:
        """Say whether members of a group are cut apart."""
        return any(peers and 0 < sum(name in names for name in group) < len(group) for names, _, peers in self.cuts)

    # --- at the roster

    def tick(self) -> None:
        """Let the roster look at the clock."""
        if self.now < self.asleep_until:
            self.at(self.asleep_until - self.now, self.tick)
        else:
            self.tell(self.roster.tick, self.now)
            if self.all_wait():
                self.seen["all wait for each other"] += not self.roster.broken
                self.tell(self.roster.fail)
            if self.random() < 0.02:
                self.push(again=True)
            self.at(TICK_S, self.tick)

    def all_wait(self) -> bool:
        """Say whether all members have said that they wait for each other, for too long."""
        number, names = self.roster.generation.number, [m.worker.name for m in self.roster.generation.members]
        heard = [self.waits.get(name, (0, None)) for name in names]
        return bool(names) and all(
            left == number and since is not None and self.now - since > WAIT_S for left, since in heard
        )

    def say(self, call: Callable[..., object], *arguments: Any) -> None:
        """Tell the roster something, when it is awake."""
        if self.now < self.asleep_until:
            self.trouble(self.asleep_until - self.now, World.tell, call, *arguments)
        else:
            self.tell(call, *arguments)

    def on_beat(self, process: Process, generation: int, sent_at: float, waits: float | None) -> None:
        """Answer a beat."""
        process.overdue = False
        self.waits[process.name] = generation, waits
        reply = self.roster.beat(process.name, generation, self.now)
        if reply.commit:
            self.seen["a checkpoint before all leave"] += 1
        self.to_process(process, process.on_reply, reply, sent_at)

    def on_enter(self, process: Process, call: int, entry: tuple[Position | None, int, bool]) -> None:
        """Take an entry; it is answered once there is an answer, unless a later one takes its place."""
        position, left, failed = entry
        process.overdue = False
        if call >= self.calls.get(process.name, (process, 0, 0))[1]:
            self.calls[process.name] = process, call, left
        if process.name not in self.roster.dead | self.roster.released:
            process.came_from = max(process.came_from, left)
        if position is not None and process.name not in self.roster.seats and left == self.roster.generation.number:
            self.seen["a dropped member returns with its state"] += 1
        self.tell(self.roster.enter, process.worker, position, self.now, left=left, failed=failed)

    def report(self, process: Process, *, saving: bool) -> None:
        """Send what the member of rank 0 did in a step and, every third one or where it is asked for, a checkpoint."""
        arguments = process.generation, process.index, process.weights, self.now
        self.to_roster(process, self.on_record, *arguments)
        if saving or process.index // self.phases % 3 == 0:
            self.at(0.2 * self.random(), self.to_roster, process, self.on_checkpoint, *arguments)

    def on_record(self, process: Process, generation: int, index: int, weights: int, sent_at: float) -> None:
        """Take a record, if the fence lets it in."""
        if not self.roster.accepts(generation):
            self.seen["a record is refused"] += 1
            return
        if generation != max(self.groups):
            self.fail(f"a record of generation {generation} counts, and a newer one is at work")
        if weights != true_weights(index):
            self.fail(f"a record of {process.name} contradicts the others")
        self.committed = max(self.committed, index)
        self.finished = sent_at > self.calm_at and self.is_settled()

    def is_settled(self) -> bool:
        """Say whether the newest generation is at work, and everybody in it who should be."""
        members, seats = {member.worker.name for member in self.roster.generation.members}, self.roster.seats.keys()
        full = len(members) == self.roster.maximum or (members >= seats and len(members) < self.roster.maximum)
        enough = len(members) >= self.roster.minimum
        return full and enough and not self.roster.broken and not self.drained & seats

    def on_checkpoint(self, process: Process, generation: int, index: int, weights: int, _: float) -> None:
        """Commit a checkpoint, if the fence lets it in."""
        if self.roster.accepts(generation):
            if weights != true_weights(index):
                self.fail(f"a checkpoint of {process.name} is wrong")
            self.saved = max(self.saved, index)
            self.tell(self.roster.noted, self.position(index))
            self.to_process(process, process.on_saved)

    def tell(self, call: Callable[..., object], *arguments: Any, **named: Any) -> None:
        """Give the roster something to digest, check what it makes of it, and send the answers that it then has."""
        before, seats = self.roster.generation, list(self.roster.seats)
        call(*arguments, **named)
        after = self.roster.generation
        for name in seats:
            if name not in self.roster.seats:
                self.check_gone(self.processes[name], before.number)
        if after is not before:
            self.check_formed(before, after)
        for name, (process, number, left) in list(self.calls.items()):
            answer = self.roster.answer(name, left)
            if answer is not Verdict.WAIT:
                del self.calls[name]
                self.told[name] = answer.number if isinstance(answer, Generation) else left, None
                self.to_process(process, process.main, process.on_answer, answer, number)
        self.push()

    def push(self, *, again: bool = False) -> None:
        """Tell those who wait for no answer what has changed for them, without being asked."""
        for name, (generation, before) in self.told.items():
            if name in self.calls or not (again or name in self.roster.seats):
                continue
            reply = self.roster.reply(name, generation)
            if again or reply != before:
                self.told[name] = generation, reply
                process = self.processes[name]
                self.to_process(process, process.on_push, reply)

    # --- what must never happen

    def check_gone(self, process: Process, number: int) -> None:
        """Nobody is dropped while alive and in touch; nobody is let go who is not asked to, or alone has its state."""
        held, process.came_from = process.holds(number), -1
        if process.name in self.roster.released:
            self.log(f"{process.name} let go")
            rest = (self.processes[name] for name in self.roster.seats)
            if process.name not in self.drained and not self.shrunk:
                self.fail(f"{process.name} is let go, and nobody asked it to leave")
            if held and max((p.index for p in rest if p.holds(number)), default=self.saved) < process.index:
                self.fail(f"{process.name} is let go with a state that nobody else has")
            return
        self.log(f"{process.name} dropped")
        if process.name not in self.roster.dead:
            self.seen["a lease runs out"] += 1
            if self.now - process.heard < LEASE_S and not process.overdue:
                self.fail(f"{process.name} is dropped, heard {self.now - process.heard:.3f} s ago")

    def check_formed(self, before: Generation, after: Generation) -> None:
        """A generation has the right size, the last one is over, and what its members claim is true."""
        names = [member.worker.name for member in after.members]
        self.log(f"generation {after.number} of {names}, source {after.source}")
        self.seen["generations"] += 1
        if not self.roster.minimum <= len(set(names)) == len(names) <= self.roster.maximum:
            self.fail(f"generation {after.number} has {len(names)} members")
        for process in self.processes.values():
            lease, old = process.lease, process.generation < after.number
            if process.alive and old and lease and lease.valid(self.now) and not process.falsely_dead:
                self.fail(f"{process.name} still trains in generation {process.generation}")
        for member in after.members:
            process = self.processes[member.worker.name]
            true = process.whole and process.generation == before.number and self.position(process.index)
            if member.position is not None and member.position != true:
                self.fail(f"{process.name} counts as holding a state that it does not hold")
        self.check_base(before, after)
        self.group_of(after)

    def check_base(self, before: Generation, after: Generation) -> None:
        """A generation starts with the best state that is left, and with none of a line that was given up."""
        source = None if after.source is None else after.members[after.source].worker.name
        base = self.saved if source is None else self.processes[source].index
        best = max((p.index for p in self.processes.values() if p.alive and p.holds(before.number)), default=-1)
        if base < best:
            self.fail(f"generation {after.number} starts at {base}, and a worker has {best}")
        if source is None:
            self.reached = base
            self.seen["the state comes from storage"] += after.number > 1
        if base > self.reached:
            self.fail(
                f"generation {after.number} starts at {base}, beyond {self.reached}, what has been done since a loss"
            )
        self.seen["an accepted step dies with all who had it"] += base < self.committed
        self.committed = min(self.committed, base)

    def check_start(self, process: Process) -> None:
        """Whoever starts a step is in the newest generation."""
        if process.generation != self.roster.generation.number and not process.falsely_dead:
            self.fail(f"{process.name} starts a step in generation {process.generation}, which is over")
        number, since = self.short or (0, 0.0)
        if number == process.generation and self.now > max(since, self.asleep_until) + SHORT_S:
            self.fail(f"generation {process.generation} goes on for more than {SHORT_S:g} s with too few members")

    def check_weights(self, process: Process) -> None:
        """Whoever has done a step has the weights that everybody has after it."""
        if process.weights != true_weights(process.index):
            self.fail(f"{process.name} has wrong weights at {self.position(process.index)}")
        if process.generation == self.roster.generation.number:
            self.reached = max(self.reached, process.index)
        else:
            self.seen["a step ends after its generation"] += 1

    # --- faults

    def spawn(self) -> None:
        """Start a worker."""
        number = len(self.processes)
        worker = Worker(name=f"w{number}", node=f"n{self.pick(0, 2)}", place=number, door=("", 0))
        process = self.processes[worker.name] = self.kind(self, worker)
        self.log(f"{worker.name} starts")
        process.enter(failed=False)
        self.at(BEAT_S * self.random(), process.take, process.on_timer)

    def end(self, process: Process, *, loud: bool) -> None:
        """End a process; Ray tells of a loud death soon, of a silent one (its machine is gone) never."""
        if not process.alive:
            return
        self.log(f"{process.name} ends")
        process.alive = False
        if loud:
            if process.group is not None:
                process.group.close(process, crashed=True)
            self.at(0.05 + 0.3 * self.random(), self.say, self.roster.died, process.name)
        if self.now > self.calm_at:
            self.refill()
        elif self.random() < 0.6:
            self.trouble(0.3 + self.random(), World.spawn)

    def trouble(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        """Let the world do something to the run later; the run need not recover before all of it is over."""
        self.troubles += 1
        self.at(delay, self.over, call, arguments)

    def over(self, call: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()) -> None:
        """Do it; after the last of it, see to it that enough workers are there."""
        if call is not None:
            call(self, *arguments)
        self.troubles -= 1
        if not self.troubles:
            self.log("calm")
            self.calm_at = self.now
            self.refill()

    def refill(self) -> None:
        """Start as many workers as the run needs."""
        there = sum(p.alive and p.name not in self.drained for p in self.processes.values())
        for _ in range(there, self.roster.minimum if self.roster.generation.number else self.roster.initial):
            self.at(0.3 * self.random(), self.spawn)

    def victims(self) -> list[Process]:
        """Choose some of the living."""
        living = [process for process in self.processes.values() if process.alive]
        self.rng.shuffle(living)
        return living[: 1 if self.random() < 0.6 else self.pick(1, 4)]

    def kill(self) -> None:
        """Kill workers, or switch off their machine."""
        loud = self.random() < 0.7
        for process in self.victims():
            self.end(process, loud=loud)

    def stop(self) -> None:
        """Stop workers; they go on later as if nothing had happened, or are killed."""
        for process in self.victims():
            self.log(f"{process.name} stops")
            process.stopped = True
            self.trouble(3 * self.random(), World.go_on, process)

    def go_on(self, process: Process) -> None:
        """End a stop."""
        self.log(f"{process.name} goes on")
        if self.random() < 0.2:
            self.end(process, loud=True)
        process.go_on()

    def hang(self) -> None:
        """Let a main thread hang while beats go on; the other thread ends the process when it has been too long."""
        for process in self.victims()[:1]:
            self.log(f"{process.name} hangs")
            process.stuck = True
            self.trouble(WAIT_S, World.kill_one, process)

    def kill_one(self, process: Process) -> None:
        """Kill a worker."""
        self.end(process, loud=True)

    def delay(self) -> None:
        """Let workers be late with their next step, which is no fault of theirs."""
        for process in self.victims():
            process.late_s = (WAIT_S - 0.2) * self.random()

    def cut(self) -> None:
        """Cut workers apart from the roster, from each other or from both."""
        roster = self.random() < 0.7
        cut = frozenset(process.name for process in self.victims()), roster, not roster or self.random() < 0.5
        self.log(f"cut {cut}")
        self.cuts.append(cut)
        self.trouble(3 * self.random(), World.mend, cut)

    def mend(self, cut: tuple[frozenset[str], bool, bool]) -> None:
        """End a cut."""
        self.log(f"mended {cut}")
        self.cuts.remove(cut)

    def sleep(self) -> None:
        """Let the roster stop for a while; what arrives meanwhile waits."""
        self.asleep_until = max(self.asleep_until, self.now + 3 * self.random())
        self.log(f"the roster sleeps until {self.asleep_until:.3f}")
        self.trouble(self.asleep_until - self.now, World.log, "the roster wakes")

    def slander(self) -> None:
        """Call a living worker dead."""
        for process in self.victims()[:1]:
            self.say(self.on_slander, process)

    def on_slander(self, process: Process) -> None:
        """Let the roster believe it."""
        self.log(f"{process.name} is called dead")
        process.falsely_dead = True
        self.roster.died(process.name)

    def drain(self) -> None:
        """Ask workers to leave; some of their machines end soon."""
        names = [process.name for process in self.victims()]
        self.log(f"drain {names}")
        self.drained.update(names)
        self.say(self.roster.drain, names)
        if self.random() < 0.3:
            for name in names:
                self.trouble(2 * self.random(), World.kill_one, self.processes[name])

    def resize(self) -> None:
        """Set other size limits."""
        minimum = self.pick(1, 4)
        maximum = self.pick(minimum, 5)
        self.log(f"resize to {minimum}, {maximum}")
        self.shrunk = True
        self.say(self.on_resize, minimum, maximum)

    def on_resize(self, minimum: int, maximum: int) -> None:
        """Let the roster know; sometimes somebody starts the workers that it then lacks."""
        number, size = self.roster.generation.number, len(self.roster.generation.members)
        if not 0 < size < minimum:
            self.short = None
        elif self.short is None or self.short[0] != number:
            self.short = number, self.now
            self.seen["a generation is too small"] += 1
        self.roster.resize(minimum, maximum)
        if self.random() < 0.5:
            self.refill()

    def jam(self) -> None:
        """Let the newest group get stuck, so that its members wait for each other and no connection fails."""
        if self.groups:
            self.log(f"generation {max(self.groups)} is jammed")
            self.groups[max(self.groups)].jammed = True

    def give_up(self) -> None:
        """Let the generation be called over though nothing is wrong with it."""
        self.log("called over")
        self.say(self.roster.fail)

    def grow(self) -> None:
        """Start new workers."""
        for _ in range(self.pick(1, 2)):
            self.spawn()


FAULTS = (
    *(World.kill, World.kill, World.stop, World.stop, World.cut, World.cut, World.grow, World.grow),
    *(World.hang, World.delay, World.sleep, World.slander, World.drain, World.resize, World.resize, World.jam),
    World.give_up,
)
