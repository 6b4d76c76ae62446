"""Secrets that lie in the environment of who trains, submits and sweeps appear nowhere: on no disk and in no API.

The same runs show that `submit --follow` gives what `train` gives, and how closed a Ray is that `train` starts.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray._raylet import GcsClient  # type: ignore[attr-defined] # compiled
from ray.job_submission import JobSubmissionClient
from tests.cluster.head import Head, head
from tests.cluster.test_jobs import SPEC, TASK

from elastrain.cluster.doors import Listener, knock, listeners
from elastrain.cluster.environment import NO_EXPORTERS
from elastrain.cluster.job_server import JobServer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

# Of who uses the cluster, and of the machine that it runs on; none of the names is one that Ray knows.
USERS = {"AWS_SECRET_ACCESS_KEY": "canary-u1-83b1", "HF_TOKEN": "canary-u2-61fe", "MY_DATABASE_LOGIN": "canary-u3-0d4c"}
MACHINES = {"AWS_SESSION_TOKEN": "canary-m1-9ab7", "WANDB_API_KEY": "canary-m2-5e02"}
# Steps that take long while there is a file of the name.
HELD = """
import time
from pathlib import Path
from task import DigitsMLP


class Held(DigitsMLP):
    def losses(self, model, batch):
        time.sleep(4 if Path("FILE").exists() else 0)
        return super().losses(model, batch)
