"""Jobs on a real head of this machine: the same weights by each way of submitting, stops, losses, and refusals."""

import base64
import dataclasses
import getpass
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from sklearn.datasets import load_digits
from tests.cluster.head import Head, free_port, head
from tests.cluster.test_preemption import gcp, metadata

from elastrain.cluster.document import read_cluster
from elastrain.cluster.job_server import JobServer
from elastrain.cluster.jobs import Job, read_status, submit
from elastrain.cluster.rayjob import FILE, FOLDER, run_manifests
from elastrain.data.columns import to_table
from elastrain.elastic import keep
from elastrain.elastic.ray_inner import draining_nodes
from elastrain.errors import ConflictError, Interrupted, ResourceError, SpecError
from elastrain.observe.actions import read_actions
from elastrain.observe.report import read_report
from elastrain.spec.document import read_train
from elastrain.spec.train import TrainSpec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
TASK = (ROOT / "pipelines" / "digits_mlp" / "task.py").read_text()
SPEC = """
kind: train
name: NAME
task: task.py:DigitsMLP
task_args: {hidden: 16}
data: {train: FOLDER/data/train, global_batch: 64}
optimizer: {name: adamw, lr: 1.0e-3}
budget: {steps: 30}
consistency: bitwise
checkpoint: {every_steps: 10}
storage: FOLDER/runs
"""


# Steps that take longer than the 3 s which Ray gives a job to end, while there is a file of the name.
SLOW = """
import time
from pathlib import Path
from task import DigitsMLP


class Slow(DigitsMLP):
    def losses(self, model, batch):
        time.sleep(4 if Path("FILE").exists() else 0)
        return super().losses(model, batch)
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """A head, and a folder with data and a task."""

    head: Head
    folder: Path

    def spec(self, name: str) -> str:
        """Write the spec of a run and return its path."""
        path = self.folder / "code" / f"{name}.yaml"
        path.write_text(SPEC.replace("NAME", name).replace("FOLDER", str(self.folder)))
        return str(path)

    def read(self, name: str, *sets: str) -> TrainSpec:
        """Return the spec of a run."""
        return read_train(self.spec(name), sets)


def write_digits(folder: Path) -> None:
    """As ordinary Parquet, which trains without packing."""
    digits = load_digits()
    rows = {"image": digits.images.astype(np.uint8), "label": digits.target.astype(np.uint8)}
    folder.mkdir(parents=True)
    pq.write_table(to_table(rows), folder / "digits.parquet")


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """One head for all tests. What it could import as elastrain by itself is broken: only what is sent works."""
    folder = Path(tempfile.mkdtemp(prefix="elastrain-"))
    shadow = folder / "shadow" / "elastrain"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text(
        "raise ImportError('the elastrain of the machine, not the one that was sent')\n"
    )
    (folder / "code").mkdir()
    write_digits(folder / "data" / "train")
    (folder / "code" / "task.py").write_text(TASK)
    (folder / "code" / "slow.py").write_text(SLOW.replace("FILE", str(folder / "slow")))
    environment = {"PYTHONPATH": str(shadow.parent), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    try:
        with head(folder / "head", cpus=2, environment=environment) as started:
            yield Place(started, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def trained(place: Place) -> dict[str, Any]:
    """What `train` gives for the spec, which plain `ray job submit` brings there and shows."""
    train_it = ("--", "python", "-m", "elastrain", "train", "pipelines/digits_mlp/train.yaml", "--json")
    spec = place.read("by-ray", f"task={ROOT}/pipelines/digits_mlp/task.py:DigitsMLP").model_dump()
    sets = [f"--set={key}={json.dumps(spec[key])}" for key in spec if key not in ("kind", "task")]
    environment = ("--runtime-env", str(ROOT / "clusters" / "runtime_env.yaml"))
    where = ("--address", place.head.url, "--working-dir", str(ROOT))
    done = cli("ray.scripts.scripts", "job", "submit", *where, *environment, *train_it, *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    return _result_in(done.stdout)


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def until(what: Callable[[], Any], *, within: float = 300) -> Any:
    deadline = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)
    return found


def drivers(run: str) -> list[int]:
    """The processes that train a run on the head, by what their working folder's spec says."""
    found = []
    for pid in keep.descendants(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            spec = (Path(f"/proc/{pid}/cwd") / "run.yaml").read_text()
        except OSError:
            continue
        if b"elastrain" in command and f"\nname: {run}\n" in spec:
            found.append(pid)
    return found


def _result_in(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(line for line in text.splitlines() if line.startswith('{"run"')))
    return found


KUBERAY = """
name: pods
provider: {type: kuberay, namespace: elastrain}
image: registry.example.com/elastrain:0.1.0
head: {cpus: 1, memory_gib: 4, mounts: [{path: FOLDER, claim: all}]}
pools: [{name: cpu, cpus: 4, memory_gib: 8, max: 1, identity: worker, mounts: [{path: FOLDER, claim: all}]}]
"""


def as_the_operator_does(place: Place, job: dict[str, Any], attempt: str) -> str:
    """Send a RayJob's job with the command that KubeRay gives its submitter, follow it, and return what it says."""
    spec = job["spec"]
    environment = json.loads(spec["runtimeEnvYAML"])
    environment["working_dir"] = environment["working_dir"].replace(FOLDER, str(place.folder / "mounted"))
    quoted = [json.dumps(json.dumps(each)) for each in (environment, spec["metadata"])]  # as Go's strconv.Quote
    ray_job = f"{sys.executable} -m ray.scripts.scripts job"
    where = f"--address {place.head.url}"
    command = (
        f"{ray_job} submit {where} --no-wait --runtime-env-json {quoted[0]} --metadata-json {quoted[1]} "
        f"--submission-id {attempt} -- {spec['entrypoint']} ; {ray_job} logs {where} --follow {attempt}"
    )
    done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, timeout=300, check=False)
    until(lambda: JobServer(place.head.url).info(attempt).end_time)
    return done.stdout


