"""Storage that goes away while a run trains: it trains on, says that it waits, and ends with the bits it would have."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.test_run import SPEC, result, wait_for
from tests.fault_proxy import proxying
from tests.s3_server import free_ports, serving

import elastrain
from elastrain import s3, storage
from elastrain.observe.ledger import read_ledger
from elastrain.training.manifests import is_whole, read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

OUTAGE_S = 10.0  # longer than anybody waits for a server that never answered, and than a lease is left alone
STEPS, FIRST, SECOND = 552, 100, 300  # of the run, and those of the checkpoints after which storage goes away
TRAINING = re.compile(rf"^training, waiting for storage · step (\d+)/{STEPS}", re.MULTILINE)
SETTINGS = (
    *("precision=fp32", "consistency=bitwise", "data.slots=5", "audit=true", "budget={epochs: 24}"),
    "checkpoint={every_steps: 50, keep: 100}",
)


@pytest.fixture
def begun(
    start: Callable[..., "subprocess.Popen[str]"], cli: Callable[..., Any], slow_task: Path
) -> Callable[[str], tuple[str, "subprocess.Popen[str]"]]:
    """Pack into a bucket and begin the run there, of a task that takes its time; returned with the run's URL."""

    def begin(bucket: str) -> tuple[str, "subprocess.Popen[str]"]:
        assert cli("pack", "digits", f"{bucket}/digits").returncode == 0
        places = (f"data.train={bucket}/digits/train", f"data.eval={bucket}/digits/test", f"storage={bucket}/runs")
        changes = (*SETTINGS, *places, f"task={slow_task}:Slow", "name=outage", "workers={min: 2, max: 2}")
        process = start("train", SPEC, "--json", *(word for change in changes for word in ("--set", change)))
        return f"{bucket}/runs/outage", process

    return begin


def wait_for_checkpoint(run: str, step: int, process: "subprocess.Popen[str]") -> None:
    there = f"{run}/checkpoints/step-{step:08d}/manifest.json"
    wait_for(lambda: process.poll() is not None or storage.exists(there))
    assert process.poll() is None, process.communicate()


def check(run: str, process: "subprocess.Popen[str]", digest: str) -> str:
    """Wait for the end of a run that was disturbed, and see that nothing was lost; returns what it said."""
    out, said = process.communicate(timeout=240)
    found = result(subprocess.CompletedProcess([], process.returncode, out, said))
    assert found["weights_sha256"] == digest, said
    assert (found["step"], found["restarts"], found["resumed_from"]) == (STEPS, 0, 0)
    acknowledged = [record["step"] for record in read_ledger(run) if record["kind"] == "checkpoint"]
    assert acknowledged == [*range(50, STEPS, 50), STEPS]
    assert all(is_whole(run, step, read_manifest(run, step)) for step in acknowledged)
    return said


@pytest.mark.usefixtures("local_ray")
def test_a_run_trains_on_while_storage_is_away_and_says_that_it_waits(
    begun: Callable[..., Any],
    spec_of: Callable[..., Any],
    slow_task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First the network goes away, then the server is killed and started again."""
    undisturbed = elastrain.train(spec_of("without-outage", *SETTINGS, "workers={min: 1, max: 1}"))
    ports = free_ports()
    with contextlib.ExitStack() as later:
        with serving(tmp_path, ports) as server:
            proxy = later.enter_context(proxying(server))
            for name, value in proxy.environment.items():
                monkeypatch.setenv(name, value)
            run, process = begun(f"s3://{server['BUCKET']}/outage")
            wait_for_checkpoint(run, FIRST, process)
            proxy.unplug()
            time.sleep(OUTAGE_S)
            proxy.clear()
            wait_for_checkpoint(run, SECOND, process)
            os.kill(int(server["SERVER_PID"]), signal.SIGKILL)
        time.sleep(OUTAGE_S)
        later.enter_context(serving(tmp_path, ports, server["BUCKET"]))
        slow_task.with_name("fast").touch()
        said = check(run, process, undisturbed.weights_sha256)
    waited = [
        {int(step) for step in TRAINING.findall(said) if (int(step) < SECOND) is first} for first in (True, False)
    ]
    assert all(len(steps) > 1 for steps in waited), said


@pytest.mark.usefixtures("local_ray")
def test_what_ray_starts_can_tell_that_it_is_not_where_the_command_began() -> None:
    import ray

    assert s3.RAY_WORKER not in os.environ
    assert ray.get(ray.remote(lambda: s3.RAY_WORKER in os.environ).remote())
