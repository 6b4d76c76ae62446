"""The cells of a run: started where there is room, ended where there is none any more, asked for where more would help.

The driver calls `Fleet.tend` a few times a second with what it sees of the members; nothing here waits, and the cluster
is looked at once a second. Who trains together is not decided here: a cell's workers come to the membership by
themselves. A cell of which only some workers have left keeps their CPUs until its end: whole cells give room back.
"""

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from elastrain.elastic.cells import KILLED_S, Work, free_cell, start_cell, work_of_cell
from elastrain.elastic.config import WorkerConfig
from elastrain.elastic.demand import HOPELESS_S as UNPLACED_S
from elastrain.elastic.demand import Demand, free
from elastrain.elastic.policy import Outlook, more_workers, packed, room_beside
from elastrain.elastic.ray_inner import draining_nodes, groups_of
from elastrain.elastic.session import addable, alike, check_kind, fitting, room
from elastrain.errors import ResourceError
from elastrain.spec.train import WorkersSpec

LOOK_S = 1.0
START_S = 15.0  # from asking for a cell to its first member, until one has shown how long it takes here
COMEBACK_S = 60.0  # a worker that is away for longer has left: it is not waited for
HOPELESS_S = 600.0  # so long may a cell on a node that has room be without any member; and a run that had enough wait
FRUITLESS = 3  # cells in a row that broke before a worker of theirs became a member
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
AVOID_S = 60.0  # a node on which a cell broke is left alone for so long, then twice as long, and so on


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Seated:
    """A worker that trains now: its name, its node's id, and its cell's."""

    name: str
    node: str
    cell: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What the driver sees.

    `members` train now, `waiting` workers have entered and are not yet among them, the run takes another `remaining_s`
    as it is (None: not known yet) and can use `target` workers at most.
    """

    members: tuple[Seated, ...]
    waiting: int
    remaining_s: float | None
    target: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something for the ledger, and the names of the workers that are to leave because of it.

    `demand` (of an autoscaler: `workers`) · `no_capacity` (`pool`: its launches fail, so it is left out for a while) ·
    `cell` (started: `cell`, `node`, `workers`) · `cell_end` (`cell`, `node`, `why`) · `node_lost` (`node`, `workers`) ·
    `preemption` (`node`, `workers`, `deadline`: Unix time or None).
    """

    kind: str
    fields: Mapping[str, Any]
    drain: tuple[str, ...] = ()


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _Cell:
    """A cell and what is known of it."""

    name: str
    actor: Any
    ended: Any  # what its `run` will return
    size: int
    node: str
    asked: float
    came: bool = False  # a worker of it has been a member
    members: int = 0
    short: float  # since when it has had fewer members than workers
    places: Sequence[PlacementGroup] = ()  # held for it until it has asked for its own

    def coming(self, now: float) -> int:
        """Count the workers that are still to come, or to come back."""
        return self.size - self.members if not self.came or now - self.short < COMEBACK_S else 0


