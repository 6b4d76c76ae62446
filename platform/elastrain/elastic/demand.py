"""What an autoscaler is asked: one pending placement group for each worker of a run, or trial of a sweep, without room.

The autoscaler packs them on nodes as it sees fit. One that has found a node holds the place until the cell that is
started there has a placement group of its own: else the node might idle, and be ended. Pools whose launches fail are
left out for a while by the label of their nodes, so that the next pool by priority is tried; Ray itself would try the
same one again and again. Nodes with accelerators are left out for work that needs none, by the label of their kind:
Ray only prefers others, and would start what costs a hundred times as much once those are full.
"""

import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from elastrain.elastic.ray_inner import NODE_ID_LABEL, Autoscaler, autoscaler, node_types
from elastrain.spec.accelerators import ACCELERATORS
from elastrain.spec.train import WorkersSpec

OUT_S = 120.0  # a pool that could not launch is left out for so long
HOPELESS_S = 30.0  # what an autoscaler cannot place for so long it never will, unless others hold the room
ANSWER_S, LOOK_S = 8.0, 0.5  # Ray's autoscaler looks every 5 s and says then what it cannot place; how often we do
POOL_LABEL = "ray.io/node-group"  # what `ClusterSpec` labels the nodes of a pool with
KIND_LABEL = "ray.io/accelerator-type"


class Demand:
    """Asks for workers that hold `resources` each; whatever happens, `close` it."""

    def __init__(self, resources: Mapping[str, float]) -> None:
        self._resources = dict(resources)
        self._asks: list[PlacementGroup] = []
        self._failed: dict[str, float] = {}  # pools that could not launch, and when (Unix time)
        self._out: tuple[str, ...] = ()
        self._where: dict[str, tuple[str, ...]] = {}  # values of labels that no answer may have
        self._hopeful = time.monotonic()
        self.spares = not {"GPU", "TPU"} & resources.keys()  # whether nodes with accelerators are no answer

    def __len__(self) -> int:
        """Count the workers that are asked for."""
        return len(self._asks)

    @property
    def hopeless_s(self) -> float:
        """Return for how long the autoscaler has been unable to place any of them; 0 where none is asked for."""
        return time.monotonic() - self._hopeful if self._asks else 0.0

    def take(self) -> dict[str, list[PlacementGroup]]:
        """Return what has found room, by node: a place for one worker each, held until it is given to `free`."""
        found: dict[str, list[PlacementGroup]] = {}
        table: Mapping[str, Any] = ray.util.placement_group_table() if self._asks else {}
        for ask in list(self._asks):
            entry = table.get(ask.id.hex(), {"state": "REMOVED"})
            if entry["state"] == "CREATED":
                found.setdefault(entry["bundles_to_node_id"][0], []).append(ask)
            if entry["state"] in ("CREATED", "REMOVED"):
                self._asks.remove(ask)
        return found

    def ask(self, workers: int, *, beside: Collection[str] = ()) -> None:
        """Ask for so many workers in all, more or fewer than before; room on the nodes `beside` is no answer."""
        where = {POOL_LABEL: self._out, NODE_ID_LABEL: tuple(sorted(beside))}
        where[KIND_LABEL] = ACCELERATORS if self.spares else ()
        if where != self._where:
            self._where = where
            self._keep(0)
        self._keep(workers)

    def look(self) -> list[str]:
        """See what the autoscaler says; return the pools that are left out from the next `ask` on."""
        said = autoscaler() if self._asks else None
        if said is None:
            self._hopeful = time.monotonic()  # nobody says that it cannot be placed
            return []
        self._hope(said)
        now, before = time.time(), self._out
        for pool, when in said.failed.items():
            self._failed[pool] = max(when, self._failed.get(pool, 0.0))
        self._out = tuple(sorted(pool for pool, when in self._failed.items() if now - when < OUT_S))
        return [pool for pool in self._out if pool not in before]

    def close(self) -> None:
        """Ask for nothing any more."""
        self._keep(0)

    def _keep(self, workers: int) -> None:
        while len(self._asks) > workers:
            remove_placement_group(self._asks.pop())
        if not self._asks:
            self._hopeful = time.monotonic()
        where = {label: f"!in({','.join(values)})" for label, values in self._where.items() if values}
        while len(self._asks) < workers:
            self._asks.append(placement_group([self._resources], bundle_label_selector=[where] if where else None))

    def _hope(self, said: Autoscaler) -> None:
        names = [ask.id.hex() for ask in self._asks]
        placed = [name for name in names if not any(name in text for text in said.infeasible)]
        if placed or self._out:
            self._hopeful = time.monotonic()


def is_refused(workers: WorkersSpec, size: int) -> bool:
    """Say whether an autoscaler, asked for one node that holds so many workers, keeps saying that it can add none."""
    if node_types():
        return False  # it is known what it can add
    demand = Demand({name: size * need for name, need in workers.needs().items()})
    demand.spares = False
    begun = time.monotonic()
    try:
        demand.ask(1)
        while time.monotonic() - begun < ANSWER_S or demand.hopeless_s > 2 * LOOK_S:
            time.sleep(LOOK_S)
            demand.look()
            if demand.hopeless_s > HOPELESS_S:
                return True
            if found := demand.take():
                free(place for places in found.values() for place in places)
                return False
    finally:
        demand.close()
    return False


def free(places: Iterable[PlacementGroup]) -> None:
    """Give places back."""
    for place in places:
        remove_placement_group(place)
