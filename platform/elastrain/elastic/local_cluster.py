"""A Ray cluster of several nodes on this machine, made to be broken: real raylets, real signals, nothing left behind.

The head offers no CPU, so that what must not be lost runs there and workers do not. Each node is a `ray start --block`
in a session and a folder of its own, on a leash (`keep`): however this process ends, its nodes end with it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray

from elastrain.elastic import keep, start_node
from elastrain.elastic.ray_inner import secure_new_cluster
from elastrain.elastic.session import ray_session
from elastrain.errors import ConflictError, ResourceError

START_S = 180.0
FAILURES = 3  # nodes that ended by themselves, until this machine is too busy
POLL_S = 0.05
LABEL = "elastrain-node"
HEAD = "head"
DRAIN_S = 30  # a node that is told to go has so long before its processes are ended
STORE_SHARE, STORE_LEAST = 0.3, 100 << 20  # of the memory, for the object stores of all nodes


class LocalCluster:
    """Nodes by the name of their label; `start_cluster` makes one."""

    def __init__(self, folder: Path, *, cpus: int, nodes: int) -> None:
        self._folder, self._cpus = folder, cpus
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._store = max(STORE_LEAST, int(memory * STORE_SHARE / (nodes + 1)))
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}
        self._gone: set[str] = set()
        self._count = self._failed = 0
        self.address = ""

    @property
    def pids(self) -> list[int]:
        """Every process of the cluster."""
        keepers = [keeper.pid for keeper in self._keepers.values()]
        return [pid for keeper in keepers for pid in (keeper, *keep.descendants(keeper))]

    @property
    def size(self) -> int:
        """How many nodes are there or on their way, the head and those that were told to go not counted."""
        living = [name for name, keeper in self._keepers.items() if keeper.poll() is None and name not in self._gone]
        return len(living) - (HEAD in living)

    def start_head(self) -> None:
        """Start the head and wait until it has an address; raises ResourceError."""
        client = f"--ray-client-server-port={_free_port()}"  # there is no way to have none
        options = ("--port=0", "--num-cpus=0", "--include-dashboard=false", "--no-monitor", client)
        written = self._folder / HEAD / "ray_current_cluster"
        for left in reversed(range(FAILURES)):
            self._start(HEAD, "--head", *options)
            try:
                self._wait(lambda: written.exists() and written.read_text().strip())
                break
            except ResourceError:
                if not left or self._keepers[HEAD].poll() is None:  # else `ray start` gave up, as on a busy machine
                    raise
                self.close()
                self._gone.discard(HEAD)
                shutil.rmtree(self._folder / HEAD, ignore_errors=True)
        self.address = written.read_text().strip()

    def add(self) -> str:
        """Start a node, without waiting for it, and return its name."""
        name = f"node-{self._count}"
        self._count += 1
        self._start(name, f"--address={self.address}", f"--num-cpus={self._cpus}", f"--labels={LABEL}={name}")
        return name

    def mend(self) -> None:
        """Start another node for each that ended without being told to: `ray start` gives up on a busy machine.

        Raises ResourceError the third time.
        """
        for name, keeper in list(self._keepers.items()):
            if keeper.poll() is not None and name not in self._gone:
                self._gone.add(name)
                self._failed += 1
                if name == HEAD or self._failed >= FAILURES:
                    raise ResourceError(self._said(name))
                self.add()

    def wait(self) -> None:
        """Wait until all nodes that were started have joined; raises ResourceError."""
        self._wait(lambda: self.size <= len(set(_joined().values()) - self._gone))

    def drain(self, node: str) -> None:
        """Send SIGTERM to the `ray start` of the node with this Ray id: it drains, and ends within DRAIN_S."""
        keeper = self._part_with(node)
        if keeper is not None:
            keeper.send_signal(signal.SIGTERM)

    def lose(self, node: str) -> None:
        """Send SIGKILL to the raylet of the node with this Ray id; its other processes go with it."""
        keeper = self._part_with(node)
        for pid in keep.descendants(keeper.pid) if keeper is not None else ():
            if _is_raylet(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End every process of the cluster."""
        for keeper in self._keepers.values():
            assert keeper.stdin is not None, "a leash"
            with contextlib.suppress(OSError):
                keeper.stdin.close()
        for keeper in self._keepers.values():
            keeper.wait()

    def _part_with(self, node: str) -> "subprocess.Popen[bytes] | None":
        """Count a node no more; None if it has gone already."""
        name = _joined().get(node)
        if name is None:
            return None
        self._gone.add(name)
        return self._keepers[name]

    def _start(self, name: str, *options: str) -> None:
        folder = self._folder / name  # nodes that share one and start at once race for the names of their sockets
        folder.mkdir()
        command = [
            *(sys.executable, "-P", keep.__file__, sys.executable, "-P", start_node.__file__, "start", "--block"),
            *(*options, f"--temp-dir={folder}", f"--object-store-memory={self._store}", "--num-gpus=0"),
            *("--disable-usage-stats", "--include-log-monitor=false", "--dashboard-agent-listen-port=0"),
        ]
        with (folder / "start.log").open("wb") as log:
            self._keepers[name] = subprocess.Popen(  # noqa: S603 -- our own script
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=_environment(), start_new_session=True
            )

    def _said(self, name: str) -> str:
        said = (self._folder / name / "start.log").read_text(errors="replace").strip().splitlines()
        return f"a local Ray node ended by itself: {said[-1][:300] if said else 'it said nothing'}"

    def _wait(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + START_S
        while True:
            self.mend()
            if what():
                return
            if time.monotonic() > deadline:
                raise ResourceError(f"a local Ray cluster did not start within {START_S:g} s; is the machine busy?")
            time.sleep(POLL_S)


@contextlib.contextmanager
def start_cluster(*, nodes: int, cpus: int) -> Iterator[LocalCluster]:
    """Start a head and `nodes` nodes of `cpus` logical CPUs each, connect this process, and end all of it afterwards.

    Raises ConflictError if this process uses a Ray already, ResourceError if a node does not start.
    """
    if ray.is_initialized():
        raise ConflictError("this process is connected to a Ray already, and needs one of its own: call ray.shutdown()")
    secure_new_cluster()
    folder = Path(tempfile.mkdtemp(prefix="elastrain-"))
    cluster = LocalCluster(folder, cpus=cpus, nodes=nodes)
    try:
        cluster.start_head()
        with ray_session(cluster.address, cpus=0):  # while the head is alone, so that we are its driver
            for _ in range(nodes):
                cluster.add()
            cluster.wait()
            yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return kept | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)}


def _joined() -> dict[str, str]:
    """The nodes that are alive: Ray's id to our name."""
    nodes = [node for node in ray.nodes() if node["Alive"] and LABEL in node["Labels"]]
    return {node["NodeID"]: node["Labels"][LABEL] for node in nodes}


def _is_raylet(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "raylet"
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])