def test_a_rayjob_whose_driver_is_killed_goes_on_in_the_next_attempt_to_the_same_weights(
    place: Place, trained: dict[str, Any]
) -> None:
    cluster, slow = place.folder / "kuberay.yaml", place.folder / "slow"
    cluster.write_text(KUBERAY.replace("FOLDER", str(place.folder)))
    (place.folder / "mounted").mkdir()
    spec = place.read("by-rayjob", f"task={place.folder}/code/slow.py:Slow", "checkpoint.every_steps=1")
    config, job = run_manifests(spec, read_cluster(cluster)).values()
    (place.folder / "mounted" / FILE).write_bytes(base64.b64decode(config["binaryData"][FILE]))
    run = place.folder / "runs" / "by-rayjob"
    slow.touch()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(as_the_operator_does, place, job, "pods-1")
        until(lambda: list(run.glob("checkpoints/step-*/manifest.json")) or first.done())
        [driver] = drivers("by-rayjob")
        os.kill(driver, signal.SIGKILL)
        slow.unlink()
        assert '"weights_sha256"' not in first.result()
    found = _result_in(as_the_operator_does(place, job, "pods-2"))
    assert found["weights_sha256"] == trained["weights_sha256"]
    assert found["resumed_from"] > 0
    assert [end["exit_code"] for end in _jobs(place, str(run))] == [-9, 0]


def _of_two_at_once(place: Place, spec: TrainSpec) -> Job:
    """Submit a run twice at once, and return the job of the one that is taken."""
    came: list[Job | Exception] = []
    start = threading.Barrier(2)

    def try_it() -> None:
        start.wait()
        try:
            came.append(submit(spec, address=place.head.url, shared=[str(place.folder)]))
        except (ConflictError, ResourceError) as error:
            came.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [job] = [found for found in came if isinstance(found, Job)]
    assert any(isinstance(found, ConflictError) for found in came), came
    assert [found["job"] for found in _jobs(place, job.run)] == [job.id]
    return job


