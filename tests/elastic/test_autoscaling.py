"""Ray's real autoscaler on this machine: nodes from zero, lost ones, pools without capacity, and nothing that pins one.

One cluster, held by the command that a user gives, and one run on it, whose story the tests tell one after the other;
what the autoscaler reports all the while is kept. Beside it a run that can never be held comes to its end.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.conftest import ROOT, SLOW, SPEC, Cli, command, environment
from tests.elastic.reference import Reference, begin_reference

from elastrain.cluster.document import read_cluster
from elastrain.cluster.pins import look
from elastrain.cluster.preemption import Notice, drain
from elastrain.cluster.why_up import explain
from elastrain.elastic.keep import descendants
from elastrain.elastic.session import check_kind
from elastrain.errors import SpecError
from elastrain.observe.ledger import read_ledger, read_steps
from elastrain.spec.train import WorkersSpec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

CLUSTER = ROOT / "clusters" / "local-autoscaling" / "cluster.yaml"
QUICK = [part for at in range(3) for part in ("--set", f"pools.{at}.idle_timeout_s=5")]
# So many steps, so slow until they may be fast, that growing is worth it also where a start takes a minute.
FIXED = ("precision=fp32", "consistency=bitwise", "data.slots=4", "budget={epochs: 60}", "eval.every_steps=1000")
GPUS = "workers={min: 1, max: 2, cpus: 1, gpus: 1, accelerator: H100}"
PAUSE_S = 0.3  # of each slot
PER_H = {"h100-spot": 26.0, "h100-od": 55.04}
QUICK_LOOKS = {"RAY_health_check_period_ms": "500"}  # a node that is gone is dead at the fifth


class Cloud:
    """A cluster that scales, and what has been seen of it: which nodes ever came, and what pinned them."""

    def __init__(self, process: "subprocess.Popen[str]", places: dict[str, str]) -> None:
        self.process, self.address = process, places["address"]
        self.lacking = Path(places["no_capacity"])
        self.ever: dict[str, str] = {}  # pools by the id of each node that ever came
        self.pins: set[str] = set()
        self.now: dict[str, str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._ended.set()
        self._thread.join()

    def raylet(self, node: str) -> int:
        """The process of a node."""
        mark = f"RAY_CLOUD_INSTANCE_ID={node}".encode()
        return next(pid for pid in self._raylets() if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))

    def _raylets(self) -> Iterator[int]:
        for pid in descendants(self.process.pid):
            try:
                first = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            except OSError:
                continue
            if Path(first).name == "raylet":
                yield pid

    def _watch(self) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined] # compiled
        from ray.core.generated import autoscaler_pb2

        message: Any = autoscaler_pb2.GetClusterStatusReply  # type: ignore[attr-defined] # made by protobuf
        client = GcsClient(address=self.address)
        while not self._ended.wait(0.2):
            state = message.FromString(client.get_cluster_status(timeout_s=60)).cluster_resource_state
            dead = autoscaler_pb2.NodeStatus.DEAD  # type: ignore[attr-defined]
            alive = [node for node in state.node_states if node.ray_node_type_name and node.status != dead]
            self.now = {node.instance_id: node.ray_node_type_name for node in alive}
            self.ever |= self.now
            self.pins |= {str(pin) for each in state.cluster_resource_constraints for pin in each.resource_requests}


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    from elastrain.elastic.ray_inner import enable_token_auth, secure_new_cluster

    secure_new_cluster()
    enable_token_auth()
    errors = tmp_path_factory.mktemp("cloud") / "stderr"
    with errors.open("w") as file:
        process = subprocess.Popen(
            command("cluster", "local", str(CLUSTER), *QUICK, "--json"),
            env=environment() | QUICK_LOOKS,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, errors.read_text()
        made = Cloud(process, json.loads(line))
        yield made
        made.close()
        below = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0, errors.read_text()
        wait_for(lambda: not any(alive(pid) for pid in below))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Story:
    """A run whose command is given more than once, and what its ledger says."""

    def __init__(self, cloud: Cloud, workspace: Path, folder: Path) -> None:
        self.cloud, self.workspace, self.fast = cloud, workspace, folder / "fast"
        self.run = folder / "runs" / "autoscaled"
        task = folder / "slow.py"
        task.write_text((SPEC.parent / "task.py").read_text() + SLOW)
        self._fixed = [*FIXED, "name=autoscaled", f"storage={folder}/runs", "audit=true", f"task={task}:Slow"]
        self._fixed.append(f"task_args={{hidden: 16, pause: {PAUSE_S}}}")
        self._begun: list[subprocess.Popen[str]] = []

    def go_on(self, workers: str) -> None:
        """Give the run's command."""
        self.process = self.train(*self._fixed, workers)

    def train(self, *changes: str) -> "subprocess.Popen[str]":
        """Begin to train on the cluster."""
        sets = [part for change in changes for part in ("--set", change)]
        self._begun.append(
            subprocess.Popen(
                command("train", str(SPEC), *sets, "--address", self.cloud.address, "--json"),
                cwd=self.workspace,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return self._begun[-1]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What has happened so far."""
        there = (self.run / "ledger").exists()
        return [record for record in read_ledger(str(self.run)) if record["kind"] == kind] if there else []

    def sizes(self) -> list[int]:
        """The workers after each change that was not a loss."""
        return [event["workers"] for event in self.events("resize")]

    def cell(self) -> int:
        """The process of one of the run's cells; other runs have cells, too."""
        import ray

        actors = ray._private.state.actors()
        job = actors[self.events("start")[-1]["id"]]["JobID"]
        ours = (a for a in actors.values() if (a["JobID"], a["ActorClassName"]) == (job, "Cell"))
        return int(next(actor["Pid"] for actor in ours if actor["State"] == "ALIVE"))

    def until(self, what: Callable[[], Any]) -> Any:
        """Wait while the run goes on."""
        return wait_for(what, self.process)

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._begun:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def story(cloud: Cloud, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """The run; this process is connected to the same Ray."""
    from elastrain.elastic.session import ray_session

    with ray_session(cloud.address, cpus=0):
        made = Story(cloud, workspace, tmp_path_factory.mktemp("task"))
        yield made
        made.close()


@pytest.fixture(scope="module")
def undisturbed(workspace: Path) -> Iterator[Reference]:
    """The run that nothing disturbs; it is computed meanwhile."""
    reference = begin_reference(SPEC, [*FIXED, "task_args={hidden: 16}", "workers.max=1"], cwd=workspace)
    yield reference
    reference.process.kill()
    reference.process.communicate()


@pytest.fixture(scope="module")
def hopeless(story: Story) -> "subprocess.Popen[str]":
    """A run that no node can hold: each has one GPU."""
    workers = "workers={min: 1, max: 1, cpus: 1, gpus: 2, accelerator: T4}"
    return story.train("name=never", f"storage={story.run.parent}", workers)


@pytest.mark.usefixtures("hopeless")
def test_nodes_come_from_zero_when_a_run_asks_and_the_run_grows_onto_them(cloud: Cloud, story: Story) -> None:
    with pytest.raises(SpecError, match="the cluster has H100, T4, and a run must not mix them"):
        check_kind(WorkersSpec(gpus=1))
    assert not cloud.ever
    story.go_on(GPUS)
    story.until(lambda: story.sizes() == [2])
    asked = [event["workers"] for event in story.events("demand")]
    assert asked[0] == max(asked) == 2, "both at once"
    assert list(cloud.ever.values()) == ["h100-spot", "h100-spot"]  # nothing else, and none twice


def test_the_cell_of_a_run_is_killed_and_made_up_for_while_a_run_without_hope_ends(
    story: Story, hopeless: "subprocess.Popen[str]"
) -> None:
    os.kill(story.cell(), signal.SIGKILL)
    story.until(lambda: story.sizes() == [2, 2])
    assert story.events("cell_end")
    _, errors = hopeless.communicate(timeout=300)
    assert hopeless.returncode == 6, errors
    assert "the cluster holds 0, and its autoscaler can add no node that holds one more" in errors


@pytest.mark.usefixtures("undisturbed")
def test_a_lost_spot_node_without_capacity_is_made_up_for_by_the_next_pool(cloud: Cloud, story: Story) -> None:
    cloud.lacking.write_text("h100-spot")  # from now on
    before, lost = len(story.sizes()), story.events("cell")[-1]["node"]
    os.kill(cloud.raylet(lost), signal.SIGKILL)
    story.until(lambda: len(story.sizes()) > before)
    assert story.sizes()[-1] == 2
    assert lost in [event["node"] for event in story.events("node_lost")]
    assert lost in [event["node"] for event in story.events("worker_lost")]
    assert {event["pool"] for event in story.events("no_capacity")} == {"h100-spot"}
    assert set(cloud.now.values()) == {"h100-spot", "h100-od"}


def test_why_up_names_on_the_command_line_what_a_run_holds_and_its_price(cloud: Cloud, cli: Cli) -> None:
    done = cli("cluster", "why-up", str(CLUSTER), "--address", cloud.address, "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    nodes = [node for node in json.loads(done.stdout)["nodes"] if not node["head"]]
    assert {node["pool"]: node["per_h"] for node in nodes} == PER_H
    for node in nodes:
        assert {"actor", "placement group"} <= {pin["kind"] for pin in node["pins"]}


def test_a_run_leaves_a_node_that_is_drained(cloud: Cloud, story: Story) -> None:
    drained = story.events("cell")[-1]["node"]
    assert cloud.now[drained] == "h100-od"
    drain(Notice(reason="spot", deadline=time.time() + 600), address=cloud.address, node=drained)
    (left,) = story.until(lambda: story.events("preemption"))
    assert (left["before"], left["workers"], left["steps_redone"]) == (2, 1, 0)
    (notice,) = story.events("drain")
    assert (notice["node"], notice["workers"]) == (drained, left["left"])
    story.until(lambda: drained not in cloud.now)  # the holder of snapshots has left it, too
    held = len(story.events("snapshot"))
    story.until(lambda: len(story.events("snapshot")) >= held + 2)


def test_when_a_driver_is_killed_only_the_holder_of_its_snapshots_stays(story: Story) -> None:
    import ray

    from elastrain.elastic.holder import NAMESPACE, holder_name

    def held() -> list[str]:  # beside what Ray itself leaves on the head
        named = ray.util.list_named_actors(all_namespaces=True)
        return [str(each["name"]) for each in named if each["namespace"] == NAMESPACE]

    story.process.kill()
    story.process.communicate()
    wait_for(lambda: held() == [holder_name(str(story.run))])
    wait_for(lambda: {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"})


def test_the_run_goes_on_from_there_and_its_weights_are_those_of_an_undisturbed_one(
    cloud: Cloud, story: Story, undisturbed: Reference
) -> None:
    held = story.events("snapshot")[-1]["step"]
    story.fast.touch()
    story.go_on(GPUS.replace("max: 2", "max: 1"))
    out, errors = story.process.communicate(timeout=300)
    assert story.process.returncode == 0, errors
    found = json.loads(out.splitlines()[-1])
    assert found["resumed_from"] >= held
    assert found["weights_sha256"] == undisturbed.weights_sha256()
    audit = read_steps(f"{story.run}/audit")
    lines = [*zip(audit["epoch"].to_pylist(), audit["row"].to_pylist(), strict=True)]
    assert len(lines) == len(set(lines)) == found["samples"], "each row once an epoch"
    assert not cloud.pins, "nobody asked for resources without a name"
    assert "t4" not in cloud.ever.values()


def test_a_node_leaves_once_nothing_pins_it_and_why_up_names_each_pin_and_its_price(
    cloud: Cloud, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Sitter:
        def sit(self) -> bytes:
            return os.urandom(2 << 20)

    assert story.process.poll() == 0
    cloud.lacking.write_text("")  # its nodes may be gone
    group = placement_group([{"GPU": 1}], name="unused")
    assert group.wait(300)
    (node,) = ray.util.placement_group_table(group)["bundles_to_node_id"].values()
    remote: Any = ray.remote
    on = NodeAffinitySchedulingStrategy(node, soft=False)
    sitter = remote(num_cpus=0, scheduling_strategy=on)(Sitter).remote()
    kept = remote(num_cpus=0, scheduling_strategy=on)(Sitter.sit).remote(None)
    assert len(ray.get(kept)) == 2 << 20
    wait_for(lambda: set(cloud.now) == {node})  # the others leave
    monkeypatch.setattr("ray.autoscaler.v2.utils.cached_is_autoscaler_v2", None)  # of another Ray of this process
    ray.autoscaler.sdk.request_resources(bundles=[{"GPU": 1}])
    kinds = ["actor: Sitter", "object: 2.0 MiB", "placement group: unused", "request: 1 x GPU 1"]
    wait_for(lambda: pins_of(cloud) == kinds)
    remove_placement_group(group)
    ray.autoscaler.sdk.request_resources(bundles=[])
    wait_for(lambda: pins_of(cloud) == kinds[:2])
    ray.kill(sitter)
    wait_for(lambda: pins_of(cloud) == kinds[1:2])
    del kept
    wait_for(lambda: not cloud.now)


def pins_of(cloud: Cloud) -> list[str]:
    """What `why-up` says of the only node beside the head; prices are those of the spec."""
    found = explain(*look(cloud.address), read_cluster(str(CLUSTER)).spec)
    (node,) = (node for node in found["nodes"] if not node["head"])
    price = PER_H[node["pool"]]
    assert (node["per_h"], found["per_h"]) == (price, pytest.approx(price + 0.4, abs=0.1))
    said = (f"{pin['kind']}: {pin['what']}" for pin in node["pins"])
    return sorted(re.sub(r"( \(|, ).*|(?<=: )\w{12} ", "", text) for text in said)


def wait_for(what: Callable[[], Any], process: "subprocess.Popen[str] | None" = None) -> Any:
    """Return what it comes to once it is true; a process is to go on meanwhile."""
    deadline = time.monotonic() + 300
    while not (found := what()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"waited too long; now it is {found!r}"
        time.sleep(0.1)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False
