"""Runs in real Ray Train workers: the same batches for any number of them, the same bits after any interruption."""

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import elastrain
from elastrain.elastic.holder import NAMESPACE
from elastrain.errors import ConflictError
from elastrain.observe.actions import read_actions
from elastrain.observe.ledger import read_ledger, read_steps

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SPEC = str(ROOT / "pipelines" / "digits_mlp" / "train.yaml")
FIXED = ("--set", "precision=fp32", "--set", "workers={min: 2, max: 2}", "--json")
BITWISE = ("--set", "precision=fp32", "--set", "consistency=bitwise", "--set", "data.slots=5", "--json")


def result(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def losses(run: str) -> np.ndarray[Any, Any]:
    return np.asarray(read_steps(f"{run}/metrics")["loss"])


def audit_files(run: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(run, "audit").iterdir())}


def wait_for(what: Callable[[], object], *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def three_epochs(spec_of: Callable[..., Any], size: int, precision: str = "fp32", *changes: str) -> elastrain.Run:
    """Three audited epochs on so many workers; trained by the first test that asks, and found finished by the next."""
    sized = f"workers={{min: {size}, max: {size}}}"
    return elastrain.train(
        spec_of(f"any-{precision}-{size}", f"precision={precision}", "data.slots=4", "audit=true", sized, *changes)
    )


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("precision", "size", "tolerance"), [("fp32", 3, 1e-4), ("fp64", 4, 1e-10)])
def test_any_number_of_workers_trains_on_the_same_batches(
    spec_of: Callable[..., Any], precision: str, size: int, tolerance: float
) -> None:
    one, many = (three_epochs(spec_of, number, precision) for number in (1, size))
    assert (one.result["workers"], many.result["workers"]) == (1, size)
    assert audit_files(many.url) == audit_files(one.url)
    reference = losses(one.url)
    assert len(reference) == 69
    assert np.max(np.abs(losses(many.url) - reference) / np.abs(reference)) < tolerance


@pytest.mark.usefixtures("local_ray")
def test_bitwise_gives_the_same_weights_on_any_number_of_workers_and_when_that_changes(
    spec_of: Callable[..., Any],
) -> None:
    def train(name: str, size: int, steps: int) -> elastrain.Run:
        fixed = ("consistency=bitwise", "data.slots=5", "schedule={name: constant}", "clip_norm=1")
        sized = (f"workers={{min: {size}, max: {size}}}", f"budget={{steps: {steps}}}")
        return elastrain.train(spec_of(name, *fixed, *sized))

    train("resized", 2, 20)
    resumed = train("resized", 3, 40)
    assert resumed.result["resumed_from"] == 20
    weights = {train(f"bitwise-{size}", size, 40).weights_sha256 for size in (1, 5)}
    assert weights == {resumed.weights_sha256}


@pytest.mark.usefixtures("local_ray")
def test_a_bitwise_run_does_not_go_on_with_another_arithmetic(spec_of: Callable[..., Any]) -> None:
    def train(cpus: int, steps: int) -> elastrain.Run:
        fixed = ("consistency=bitwise", "data.slots=2", "schedule={name: constant}")
        sized = (f"workers={{min: 1, max: 1, cpus: {cpus}}}", f"budget={{steps: {steps}}}")
        return elastrain.train(spec_of("threads", *fixed, *sized))

    train(1, 5)
    with pytest.raises(ConflictError, match=r"was computed with .* 1 threads, here it would go on with .* 2 threads"):
        train(2, 10)
    again = train(1, 5)
    assert (again.result["resumed_from"], again.step) == (5, 5), "nothing is lost"


