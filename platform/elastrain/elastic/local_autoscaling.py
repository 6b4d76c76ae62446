"""Ray's real autoscaler on this machine: the pools of a spec of provider `local`, from zero nodes to what runs ask for.

A head without CPUs, with a dashboard on loopback, an autoscaler and tokens; what the autoscaler starts are raylets of
this machine with the resources and labels of their pool. All of it is on one leash (`keep`): however the process that
holds it ends, nothing is left.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastrain.cluster.environment import LOCAL_HEAD
from elastrain.elastic import keep
from elastrain.elastic.fake_nodes import ADDRESS, NO_CAPACITY, FakeNodes
from elastrain.elastic.ray_inner import secure_new_cluster
from elastrain.errors import ResourceError, SpecError
from elastrain.spec.accelerators import FAKE_GPUS
from elastrain.spec.cluster import ClusterSpec, Pool

START_S = 120.0
LOOP_S = 1  # between two looks of the autoscaler; Ray's own default of 5 s is for machines that take minutes
STORE_BYTES = 100 << 20  # of each node's object store
HEAD_TYPE = "ray.head.default"  # the only name that Ray's provider of fake nodes gives its head
LOOPBACK = "127.0.0.1"
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class LocalAutoscaling:
    """A cluster that runs: `address` for `train`, `dashboard` for `submit`. `start_autoscaling` makes one."""

    address: str
    dashboard: str
    folder: Path
    keeper: "subprocess.Popen[bytes]"

    @property
    def pids(self) -> list[int]:
        """Every process of the cluster, those of its nodes included."""
        return [self.keeper.pid, *keep.descendants(self.keeper.pid)]

    @property
    def lacking(self) -> Path:
        """A file: the names of the pools that launch nothing now, one a line; it is read at each launch."""
        return self.folder / NO_CAPACITY


def autoscaler_config(spec: ClusterSpec, folder: Path) -> dict[str, Any]:
    """Return what Ray's autoscaler is told; Ray has no defaults for a provider of one's own, so all keys are there."""
    lists = (
        *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
        *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude"),
    )
    provider = {
        "type": "external",
        "module": f"{FakeNodes.__module__}.{FakeNodes.__name__}",
        "folder": str(folder),
        "head_node_id": LOCAL_HEAD,
        **dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "launch_multiple"), True),
        "disable_launch_config_check": True,
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": spec.name,
        "max_workers": sum(pool.most for pool in spec.pools),
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 5,
        "provider": provider,
        "head_node_type": HEAD_TYPE,
        "available_node_types": {HEAD_TYPE: head, **{pool.name: _node_type(pool) for pool in spec.pools}},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in (*lists, "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }


@contextlib.contextmanager
def start_autoscaling(spec: ClusterSpec) -> Iterator[LocalAutoscaling]:
    """Start the cluster, yield it once it answers, and end every process of it afterwards.

    Raises SpecError for a spec of another provider, ResourceError if the head does not start.
    """
    if spec.provider.type != "local":
        raise SpecError(f"{spec.name} is a cluster of {spec.provider.type}; render it: elastrain cluster render")
    secure_new_cluster()
    folder = Path(tempfile.mkdtemp(prefix="elastrain-"))
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(autoscaler_config(spec, folder)))
    ports = [_free_port() for _ in range(4)]
    with (folder / "start.log").open("wb") as log:
        keeper = subprocess.Popen(  # noqa: S603 -- our own script
            _command(folder, config, ports, spec.offers()),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=_environment(ports[3]),
            start_new_session=True,
        )
    try:
        address = _address(folder, keeper, dashboard_port=ports[0])
        yield LocalAutoscaling(address, f"http://{LOOPBACK}:{ports[0]}", folder, keeper)
    finally:
        assert keeper.stdin is not None, "a leash"
        with contextlib.suppress(OSError):
            keeper.stdin.close()
        keeper.wait()
        shutil.rmtree(folder, ignore_errors=True)


def hold(spec: ClusterSpec, without: Iterable[str], *, show: Callable[[LocalAutoscaling], None]) -> None:
    """Start the cluster, `show` it, and hold it until SIGINT or SIGTERM; the pools `without` capacity launch nothing.

    Raises as `start_autoscaling`, SpecError for a pool that is not there, ResourceError if the head ends by itself.
    """
    from elastrain.elastic.session import stopping  # noqa: PLC0415 -- Ray, once the spec is known to be sound

    names, lacking = {pool.name for pool in spec.pools}, list(without)
    if strange := [name for name in lacking if name not in names]:
        raise SpecError(f"--no-capacity {strange[0]}: {spec.name} has {', '.join(sorted(names))}")
    ended = threading.Event()
    with stopping(ended), start_autoscaling(spec) as cluster:
        cluster.lacking.write_text("\n".join(lacking))
        show(cluster)
        while not ended.wait(POLL_S):
            if cluster.keeper.poll() is not None:
                raise ResourceError(_said(cluster.folder))


def as_text(cluster: LocalAutoscaling, spec: ClusterSpec) -> str:
    """Return what somebody with another terminal can do with it."""
    pools = ", ".join(f"{pool.name} (0 to {pool.most})" for pool in spec.pools)
    return "\n".join(
        [
            f"{spec.name} is up, with no node yet: {pools}",
            f"  elastrain train RUN.yaml --address {cluster.address}",
            f"  elastrain submit RUN.yaml --address {cluster.dashboard}",
            f"  elastrain cluster why-up --address {cluster.address}",
            f"  echo {spec.pools[0].name} > {cluster.lacking}    # that pool launches nothing from now on",
            "Ctrl-C ends it and every process of it",
        ]
    )


def _node_type(pool: Pool) -> dict[str, Any]:
    return {
        "resources": {**pool.resources(), "object_store_memory": STORE_BYTES},
        "labels": pool.node_labels(),
        "node_config": {},
        "min_workers": pool.least,
        "max_workers": pool.most,
        "priority": pool.priority,
        "idle_timeout_s": pool.idle_timeout_s,
    }


def _command(folder: Path, config: Path, ports: list[int], labels: Mapping[str, str]) -> list[str]:
    dashboard, agent, client, _ = ports
    return [
        *(
            sys.executable,
            "-P",
            keep.__file__,
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            "--head",
        ),
        *("--port=0", "--num-cpus=0", "--num-gpus=0", f"--temp-dir={folder}"),
        *(f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"),
        *("--include-log-monitor=false", f"--autoscaling-config={config}"),
        f"--labels={','.join(f'{name}={value}' for name, value in labels.items())}",
    ]


def _environment(metrics_port: int) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])  # jobs call `python`
    ray = {
        "AUTH_MODE": "token",
        "FAKE_CLUSTER": "1",
        "enable_autoscaler_v2": "1",
        "CLOUD_INSTANCE_ID": LOCAL_HEAD,
        "OVERRIDE_NODE_ID_FOR_TESTING": LOCAL_HEAD,
    }
    loop = {"AUTOSCALER_UPDATE_INTERVAL_S": str(LOOP_S), "AUTOSCALER_METRIC_PORT": str(metrics_port)}
    return kept | {f"RAY_{name}": value for name, value in ray.items()} | loop | {"PATH": path, FAKE_GPUS: "1"}


def _address(folder: Path, keeper: "subprocess.Popen[bytes]", *, dashboard_port: int) -> str:
    """Wait until the head has an address and its dashboard listens; raises ResourceError."""
    written, deadline = folder / ADDRESS, time.monotonic() + START_S
    while not (written.exists() and written.read_text().strip() and _listens(dashboard_port)):
        if keeper.poll() is not None:
            raise ResourceError(_said(folder))
        if time.monotonic() > deadline:
            raise ResourceError(f"the head did not start within {START_S:g} s; is the machine busy?")
        time.sleep(POLL_S)
    return written.read_text().strip()


def _said(folder: Path) -> str:
    said = (folder / "start.log").read_text(errors="replace").strip().splitlines()
    return f"the head ended by itself: {said[-1][:300] if said else 'it said nothing'}"


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as door:
        door.bind((LOOPBACK, 0))
        return int(door.getsockname()[1])
