"""Cells on a real Ray with two nodes: real processes, real signals."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.cell_harness import Nodes, alive, groups, kill, ongoing, present, several_nodes, stand_in, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Config:
    """As much of a WorkerConfig as the stand-in reads."""

    run_url: str
    cell: str


@dataclass
class Running:
    """A cell that has been started."""

    folder: Path
    actor: Any
    ended: Any

    def pids(self, count: int) -> set[int]:
        """Wait until exactly so many work."""
        return set(until(lambda: found if len(found := present(self.folder)) == count else None))


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with several_nodes() as made:
        made.add(3)
        yield made


@pytest.fixture(scope="module")
def start(node: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a cell, on the second node unless told otherwise."""
    from elastrain.elastic.cells import start_cell

    started: list[Running] = []

    def begin(size: int, *, node: str = node, **beside: float) -> Running:
        folder = tmp_path_factory.mktemp("cell")
        actor, name, resources = start_cell(), folder.name, {"CPU": 1.0, **beside}
        config = Config(run_url=str(folder), cell="one")
        ended = actor.run.remote(config, name=name, size=size, resources=resources, node=node, work=stand_in())
        started.append(Running(folder, actor, ended))
        return started[-1]

    yield begin
    for cell in started:
        end(cell)


@pytest.fixture(scope="module")
def node(nodes: Nodes) -> str:
    """The second of two nodes that both have room for three."""
    return nodes.add(3)


@pytest.fixture(scope="module")
def trio(start: Start) -> Running:
    """A cell of three workers, which the tests treat one after the other, ever more roughly."""
    return start(3)


def test_all_workers_of_a_cell_are_on_the_node_that_was_asked_for(trio: Running, node: str) -> None:
    trio.pids(3)
    assert {where for _, where, _ in present(trio.folder).values()} == {node}


def test_a_cell_starts_no_process_that_it_does_not_need(trio: Running) -> None:
    import ray

    trio.pids(3)
    found = {actor["ActorClassName"] for actor in ray._private.state.actors().values()}
    assert "RayTrainWorker" in found
    assert not {"DatasetManager", "PlacementGroupCleaner"} & found


def test_two_of_three_are_killed_at_once_and_replaced_while_the_third_goes_on(trio: Running) -> None:
    first, second, other = trio.pids(3)
    kill(first, second)
    assert other in trio.pids(3)


def test_a_worker_that_dies_while_another_is_replaced_harms_nobody(trio: Running) -> None:
    first, second, other = trio.pids(3)
    kill(first)
    time.sleep(0.6)  # the death is noticed and the replacement is under way
    kill(second)
    assert other in trio.pids(3)


def test_a_worker_that_raises_is_replaced_while_others_go_on_and_have_left(trio: Running) -> None:
    leaver, victim, other = trio.pids(3)
    (trio.folder / f"leave-{leaver}").touch()
    (trio.folder / f"raise-{victim}").touch()
    until(lambda: victim not in present(trio.folder))
    assert trio.pids(3) > {leaver, other}
    assert alive(leaver)  # its process is kept, though its function has returned


def test_a_cell_that_is_killed_whole_comes_back_on_its_node(trio: Running, node: str) -> None:
    before = trio.pids(3)
    kill(*before)
    assert not trio.pids(3) & before
    assert {where for _, where, _ in present(trio.folder).values()} == {node}


def test_a_cell_goes_on_when_a_worker_leaves_and_returns_when_all_have_left(trio: Running) -> None:
    import ray

    leaver, *others = trio.pids(3)
    (trio.folder / f"leave-{leaver}").touch()
    assert not ray.wait([trio.ended], timeout=1.0)[0]
    assert present(trio.folder).keys() > set(others)
    (trio.folder / "leave").touch()
    assert ray.get(trio.ended, timeout=300) == ""
    until(lambda: not present(trio.folder))
    end(trio)


