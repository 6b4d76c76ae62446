"""Which folders all machines of a cluster see: those that its autoscaler may start are among them."""

import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from elastrain.__main__ import app
from elastrain.cluster.environment import LOCAL_HEAD
from elastrain.cluster.folders import more_machines, refuse_unseen
from elastrain.cluster.job_server import JobServer
from elastrain.cluster.package import entrypoint, places
from elastrain.data.columns import to_table
from elastrain.elastic import session
from elastrain.errors import SpecError
from elastrain.spec.document import train_spec

HERE = socket.gethostname()
CLOUD = ("1a" * 28, HERE, "i-0123456789")
ALONE = ("1a" * 28, HERE, "")
LOCAL = (LOCAL_HEAD, HERE, LOCAL_HEAD)
OTHER = ("2b" * 28, "another", "")


def a_run(storage: str, data: str = "s3://bucket/data") -> list[str]:
    """The places of a run."""
    spec = train_spec(
        {
            "name": "seen",
            "task": "package.module:Task",
            "data": {"train": data, "global_batch": 8},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "budget": {"steps": 1},
            "storage": storage,
        }
    )
    return places(spec)


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


class Accepted(Exception):  # noqa: N818 -- an event
    """All machines see the folders."""


SWEEP = """
kind: sweep
name: searched
base: BASE
objective: {metric: val_loss, every: 10, max_steps: 20}
space: {optimizer.lr: {log: [1.0e-4, 1.0e-1]}}
budget: {unit: trials, per_arm: 1}
"""


@pytest.mark.parametrize(
    ("verb", "needs"),
    [("train", ["data", "runs"]), ("check", ["data", "runs"]), ("sweep", ["data", "runs"]), ("pack", ["data"])],
)
def test_every_verb_that_uses_a_cluster_refuses_folders_that_its_machines_do_not_see(
    verb: str, needs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `pack` writes is written by the command alone; all else is read or written on any machine."""
    base = Path(__file__).parents[2] / "pipelines" / "digits_mlp" / "train.yaml"
    (tmp_path / "data").mkdir()
    images = to_table({"image": np.zeros((64, 8, 8), "uint8"), "label": np.arange(64) % 10})
    pq.write_table(images, tmp_path / "data" / "a.parquet", write_page_checksum=True)
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("BASE", str(base)))
    data = [f"data.train={tmp_path}/data", f"data.eval={tmp_path}/data"]
    sets = [*data, f"storage={tmp_path}/runs"] if verb != "sweep" else [*(f"set.{each}" for each in data)]
    sets += [f"storage={tmp_path}/runs"] if verb == "sweep" else []
    spec = [str(tmp_path / "sweep.yaml" if verb == "sweep" else base), *(f"--set={each}" for each in sets)]
    arguments = [f"parquet:{tmp_path}/data", str(tmp_path / "packed")] if verb == "pack" else spec

    def asked(seen: Sequence[str], others: str | None, shared: Sequence[str]) -> None:
        refuse_unseen(seen, others, shared)
        raise Accepted

    monkeypatch.setattr(session, "refuse_unseen", asked)
    monkeypatch.setattr(session, "autoscaler", lambda: None)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": "2b", "NodeManagerHostname": "another", "Alive": True}])
    for known in ([], needs[:-1], needs):
        shared = [f"--shared={tmp_path / folder}" for folder in known]
        done = CliRunner().invoke(app, [verb, *arguments, *shared])
        if known == needs:
            assert isinstance(done.exception, Accepted), done.output
        else:
            assert isinstance(done.exception, SpecError), done.output
            assert "is a folder of this machine, and another is in the cluster, too" in str(done.exception)


def test_the_job_is_told_what_is_shared() -> None:
    assert entrypoint([]) == "exec python -m elastrain train run.yaml --json"
    assert entrypoint(["/mnt/a b"], "--x").endswith("--json --shared '/mnt/a b' --x")