"""
CARELESS = "careless-4c1d"
SWEEP = """
kind: sweep
name: searched
base: alone.yaml
set: {workers: {min: 1, max: 1}, data.slots: 2}
objective: {metric: val_loss, every: 10, max_steps: 20}
space: {optimizer.lr: {log: [1.0e-4, 1.0e-1]}}
budget: {unit: trials, per_arm: 1}
"""
STATES = ("actors", "jobs", "nodes", "placement_groups", "runtime_envs", "tasks", "workers")


@dataclass(frozen=True)
class Place:
    """A head, and a folder that holds all files of it and of the commands."""

    head: Head
    folder: Path

    def elastrain(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a command with the user's secrets in its environment; all that its Ray writes lies in the folder."""
        own = {"TMPDIR": str(self.folder / "t"), "RAY_TMPDIR": str(self.folder / "t")}
        return subprocess.Popen(
            [sys.executable, "-m", "elastrain", *arguments],
            env=os.environ | own | USERS,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def done(self, *arguments: str) -> "Said":
        """Run a command to its end and return what it has said."""
        return said_by(self.elastrain(*arguments))


class Said(NamedTuple):
    """What a command wrote."""

    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """What it came to."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


def said_by(process: "subprocess.Popen[str]") -> Said:
    said = Said(*process.communicate(timeout=900))
    assert process.returncode == 0, said.err
    return said


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="e", dir="/tmp"))  # sockets lie in it: a short name
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (folder / "t").mkdir()
    (folder / "task.py").write_text(TASK)
    (folder / "held.py").write_text(HELD.replace("FILE", str(folder / "hold")))
    (folder / "sweep.yaml").write_text(SWEEP)
    for name in ("alone", "sent"):
        text = SPEC.replace("NAME", name).replace("FOLDER", str(folder))
        (folder / f"{name}.yaml").write_text(text.replace("train, global", f"train, eval: {folder}/data/test, global"))
    try:
        with head(folder / "head", cpus=2, environment=NO_EXPORTERS | MACHINES | {"PATH": path}) as started:
            there = Place(started, folder)
            there.done("pack", "digits", str(folder / "data"), "--address", started.address)
            yield there
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(place: Place) -> tuple[Said, dict[Listener, str]]:
    """What `train` on a Ray of its own says, and what its ports answer while it trains."""
    hold = place.folder / "hold"
    hold.touch()
    sets = ("--set", "task=held.py:Held", "--set", "checkpoint.every_steps=1")
    process = place.elastrain("train", "alone.yaml", *sets, "--json")
    try:
        deadline = time.monotonic() + 600
        while not list((place.folder / "runs" / "alone").glob("checkpoints/step-*/manifest.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        answers = {each: knock(each.reachable, each.port) for each in listeners([], [process.pid])}
        hold.unlink()
        return said_by(process), dict(answers)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def sent(place: Place) -> Said:
    """What `submit --follow` says."""
    return place.done("submit", "sent.yaml", "--follow", "--address", place.head.url, "--json")


def forms_of(secrets: dict[str, str]) -> set[bytes]:
    """How a secret may be written: as it is, in base64 at any place, in hexadecimal digits, in a URL."""
    found: set[bytes] = set()
    for value in map(str.encode, secrets.values()):
        middles = (base64.b64encode(b"x" * shift + value)[4:-4] for shift in range(3))
        found |= {value, value.hex().encode(), urllib.parse.quote(value).encode(), *middles}
    return found


def on_disk(folder: Path, forms: set[bytes]) -> list[str]:
    """The files below a folder that hold one of the forms, by content or by name, and which."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # sockets, and what has gone meanwhile
            held = os.fsencode(path) + (path.read_bytes() if path.is_file() else b"")
            found += [f"{path}: {form!r}" for form in forms if form in held]
    return found


def told(by: Head) -> bytes:
    """All that the jobs API, the dashboard, the state API and the head's own store tell who has the token."""
    server = JobServer(by.url)
    nodes = server._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
    paths = ["/api/jobs/", "/nodes?view=summary", "/api/cluster_status", "/logical/actors", "/api/serve/applications/"]
    paths += [f"/nodes/{node['raylet']['nodeId']}" for node in nodes]
    paths += [f"/api/v0/{state}?detail=1&limit=1000" for state in STATES]
    paths += [f"/api/v0/logs?node_id={nodes[0]['raylet']['nodeId']}"]
    answers = [server._do_request("GET", path).content for path in paths]
    answers += [server.log(str(job.submission_id)).encode() for job in server.jobs()]
    client = GcsClient(address=by.address)
    spaces = [None, *(space.encode() for space in ("cluster", "dashboard", "fun", "job", "session", "usage_stats"))]
    keys = [(space, key) for space in spaces for key in client.internal_kv_keys(b"", space)]
    answers += [key + (client.internal_kv_get(key, space) or b"") for space, key in keys]
    return b"\n".join(answers)


def test_submit_and_follow_gives_what_train_gives_and_the_jobs_name(
    place: Place, alone: tuple[Said, object], sent: Said
) -> None:
    found, trained = sent.result, alone[0].result
    assert found["weights_sha256"] == trained["weights_sha256"]
    assert found["metrics"] == trained["metrics"]
    assert found.keys() == trained.keys() | {"job"}
    assert all(line.startswith(("starting", "training")) for line in sent.err.splitlines()), sent.err
    assert re.search(r"^(starting workers|training) · step \d+/30 · .* 1 worker", sent.err, re.MULTILINE), sent.err
    told = place.done("status", found["job"], "--address", place.head.url, "--json")
    assert told.result["status"] == "succeeded"
    written = place.done("logs", found["job"], "--address", place.head.url)
    assert found["weights_sha256"] in written.out


def test_no_secret_of_an_environment_is_written_or_told(place: Place, alone: tuple[Said, object], sent: Said) -> None:
    searched = place.done("sweep", "sweep.yaml", "--address", place.head.address, "--json")
    shown = [place.done("status", "--address", place.head.url), place.done("audit", "runs", "--json")]
    shown += [place.done("logs", sent.result["job"], "--address", place.head.url)]
    shown += [place.done("report", "runs/sent", "--json")]
    spoken = "\n".join(line for said in (alone[0], sent, searched, *shown) for line in said).encode()

    forms = forms_of(USERS | MACHINES)
    assert [form for form in forms if form in spoken] == []
    assert on_disk(place.folder, forms) == []
    answers = told(place.head)
    assert [form for form in forms if form in answers] == []
    written = {path.name for path in place.folder.rglob("*") if path.is_file()}
    assert {"gcs_server.out", "raylet.out", "runtime_env_agent.log", "run.yaml", "ledger", "00000.jsonl"} - written == {
        "ledger"
    }, "the folder has all that Ray and the runs have written"


def test_the_look_itself_would_find_them(place: Place) -> None:
    """What Ray itself would do with a secret in a job's environment and arguments, which Elastrain never puts there."""
    client = JobSubmissionClient(place.head.url)
    environment = {"env_vars": {"HF_TOKEN": CARELESS}}
    job = client.submit_job(entrypoint=f"echo {CARELESS}", submission_id="careless", runtime_env=environment)
    deadline = time.monotonic() + 120
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    forms = forms_of({"HF_TOKEN": CARELESS})
    assert any("runtime_env_agent.log" in path for path in on_disk(place.folder, forms))
    assert CARELESS.encode() in told(place.head)
    encoded = base64.b64encode(f"..{CARELESS}..".encode())
    assert any(form in encoded for form in forms)


def test_the_ports_of_a_run_on_a_ray_of_its_own_open_to_nobody_without_a_token(
    alone: tuple[Said, dict[Listener, str]],
) -> None:
    answers = alone[1]
    names = {_name(each.process) for each, answer in answers.items() if answer == "refused"}
    assert {"gcs_server", "raylet", "Host", "RayTrainWorker"} <= names, names
    assert "DashboardAgent" not in names, "there is no dashboard, and its agent may take longer than a raylet waits"
    # What has gone meanwhile answers nobody either.
    assert [(each, answer) for each, answer in answers.items() if answer not in ("refused", "away")] == []


def _name(process: str) -> str:
    """An actor's process is called by the method that it runs as well, while it does."""
    return process.partition(".")[0]