def test_one_job_of_a_run_is_followed_by_another_if_its_driver_is_lost_and_ends_after_a_commit_if_stopped(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitted from another machine, whose folders the cluster does not see unless that is said; twice at once."""
    monkeypatch.setattr("socket.gethostname", lambda: "a-laptop")
    with pytest.raises(SpecError, match=r"is a folder of this machine, and .* is in the cluster"):
        submit(place.read("long"), address=place.head.url)
    (place.folder / "slow").touch()
    sets = ("budget={steps: 1000}", "checkpoint.every_steps=1", f"task={place.folder}/code/slow.py:Slow")
    job = _of_two_at_once(place, place.read("long", *sets))
    first, ended = job.id, []

    def follow() -> None:
        try:
            job.result()
        except Interrupted as error:
            ended.append(error)

    follower = threading.Thread(target=follow)
    follower.start()
    until(lambda: list(Path(job.run).glob("checkpoints/step-*/manifest.json")))
    with pytest.raises(ConflictError, match=f"trained by {first}"):
        submit(place.read("long"), address=place.head.url, shared=[str(place.folder)])
    assert [found["job"] for found in _jobs(place, job.run)] == [first], "nothing half-started"
    [driver] = drivers("long")
    os.kill(driver, signal.SIGKILL)
    until(lambda: job.id != first and "training" in job.logs())
    stopped = job.stop()
    (place.folder / "slow").unlink()
    follower.join(300)
    assert stopped["status"] == "stopped"
    assert [found["status"] for found in _jobs(place, job.run)] == ["failed", "stopped"]
    assert re.search(r"stopped at step \d+ after a commit", str(ended[0])), ended
    _is_noted(place, job, first)
    report = read_report(job.run)
    assert report["outcome"] == "interrupted"
    assert report["resumed_from"] > 0
    assert report["checkpoints"][-1]["step"] == report["step"]


def _is_noted(place: Place, job: Job, first: str) -> None:
    noted = [each for each in read_actions(str(place.folder / "runs")) if each["run"] == job.run]
    me = f"{getpass.getuser()}@a-laptop"
    by_hand = [(each["action"], each["job"]) for each in noted if "asked_by" not in each]
    assert by_hand == [("submit", first), ("submit", job.id), ("stop", job.id)]
    by_jobs = [(each["action"], each["job"], each["asked_by"]) for each in noted if "asked_by" in each]
    assert by_jobs == [("start", first, me), ("resume", job.id, me), ("stop", job.id, me)]


def _jobs(place: Place, run: str) -> list[dict[str, Any]]:
    found = read_status(None, address=place.head.url)["jobs"]
    return sorted((job for job in found if job["run"] == run), key=lambda job: job["job"])


@pytest.mark.parametrize("command", ["submit", "train", "none"])
def test_without_the_clusters_token_nothing_is_done(place: Place, command: str) -> None:
    """With a token of another cluster, and with none."""
    path, spec = place.folder / "another", place.spec("stranger")
    path.write_text("0" * 64)
    path.chmod(0o600)
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    environment = {"RAY_AUTH_MODE": "disabled"} if command == "none" else wrong
    verb, address = ("train", place.head.address) if command == "train" else ("submit", place.head.url)
    done = cli("elastrain", verb, spec, "--address", address, **environment)
    assert done.returncode == 6
    assert done.stderr.splitlines()[-1].startswith("elastrain: error: "), done.stderr
    assert "lets in only who has the cluster's token" in done.stderr
    assert command == "train" or len(done.stderr.splitlines()) == 1
    assert not _jobs(place, str(place.folder / "runs" / "stranger"))
    assert not list((place.folder / "runs").glob("stranger/checkpoints/*"))


def test_a_clouds_notice_drains_the_node_that_it_is_about(place: Place) -> None:
    """The node is not named: it is that of the instance which `ray up` tells the commands that it runs."""
    instance = {"RAY_CLOUD_INSTANCE_ID": "i-spot"}
    with metadata(gcp("TRUE")) as server, place.head.node(place.folder / "spot", **instance) as node:
        command = ("elastrain.cluster.preemption", "gcp", "--address", place.head.address, "--metadata", server)
        done = cli(*command, **instance)
        assert done.returncode == 0, done.stderr
        ray.init(place.head.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            states = {found["NodeID"]: found["Alive"] for found in ray.nodes()}
            draining = draining_nodes()
        finally:
            ray.shutdown()
    assert f"GCP pre-empts this instance: draining node {node[:12]}" in done.stderr
    # A node that is idle is gone as soon as it is drained.
    assert node in draining or not states[node]
    assert sum(states.values()) >= 1
    assert set(draining) <= {node}


def test_what_training_says_comes_through_with_its_exit_code(place: Place) -> None:
    """And the job is not tried again: that would change nothing."""
    arguments = (place.spec("no-data"), "--set", f"data.train={place.folder}/nothing", "--follow")
    done = cli("elastrain", "submit", *arguments, "--address", place.head.url)
    assert done.returncode == 4, done.stderr
    assert re.match(r"elastrain: error: .*nothing", done.stderr.splitlines()[-1]), done.stderr
    assert [job["exit_code"] for job in _jobs(place, str(place.folder / "runs" / "no-data"))] == [4]


def test_a_job_that_dies_in_set_up_ends_with_a_sentence(place: Place) -> None:
    nowhere: dict[str, Any] = {"working_dir": f"file://{place.folder}/nowhere.zip"}
    JobServer(place.head.url).send(job="unset-1", entrypoint="true", runtime_env=nowhere, metadata={})
    with pytest.raises(ResourceError, match=r"unset-1 died in set-up: .*nowhere\.zip"):
        Job("unset-1", "runs/unset", place.head.url).result()


def test_too_much_code_is_refused_and_nothing_is_sent(place: Place) -> None:
    large = place.folder / "large"
    large.mkdir()
    (large / "task.py").write_text(TASK)
    for index in range(12):
        with (large / f"weights{index:02d}.bin").open("wb") as file:
            file.truncate((index + 1) << 20)
    with pytest.raises(SpecError, match=r"the largest files: .*weights11\.bin") as refused:
        submit(place.read("heavy", f"task={large}/task.py:DigitsMLP"), address=place.head.url)
    assert str(refused.value).count("weights") == 10
    assert not _jobs(place, str(place.folder / "runs" / "heavy"))


@pytest.mark.parametrize("name", ["nobody-1", "a/b", "a;b", "../version", "%2e%2e/x", "?a#b"])
def test_a_job_that_nobody_submitted(place: Place, name: str) -> None:
    job = Job(name, "runs/nobody", place.head.url)
    for ask in (job.status, job.logs, job.stop):
        with pytest.raises(SpecError, match=re.escape(f"knows no job {name}")):
            ask()


def test_an_address_where_nothing_answers() -> None:
    with pytest.raises(ResourceError, match="no Ray cluster answers at"):
        JobServer(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SpecError, match="a job is sent to the cluster's dashboard"):
        JobServer("127.0.0.1:6379")