def test_ending_a_cell_leaves_nothing_though_a_worker_hangs_and_ray_waits_for_it(start: Start, node: str) -> None:
    cell = start(2)
    hung, victim = cell.pids(2)
    assert not ongoing(), "a request to Ray's coordinator outlives its cell by minutes"
    os.kill(hung, signal.SIGSTOP)
    kill(victim)
    time.sleep(0.6)  # Ray wants to replace the victim, and asks the hung one first
    end(cell)
    until(lambda: not groups() and not ongoing() and not present(cell.folder) and free(node) == 3.0)


def test_ending_a_cell_that_waits_for_room_takes_its_demand_back(start: Start) -> None:
    cell = start(4)  # more than the node holds
    (group,) = until(groups)
    assert (group["state"], group["strategy"]) == ("PENDING", "STRICT_PACK")
    assert not ongoing()
    end(cell)
    until(lambda: not groups() and not ongoing())


class Asker:
    """An actor that asks for room as a cell does."""

    def ask(self) -> None:
        """Ask for a group, the last thing in a life perhaps."""
        from ray.util.placement_group import placement_group

        placement_group([{"CPU": 1.0, "asked": 1.0}])


def test_what_a_cell_asked_for_that_was_dead_when_it_came_is_freed_when_room_is_looked_for(nodes: Nodes) -> None:
    import ray

    from elastrain.elastic.session import room
    from elastrain.spec.train import WorkersSpec

    node, held = nodes.add(2, asked=2), len(groups())
    remote: Any = ray.remote(num_cpus=0)(Asker)
    living, dead = remote.remote(), remote.remote()
    ray.get([living.ask.remote(), dead.ask.remote()])
    until(lambda: room(WorkersSpec())[node] == 0)
    ray.kill(dead)
    until(lambda: room(WorkersSpec())[node] == 1)
    assert len(groups()) == held + 1, "who lives keeps what it has"
    ray.kill(living)
    until(lambda: room(WorkersSpec())[node] == 2)
    nodes.lose(node)


def test_what_is_asked_for_comes_on_a_node_of_the_accelerator_that_a_worker_needs(nodes: Nodes) -> None:
    """What `WorkersSpec.needs` asks for is what Ray's autoscaler and scheduler tell kinds of nodes by."""
    from elastrain.elastic.demand import Demand, free

    node = nodes.add(1, **{"accelerator_type:H100": 1.0})
    demand = Demand({"CPU": 1.0, "accelerator_type:H100": 0.001})
    demand.spares = False
    demand.ask(1)
    found = until(demand.take)
    assert [*found] == [node]
    free(found[node])


def test_a_cell_whose_worker_breaks_again_and_again_gives_up_and_says_why(start: Start) -> None:
    import ray

    cell = start(1)
    (cell.folder / "raise-all").touch()
    assert "the train function broke" in ray.get(cell.ended, timeout=300)
    assert len(list(cell.folder.glob("one-*"))) == 3


def test_failures_in_a_row_are_answered_later_and_later_and_a_cell_with_survivors_is_never_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2.api.exceptions import WorkerGroupError

    from elastrain.elastic.trainer import Patience

    now, waited = [1000.0], list[float]()
    monkeypatch.setattr("elastrain.elastic.trainer.time.monotonic", lambda: now[0])
    monkeypatch.setattr("elastrain.elastic.trainer.time.sleep", waited.append)
    some, patience = WorkerGroupError("one of two", {0: ValueError()}), Patience(size=2)
    for _ in range(9):
        assert patience.make_decision(some) is FailureDecision.RETRY
        now[0] += 5.0
    assert waited == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    now[0] += 60.0
    assert patience.make_decision(some) is FailureDecision.RETRY
    assert len(waited) == 8  # after a calm it is the first failure again


def test_a_cell_does_not_wait_for_room_for_ever() -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    from elastrain.elastic.trainer import Patience

    no_room = ControllerError(WorkerGroupStartupTimeoutError(2))
    assert Patience(size=2).make_decision(no_room).value == "RAISE"


def end(cell: Running) -> None:
    from elastrain.elastic.cells import end_cell

    end_cell(cell.actor, cell.ended)


def free(node: str) -> float:
    from elastrain.elastic.ray_inner import available_per_node

    return available_per_node().get(node, {}).get("CPU", 0.0)
