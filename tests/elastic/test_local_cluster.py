"""A cluster of real nodes on this machine: it comes up, nodes drain and die, and nothing of it is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastrain.elastic.keep import descendants
from elastrain.errors import ConflictError, ResourceError

pytestmark = pytest.mark.timeout(900)


def wait_for(what: Callable[[], object], *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process is there and not a corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


KEEP = [sys.executable, "-P", str(Path(__file__).parents[2] / "platform" / "elastrain" / "elastic" / "keep.py")]
FAMILY = "setsid sleep 300 & (setsid sleep 300 &) ; echo started; wait"  # one child, one orphan, in other sessions


@pytest.mark.parametrize("end", ["pipe", "term", "starter"])
def test_a_leash_leaves_nothing(end: str) -> None:
    starter = f"import subprocess, sys; subprocess.Popen({[*KEEP, 'sh', '-c', FAMILY]!r}, stdin=subprocess.PIPE).wait()"
    command = [sys.executable, "-c", starter] if end == "starter" else [*KEEP, "sh", "-c", FAMILY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        wait_for(lambda: len(descendants(process.pid)) >= 3)
        below = descendants(process.pid)
        if end == "pipe":
            assert process.stdin is not None
            process.stdin.close()
        process.send_signal({"pipe": 0, "term": signal.SIGTERM, "starter": signal.SIGKILL}[end])
        process.wait(timeout=300)
        wait_for(lambda: not any(map(alive, below)))


@pytest.mark.ray
def test_nodes_come_drain_and_die_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from elastrain.elastic import local_cluster
    from elastrain.elastic.local_cluster import HEAD, LABEL, start_cluster

    with start_cluster(nodes=3, cpus=1) as cluster:
        head = next(node["NodeID"] for node in ray.nodes() if LABEL not in node["Labels"])
        assert ray.get_runtime_context().get_node_id() == head
        assert ray.cluster_resources()["CPU"] == 3
        nodes = [node["NodeID"] for node in ray.nodes() if LABEL in node["Labels"]]

        @ray.remote(num_cpus=1)
        class Holder:
            def where(self) -> tuple[str, int]:
                return ray.get_runtime_context().get_node_id(), os.getpid()

        holders = [Holder.remote() for _ in nodes]  # type: ignore[attr-defined] # made by a decorator
        where = dict(ray.get([holder.where.remote() for holder in holders]))
        assert set(where) == set(nodes)

        cluster.drain(nodes[0])
        wait_for(lambda: nodes[0] in ray._private.state.state.get_draining_nodes())
        assert alive(where[nodes[0]]), "who is told to go has time to do so"
        cluster.lose(nodes[1])
        wait_for(lambda: not alive(where[nodes[1]]))
        wait_for(lambda: nodes[1] not in [node["NodeID"] for node in ray.nodes() if node["Alive"]])
        assert cluster.size == 1
        cluster.lose(nodes[1])  # once more is no harm
        with pytest.raises(ConflictError, match="connected to a Ray already"), start_cluster(nodes=1, cpus=1):
            pass
        (broken,) = set(cluster._keepers) - cluster._gone - {HEAD}
        os.kill(cluster._keepers[broken].pid, signal.SIGKILL)
        wait_for(lambda: cluster._keepers[broken].poll() is not None)
        cluster.wait()
        assert cluster.size == 1, "another one has come"
        monkeypatch.setattr(local_cluster, "FAILURES", cluster._failed + 1)
        (broken,) = set(cluster._keepers) - cluster._gone - {HEAD}
        os.kill(cluster._keepers[broken].pid, signal.SIGKILL)
        wait_for(lambda: cluster._keepers[broken].poll() is not None)
        with pytest.raises(ResourceError, match="a local Ray node ended by itself"):
            cluster.mend()
        pids = [*cluster.pids, *where.values()]
        assert len(pids) > 10
    assert not [pid for pid in pids if alive(pid)]


STARTER = """
from elastrain.elastic.local_cluster import HEAD, LocalCluster, start_cluster

started, start = [], LocalCluster._start

def gives_up(cluster, name, *options):
    started.append(name)
    start(cluster, name, *options)
    if started == [HEAD]:
        cluster._keepers[HEAD].kill()

LocalCluster._start = gives_up
with start_cluster(nodes=1, cpus=1) as cluster:
    print(*started, cluster.size)
    print(*cluster.pids, flush=True)
    input()
"""


@pytest.mark.ray
def test_a_head_that_ray_gave_up_on_is_started_again_and_no_process_outlives_its_starter() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", STARTER], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["head", "head", "node-0", "1"]
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) > 5
        process.kill()
        process.communicate(timeout=300)
    wait_for(lambda: not any(map(alive, pids)))
