"""The fleet on a real Ray with several nodes; the membership is played by the test, from who is there."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.cell_harness import (
    DRAIN_S,
    Nodes,
    autoscaler_offering,
    groups,
    ongoing,
    present,
    several_nodes,
    stand_in,
    until,
)

from elastrain.elastic.cells import KILLED_S
from elastrain.elastic.fleet import Event, Fleet, Seated, Seen
from elastrain.errors import ResourceError
from elastrain.spec.train import WorkersSpec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with several_nodes() as made:
        yield made


class Run:
    """A fleet, and what a driver would see of its workers."""

    def __init__(self, folder: Path, *, most: int, least: int = 1, gpus: int = 0) -> None:
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
        workers = WorkersSpec(min=least, max=most, cpus=1.0, gpus=gpus)
        self.folder, self.target, self.waiting = folder, most, 0
        self.remaining_s: float | None = None
        self.fleet = Fleet(workers, most, config, "run", work=stand_in())
        self.events: list[Event] = []
        self.slowest = 0.0

    def look(self) -> list[Event]:
        """One look of the driver's."""
        there = present(self.folder)
        members = tuple(Seated(name=str(pid), node=node, cell=cell) for pid, (cell, node, _) in there.items())
        seen = Seen(members=members, waiting=self.waiting, remaining_s=self.remaining_s, target=self.target)
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

    def look_for(self, seconds: float) -> None:
        """Tend for so long."""
        for _ in range(int(seconds / 0.2)):
            self.look()
            time.sleep(0.2)

    def happened(self, kind: str, **fields: Any) -> Event | None:
        """Return the first such event."""
        return next((e for e in self.events if e.kind == kind and fields.items() <= e.fields.items()), None)

    def at(self, node: str) -> set[int]:
        """The workers on a node."""
        return {pid for pid, (_, where, _) in present(self.folder).items() if where == node}


