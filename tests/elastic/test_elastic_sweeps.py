"""A sweep on nodes that come and go: more trials at once where there is room, and none lost with a node."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.cell_harness import autoscaler_offering
from tests.elastic.sweep_stage import Moods, wait_for

from elastrain.elastic.local_cluster import LocalCluster, start_cluster
from elastrain.observe.ledger import read_ledger
from elastrain.sweeps.trials import trials_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with start_cluster(nodes=1, cpus=1) as made:
        yield made


def test_trials_at_once_follow_the_nodes_and_a_lost_node_costs_no_trial(
    cluster: LocalCluster, start: Callable[..., Any], workspace: Path, tmp_path: Path
) -> None:
    moods = Moods(tmp_path)
    moods.hold()  # from the 26th step on, until nodes have come and gone
    changes = ("objective.every=10", "set.workers.cpus=1", "set.checkpoint.every_steps=10", "budget.per_arm=2")
    sets = [part for change in changes for part in ("--set", change)]
    offering = autoscaler_offering(cpus=1, most=8, address=cluster.address)
    offering.offer(("spot", 1, 8))
    process = start("sweep", str(moods.path("nodes-of-a-sweep")), *sets, "--address", cluster.address, "--json")
    url = str(workspace / "runs" / "nodes-of-a-sweep")

    def events(kind: str) -> list[dict[str, Any]]:
        assert process.poll() is None, process.communicate()
        return [event for event in read_ledger(url) if event["kind"] == kind] if Path(url).exists() else []

    wait_for(lambda: len(events("eval")) == 2)
    assert len(events("trial")) == 1, "one node, one trial at once"
    wait_for(lambda: events("demand"))
    cluster.add()
    wait_for(lambda: len(events("eval")) == 4)
    assert [event["cells"] for event in events("demand")] == [1]
    cluster.lose(events("cell")[0]["node"])
    wait_for(lambda: events("lost"))
    moods.release()
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(said.splitlines()[-1])["trials"] == {"finished": 2}
    told = read_ledger(url)
    assert [event["reason"] for event in told if event["kind"] == "lost"] == ["its node is gone"]
    for trial in trials_of(told):
        assert [entry.step for entry in trial.evaluations] == list(range(10, 61, 10))
    # what was done after the last checkpoint is all that is done again
    steps = [event["step"] for event in told if event["kind"] == "eval" and event["trial"] == "search-0000"]
    assert len(steps) <= 6 + 2
