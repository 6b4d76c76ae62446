"""Jobs on a real head of this machine: the same weights by each way of submitting, stops, losses, and refusals."""

import base64
import contextlib
import dataclasses
import getpass
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from tests.cluster.head import Head, free_port, head
from tests.cluster.test_preemption import gcp, metadata

from elastrain.cluster.job_server import JobServer
from elastrain.cluster.jobs import Job, submit
from elastrain.cluster.rayjob import FILE, FOLDER
from elastrain.elastic import keep
from elastrain.elastic.ray_inner import draining_nodes
from elastrain.errors import ConflictError, Interrupted, ResourceError, SpecError
from elastrain.observe.actions import read_actions
from elastrain.observe.report import read_report
from elastrain.spec.document import read_train
from elastrain.spec.train import TrainSpec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

CANARY = "canary-7f3a91"
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


# Steps that take longer than the 3 s which Ray gives a job to end, once there is a file of the name.
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


# The data and what `train` gives, in a process of its own on the same head, with the elastrain of this repository.
LOCAL = """
import json, logging, sys
import ray
from elastrain import train
from elastrain.data.pack import pack_dataset
from elastrain.data.sources import PackOptions
from elastrain.spec.document import read_train
address, platform, data, spec = sys.argv[1:]
ray.init(address, runtime_env={"env_vars": {"PYTHONPATH": platform}}, log_to_driver=False, logging_level=logging.ERROR)
pack_dataset("digits", data, PackOptions())
print(json.dumps(dict(train(read_train(spec)).result)))
"""


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
    (folder / "code" / "task.py").write_text(TASK)
    (folder / "code" / "slow.py").write_text(SLOW.replace("FILE", str(folder / "slow")))
    environment = {"PYTHONPATH": str(shadow.parent), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    try:
        with head(folder / "head", cpus=4, environment=environment) as started:
            yield Place(started, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def local(place: Place) -> dict[str, Any]:
    """What `train` gives for the spec, from this process on the same head."""
    folder = place.folder
    done = python("-c", LOCAL, place.head.address, str(ROOT / "platform"), str(folder / "data"), place.spec("by-train"))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-m", *arguments, **environment)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def until(what: Callable[[], Any], *, within: float = 120) -> Any:
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


def written_below(folder: Path) -> dict[Path, bytes]:
    """All files that are there; Ray replaces some of its own at any moment."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                found[path] = path.read_bytes()
    return found


def test_submit_and_follow_gives_what_train_gives_and_the_jobs_name(place: Place, local: dict[str, Any]) -> None:
    arguments = ("submit", place.spec("by-submit"), "--address", place.head.url, "--follow", "--json")
    done = cli("elastrain", *arguments, AWS_SECRET_ACCESS_KEY=CANARY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights_sha256"] == local["weights_sha256"]
    assert found.keys() == local.keys() | {"job"}
    assert all(line.startswith(("starting", "training")) for line in done.stderr.splitlines()), done.stderr
    assert re.search(r"^(starting workers|training) · step \d+/30 · .* 1 worker", done.stderr, re.MULTILINE), (
        done.stderr
    )
    told = cli("elastrain", "status", found["job"], "--address", place.head.url, "--json")
    assert json.loads(told.stdout)["status"] == "succeeded"
    written = cli("elastrain", "logs", found["job"], "--address", place.head.url)
    assert found["weights_sha256"] in written.stdout
    files = written_below(place.folder)
    assert not [path for path, data in files.items() if CANARY.encode() in data], "a secret of the submitter was sent"
    assert any(b"RAY_JOB_STOP_WAIT_TIME_S" in data for data in files.values()), "what was sent would be seen"


def test_plain_ray_job_submit_gives_the_same(place: Place, local: dict[str, Any]) -> None:
    train_it = ("--", "python", "-m", "elastrain", "train", "pipelines/digits_mlp/train.yaml", "--json")
    spec = place.read("by-ray", f"task={ROOT}/pipelines/digits_mlp/task.py:DigitsMLP").model_dump()
    sets = [f"--set={key}={json.dumps(spec[key])}" for key in spec if key not in ("kind", "task")]
    environment = ("--runtime-env", str(ROOT / "clusters" / "runtime_env.yaml"))
    where = ("--address", place.head.url, "--working-dir", str(ROOT))
    done = cli("ray.scripts.scripts", "job", "submit", *where, *environment, *train_it, *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    assert local["weights_sha256"] in done.stdout


KUBERAY = """
name: pods
provider: {type: kuberay, namespace: elastrain}
image: registry.example.com/elastrain:0.1.0
head: {cpus: 1, memory_gib: 4, mounts: [{path: FOLDER, claim: all}]}
pools: [{name: cpu, cpus: 4, memory_gib: 8, max: 1, identity: worker, mounts: [{path: FOLDER, claim: all}]}]
"""


def as_the_operator_does(place: Place, job: dict[str, Any], attempt: str) -> subprocess.CompletedProcess[str]:
    """Send a RayJob's job with the command that KubeRay gives its submitter, and follow it."""
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
    done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, timeout=240, check=False)
    until(lambda: JobServer(place.head.url).info(attempt).end_time)
    return done


def test_a_rayjob_gives_the_same_and_is_tried_again_only_where_that_may_help(
    place: Place, local: dict[str, Any]
) -> None:
    cluster, data = place.folder / "kuberay.yaml", place.folder / "later"
    cluster.write_text(KUBERAY.replace("FOLDER", str(place.folder)))
    (place.folder / "mounted").mkdir()

    def rendered() -> dict[str, Any]:
        spec = place.spec("by-rayjob")
        done = cli("elastrain", "submit", spec, "--rayjob", str(cluster), "--json", f"--set=data.train={data}")
        assert done.returncode == 0, done.stderr
        config, job = json.loads(done.stdout)["files"].values()
        (place.folder / "mounted" / FILE).write_bytes(base64.b64decode(config["binaryData"][FILE]))
        return dict(job)

    job = rendered()
    assert "later" in as_the_operator_does(place, job, "pods-1").stdout
    data.symlink_to(place.folder / "data" / "train")
    again = as_the_operator_does(place, job, "pods-2").stdout  # the same error, though there are data by now
    assert f"{data}" in again
    found = as_the_operator_does(place, rendered(), "pods-3").stdout
    assert local["weights_sha256"] in found
    assert [end["exit_code"] for end in _jobs(place, str(place.folder / "runs" / "by-rayjob"))] == [4, 4, 0]


def test_a_lost_driver_is_followed_by_another_job_and_a_stopped_one_ends_after_a_commit(place: Place) -> None:
    sets = ("budget={steps: 1000000}", f"task={place.folder}/code/slow.py:Slow")
    job = submit(place.read("long", *sets), address=place.head.url)
    first, ended = job.id, []

    def follow() -> None:
        try:
            job.result()
        except Interrupted as error:
            ended.append(error)

    follower = threading.Thread(target=follow)
    follower.start()
    checkpoints = Path(job.run) / "checkpoints"
    until(lambda: list(checkpoints.glob("step-*/*manifest*")))
    with pytest.raises(ConflictError, match=f"trained by {first}"):
        submit(place.read("long"), address=place.head.url)
    assert [found["job"] for found in _jobs(place, job.run)] == [first], "nothing half-started"
    [driver] = drivers("long")
    os.kill(driver, signal.SIGKILL)
    until(lambda: job.id != first and "training" in job.logs())
    (place.folder / "slow").touch()
    stopped = job.stop()
    follower.join(120)
    assert stopped["status"] == "stopped"
    assert [found["status"] for found in _jobs(place, job.run)] == ["failed", "stopped"]
    assert re.search(r"stopped at step \d+ after a commit", str(ended[0])), ended
    noted = [each for each in read_actions(str(place.folder / "runs")) if each["run"] == job.run]
    me = f"{getpass.getuser()}@{socket.gethostname()}"
    by_hand = [(each["action"], each["job"]) for each in noted if "asked_by" not in each]
    assert by_hand == [("submit", first), ("submit", job.id), ("stop", job.id)]
    by_jobs = [(each["action"], each["job"], each["asked_by"]) for each in noted if "asked_by" in each]
    assert by_jobs == [("start", first, me), ("resume", job.id, me), ("stop", job.id, me)]
    report = read_report(job.run)
    assert report["outcome"] == "interrupted"
    assert report["resumed_from"] > 0
    assert report["checkpoints"][-1]["step"] == report["step"]


def test_of_two_who_submit_a_run_at_once_one_is_refused(place: Place) -> None:
    spec, start = place.read("race", "budget={steps: 1000000}"), threading.Barrier(2)
    came: list[Job | Exception] = []

    def try_it() -> None:
        start.wait()
        try:
            came.append(submit(spec, address=place.head.url))
        except (ConflictError, ResourceError) as error:
            came.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    jobs = [found for found in came if isinstance(found, Job)]
    assert len(jobs) == 1, came
    assert any(isinstance(found, ConflictError) for found in came), came
    assert [found["job"] for found in _jobs(place, jobs[0].run)] == [jobs[0].id]
    assert jobs[0].stop()["status"] == "stopped"


def _jobs(place: Place, run: str) -> list[dict[str, Any]]:
    done = cli("elastrain", "status", "--address", place.head.url, "--json")
    return sorted((job for job in json.loads(done.stdout)["jobs"] if job["run"] == run), key=lambda job: job["job"])


def test_what_training_says_comes_through_with_its_exit_code(place: Place) -> None:
    """And the job is not tried again: that would change nothing."""
    arguments = (place.spec("no-data"), "--set", f"data.train={place.folder}/nothing", "--follow")
    done = cli("elastrain", "submit", *arguments, "--address", place.head.url)
    assert done.returncode == 4, done.stderr
    assert "error: " in done.stderr
    assert "nothing" in done.stderr.splitlines()[-1]
    assert [job["exit_code"] for job in _jobs(place, str(place.folder / "runs" / "no-data"))] == [4]


@pytest.mark.parametrize("command", ["submit", "train", "why-up", "none"])
def test_without_the_clusters_token_nothing_is_done(place: Place, command: str) -> None:
    """With a token of another cluster, and with none."""
    path, spec = place.folder / "another", place.spec("stranger")
    path.write_text("0" * 64)
    path.chmod(0o600)
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    if command in ("submit", "none"):
        environment = {"RAY_AUTH_MODE": "disabled"} if command == "none" else wrong
        done = cli("elastrain", "submit", spec, "--address", place.head.url, **environment)
        assert "lets in only who has the cluster's token" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    else:
        verb = ("train", spec) if command == "train" else ("cluster", "why-up")
        done = cli("elastrain", *verb, "--address", place.head.address, **wrong)
        assert done.stderr.splitlines()[-1].startswith("elastrain: error: "), done.stderr
        assert "token" in done.stderr.splitlines()[-1]
        assert command == "why-up" or "lets in only who has the cluster's token" in done.stderr
    assert done.returncode == 6
    assert not _jobs(place, str(place.folder / "runs" / "stranger"))
    assert not list((place.folder / "runs").glob("stranger/checkpoints/*"))


def test_a_folder_that_another_machine_cannot_see_is_refused(
    place: Place, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "a-laptop")
    with pytest.raises(SpecError, match=r"is a folder of this machine, and .* is in the cluster"):
        submit(place.read("unseen"), address=place.head.url)
    job = submit(place.read("seen"), address=place.head.url, shared=[str(place.folder)])
    assert job.result()["weights_sha256"] == local["weights_sha256"], "the SDK gives something else"


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


def test_what_can_never_fit_and_what_dies_in_set_up_end_with_a_sentence(place: Place) -> None:
    arguments = (place.spec("large"), "--set", "workers={min: 64, max: 64}", "--follow", "--address", place.head.url)
    done = cli("elastrain", "submit", *arguments)
    assert done.returncode == 6, done.stderr
    assert re.match(r"elastrain: error: .*64", done.stderr.splitlines()[-1]), done.stderr
    assert not (place.folder / "runs" / "large" / "checkpoints").exists()
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
    task = f"task={large}/task.py:DigitsMLP"
    done = cli("elastrain", "submit", place.spec("heavy"), "--set", task, "--address", place.head.url)
    assert done.returncode == 2, done.stderr
    assert re.match(r"elastrain: error: .*the largest files: .*weights11\.bin", done.stderr)
    assert done.stderr.count("weights") == 10
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
