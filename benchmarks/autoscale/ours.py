"""Rounds of one side: submit, two nodes, the end, no node; ten times a second what Ray reports is looked at."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.script import finish, options
from ray._raylet import GcsClient  # type: ignore[attr-defined] # compiled
from ray.core.generated import autoscaler_pb2
from ruamel.yaml import YAML

from elastrain.cluster.document import read_cluster
from elastrain.elastic.local_autoscaling import LocalAutoscaling, start_autoscaling

CLUSTER = ROOT / "clusters" / "local-autoscaling" / "cluster.yaml"
MAIN = "from elastrain.__main__ import main; main()"
NODES, STUCK_S, POLL_S = 2, 120.0, 0.1
BARE = f"""
import ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1, num_gpus=1)
def hold():
    import time
    time.sleep(5)
ray.get([hold.remote() for _ in range({NODES})])
"""


def main() -> None:
    """Run the rounds in one cluster and print what the slowest took."""
    given = options()
    spec = read_cluster(CLUSTER, [f"pools.{at}.idle_timeout_s={given['idle_s']}" for at in range(3)]).spec
    rounds: list[tuple[float, float]] = []
    stuck = 0
    with tempfile.TemporaryDirectory() as folder, start_autoscaling(spec) as cluster:
        path = write_spec(Path(folder), given["data"])
        for number in range(given["rounds"]):
            up_s, zero_s = one_round(cluster, command(cluster, path, number, bare=given["bare"]), Path(folder))
            print(
                f"round {number + 1}: {NODES} nodes after {up_s:.1f} s, none {zero_s:.1f} s after its end", flush=True
            )
            stuck += max(up_s, zero_s) >= STUCK_S
            rounds.append((up_s, zero_s))
    ups, zeros = sorted(up for up, _ in rounds), sorted(zero for _, zero in rounds)
    measures = {
        "up_s": ups[-1],
        "zero_s": zeros[-1],
        "median_up_s": ups[len(ups) // 2],
        "median_zero_s": zeros[len(zeros) // 2],
    }
    allowed = {name: given[name] for name in ("allowed_up_s", "allowed_zero_s")}
    finish({**measures, **allowed}, {"rounds": len(rounds), "stuck": stuck})


def command(cluster: LocalAutoscaling, path: Path, number: int, *, bare: bool) -> list[str]:
    """Return the command that submits a round's work and waits for its end."""
    if bare:
        ray = str(Path(sys.executable).with_name("ray"))
        script = path.with_name("bare.py")
        script.write_text(BARE)
        return [ray, "job", "submit", "--address", cluster.dashboard, "--", "python", str(script)]
    run = ["submit", str(path), "--set", f"name=round-{number}", "--address", cluster.dashboard, "--follow", "--json"]
    return [sys.executable, "-c", MAIN, *run]


def one_round(cluster: LocalAutoscaling, words: list[str], folder: Path) -> tuple[float, float]:
    """Return seconds from the submission to two nodes, and from its end to none; raises SystemExit if it fails."""
    client, begun = GcsClient(address=cluster.address), time.monotonic()
    with (folder / "log").open("w") as log, subprocess.Popen(words, stdout=log, stderr=log, cwd=folder) as process:
        up_s = waited(lambda: nodes(client) >= NODES, begun)
        code = process.wait(600)
    if code:
        raise SystemExit((folder / "log").read_text()[-4000:])
    return up_s, waited(lambda: not nodes(client), time.monotonic())


def waited(what: Callable[[], object], since: float) -> float:
    """Return the seconds since `since` until something is true, STUCK_S if it never is."""
    while not what():
        if time.monotonic() - since > STUCK_S:
            return STUCK_S
        time.sleep(POLL_S)
    return time.monotonic() - since


def nodes(client: GcsClient) -> int:
    """Count the nodes that are alive, without the head."""
    messages: Any = autoscaler_pb2  # made at import by protobuf
    reply = messages.GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=60))
    states = reply.cluster_resource_state.node_states
    return sum(bool(node.ray_node_type_name) and node.status != messages.NodeStatus.DEAD for node in states)


def write_spec(folder: Path, data: str) -> Path:
    """Write the spec of a short run of two workers with a GPU each; return its path."""
    spec = {
        "kind": "train",
        "name": "round",
        "task": str(ROOT / "pipelines" / "digits_mlp" / "task.py") + ":DigitsMLP",
        "task_args": {"hidden": 128},
        "data": {"train": f"{data}/train", "global_batch": 64, "slots": NODES},
        "optimizer": {"name": "adamw", "lr": 0.001},
        "budget": {"steps": 500},
        "workers": {"min": 1, "max": NODES, "cpus": 1, "gpus": 1, "accelerator": "H100"},
        "storage": str(folder / "runs"),
    }
    path = folder / "train.yaml"
    with path.open("w") as file:
        YAML().dump(spec, file)
    return path


if __name__ == "__main__":
    main()