@pytest.fixture(scope="module")
def run(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Up to three workers, on nodes with room for one each; one after the other the tests tell the run's story."""
    made = Run(tmp_path_factory.mktemp("run"), most=3)
    first = nodes.add(1)
    made.fleet.start({first: 1})
    made.until(lambda: made.at(first))
    yield made
    made.fleet.close(grace_s=0.0)


def test_a_run_that_will_soon_be_over_does_not_grow(nodes: Nodes, run: Run) -> None:
    run.remaining_s = 5.0
    nodes.add(1)
    run.look_for(1.5)
    assert not run.events
    assert len(groups()) == 1


def test_it_grows_onto_a_node_with_room_when_that_is_worth_it(run: Run) -> None:
    run.remaining_s = 5000.0
    before = set(present(run.folder))
    run.until(lambda: len(present(run.folder)) == 2)
    assert set(present(run.folder)) > before
    assert run.happened("cell", workers=1)


def test_where_an_autoscaler_could_add_nodes_the_missing_worker_is_asked_for(nodes: Nodes, run: Run) -> None:
    with autoscaler_offering(cpus=1, most=3):
        run.until(lambda: run.happened("demand", workers=1))
        until(lambda: pending() == 1)
        run.target = 2
        run.until(lambda: run.happened("demand", workers=0))
        run.until(lambda: len(groups()) == 2)
        run.target = 3
        run.until(lambda: pending() == 1)
        run.look_for(1.5)
        assert pending() == 1
        new = nodes.add(1)
        run.until(lambda: run.at(new))
        run.look_for(1.5)
        assert (pending(), len(groups())) == (0, 3)
        assert not ongoing()


def test_workers_of_a_node_that_drains_are_named_and_nobody_is_placed_there_again(nodes: Nodes, run: Run) -> None:
    node, stayed = nodes.ids[-1], set(present(run.folder))
    stayed -= run.at(node)
    before = len(run.events)
    nodes.drain(node)
    notice = run.until(lambda: run.happened("preemption", node=node))
    assert set(notice.drain) == {str(pid) for pid in run.at(node)}
    assert 0 < notice.fields["deadline"] - time.time() <= DRAIN_S
    for name in notice.drain:
        (run.folder / f"leave-{name}").touch()
    end = run.until(lambda: run.happened("cell_end", node=node))
    assert end.fields["why"] in {"its workers left", "its node is drained"}
    run.look_for(1.5)
    assert not [e for e in run.events[before:] if e.kind == "cell" and e.fields["node"] == node]
    assert present(run.folder).keys() == stayed


def test_when_a_node_is_lost_its_cell_ends_and_another_is_started_where_there_is_room(nodes: Nodes, run: Run) -> None:
    lost, stayed = nodes.ids[1], run.at(nodes.ids[0])
    assert run.at(lost)
    nodes.lose(lost)
    run.until(lambda: run.happened("node_lost", node=lost))
    assert run.happened("cell_end", node=lost, why="its node is lost")
    new = nodes.add(1)
    run.until(lambda: run.at(new))
    assert present(run.folder).keys() > stayed


def test_members_that_are_enough_end_cells_that_have_none(nodes: Nodes, run: Run) -> None:
    node = nodes.add(1)
    run.until(lambda: run.happened("cell", node=node))
    run.target = 2
    assert run.until(lambda: run.happened("cell_end", node=node)).fields["why"] == "not needed"


def test_a_closed_fleet_leaves_nothing_and_no_look_kept_the_driver_waiting(run: Run) -> None:
    run.fleet.close(grace_s=0.0)
    until(lambda: not groups() and not ongoing() and not present(run.folder))
    assert run.slowest < KILLED_S, "it waited for a cell's death"


def test_a_type_of_which_all_nodes_are_up_adds_none(nodes: Nodes) -> None:
    from elastrain.elastic.session import largest_addable

    workers = WorkersSpec(min=1, max=8)
    with autoscaler_offering(cpus=1, most=3) as offered:
        offered.offer(("large", 4, 1), ("small", 2, 3))
        assert largest_addable(workers) == 4
        large = nodes.add_of_type(4, "large")
        assert largest_addable(workers) == 2, "a cell that no node to come could hold would be asked for"
        nodes.lose(large)
        until(lambda: largest_addable(workers) == 4)


class Breaking:
    """A cell that breaks as soon as it is started."""

    def run(self, *arguments: Any, **named: Any) -> str:
        """Break."""
        del arguments, named
        return "Training failed:\nno such library on this machine"


@pytest.mark.usefixtures("nodes")
def test_cell_after_cell_that_breaks_ends_the_run_with_what_ray_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from elastrain.elastic import fleet

    remote: Any = ray.remote
    monkeypatch.setattr(fleet, "start_cell", lambda: remote(num_cpus=0)(Breaking).remote())
    monkeypatch.setattr(fleet, "room", lambda _: dict.fromkeys("abc", 1))
    monkeypatch.setattr(fleet, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(fleet, "LOOK_S", 0.1)
    one = Run(tmp_path, most=1)
    one.fleet.start({"a": 1})
    with pytest.raises(ResourceError, match=r"3 cells in a row broke .* no such library on this machine"):
        one.until(lambda: False)
    one.fleet.close(grace_s=0.0)
    assert [e.fields["node"] for e in one.events if e.kind == "cell"] == ["b", "c"]  # each time elsewhere


class Standing:
    """A cell whose workers wait for others."""

    def run(self, *arguments: Any, **named: Any) -> str:
        """Wait."""
        del arguments, named
        time.sleep(600)
        return ""


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(("free", "hopeless_s", "ends"), [(0, 40, True), (1, 40, False), (0, 20, False)])
def test_workers_that_wait_for_others_who_can_never_come_do_not_hold_their_nodes_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, hopeless_s: float, *, ends: bool
) -> None:
    import ray

    from elastrain.elastic import fleet
    from elastrain.elastic.demand import Demand

    remote: Any = ray.remote
    monkeypatch.setattr(fleet, "start_cell", lambda: remote(num_cpus=0)(Standing).remote())
    monkeypatch.setattr(fleet, "room", lambda _: {})
    monkeypatch.setattr(fleet, "fitting", lambda _, kind: {"free": free, "total": 2}[kind])
    monkeypatch.setattr(fleet, "LOOK_S", 0.0)
    monkeypatch.setattr(Demand, "hopeless_s", property(lambda _: hopeless_s))
    one = Run(tmp_path, most=3, least=3, gpus=1)
    one.fleet.start({"a": 2})
    try:
        one.waiting = 1
        one.look()  # the other one may yet come
        one.waiting = 2
        if ends:
            with pytest.raises(
                ResourceError, match=r"workers.min 3 .*: the cluster holds 2, and its autoscaler can add"
            ):
                one.look()
        else:
            one.look()
    finally:
        one.fleet.close(grace_s=0.0)


@pytest.mark.usefixtures("nodes")
def test_work_on_cpus_asks_for_nodes_without_accelerators_and_for_others_only_if_there_are_too_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastrain.elastic import demand, fleet, session

    asked: list[Any] = []
    monkeypatch.setattr(demand, "placement_group", lambda _, bundle_label_selector: asked.append(bundle_label_selector))
    monkeypatch.setattr(demand, "remove_placement_group", lambda _: None)
    monkeypatch.setattr(demand.Demand, "take", lambda _: {})
    monkeypatch.setattr(fleet, "room", lambda _: {})
    monkeypatch.setattr(fleet, "LOOK_S", 0.0)
    looks = iter([40.0])  # seconds for which nothing could be placed; what is asked for anew counts from 0
    monkeypatch.setattr(demand.Demand, "hopeless_s", property(lambda _: next(looks, 0.0)))
    there = session.fitting(WorkersSpec(), "total")  # of the tests before, and on nodes that are lost but count yet
    with autoscaler_offering(cpus=1, most=there + 1):
        one = Run(tmp_path, most=1)
        one.fleet.start({})
        events = one.look(), one.look()
        one.fleet.close(grace_s=0.0)
    assert len(asked) == 2, events
    [first, second] = asked
    label = first[0]["ray.io/accelerator-type"]
    assert label.startswith("!in(")
    assert {"H100", "T4", "TPU-V6E"} <= set(label[len("!in(") : -1].split(","))
    assert second is None


def test_a_run_that_names_no_gpu_never_mixes_kinds(nodes: Nodes) -> None:
    from elastrain.elastic.session import alike, check_kind
    from elastrain.errors import SpecError

    any_kind, t4 = WorkersSpec(gpus=1), WorkersSpec(gpus=1, accelerator="T4")
    first, second = (nodes.add_gpus("H100"), nodes.add_gpus("H100"))
    check_kind(any_kind)
    third = nodes.add_gpus("T4")
    with pytest.raises(SpecError, match=r"the cluster has H100, T4, and a run must not mix them: name one"):
        check_kind(any_kind)
    check_kind(t4)
    check_kind(WorkersSpec())
    fits = dict.fromkeys((first, second, third), 1)
    assert alike(any_kind, fits, [first]) == {first: 1, second: 1}
    assert alike(any_kind, fits, []) == alike(t4, fits, [first]) == fits
    for node in fits:
        nodes.lose(node)


def pending() -> int:
    return sum(group["state"] == "PENDING" for group in groups())
