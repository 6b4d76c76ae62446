"""The cells of a sweep without Ray: where they start, as the plan has counted them, and what is said if they cannot."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from elastrain.spec.train import WorkersSpec
from elastrain.sweeps import pool as pool_module
from elastrain.sweeps.forecast import fits
from elastrain.sweeps.orders import CellConfig
from elastrain.sweeps.pool import PATIENCE, Pool, ask_cluster

WORKERS = WorkersSpec(min=2, max=2)


class Cluster:
    """Nodes and what is free on them, in workers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes = {"n1": {"CPU": 5.0}, "n2": {"CPU": 3.0}}
        self.free = {"n1": 0, "n2": 1}
        self.addable, self.started, self.said = 0, list[str | None](), list[str]()
        monkeypatch.setattr(pool_module, "room", lambda _: dict(self.free))
        monkeypatch.setattr(pool_module, "addable", lambda _: self.addable)
        monkeypatch.setattr(pool_module, "start_cell", lambda: self.actor("run"))
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
        nodes = [{"Alive": True, "Resources": held} for held in self.nodes.values()]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)

    def actor(self, *_: str) -> Any:
        """Return an actor that notes on which nodes cells were started."""
        started = SimpleNamespace(remote=lambda *_, **given: self.started.append(given["node"]))
        return SimpleNamespace(run=started, event=SimpleNamespace(remote=lambda *_: None))

    def pool(self, left: float = 9) -> Pool:
        """Return a pool that has not begun."""
        config = CellConfig(desk=self.actor(), cell="", size=2, cpus=1.0, gpus=0.0, timeout_s=60.0, info={})
        return Pool(config, WORKERS, most=100, left=lambda: left, say=self.said.append)


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
    assert cluster.started == ([None] if cluster.addable else [])
