"""The fleet on a real Ray with several nodes; the membership is played by the test, from who is there."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.cell_harness import Nodes, groups, ongoing, present, several_nodes, stand_in, until

from elastrain.elastic.fleet import Event, Fleet, Seated, Seen
from elastrain.errors import ResourceError
from elastrain.spec.train import WorkersSpec

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with several_nodes() as made:
        yield made


class Run:
    """A fleet, and what a driver would see of its workers."""

    def __init__(self, folder: Path, *, least: int = 1, most: int) -> None:
        from elastrain.elastic.config import WorkerConfig

        config = WorkerConfig(
            host=None,
            feeder=None,
            spec=None,  # type: ignore[arg-type] # the stand-in needs none
            feed=None,  # type: ignore[arg-type]
            num_steps=1,
            run_url=str(folder),
            resume=None,
            info={},
            launched=0.0,
        )
        workers = WorkersSpec(min=least, max=most, cpus=1.0, gpus=0)
        self.folder, self.target, self.remaining_s = folder, most, None
        self.fleet = Fleet(workers, most, config, "run", work=stand_in())
        self.events: list[Event] = []
        self.slowest = 0.0

    def look(self) -> list[Event]:
        """One look of the driver's."""
        there = present(self.folder)
        members = tuple(Seated(name=str(pid), node=node, cell=cell) for pid, (cell, node, _) in there.items())
        seen = Seen(members=members, waiting=0, remaining_s=self.remaining_s, target=self.target)
        begun = time.monotonic()
        new = self.fleet.tend(seen)
        self.slowest = max(self.slowest, time.monotonic() - begun)
        self.events += new
        return new

    def until(self, condition: Callable[[], Any]) -> Any:
        """Tend until the condition holds."""

        def both() -> Any:
            self.look()
            return condition()

        return until(both)

    def happened(self, kind: str, **fields: Any) -> Event | None:
        """Return the first such event."""
        return next((e for e in self.events if e.kind == kind and fields.items() <= e.fields.items()), None)

    def at(self, node: str) -> set[int]:
        """The workers on a node."""
        return {pid for pid, (_, where, _) in present(self.folder).items() if where == node}


