"""Ray's real autoscaler on this machine: nodes from zero, lost ones, pools without capacity, and nothing that pins one.

One cluster, held by the command that a user gives; its tests tell one story after the other. What is counted is read
from what the autoscaler reports.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.conftest import ROOT, SPEC, Cli, command, environment

from elastrain.cluster.preemption import Notice, drain
from elastrain.elastic.keep import descendants
from elastrain.observe.ledger import read_ledger

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

CLUSTER = ROOT / "clusters" / "local-autoscaling" / "cluster.yaml"
QUICK = [part for at in range(3) for part in ("--set", f"pools.{at}.idle_timeout_s=5")]
FIXED = ("precision=fp32", "consistency=bitwise", "data.slots=4", "budget={epochs: 20}")
LONG = ("--set", "budget={epochs: 200}")  # so long that growing is worth it, also where a start takes a minute
GPUS = "workers={min: 1, max: 2, cpus: 1, gpus: 1, accelerator: H100}"

Start = Callable[..., "subprocess.Popen[str]"]


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
        return next(
            pid for pid in self._called("raylet") if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        )

    def cells(self) -> list[int]:
        """The processes of cells."""
        return self._called("ray::Cell")

    def _called(self, name: str) -> list[int]:
        found = []
        for pid in descendants(self.process.pid):
            try:
                first = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            except OSError:
                continue
            if Path(first).name.startswith(name) or first.startswith(name):
                found.append(pid)
        return found

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
            env=environment(),
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
        assert process.wait(60) == 0, errors.read_text()
        wait_for(lambda: not any(alive(pid) for pid in below))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_nodes_come_from_zero_when_a_run_asks_the_run_grows_onto_them_and_they_leave(
    cloud: Cloud, start: Start, workspace: Path, slow_task: Path
) -> None:
    assert not cloud.ever
    process = begin(start, cloud, "from-zero", slow_task)
    wait_for(lambda: events_of(workspace, "from-zero", "resize"), process)
    slow_task.with_name("fast").touch()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    result = json.loads(out.splitlines()[-1])
    assert (result["workers"], result["restarts"]) == (2, 0)
    assert [event["workers"] for event in events_of(workspace, "from-zero", "demand")] == [2]
    wait_for(lambda: not cloud.now)
    assert list(cloud.ever.values()) == ["h100-spot", "h100-spot"]  # nothing else, and none twice
    assert not cloud.pins


def test_a_lost_spot_node_without_capacity_is_made_up_for_by_the_next_pool_and_weights_are_equal(
    cloud: Cloud, start: Start, workspace: Path, slow_task: Path, cli: Cli
) -> None:
    before = set(cloud.ever)
    process = begin(start, cloud, "spot", slow_task, *LONG)

    def grown(times: int) -> bool:
        return [event["workers"] for event in events_of(workspace, "spot", "resize")].count(2) >= times

    wait_for(lambda: grown(1), process)
    os.kill(cloud.cells()[0], signal.SIGKILL)
    wait_for(lambda: grown(2), process)
    cloud.lacking.write_text("h100-spot")
    os.kill(cloud.raylet(min(set(cloud.now) - before)), signal.SIGKILL)
    wait_for(lambda: grown(3), process)
    assert "h100-od" in cloud.now.values()
    drained = next(node for node, pool in cloud.now.items() if pool == "h100-od")
    drain(Notice(reason="spot", deadline=time.time() + 60), address=cloud.address, node=drained)
    wait_for(lambda: grown(4), process)
    wait_for(lambda: drained not in cloud.now, process)
    assert len(events_of(workspace, "spot", "drain")) == 1
    cloud.lacking.write_text("")
    slow_task.with_name("fast").touch()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [event["pool"] for event in events_of(workspace, "spot", "no_capacity")][:1] == ["h100-spot"]
    assert "t4" not in cloud.ever.values()
    few = "workers={min: 3, max: 3, cpus: 1, gpus: 1, accelerator: T4}"  # of which there are two: they come, and wait
    never = ("--set", "name=never", "--set", few, "--set", "data.slots=3", "--address", cloud.address)
    hopeless = start("train", str(SPEC), *never)  # meanwhile
    undisturbed = cli(
        "train", SPEC, *sets("undisturbed", slow_task), *LONG, "--set", "workers={max: 1}", "--json", timeout=800
    )
    digests = {json.loads(text.splitlines()[-1])["weights_sha256"] for text in (out, undisturbed.stdout)}
    assert len(digests) == 1
    _, errors = hopeless.communicate(timeout=300)
    assert hopeless.returncode == 6, errors
    assert "the cluster holds 2, and its autoscaler can add no node that holds one more" in errors
    wait_for(lambda: not cloud.now)
    assert list(cloud.ever.values()).count("t4") == 2
    assert not cloud.pins


def test_when_a_driver_is_killed_only_the_holder_of_its_snapshots_stays_and_not_for_long(
    cloud: Cloud, start: Start, workspace: Path, slow_task: Path
) -> None:
    import ray

    from elastrain.elastic.holder import NAMESPACE, holder_name
    from elastrain.elastic.session import ray_session

    process = begin(start, cloud, "killed", slow_task)
    wait_for(lambda: events_of(workspace, "killed", "snapshot"), process)
    process.kill()
    process.communicate()
    with ray_session(cloud.address, cpus=0):

        def held() -> list[str]:  # beside what Ray itself leaves on the head
            named = ray.util.list_named_actors(all_namespaces=True)
            return [str(each["name"]) for each in named if each["namespace"] == NAMESPACE]

        wait_for(lambda: held() == [holder_name(str(workspace / "runs" / "killed"))])
        wait_for(lambda: {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"})
        ray.kill(ray.get_actor(held()[0], namespace=NAMESPACE))
        wait_for(lambda: not cloud.now)
    assert not cloud.pins


def test_why_up_names_each_of_the_pins_and_its_price_and_a_node_leaves_once_it_is_gone(cloud: Cloud, cli: Cli) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from elastrain.elastic.session import ray_session

    why = partial(pins_of, cloud, cli)

    class Sitter:
        def sit(self) -> bytes:
            return os.urandom(2 << 20)

    with ray_session(cloud.address, cpus=0):
        group = placement_group([{"GPU": 1}] * 2, strategy="STRICT_SPREAD", name="unused")
        assert group.wait(300)
        reasons = why()
        assert [len(pins) for pins in reasons.values()] == [1, 1]
        assert all("placement group" in pins[0] and "unused" in pins[0] for pins in reasons.values())
        first, second = sorted(reasons)
        remote: Any = ray.remote
        on = [NodeAffinitySchedulingStrategy(node, soft=False) for node in (first, second)]
        sitter = remote(num_cpus=0, scheduling_strategy=on[0])(Sitter).remote()
        kept = remote(num_cpus=0, scheduling_strategy=on[1])(Sitter.sit).remote(None)
        assert len(ray.get(kept)) == 2 << 20
        remove_placement_group(group)
        wait_for(lambda: not any("placement group" in pin for pins in why().values() for pin in pins))
        reasons = why()
        assert [pin.split(" (")[0] for pin in reasons[first]] == ["actor: Sitter"]
        assert [pin.split(",")[0] for pin in reasons[second]] == ["object: 2.0 MiB"]
        ray.kill(sitter)
        wait_for(lambda: set(cloud.now) == {second})
        del kept
        wait_for(lambda: not cloud.now)


@pytest.mark.skipif("SOAK" not in os.environ, reason="on a loaded machine it has waited in vain, nobody knows for what")
def test_why_up_names_a_plain_request(cloud: Cloud, cli: Cli) -> None:
    import ray

    from elastrain.elastic.session import ray_session

    with ray_session(cloud.address, cpus=0):
        ray.autoscaler.sdk.request_resources(bundles=[{"GPU": 1}])
        wait_for(lambda: list(pins_of(cloud, cli).values()) == [["request: 1 x GPU 1"]])
        ray.autoscaler.sdk.request_resources(bundles=[])
        wait_for(lambda: not cloud.now)


def pins_of(cloud: Cloud, cli: Cli) -> dict[str, list[str]]:
    """What `why-up` says of each node beside the head; prices are those of the spec."""
    done = cli("cluster", "why-up", str(CLUSTER), "--address", cloud.address, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    nodes = [node for node in found["nodes"] if not node["head"]]
    assert [node["per_h"] for node in nodes] == [26.0] * len(nodes)
    assert found["per_h"] == pytest.approx(0.4 + 26.0 * len(nodes), abs=0.1)
    return {node["node"]: [f"{pin['kind']}: {pin['what']}" for pin in node["pins"]] for node in nodes}


def begin(start: Start, cloud: Cloud, name: str, task: Path, *more: str) -> "subprocess.Popen[str]":
    task.with_name("fast").unlink(missing_ok=True)
    return start("train", str(SPEC), *sets(name, task), "--set", GPUS, *more, "--address", cloud.address, "--json")


def sets(name: str, task: Path) -> list[str]:
    changes = (f"name={name}", f"task={task}:Slow", *FIXED)
    return [part for change in changes for part in ("--set", change)]


def events_of(workspace: Path, name: str, kind: str) -> list[dict[str, Any]]:
    run = workspace / "runs" / name
    return [record for record in read_ledger(str(run)) if record["kind"] == kind] if (run / "ledger").exists() else []


def wait_for(what: Callable[[], object], process: "subprocess.Popen[str] | None" = None) -> None:
    deadline = time.monotonic() + 300
    while not (found := what()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"waited too long; now it is {found!r}"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False
