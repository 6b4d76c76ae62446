"""Which folders all machines of a cluster see: those that its autoscaler may start are among them."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from elastrain.cluster.environment import LOCAL_HEAD
from elastrain.cluster.folders import more_machines, refuse_unseen
from elastrain.cluster.job_server import JobServer
from elastrain.cluster.package import entrypoint
from elastrain.elastic import session
from elastrain.errors import SpecError
from elastrain.spec.document import train_spec
from elastrain.spec.train import TrainSpec

HERE = socket.gethostname()
CLOUD = ("1a" * 28, HERE, "i-0123456789")
ALONE = ("1a" * 28, HERE, "")
LOCAL = (LOCAL_HEAD, HERE, LOCAL_HEAD)
OTHER = ("2b" * 28, "another", "")


def a_run(storage: str, data: str = "s3://bucket/data") -> TrainSpec:
    return train_spec(
        {
            "name": "seen",
            "task": "package.module:Task",
            "data": {"train": data, "global_batch": 8},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "budget": {"steps": 1},
            "storage": storage,
        }
    )


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([ALONE], None),
        ([ALONE, OTHER], "another is in the cluster, too"),
        ([CLOUD], "the cluster's autoscaler may start others"),  # from zero: only the head is up
        ([LOCAL], None),  # its nodes are processes of this machine
    ],
)
def test_submit_and_train_know_of_machines_that_are_not_there_yet(
    nodes: list[tuple[str, str, str]], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    raylets = [
        {"nodeId": node, "nodeManagerHostname": host, "instanceId": instance, "state": "ALIVE"}
        for node, host, instance in nodes
    ]
    gone = {"nodeId": "3c", "nodeManagerHostname": "gone", "instanceId": "", "state": "DEAD"}
    answer = {"data": {"summary": [{"raylet": each} for each in [*raylets, gone]]}}
    monkeypatch.setattr(JobServer, "_do_request", lambda *_: SimpleNamespace(json=lambda: answer))
    server: Any = object.__new__(JobServer)
    server.url = "http://127.0.0.1:8265"
    assert server.more_machines() == said

    table = [{"NodeID": node, "NodeManagerHostname": host, "Alive": True} for node, host, _ in nodes]
    monkeypatch.setattr("ray.nodes", lambda: table)
    managed = object() if any(instance for *_, instance in nodes) else None
    monkeypatch.setattr(session, "autoscaler", lambda: managed)
    session._check_folders(a_run("s3://bucket/runs"), [])
    session._check_folders(a_run("/mnt/all/runs"), ["/mnt/all"])
    if said:
        with pytest.raises(SpecError, match=f"/mnt/all/runs is a folder of this machine, and {said}"):
            session._check_folders(a_run("/mnt/all/runs"), [])
    else:
        session._check_folders(a_run("/mnt/all/runs"), [])


@pytest.mark.parametrize(
    ("storage", "data"),
    [
        ("/mnt/all/../local", "s3://bucket/data"),
        ("/mnt/all", "/mnt/allx/data"),
        ("/mnt/all", "delta:/data@3"),
        ("file:///mnt/local", "s3://bucket/data"),
    ],
)
def test_only_what_lies_under_a_shared_folder_is_seen(storage: str, data: str) -> None:
    with pytest.raises(SpecError, match="say --shared FOLDER"):
        refuse_unseen(a_run(storage, data), "another is in the cluster, too", ["/mnt/all/"])
    assert more_machines([HERE], [], managed=False) is None


def test_the_job_is_told_what_is_shared() -> None:
    assert entrypoint([]) == "exec python -m elastrain train run.yaml --json"
    assert entrypoint(["/mnt/a b"], "--x").endswith("--json --shared '/mnt/a b' --x")
