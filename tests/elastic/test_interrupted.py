"""One training, undisturbed and through whatever may happen to a run: the same samples and the same bits.

That survivors go on in their processes while others are made up for, `test_verify.py` shows.
"""

import getpass
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.test_run import SPEC, audit_files, result, wait_for

import elastrain
from elastrain.elastic.keep import descendants
from elastrain.errors import ConflictError
from elastrain.observe.actions import read_actions
from elastrain.observe.ledger import read_ledger
from elastrain.observe.report import read_report

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(900)]

STEPS = 184
SETTINGS = (
    *("precision=fp32", "consistency=bitwise", "data.slots=5", "schedule={name: constant}", "clip_norm=1"),
    *("checkpoint.every_steps=5", "eval.every_steps=1000", "audit=true", f"budget={{steps: {STEPS}}}"),
)


def alone(spec_of: Callable[..., Any], *, cpus: int = 1, steps: int = STEPS) -> elastrain.Run:
    """What one worker makes of it; trained by the first test that asks, and found finished by the next."""
    sized = (f"workers={{min: 1, max: 1, cpus: {cpus}}}", f"budget={{steps: {steps}}}")
    return elastrain.train(spec_of("alone", *SETTINGS, *sized))


def check_equal(weights: str, run: str, reference: elastrain.Run) -> None:
    assert weights == reference.weights_sha256
    assert audit_files(run) == audit_files(reference.url)


def test_a_run_goes_on_with_a_larger_budget_but_not_with_another_arithmetic(spec_of: Callable[..., Any]) -> None:
    """To the same bits, since those that are disturbed below never have another budget."""
    alone(spec_of, steps=5)
    with pytest.raises(ConflictError, match=r"was computed with .* 1 threads, here it would go on with .* 2 threads"):
        alone(spec_of, cpus=2, steps=10)
    longer = alone(spec_of)
    assert (longer.result["resumed_from"], longer.step) == (5, STEPS), "nothing is lost"


class Disturbed:
    """A run of a task that takes its time, by the same command again and again."""

    def __init__(self, start: Callable[..., Any], workspace: Path, task: Path) -> None:
        self.run = workspace / "runs" / "disturbed"
        slowly = (f"task={task}:Slow", "task_args={pause: 0.2}", "name=disturbed")
        self._command = ("train", SPEC, "--json", *_sets(*SETTINGS, *slowly))
        self._start = start

    def begin(self, workers: int, *more: str) -> "subprocess.Popen[str]":
        """Start the command, and return once this attempt has committed something; one that ends before is an error."""
        attempts = len(_starts(self.run))
        sized = _sets(f"workers={{min: {workers}, max: {workers}}}")
        process: subprocess.Popen[str] = self._start(*self._command, *sized, *more)
        # By where this attempt began: workers of one that was killed may have committed once more meanwhile.
        wait_for(
            lambda: process.poll() is not None or any(committed(self.run) > at for at in _starts(self.run)[attempts:])
        )
        assert process.poll() is None, process.communicate()
        return process


def test_a_run_that_is_stopped_then_killed_then_wiped_out_comes_to_the_same_bits(
    spec_of: Callable[..., Any], start: Callable[..., Any], workspace: Path, slow_task: Path, running_ray: "RunningRay"
) -> None:
    """Three times the same command, which loses only what was not committed.

    Twice on a Ray of its own with one worker, then with two on one that runs already.
    """
    disturbed = Disturbed(start, workspace, slow_task)
    run = disturbed.run
    process = disturbed.begin(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "after a commit" in said
    stopped = committed(run)

    process = disturbed.begin(1)
    before_the_kill = committed(run)
    process.kill()
    process.communicate()

    process = disturbed.begin(2, "--address", running_ray.address)
    before_the_end = committed(run)
    wait_for(lambda: process.poll() is not None or len(_workers(run, attempt=2)) == 2)
    pids = [int(name.rsplit("-", 1)[1]) for name in _workers(run, attempt=2)]
    assert set(pids) <= set(descendants(running_ray.process.pid)), "it was joined"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    slow_task.with_name("fast").touch()
    out, said = process.communicate(timeout=300)
    found = result(subprocess.CompletedProcess([], process.returncode, out, said))
    assert running_ray.process.poll() is None, "and goes on"
    assert (found["restarts"], found["step"], found["workers"]) == (1, STEPS, 2)
    (event,) = (event for event in read_report(str(run))["events"] if event["kind"] == "restart")
    assert event["recovery_s"] > 0
    assert event["steps_redone"] >= 0
    check_noted(run, stopped)
    first, second, third, last = _starts(run)
    assert (first, second) == (0, stopped), "the commit that it was stopped after"
    assert second < before_the_kill <= third < before_the_end <= last == found["resumed_from"]
    check_equal(found["weights_sha256"], found["run"], alone(spec_of))


def check_noted(run: Path, stopped: int) -> None:
    """The storage's actions say who began, stopped and went on with it."""
    noted = [each for each in read_actions(str(run.parent)) if each["run"] == str(run)]
    assert [each["action"] for each in noted] == ["start", "stop", "resume", "resume"]
    assert [each["attempt"] for each in noted if "attempt" in each] == [0, 1, 2]
    assert [each["step"] for each in noted[1:3]] == [stopped, stopped]
    assert {(each["user"], each["host"]) for each in noted} == {(getpass.getuser(), socket.gethostname())}


def committed(run: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = (path.parent.name for path in (run / "checkpoints").glob("*/manifest.json"))
    return max((int(name.rsplit("-", 1)[1]) for name in found), default=0)


def _sets(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    if not (run / "ledger").exists():
        return []
    return [record for record in read_ledger(str(run)) if record["kind"] == kind]


def _starts(run: Path) -> list[int]:
    """The steps at which the attempts at a run began."""
    return [record["step"] for record in _events(run, "start")]


def _workers(run: Path, attempt: int = 0) -> list[str]:
    """The names of the workers of an attempt that have reported, each `host-pid`."""
    return [record["worker"] for record in _events(run, "seconds") if record["attempt"] == attempt]


class RunningRay:
    """`ray start --head --block` with two CPUs, its own port and folder."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as door:
            door.bind(("127.0.0.1", 0))
            port = door.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._log = folder / "ray.log"
        ray = str(Path(sys.executable).with_name("ray"))
        options = ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--block"]
        with self._log.open("w") as log:
            command = [ray, "start", "--head", f"--port={port}", *options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def is_up(self) -> bool:
        """Whether it says so; one that has ended is an error."""
        said = self._log.read_text()
        assert self.process.poll() is None, said
        return "Ray runtime started" in said


@pytest.fixture
def running_ray(tmp_path: Path) -> Iterator[RunningRay]:
    """A Ray that runs already; ended by SIGTERM to it alone."""
    made = RunningRay(tmp_path)
    try:
        wait_for(made.is_up)
        yield made
    finally:
        made.process.terminate()
        made.process.wait(timeout=300)
