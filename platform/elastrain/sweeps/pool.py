"""The cells of a sweep: as many as the cluster has room for and trials are there for, each for one trial at a time.

The driver's main thread belongs to Ray Tune; this runs beside it, in a thread. A cell stays up from trial to trial.
Nodes that come bring cells, and with them trials in flight; nodes that go take theirs, whose trials go on elsewhere.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from elastrain.elastic.cells import KILLED_S, end_cell, free_cell, start_cell
from elastrain.elastic.demand import HOPELESS_S, Demand, free, is_refused
from elastrain.elastic.ray_inner import draining_nodes, groups_of
from elastrain.elastic.session import (
    addable,
    alike,
    check_kind,
    fitting,
    largest,
    largest_addable,
    ray_session,
    room,
)
from elastrain.errors import ResourceError
from elastrain.spec.train import WorkersSpec
from elastrain.sweeps.forecast import fits
from elastrain.sweeps.orders import CellConfig

POLL_S = 0.25
LOOK_S = 1.0
PATIENCE = 2  # looks in a row without room for any cell: what one that ended had held comes free by the second
FRUITLESS = 3  # cells in a row that end before their workers have come
LOST_S = 600.0  # so long a sweep that had a cell waits for another one that its autoscaler cannot place


def work_of_trials(config: dict[str, Any]) -> None:
    """What each worker of a cell does."""
    from elastrain.sweeps.worker import work  # noqa: PLC0415 -- torch, in workers only

    work(config["config"])


@dataclass(slots=True, eq=False)
class _Cell:
    actor: Any
    ended: Any  # what its `run` will return
    node: str
    places: Sequence[PlacementGroup]  # held for it until it has asked for its own
    came: bool = False
    drains: bool = False


class Pool:
    """Starts and ends cells; `error` says what made that impossible. Whatever happens, `close` it."""

    def __init__(
        self,
        config: CellConfig,
        workers: WorkersSpec,
        *,
        most: int,
        left: Callable[[], float],
        say: Callable[[str], object],
    ) -> None:
        """Make a pool of cells of `config.size` workers, `most` at once; `left()` counts the trials still to be run.

        `say(text)` is called from the pool's thread, once whenever all room is taken by others.
        """
        self._config, self._workers, self._most, self._left, self._say = config, workers, most, left, say
        self._cells: dict[str, _Cell] = {}
        self._fruitless, self._next_look = 0, 0.0
        self._roomless = 0
        self._demand = Demand({name: config.size * need for name, need in workers.needs().items()})
        self._patience_s = HOPELESS_S  # for how long nothing runs though an autoscaler says that it can place nothing
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sweep-pool")
        self._capacity = 1
        self.error: Exception | None = None
        self.view: Mapping[str, Any] = {"cells": {}, "queued": 0, "failure": None}

    def start(self) -> None:
        """Begin; `capacity` says from then on what the cluster has room for. Raises what Ray does."""
        self._tend()
        self._thread.start()

    @property
    def capacity(self) -> int:
        """How many trials can be in flight now."""
        return self._capacity

    @property
    def busy(self) -> int:
        """How many cells run a trial."""
        return sum(bool(cell["trial"]) for cell in self.view["cells"].values())

    def close(self, *, grace_s: float) -> None:
        """Wait a moment for cells that end by themselves, then end all and free everything that they held."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._demand.close()
        cells, self._cells = list(self._cells.values()), {}
        running = [cell.ended for cell in cells]
        with contextlib.suppress(ray.exceptions.RayError):
            if running and grace_s > 0:
                ray.wait(running, num_returns=len(running), timeout=grace_s)
        for cell in cells:
            ray.kill(cell.actor)
        with contextlib.suppress(ray.exceptions.RayError):
            if running:
                ray.wait(running, num_returns=len(running), timeout=KILLED_S)
        for cell in cells:
            free_cell(cell.actor)
            free(cell.places)

    def _run(self) -> None:
        try:
            self._grow()  # cells start while the desk does
            while not self._closing.wait(POLL_S):
                self._tend()
        except Exception as error:  # noqa: BLE001 -- the main thread has to hear of it
            self.error = error

    def _tend(self) -> None:
        self.view = ray.get(self._config.desk.view.remote())
        for name, seen in self.view["cells"].items():
            if cell := self._cells.get(name):
                cell.came = cell.came or seen["joined"] == self._config.size
                self._patience_s = LOST_S if cell.came else self._patience_s
        self._take_ended()
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            self._leave_nodes()
            self._free_places()
            self._grow()

    def _take_ended(self) -> None:
        """Forget cells that have ended by themselves. Raises ResourceError if none gets as far as a trial."""
        for name, cell in list(self._cells.items()):
            if not ray.wait([cell.ended], timeout=0)[0]:
                continue
            try:
                why = ray.get(cell.ended)
            except ray.exceptions.RayError as error:
                why = str(error)
            del self._cells[name]
            free_cell(cell.actor)
            free(cell.places)
            self._config.desk.drop.remote(name, why or "its cell ended")
            others = any(other.came for other in self._cells.values())  # what has no room now may have it later
            self._fruitless = 0 if cell.came or others else self._fruitless + 1
            if self._fruitless >= FRUITLESS:
                raise ResourceError(f"{FRUITLESS} cells in a row broke before their workers had come: {why}")

    def _leave_nodes(self) -> None:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        draining = draining_nodes()
        for name, cell in list(self._cells.items()):
            if cell.node not in alive:
                del self._cells[name]
                free(cell.places)
                ray.get(self._config.desk.drop.remote(name, "its node is gone"))
                threading.Thread(target=end_cell, args=(cell.actor, cell.ended), daemon=True).start()
            elif cell.node in draining and not cell.drains:
                cell.drains = True
                self._config.desk.drain.remote(name)

    def _free_places(self) -> None:
        """Free the places of cells that have asked for their own; nothing else that we ask for may come there."""
        for cell in self._cells.values():
            if cell.places and groups_of(cell.actor):
                free(cell.places)
                cell.places = ()

    def _grow(self) -> None:
        """Start cells where there is room, as long as there are trials for them; where there is none, ask for it."""
        for pool in self._demand.look():
            self._config.desk.event.remote("no_capacity", {"pool": pool})
        found = self._demand.take()
        working = [cell for cell in self._cells.values() if not cell.drains]
        holds = self._room(working, found)
        self._capacity = max(1, min(self._most, len(working) + sum(holds.values())))
        wanted = min(self._most, self._left())
        for node, cells in holds.items():
            for _ in range(cells):
                if len(working) < wanted:
                    working.append(self._launch(node, [found[node].pop()] if found.get(node) else []))
        free(place for places in found.values() for place in places)
        self._ask(wanted - len(working))
        hopeless = self._check_hope()
        waits = not self._cells and wanted > 0 and (hopeless or not len(self._demand))
        self._roomless = self._roomless + 1 if waits else 0
        if self._roomless == PATIENCE:
            held = ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0)
            self._say(f"waiting for room: no node has it now for {self._trial()}; {held:g} CPUs are held by others")

    def _room(self, working: Sequence[_Cell], found: Mapping[str, Sequence[PlacementGroup]]) -> dict[str, int]:
        """Return how many cells fit, by node, `found` for us included."""
        holds = {node: len(places) for node, places in found.items()}
        if all(cell.came for cell in working):  # else some of the room will be taken by a cell that starts
            there = alike(self._workers, room(self._workers), {cell.node for cell in working})
            for node, workers in there.items():
                holds[node] = max(holds.get(node, 0), workers // self._config.size)
        return holds

    def _ask(self, missing: float) -> None:
        """Ask an autoscaler for room for so many cells, at most as many again as have come: trials may be short."""
        came = sum(cell.came for cell in self._cells.values())
        most = max(1, came) - (len(self._cells) - came)
        more = int(max(0, min(missing, most))) if addable(self._workers) >= self._config.size else 0
        before = len(self._demand)
        self._demand.ask(more, beside={cell.node for cell in self._cells.values()})
        if len(self._demand) != before:
            self._config.desk.event.remote("demand", {"cells": more})

    def _check_hope(self) -> bool:
        """Say whether an autoscaler has said for long that it can place no cell, and there is none.

        Raises ResourceError if nobody else holds anything that might come free.
        """
        hopeless_s = self._demand.hopeless_s
        if self._cells or hopeless_s < HOPELESS_S:
            return False
        if self._demand.spares:
            self._demand.spares = False  # rather a GPU that idles than a sweep that cannot begin
        elif hopeless_s >= self._patience_s and fitting(self._workers, "free") == fitting(self._workers, "total"):
            raise ResourceError(
                f"no node holds {self._trial()}, and the cluster's autoscaler can add none that does; "
                "lower workers.max, workers.cpus or workers.gpus under `set:`, or add a pool"
            )
        return True

    def _trial(self) -> str:
        return f"a trial of {self._config.size} workers of {self._workers.in_words()} each"

    def _launch(self, node: str, places: Sequence[PlacementGroup]) -> _Cell:
        name = uuid.uuid4().hex[:8]
        config, workers = self._config, self._workers
        actor = start_cell()
        ended = actor.run.remote(
            replace(config, cell=name),
            name=f"sweep-{name}",
            size=config.size,
            resources=workers.needs(),
            node=node,
            work=work_of_trials,
        )
        self._cells[name] = cell = _Cell(actor, ended, node, places)
        config.desk.event.remote("cell", {"cell": name, "node": node, "workers": config.size})
        return cell


def check_room(workers: WorkersSpec, size: int) -> None:
    """Raise ResourceError if no node can ever hold a trial, whose workers are all on one; SpecError as `check_kind`.

    An autoscaler that does not say what it can add is asked for such a node, for some seconds.
    """
    check_kind(workers, "set.workers.accelerator")
    if largest(workers) < size and (largest_addable(workers) < size or is_refused(workers, size)):
        raise ResourceError(
            f"a trial of {size} workers of {workers.in_words()} each fits on no node (the largest holds "
            f"{largest(workers)}); lower workers.max, workers.cpus or workers.gpus under `set:`, or add nodes"
        )


def ask_cluster(address: str, workers: WorkersSpec) -> int:
    """Return how many trials the nodes of the Ray at `address` hold at once, by `workers.min` and with nothing beside.

    Raises ResourceError if no Ray answers there, or no node can ever hold a trial; SpecError as `check_kind`.
    """
    with ray_session(address, cpus=1.0):
        check_room(workers, workers.min)
        return fits([node["Resources"] for node in ray.nodes() if node["Alive"]], workers)