@pytest.mark.usefixtures("local_ray")
def test_every_sample_is_trained_on_exactly_once_an_epoch(spec_of: Callable[..., Any]) -> None:
    run = three_epochs(spec_of, 3)
    audit = read_steps(f"{run.url}/audit")
    epoch, step, slot, row = (np.asarray(audit[name]) for name in ("epoch", "step", "slot", "row"))
    for number in range(3):
        assert sorted(row[epoch == number]) == list(range(1442))
    assert (epoch == step // 23).all()
    assert set(slot) == set(range(4))
    assert run.result["samples"] == 3 * 1442


@pytest.mark.usefixtures("local_ray")
def test_an_audit_changes_nothing_else(spec_of: Callable[..., Any]) -> None:
    audited = three_epochs(spec_of, 1)
    plain = elastrain.train(spec_of("no-audit", "data.slots=4", "workers={min: 1, max: 1}"))
    assert plain.weights_sha256 == audited.weights_sha256
    assert not Path(plain.url, "audit").exists()


@pytest.mark.usefixtures("local_ray")
def test_half_precision_learns(spec_of: Callable[..., Any]) -> None:
    """As bf16, what the spec says, does in `test_readme.py`."""
    run = elastrain.train(spec_of("fp16", "precision=fp16", "budget={epochs: 10}", "workers={min: 1, max: 1}"))
    assert run.metrics["accuracy"] > 0.9


@pytest.mark.usefixtures("local_ray")
def test_on_a_single_node_nobody_holds_snapshots(spec_of: Callable[..., Any], slow_task: Path) -> None:
    import ray

    from elastrain.training.snapshot import SNAPSHOT_S

    found: list[dict[str, str]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            found.extend(ray.util.list_named_actors(all_namespaces=True))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        sized = ("budget={steps: 300}", "checkpoint.every_steps=1000", "workers={min: 1, max: 1}", "data.slots=1")
        run = elastrain.train(spec_of("alone", f"task={slow_task}:Slow", *sized, "eval.every_steps=1000"))
    finally:
        over.set()
        looking.join()
    assert found, "somebody has a name: Ray's coordinator"
    assert not [actor for actor in found if actor["namespace"] == NAMESPACE]
    ended = np.asarray(read_steps(f"{run.url}/metrics")["ended"])
    assert ended[-1] - ended[0] > SNAPSHOT_S, "time enough"
    assert not any("snapshot" in record["kind"] for record in read_ledger(run.url))


@pytest.mark.usefixtures("local_ray")
def test_a_finished_run_is_found_finished(spec_of: Callable[..., Any]) -> None:
    first = three_epochs(spec_of, 1)
    again = three_epochs(spec_of, 1)
    assert again.result["resumed_from"] == 69
    assert again.weights_sha256 == first.weights_sha256
    attempts = [record for record in read_ledger(first.url) if record["kind"] == "start"]
    assert len(attempts) == 1, "nothing was started again"


@pytest.mark.usefixtures("local_ray")
def test_a_finished_run_goes_on_with_a_larger_budget(spec_of: Callable[..., Any]) -> None:
    elastrain.train(spec_of("longer", "budget={steps: 5}", "workers={min: 1, max: 1}"))
    longer = elastrain.train(spec_of("longer", "budget={steps: 9}", "workers={min: 1, max: 1}"))
    assert (longer.result["resumed_from"], longer.step) == (5, 9)


@pytest.mark.usefixtures("local_ray")
def test_weights_are_exported_with_the_same_digest(spec_of: Callable[..., Any], tmp_path: Path) -> None:
    from elastrain.training.checkpoint import read_weights
    from elastrain.training.export import export_weights
    from elastrain.training.state import digest

    run = three_epochs(spec_of, 1)
    found = export_weights(run.url, str(tmp_path / "model.safetensors"), step=None, weights="model")
    assert found["weights_sha256"] == run.weights_sha256
    assert digest(read_weights(tmp_path / "model.safetensors")) == run.weights_sha256


LONG = ("train", SPEC, *FIXED, "--set", "budget={epochs: 90}", "--set", "audit=true")


@pytest.fixture(scope="module")
def whole(cli: Callable[..., Any], workspace: Path) -> dict[str, Any]:
    """What ninety epochs come to that nobody disturbs, on a Ray that was there before."""
    with running_ray(_free_port(), workspace) as address:
        return result(cli(*LONG, "--set", "name=whole", "--address", address))


def check_equal(found: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    assert found["weights_sha256"] == whole["weights_sha256"]
    assert audit_files(found["run"]) == audit_files(whole["run"])


def test_a_run_that_is_stopped_then_killed_then_wiped_out_comes_to_the_same_bits(
    whole: dict[str, Any], cli: Callable[..., Any], start: Callable[..., Any], workspace: Path
) -> None:
    """On a Ray of its own: three times the same command, which loses only what was not committed."""
    run = workspace / "runs" / "disturbed"
    seen: list[int] = []

    def begin() -> "subprocess.Popen[str]":
        attempts = len(_starts(run))
        process: subprocess.Popen[str] = start(*LONG, "--set", "name=disturbed")
        # By where this attempt began: workers of one that was killed may have committed once more meanwhile.
        wait_for(lambda: process.poll() is not None or any(committed(run) > at for at in _starts(run)[attempts:]))
        assert process.poll() is None, process.communicate()
        seen.append(committed(run))
        return process

    process = begin()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130, said
    assert "after a commit" in said
    seen.append(committed(run))

    process = begin()
    process.kill()
    process.communicate()

    process = begin()
    for name in _workers(str(run), attempt=2):
        os.kill(int(name.rsplit("-", 1)[1]), signal.SIGKILL)
    out, said = process.communicate(timeout=480)
    found = result(subprocess.CompletedProcess([], process.returncode, out, said))
    assert (found["restarts"], found["step"]) == (1, 2070)
    (event,) = (e for e in json.loads(cli("report", str(run), "--json").stdout)["events"] if e["kind"] == "restart")
    assert event["recovery_s"] > 0
    assert event["steps_redone"] >= 0

    stopped, before_the_kill, before_the_end = seen[1:]
    noted = [each for each in read_actions(str(run.parent)) if each["run"] == str(run)]
    assert [each["action"] for each in noted] == ["start", "stop", "resume", "resume"]
    assert [each["attempt"] for each in noted if "attempt" in each] == [0, 1, 2]
    assert [each["step"] for each in noted[1:3]] == [stopped, stopped]
    assert {(each["user"], each["host"]) for each in noted} == {(getpass.getuser(), socket.gethostname())}
    first, second, third, last = _starts(run)
    assert (first, second) == (0, stopped), "the commit that it was stopped after"
    assert second < before_the_kill <= third < before_the_end <= last == found["resumed_from"]
    check_equal(found, whole)


def committed(run: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = (path.parent.name for path in (run / "checkpoints").glob("*/manifest.json"))
    return max((int(name.rsplit("-", 1)[1]) for name in found), default=0)


def test_a_ray_that_runs_already_is_joined(whole: dict[str, Any]) -> None:
    """It has two CPUs; what a run on it comes to, the test above compares with a run on a Ray of its own."""
    assert (whole["step"], whole["workers"], whole["restarts"]) == (2070, 2, 0)


@pytest.mark.usefixtures("local_ray")
def test_survivors_go_on_in_their_processes_and_the_dead_are_replaced(
    cli: Callable[..., Any], start: Callable[..., Any], spec_of: Callable[..., Any], workspace: Path, slow_task: Path
) -> None:
    settings = ("consistency=bitwise", "data.slots=5", "budget={epochs: 20}", "audit=true", "checkpoint.every_steps=5")
    slowly = (f"task={slow_task}:Slow", "task_args={pause: 0.3}")
    changes = ("precision=fp32", *settings, *slowly, "name=bereaved", "workers={min: 1, max: 3}")
    process = start("train", SPEC, "--json", *(word for change in changes for word in ("--set", change)))
    run = workspace / "runs" / "bereaved"
    wait_for(lambda: len(_workers(str(run))) == 3)
    wait_for(lambda: committed(run))
    first = [int(name.rsplit("-", 1)[1]) for name in _workers(str(run))]
    os.kill(first[0], signal.SIGKILL)
    wait_for(lambda: _events(run, "resize"))  # the one in its place has joined
    alive = [pid for pid in first[1:] if Path(f"/proc/{pid}").exists()]
    slow_task.with_name("fast").touch()
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert alive == first[1:], "the survivors' processes went on"
    found = json.loads(out.splitlines()[-1])
    assert (found["restarts"], found["step"], found["resizes"]) == (0, 460, 1)
    events = json.loads(cli("report", str(run), "--json").stdout)["events"]
    loss = next(event for event in events if event["kind"] == "worker_lost")
    assert loss["worker"].endswith(f"-{first[0]}")
    assert loss["steps_redone"] <= 1
    parts = sum(loss[name] for name in ("detect_s", "agree_s", "connect_s", "state_s", "step_s"))
    assert 0 < parts <= loss["recovery_s"] * 1.01
    alone = elastrain.train(spec_of("bereaved-alone", *settings, "workers={min: 1, max: 1}"))
    check_equal(found, alone.result)


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_ledger(str(run)) if record["kind"] == kind]


def _starts(run: Path) -> list[int]:
    """The steps at which the attempts at a run began."""
    return [record["step"] for record in _events(run, "start")] if (run / "ledger").exists() else []


def _workers(run: str, attempt: int = 0) -> list[str]:
    """The names of the workers of an attempt that have reported, each `host-pid`."""

    def reported() -> list[str]:
        records = (record for record in read_ledger(run) if record["kind"] == "seconds")
        return [record["worker"] for record in records if record["attempt"] == attempt]

    wait_for(reported)
    return reported()


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


class running_ray:  # noqa: N801 -- read as a verb
    """`ray start --head --block` with two CPUs, its own port and folder; ended by SIGTERM to it alone."""

    def __init__(self, port: int, folder: Path) -> None:
        self._address = f"127.0.0.1:{port}"
        self._log = (folder / "ray.log").open("w")
        ray = str(Path(sys.executable).with_name("ray"))
        options = ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--block"]
        self._command = [ray, "start", "--head", f"--port={port}", *options]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log)
        wait_for(lambda: "Ray runtime started" in Path(self._log.name).read_text(), seconds=60)
        return self._address

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)
        self._log.close()
