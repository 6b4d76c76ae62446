"""What the tests of cells share: a stand-in for the training, which writes down who works and does as it is told."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAIT_S = 300.0  # on a busy machine
DRAIN_S = 600  # from a notice to the end of a node


def stand_in() -> Callable[[dict[str, Any]], None]:
    """A train function that needs nothing of ours.

    It writes `<folder>/<cell>-<pid>` with its node and place, and works until there is a file `leave`, `leave-<pid>`,
    `raise-<pid>` or `raise-all` beside it. It is made here, so that it travels by value: workers know no tests.
    """

    def work(config: dict[str, Any]) -> None:
        import os
        import time
        from pathlib import Path

        import ray
        import ray.train

        folder, cell = Path(config["config"].run_url), config["config"].cell
        place = ray.train.get_context().get_world_rank()
        (folder / f"{cell}-{os.getpid()}").write_text(f"{ray.get_runtime_context().get_node_id()} {place}")
        while not any((folder / name).exists() for name in ("leave", f"leave-{os.getpid()}", f"leave-{cell}")):
            if any((folder / name).exists() for name in (f"raise-{os.getpid()}", "raise-all")):
                raise ValueError("the train function broke")
            time.sleep(0.02)

    return work


def present(folder: Path) -> dict[int, tuple[str, str, int]]:
    """Who has begun to work: cell, node and place of each live process."""
    found = {}
    for file in folder.glob("*-*"):
        cell, _, pid = file.name.rpartition("-")
        if not pid.isdigit() or cell in {"leave", "raise"} or not alive(int(pid)):
            continue
        node, _, place = file.read_text().partition(" ")
        if place:
            found[int(pid)] = (cell, node, int(place))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def until(condition: Callable[[], Any], *, timeout: float = WAIT_S) -> Any:
    """Return what the condition comes to once it is true."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout:g} s")


def kill(*pids: int) -> None:
    """Kill at one blow, and see them dead."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in pids))


def ongoing() -> list[str]:
    """Who has asked Ray's coordinator of demand for something that it still holds."""
    import ray

    try:
        coordinator: Any = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    except ValueError:
        return []
    found: list[str] = ray.get(coordinator.__ray_call__.remote(lambda actor: list(actor._ongoing_reqs)))
    return found


def groups() -> list[dict[str, Any]]:
    """The placement groups that are not removed."""
    import ray

    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


@dataclass
class Nodes:
    """A cluster of several raylets on this machine: a head without CPUs, and what the tests add."""

    cluster: Any
    ids: list[str] = field(default_factory=list)  # of those that are there, in the order in which they came

    def add(self, cpus: int, **resources: float) -> str:
        """Add a node and return its id."""
        return self._add(num_cpus=cpus, resources=resources)

    def add_of_type(self, cpus: int, name: str) -> str:
        """Add a node as an autoscaler does, which labels it with its type; return its id."""
        return self._add(num_cpus=cpus, labels={"ray.io/node-group": name})

    def add_gpus(self, kind: str) -> str:
        """Add a node with a GPU of this kind, which is a name; return its id."""
        return self._add(num_cpus=1, num_gpus=1, resources={f"accelerator_type:{kind}": 1})

    def _add(self, **options: Any) -> str:
        import ray

        node = self.cluster.add_node(**options)
        until(lambda: any(n["NodeID"] == node.node_id and n["Alive"] for n in ray.nodes()))
        self.ids.append(str(node.node_id))
        return self.ids[-1]

    def lose(self, node: str) -> None:
        """Kill a node's raylet, and its workers with it."""
        found = next(n for n in self.cluster.worker_nodes if n.node_id == node)
        self.cluster.remove_node(found, allow_graceful=False)
        self.ids.remove(node)

    def drain(self, node: str) -> None:
        """Announce that a node will be taken away, as a cloud's notice does."""
        ray_command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.cluster.address]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        until_then = ["--deadline-remaining-seconds", f"{DRAIN_S}"]
        subprocess.run([*ray_command, "--node-id", node, *reason, *until_then], check=True, capture_output=True)
        self.ids.remove(node)


@contextlib.contextmanager
def several_nodes(*, looks_ms: int = 300) -> Iterator[Nodes]:
    """A head without CPUs, which looks at the others every `looks_ms` and takes one that is gone for dead at the third.

    One that is there but answers late, as on a busy machine, is not dead.
    """
    import ray
    from ray.cluster_utils import Cluster

    from elastrain.elastic.ray_inner import secure_new_cluster

    secure_new_cluster()  # as `ray.init` does: a process that has had a Ray with tokens cannot do without them
    quick = {"health_check_period_ms": looks_ms, "health_check_failure_threshold": 3, "health_check_timeout_ms": 60_000}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield Nodes(cluster)
    finally:
        ray.shutdown()
        cluster.shutdown()


class autoscaler_offering:  # noqa: N801 -- used as a context
    """Write into Ray what an autoscaler would: that it can add nodes."""

    def __init__(self, *, cpus: int, most: int, address: str | None = None) -> None:
        """Write into the Ray at `address`, or into the one that this process is connected to."""
        self._cpus, self._most, self._address = cpus, most, address

    def __enter__(self) -> "autoscaler_offering":
        self.offer(("spot", self._cpus, self._most))
        return self

    def offer(self, *types: tuple[str, int, int]) -> None:
        """Write these instead: name, CPUs, most."""
        from ray.core.generated import autoscaler_pb2

        config: Any = autoscaler_pb2.ClusterConfig()  # type: ignore[attr-defined] # made at import by protobuf
        for name, cpus, most in types:
            config.node_group_configs.add(name=name, resources={"CPU": cpus}, max_count=most)
        self._put(config.SerializeToString())

    def __exit__(self, *_: object) -> None:
        self._put(b"")

    def _put(self, value: bytes) -> None:
        import ray

        worker: Any = ray._private.worker.global_worker
        raylet: Any = ray._raylet
        client = raylet.GcsClient(address=self._address) if self._address else worker.gcs_client
        overwrite = True
        namespace = raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode()
        client.internal_kv_put(raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(), value, overwrite, namespace)