@pytest.fixture
def run(nodes: Nodes, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Make a run; at the end of the test nothing of it may be left."""
    made: list[Run] = []

    def make(**options: Any) -> Run:
        made.append(Run(tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.fleet.close(grace_s=0.0)
        assert one.slowest < 1.0
    until(lambda: not groups() and not ongoing() and not present(tmp_path))
    for node in list(nodes.cluster.worker_nodes):
        nodes.cluster.remove_node(node, allow_graceful=False)


def test_it_grows_onto_a_second_node_leaves_it_when_drained_and_never_returns(nodes: Nodes, run: Any) -> None:
    first, one = nodes.add(2), run(most=4)
    one.fleet.start({first: 2})
    one.until(lambda: len(one.at(first)) == 2)
    stayed = one.at(first)
    second = nodes.add(2)
    one.until(lambda: len(one.at(second)) == 2)
    assert one.happened("cell", node=second, workers=2)

    nodes.drain(second)
    notice = one.until(lambda: one.happened("preemption", node=second))
    assert set(notice.drain) == {str(pid) for pid in one.at(second)}
    assert 0 < notice.fields["deadline"] - time.time() <= 60
    for name in notice.drain:
        (one.folder / f"leave-{name}").touch()
    one.until(lambda: one.happened("cell_end", node=second))
    assert one.happened("cell_end", node=second).fields["why"] in {"its workers left", "its node is drained"}
    for _ in range(10):
        one.look()
        time.sleep(0.2)
    assert [e.fields["node"] for e in one.events if e.kind == "cell"] == [second]
    assert one.at(first) == stayed


def test_when_a_node_is_lost_its_cell_ends_and_another_is_started_where_there_is_room(nodes: Nodes, run: Any) -> None:
    first, second = nodes.add(2), nodes.add(2)
    one = run(least=1, most=4)
    one.fleet.start({first: 2, second: 2})
    one.until(lambda: len(present(one.folder)) == 4)
    stayed = one.at(first)
    nodes.lose(second)
    one.until(lambda: one.happened("node_lost", node=second))
    assert one.happened("cell_end", node=second, why="its node is lost")
    third = nodes.add(2)
    one.until(lambda: len(one.at(third)) == 2)
    assert one.at(first) == stayed


def test_where_an_autoscaler_could_add_nodes_one_pending_cell_asks_for_them(nodes: Nodes, run: Any) -> None:
    first, one = nodes.add(2), run(most=4)
    one.fleet.start({first: 2})
    one.until(lambda: len(one.at(first)) == 2)
    with autoscaler_offering(cpus=2, most=3):
        one.until(lambda: one.happened("cell", node=None, workers=2))
        until(lambda: [g["state"] for g in groups()].count("PENDING") == 1)
        one.target = 2
        one.until(lambda: one.happened("cell_end", node=None, why="not needed"))
        one.until(lambda: len(groups()) == 1 and len(ongoing()) == 1)
        one.target = 4
        one.until(lambda: sum(g["state"] == "PENDING" for g in groups()) == 1)
        for _ in range(10):
            one.look()
            time.sleep(0.2)
        assert sum(g["state"] == "PENDING" for g in groups()) == 1
        second = nodes.add(2)
        one.until(lambda: len(one.at(second)) == 2)
    assert len([e for e in one.events if e.kind == "cell"]) == 2


def test_a_run_that_will_soon_be_over_does_not_grow_and_members_that_are_enough_end_empty_cells(
    nodes: Nodes, run: Any
) -> None:
    first, one = nodes.add(2), run(most=4)
    one.fleet.start({first: 2})
    one.until(lambda: len(one.at(first)) == 2)
    one.remaining_s = 5.0
    second = nodes.add(2)
    for _ in range(10):
        one.look()
        time.sleep(0.2)
    assert not one.events
    one.remaining_s = 5000.0
    one.until(lambda: one.happened("cell", node=second))
    one.target = 2
    one.until(lambda: one.happened("cell_end", node=second, why="not needed"))


class Breaking:
    """A cell that breaks as soon as it is started."""

    def run(self, *arguments: Any, **named: Any) -> str:
        del arguments, named
        return "Training failed:\nno such library on this machine"


def test_cell_after_cell_that_breaks_ends_the_run_with_what_ray_said(
    nodes: Nodes, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from elastrain.elastic import fleet

    remote: Any = ray.remote
    monkeypatch.setattr(fleet, "start_cell", lambda: remote(num_cpus=0)(Breaking).remote())
    monkeypatch.setattr(fleet, "FIRST_PAUSE_S", 0.1)
    one = run(most=2)
    first = nodes.add(2)
    one.fleet.start({first: 2})
    nodes.add(2)
    nodes.add(2)
    with pytest.raises(ResourceError, match=r"3 cells in a row broke .* no such library on this machine"):
        one.until(lambda: False)
    started = [e.fields["node"] for e in one.events if e.kind == "cell"]
    assert len({first, *started}) == 3  # each time elsewhere


class autoscaler_offering:  # noqa: N801 -- used as a context
    """Write into Ray what an autoscaler would: that it can add nodes."""

    def __init__(self, *, cpus: int, most: int) -> None:
        self._cpus, self._most = cpus, most

    def __enter__(self) -> None:
        from ray.core.generated import autoscaler_pb2

        config: Any = autoscaler_pb2.ClusterConfig()  # type: ignore[attr-defined] # made at import by protobuf
        config.node_group_configs.add(name="spot", resources={"CPU": self._cpus}, max_count=self._most)
        self._put(config.SerializeToString())

    def __exit__(self, *_: object) -> None:
        self._put(b"")

    def _put(self, value: bytes) -> None:
        import ray

        gcs = ray._private.worker.global_worker.gcs_client
        raylet: Any = ray._raylet
        namespace = raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode()
        gcs.internal_kv_put(raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(), value, True, namespace)
