"""Secrets that lie in the environment of who trains, submits and sweeps appear nowhere: on no disk and in no API."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import GcsClient  # type: ignore[attr-defined] # compiled
from ray.job_submission import JobSubmissionClient
from tests.cluster.head import Head, head
from tests.cluster.test_jobs import SPEC, TASK

from elastrain.cluster.doors import knock, listeners
from elastrain.cluster.environment import NO_EXPORTERS
from elastrain.cluster.job_server import JobServer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

# Of who uses the cluster, and of the machine that it runs on; none of the names is one that Ray knows.
USERS = {"AWS_SECRET_ACCESS_KEY": "canary-u1-83b1", "HF_TOKEN": "canary-u2-61fe", "MY_DATABASE_LOGIN": "canary-u3-0d4c"}
MACHINES = {"AWS_SESSION_TOKEN": "canary-m1-9ab7", "WANDB_API_KEY": "canary-m2-5e02"}
CARELESS = "careless-4c1d"
SWEEP = """
kind: sweep
name: searched
base: alone.yaml
set: {workers: {min: 1, max: 1}, data.slots: 2}
objective: {metric: val_loss, every: 10, max_steps: 20}
space: {optimizer.lr: {log: [1.0e-4, 1.0e-1]}}
budget: {unit: trials, per_arm: 2}
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

    def done(self, *arguments: str) -> str:
        """Run a command to its end and return all that it has said."""
        process = self.elastrain(*arguments)
        out, said = process.communicate(timeout=900)
        assert process.returncode == 0, said
        return out + said


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="e", dir="/tmp"))  # sockets lie in it: a short name
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (folder / "t").mkdir()
    (folder / "task.py").write_text(TASK)
    (folder / "sweep.yaml").write_text(SWEEP)
    for name in ("alone", "sent"):
        text = SPEC.replace("NAME", name).replace("FOLDER", str(folder))
        (folder / f"{name}.yaml").write_text(text.replace("train, global", f"train, eval: {folder}/data/test, global"))
    try:
        with head(folder / "head", cpus=4, environment=NO_EXPORTERS | MACHINES | {"PATH": path}) as started:
            there = Place(started, folder)
            there.done("pack", "digits", str(folder / "data"), "--json")
            yield there
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def test_no_secret_of_an_environment_is_written_or_told(place: Place) -> None:
    where = ("--address", place.head.url, "--json")
    alone = place.done("train", "alone.yaml", "--json")
    sent = place.done("submit", "sent.yaml", "--follow", *where)
    searched = place.done("sweep", "sweep.yaml", "--address", place.head.address, "--json")
    job = json.loads(sent.splitlines()[[line[:1] for line in sent.splitlines()].index("{")])["job"]
    shown = [place.done("status", job, *where), place.done("logs", job, "--address", place.head.url)]
    shown += [place.done("report", "runs/sent", "--json"), place.done("audit", "runs", "--json")]
    spoken = "\n".join([alone, sent, searched, *shown]).encode()

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


def test_the_ports_of_a_run_on_a_ray_of_its_own_open_to_nobody_without_a_token(place: Place) -> None:
    sets = ("--set", "name=long", "--set", "budget={steps: 100000}")
    process = place.elastrain("train", "alone.yaml", *sets)
    try:
        deadline = time.monotonic() + 600
        while not list((place.folder / "runs" / "long").glob("checkpoints/step-*/manifest.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        answers: dict[Any, str] = {each: knock(each.reachable, each.port) for each in listeners([], [process.pid])}
    finally:
        process.kill()
        process.communicate()
    names = {_name(each.process) for each in answers}
    assert {"gcs_server", "raylet", "DashboardAgent", "Host"} <= names, names
    # What has gone meanwhile answers nobody either. torch's store knows no tokens: the network has to close it.
    others = {(_name(each.process), answer) for each, answer in answers.items() if answer not in ("refused", "away")}
    assert others <= {("RayTrainWorker", "foreign")}


def _name(process: str) -> str:
    """An actor's process is called by the method that it runs as well, while it does."""
    return process.partition(".")[0]