class Fleet:
    """The cells of one attempt at a run. Whatever happens, `close` it."""

    def __init__(
        self, workers: WorkersSpec, slots: int, config: WorkerConfig, name: str, *, work: Work = work_of_cell
    ) -> None:
        self._workers, self._slots, self._config, self._name, self._work = workers, slots, config, name, work
        self._demand = Demand(workers.needs())
        self._cells: list[_Cell] = []
        self._ending: list[tuple[float, _Cell]] = []  # killed when; what they hold is freed once they are dead
        self._told: dict[str, set[str]] = {}  # draining nodes, and who was asked to leave them
        self._avoid: dict[str, float] = {}
        self._fruitless, self._not_before, self._next_look = 0, 0.0, 0.0
        self._patience_s = UNPLACED_S  # how long the run stands still though its autoscaler can add nothing
        self._start_s = START_S

    def start(self, sizes: Mapping[str, int]) -> list[Event]:
        """Start a cell of so many workers on each node, all at once; {} where an autoscaler is to make the room."""
        if not sizes:
            return self._ask(min(self._workers.max, self._slots), time.monotonic())
        return [self._launch(node, size) for node, size in sizes.items()]

    def tend(self, seen: Seen) -> list[Event]:
        """Look at cells and cluster and do what is to be done; return what has happened and who is to leave.

        Raises ResourceError if cell after cell breaks before a worker of it trains, while too few others do.
        """
        now = time.monotonic()
        self._free_ended(now)
        self._count(seen, now)
        events = self._take_ended(seen, now)
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            nodes = {node["NodeID"]: bool(node["Alive"]) for node in ray.nodes()}
            events += self._leave_dead(nodes, seen, now)
            events += self._leave_draining(nodes, seen, now)
            events += self._drop_unwanted(seen, now)
            self._free_places()
            events += self._grow(seen, now)
        return events

    def close(self, *, grace_s: float) -> None:
        """Wait a moment for cells that end by themselves, then end all and free everything that they held."""
        self._demand.close()
        try:
            running = [cell.ended for cell in self._cells]
            if running and grace_s > 0:
                ray.wait(running, num_returns=len(running), timeout=grace_s)
        finally:
            for cell in list(self._cells):
                self._end(cell, time.monotonic())
            with contextlib.suppress(ray.exceptions.RayError):
                dying = [cell.ended for _, cell in self._ending]
                if dying:
                    ray.wait(dying, num_returns=len(dying), timeout=KILLED_S)
            while self._ending:
                free_cell(self._ending.pop()[1].actor)

    # --- one cell

    def _launch(self, node: str, size: int, places: Sequence[PlacementGroup] = ()) -> Event:
        name, now = f"{self._name}-{uuid.uuid4().hex[:8]}", time.monotonic()
        config = dataclasses.replace(self._config, cell=name, launched=time.time())
        actor = start_cell()
        resources = self._workers.needs()
        ended = actor.run.remote(config, name=name, size=size, resources=resources, node=node, work=self._work)
        cell = _Cell(name=name, actor=actor, ended=ended, size=size, node=node, asked=now, short=now)
        cell.places = places
        self._cells.append(cell)
        return Event(kind="cell", fields={"cell": name, "node": node, "workers": size})

    def _end(self, cell: _Cell, now: float, why: str = "closed") -> Event:
        """Kill a cell; what it held is freed at one of the next looks, so that nobody waits for its death."""
        self._cells.remove(cell)
        free(cell.places)
        self._ending.append((now, cell))
        ray.kill(cell.actor)
        return Event(kind="cell_end", fields={"cell": cell.name, "node": cell.node, "why": why})

    def _free_ended(self, now: float) -> None:
        """Free what killed cells held, once they can ask for nothing more."""
        dead = _done(cell for _, cell in self._ending)
        for entry in list(self._ending):
            if entry[1] in dead or now - entry[0] > KILLED_S:
                self._ending.remove(entry)
                free_cell(entry[1].actor)

    def _free_places(self) -> None:
        """Free the places of cells that have asked for their own; nothing else that we ask for may come there."""
        for cell in self._cells:
            if cell.places and groups_of(cell.actor):
                free(cell.places)
                cell.places = ()

    # --- what has become of them

    def _count(self, seen: Seen, now: float) -> None:
        """Note who has come and from where."""
        if len(seen.members) >= self._workers.min:
            self._patience_s = HOPELESS_S  # what was there once may come back
        for cell in self._cells:
            mine = [member for member in seen.members if member.cell == cell.name]
            if mine and not cell.came:
                cell.came, self._fruitless = True, 0
                self._start_s = now - cell.asked
            if len(mine) != cell.members or len(mine) == cell.size:
                cell.short = now
            cell.members = len(mine)

    def _take_ended(self, seen: Seen, now: float) -> list[Event]:
        """End the cells whose `run` has returned, or from which nobody has ever come."""
        events, done = [], _done(self._cells)
        for cell in list(self._cells):
            if cell in done:
                said = _said(cell)
                events.append(self._end(cell, now, said or "its workers left"))
            elif not (cell.came or seen.waiting) and now - cell.asked > HOPELESS_S:
                said = f"none of its workers came within {HOPELESS_S:g} s"
                events.append(self._end(cell, now, said))
            else:
                continue
            if said:
                self._note_broken(cell, said, seen, now)
        return events

    def _note_broken(self, cell: _Cell, said: str, seen: Seen, now: float) -> None:
        """After a cell broke the next one waits, longer each time, and goes elsewhere; at last there is no next one."""
        if not cell.came:
            self._fruitless += 1
        if self._fruitless >= FRUITLESS and len(seen.members) < self._workers.min:
            raise ResourceError(
                f"{self._fruitless} cells in a row broke before a worker of theirs trained; the last one said: {said}"
            )
        self._not_before = now + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._fruitless)
        if not cell.came:
            self._avoid[cell.node] = now + AVOID_S * 2 ** min(6, self._fruitless - 1)

    def _leave_dead(self, nodes: Mapping[str, bool], seen: Seen, now: float) -> list[Event]:
        """End the cells of nodes that are dead: Ray would wait for their room for ever."""
        dead = {cell.node for cell in self._cells if not nodes.get(cell.node, True)}
        events = []
        for node in sorted(dead):
            workers = [member.name for member in seen.members if member.node == node]
            events.append(Event(kind="node_lost", fields={"node": node, "workers": workers}))
            events += [self._end(cell, now, "its node is lost") for cell in self._of(node)]
        return events

    def _leave_draining(self, nodes: Mapping[str, bool], seen: Seen, now: float) -> list[Event]:
        """Name those who are to leave nodes that will be taken away, and end the cells there that have nobody left."""
        events = []
        for node, deadline in sorted(draining_nodes().items()):
            if not nodes.get(node, False) or not self._of(node):
                continue
            told = self._told.setdefault(node, set())
            leave = tuple(m.name for m in seen.members if m.node == node and m.name not in told)
            told.update(leave)
            if leave:
                fields = {"node": node, "workers": list(leave), "deadline": deadline}
                events.append(Event(kind="preemption", fields=fields, drain=leave))
            events += [self._end(c, now, "its node is drained") for c in self._of(node) if not c.members]
        return events

    def _of(self, node: str) -> list[_Cell]:
        return [cell for cell in self._cells if cell.node == node]

    # --- how many there should be

    def _drop_unwanted(self, seen: Seen, now: float) -> list[Event]:
        """Where there are enough members, end the cells that have none: all have left, or none is needed any more."""
        if len(seen.members) < seen.target:
            return []
        return [self._end(cell, now, "not needed") for cell in list(self._cells) if not cell.members]

    def _grow(self, seen: Seen, now: float) -> list[Event]:
        """Start cells where there is room and more workers are worth it; where there is none, ask for it."""
        coming = {cell.name: cell.coming(now) for cell in self._cells}
        size = len(seen.members) + sum(coming.values())
        if size >= min(seen.target, self._slots):
            return self._ask(0, now)
        if seen.members and seen.remaining_s == 0.0 and size >= self._workers.min:
            return []  # as long as nobody knows how long the run takes, what was asked for stays asked for
        events = [Event(kind="no_capacity", fields={"pool": pool}) for pool in self._demand.look()]
        found = self._demand.take()
        if not self._cells:
            check_kind(self._workers)  # an autoscaler does not say before which kinds it has
        fits = self._room(coming, found, now)
        could = addable(self._workers)
        more = self._more(seen, size, sum(fits.values()) + could)
        calm = now >= self._not_before  # else a cell has just broken, and its room will be seen to be free in a moment
        cells = packed(fits, more) if calm else {}
        events += [self._launch(node, n, found.pop(node, ())) for node, n in cells.items()]
        free(place for places in found.values() for place in places)
        missing = max(0, min(more - sum(cells.values()), could))
        events += self._ask(missing if calm else min(missing, len(self._demand)), now)
        self._check_hope(seen, sum(coming.values()))
        return events

    def _ask(self, workers: int, now: float) -> list[Event]:
        """Ask an autoscaler for so many workers in all, not where cells of ours are, or broke."""
        avoided = {node for node, until in self._avoid.items() if until > now}
        before = len(self._demand)
        self._demand.ask(workers, beside={cell.node for cell in self._cells} | avoided)
        return [Event(kind="demand", fields={"workers": workers})] if workers != before else []

    def _check_hope(self, seen: Seen, coming: int) -> None:
        """Raise ResourceError if the run cannot go on and an autoscaler cannot help, though nobody else holds anything.

        Workers that have come and wait for others do not train: their nodes would be paid for without an end.
        """
        hopeless_s = self._demand.hopeless_s
        if hopeless_s < UNPLACED_S or len(seen.members) >= self._workers.min or coming > seen.waiting:
            return
        if self._demand.spares:
            self._demand.spares = False  # rather a GPU that idles than a run that cannot begin
            return
        held, total = sum(cell.size for cell in self._cells), fitting(self._workers, "total")
        if hopeless_s >= self._patience_s and fitting(self._workers, "free") + held == total:
            raise ResourceError(
                f"workers.min {self._workers.min} of {self._workers.in_words()} each: the cluster holds {total}, and "
                "its autoscaler can add no node that holds one more; lower workers.min, workers.cpus or workers.gpus, "
                "or add a pool"
            )

    def _more(self, seen: Seen, size: int, free: int) -> int:
        most = min(seen.target, self._slots)
        bounds = (min(self._workers.min, most), most)
        remaining_s = seen.remaining_s if seen.members else None
        outlook = Outlook(remaining_s=remaining_s, start_s=self._start_s)
        return more_workers(slots=self._slots, size=size, bounds=bounds, room=free, outlook=outlook)

    def _room(self, coming: Mapping[str, int], found: Mapping[str, Sequence[Any]], now: float) -> dict[str, int]:
        """Return what is free, `found` for us included, beside what is on its way: a new cell holds nothing yet.

        Whether the view of the cluster counts what was found as free yet nobody knows.
        """
        taken: dict[str, int] = {}
        for cell in self._cells:
            if not cell.came:
                taken[cell.node] = taken.get(cell.node, 0) + coming[cell.name]
        there = {node: max(n, len(found.get(node, ()))) for node, n in room(self._workers).items()}
        there = alike(self._workers, there, {cell.node for cell in self._cells})
        return room_beside({node: n for node, n in there.items() if self._avoid.get(node, 0.0) <= now}, taken)


def _done(cells: Iterable[_Cell]) -> list[_Cell]:
    """Return the cells whose `run` has returned."""
    by_end = {cell.ended: cell for cell in cells}
    done, _ = ray.wait(list(by_end), num_returns=len(by_end), timeout=0) if by_end else ([], [])
    return [by_end[ended] for ended in done]


def _said(cell: _Cell) -> str:
    """Return why a cell broke, in a line; "" if its workers have left."""
    try:
        said = str(ray.get(cell.ended))
    except ray.exceptions.RayError as error:
        said = str(error) or type(error).__name__
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
