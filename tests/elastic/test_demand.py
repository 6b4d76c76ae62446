"""What is asked of an autoscaler, which is played here: no Ray, and a clock that only sleeping moves."""

from types import SimpleNamespace
from typing import Any

import pytest

from elastrain.elastic import demand
from elastrain.elastic.demand import Demand, is_refused
from elastrain.elastic.ray_inner import Autoscaler, NodeType
from elastrain.spec.train import WorkersSpec

TRIAL = WorkersSpec(gpus=1)


class Cluster:
    """Placement groups, and an autoscaler that looks every five seconds and then says what it cannot place."""

    def __init__(self, *, holds_gpus: int, places: bool = False) -> None:
        self.now, self._holds_gpus, self._places = 100.0, holds_gpus, places
        self.groups: dict[str, float] = {}  # GPUs of each that is there
        self.removed: list[str] = []

    def group(self, bundles: list[dict[str, float]], bundle_label_selector: Any) -> Any:
        """Make one."""
        del bundle_label_selector
        name = f"group-{len(self.groups) + len(self.removed)}"
        self.groups[name] = bundles[0]["GPU"]
        return SimpleNamespace(id=SimpleNamespace(hex=lambda: name))

    def remove(self, group: Any) -> None:
        """Take one back."""
        self.removed.append(group.id.hex())
        del self.groups[group.id.hex()]

    def table(self) -> dict[str, Any]:
        """Return what Ray says of those that are there."""
        state = "CREATED" if self._places and self.now > 103 else "PENDING"
        return {name: {"state": state, "bundles_to_node_id": {0: "a-node"}} for name in self.groups}

    def says(self) -> Autoscaler:
        """Return what the autoscaler has said last."""
        large = [name for name, gpus in self.groups.items() if gpus > self._holds_gpus]
        return Autoscaler({}, tuple(f"{name}:PACK" for name in large) if self.now > 105 else ())

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Any:
    def begin(cluster: Cluster) -> Cluster:
        clock = SimpleNamespace(monotonic=lambda: cluster.now, time=lambda: cluster.now, sleep=cluster.sleep)
        monkeypatch.setattr(demand, "time", clock)
        monkeypatch.setattr(demand, "placement_group", cluster.group)
        monkeypatch.setattr(demand, "remove_placement_group", cluster.remove)
        monkeypatch.setattr("ray.util.placement_group_table", cluster.table)
        monkeypatch.setattr(demand, "autoscaler", cluster.says)
        monkeypatch.setattr(demand, "node_types", list)
        return cluster

    return begin


@pytest.mark.parametrize(
    ("cluster", "refused", "within_s"),
    [
        (Cluster(holds_gpus=1), True, 40),
        (Cluster(holds_gpus=8), False, 10),
        (Cluster(holds_gpus=8, places=True), False, 5),
    ],
)
def test_a_trial_that_no_node_can_hold_is_known_before_anything_is_started(
    play: Any, cluster: Cluster, within_s: float, *, refused: bool
) -> None:
    play(cluster)
    assert is_refused(TRIAL, 4) is refused
    assert cluster.now - 100 <= within_s
    assert not cluster.groups, "what was asked for is taken back"
    assert len(cluster.removed) == 1


def test_an_autoscaler_that_says_what_it_can_add_is_not_asked(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = play(Cluster(holds_gpus=1))
    monkeypatch.setattr(demand, "node_types", lambda: [NodeType({"GPU": 8.0}, 2)])
    assert not is_refused(TRIAL, 4)
    assert not cluster.removed


def test_as_long_as_nobody_says_that_it_cannot_be_placed_there_is_hope(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = play(Cluster(holds_gpus=1))
    monkeypatch.setattr(demand, "autoscaler", lambda: None)
    asked = Demand(TRIAL.needs())
    asked.ask(2)
    for _ in range(10):
        cluster.sleep(20.0)
        asked.look()
        assert asked.hopeless_s == 0.0
    asked.close()
