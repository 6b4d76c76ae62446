"""The cells of a sweep without Ray: where they start, as the plan has counted them, and what is said if they cannot."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from elastrain.errors import ResourceError
from elastrain.spec.train import WorkersSpec
from elastrain.sweeps import pool as pool_module
from elastrain.sweeps.forecast import fits
from elastrain.sweeps.orders import CellConfig
from elastrain.sweeps.pool import PATIENCE, Pool, ask_cluster

WORKERS = WorkersSpec(min=2, max=2)


class Asked:
    """An autoscaler: what it is asked for, and what it has found."""

    def __init__(self) -> None:
        self.resources: dict[str, float] = {}
        self.count, self.beside = 0, set[str]()
        self.found: dict[str, list[Any]] = {}
        self.freed: list[Any] = []
        self.hopeless_s, self.spares = 0.0, True

    def of(self, resources: dict[str, float]) -> "Asked":
        """Play a `Demand` of so much each."""
        self.resources = resources
        return self

    def __len__(self) -> int:
        return self.count

    def look(self) -> list[str]:
        """Say which pools are newly left out."""
        return []

    def take(self) -> dict[str, list[Any]]:
        """Return what has found room."""
        found, self.found = self.found, {}
        return found

    def ask(self, count: int, *, beside: set[str]) -> None:
        """Note what is asked for."""
        self.count, self.beside = count, beside


class Cluster:
    """Nodes and what is free on them, in workers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes = {"n1": {"CPU": 5.0}, "n2": {"CPU": 3.0}}
        self.free = {"n1": 0, "n2": 1}
        self.addable, self.started, self.said = 0, list[str](), list[str]()
        self.asked, self.events = Asked(), list[Any]()
        monkeypatch.setattr(pool_module, "room", lambda _: dict(self.free))
        monkeypatch.setattr(pool_module, "addable", lambda _: self.addable)
        monkeypatch.setattr(pool_module, "Demand", self.asked.of)
        monkeypatch.setattr(pool_module, "free", self.asked.freed.extend)
        monkeypatch.setattr(pool_module, "fitting", lambda _, kind: 3 if kind == "total" else sum(self.free.values()))
        monkeypatch.setattr(pool_module, "start_cell", lambda: self.actor("run"))
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
        nodes = [{"Alive": True, "Resources": held, "Labels": {}} for held in self.nodes.values()]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)

    def actor(self, *_: str) -> Any:
        """Return an actor that notes on which nodes cells were started."""
        started = SimpleNamespace(remote=lambda *_, **given: self.started.append(given["node"]))
        return SimpleNamespace(run=started, event=SimpleNamespace(remote=lambda *event: self.events.append(event)))

    def pool(self, left: float | Callable[[], float] = 9) -> Pool:
        """Return a pool that has not begun."""
        config = CellConfig(desk=self.actor(), cell="", size=2, cpus=1.0, gpus=0.0, timeout_s=60.0, info={})
        return Pool(config, WORKERS, most=100, left=left if callable(left) else lambda: left, say=self.said.append)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_as_many_cells_start_as_the_plan_counts_trials_none_across_nodes(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.free = {"n1": 5, "n2": 3}
    pool = cluster.pool()
    pool._grow()
    assert cluster.started == ["n1", "n1", "n2"]
    assert pool.capacity == len(cluster.started) == fits(cluster.nodes.values(), WORKERS)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(pool_module, "largest", lambda _: 5)
    assert ask_cluster("10.0.0.1:6379", WORKERS) == 3


def test_a_sweep_that_waits_for_room_says_so_once_whenever_it_does(cluster: Cluster) -> None:
    pool = cluster.pool()
    for _ in range(PATIENCE - 1):
        pool._grow()
    assert cluster.said == [], "what a cell that ended had held may be about to come free"
    for _ in range(3):
        pool._grow()
    (text,) = cluster.said
    assert text == (
        "waiting for room: no node has it now for a trial of 2 workers of 1 CPUs each; 7 CPUs are held by others"
    )
    cluster.free = {"n1": 2, "n2": 0}
    pool._grow()
    assert cluster.started == ["n1"]
    pool._cells.clear()
    cluster.free = {"n1": 0, "n2": 0}
    for _ in range(3):
        pool._grow()
    assert len(cluster.said) == 2


@pytest.mark.parametrize("case", ["nothing is left to do", "an autoscaler is asked"])
def test_who_does_not_wait_for_others_says_nothing(cluster: Cluster, case: str) -> None:
    cluster.addable = 2 if case == "an autoscaler is asked" else 0
    pool = cluster.pool(left=0 if case == "nothing is left to do" else 9)
    for _ in range(5):
        pool._grow()
    assert cluster.said == []
    assert not cluster.started
    assert len(cluster.asked) == (1 if cluster.addable else 0)


def test_an_autoscaler_is_asked_for_as_many_cells_again_as_have_come_and_no_more_than_trials_are_left(
    cluster: Cluster,
) -> None:
    cluster.addable = 2
    left = [9.0]
    pool = cluster.pool(left=lambda: left[0])
    pool._grow()
    assert cluster.asked.resources == {"CPU": 2.0}, "a cell is on one node, whole"
    cluster.asked.found = {"n3": ["a place"]}
    pool._grow()
    assert cluster.started == ["n3"]
    assert len(cluster.asked) == 0, "nobody knows yet whether it comes"
    assert cluster.asked.freed == [], "its place is held until it has asked for its own"
    for come, asked in ((1, 1), (2, 2), (4, 4)):
        for cell in pool._cells.values():
            cell.came = True
        pool._grow()
        assert len(pool._cells) == come
        assert (len(cluster.asked), cluster.asked.beside) == (asked, {cell.node for cell in pool._cells.values()})
        cluster.asked.found = {f"node-{come}": ["a place"] * asked}
        pool._grow()
    left[0] = 10.0
    for cell in pool._cells.values():
        cell.came = True
    pool._grow()
    assert len(cluster.asked) == 2
    left[0] = 8.0
    cluster.asked.found = {"n9": ["late", "later"]}
    pool._grow()
    assert cluster.asked.freed == ["late", "later"], "what nobody needs any more is given back"
    assert len(cluster.asked) == 0


def test_a_sweep_that_its_autoscaler_cannot_place_takes_other_nodes_and_ends_once_nobody_holds_any(
    cluster: Cluster,
) -> None:
    cluster.addable, cluster.asked.hopeless_s = 2, 40.0
    pool = cluster.pool()
    pool._grow()
    assert not cluster.asked.spares, "nodes with GPUs, too, before it cannot begin"
    pool._grow()
    assert len(cluster.said) == 1, "others hold room, which may come free"
    cluster.free = {"n1": 1, "n2": 1, "n4": 1}  # all there is: too little on each for a trial
    with pytest.raises(
        ResourceError, match=r"no node holds a trial of 2 workers of 1 CPUs each, .* autoscaler can add"
    ):
        pool._grow()
