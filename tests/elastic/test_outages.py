"""Storage that goes away while a run trains: it trains on, says that it waits, and ends with the bits it would have."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.test_run import BITWISE, SPEC, result, wait_for
from tests.fault_proxy import Proxy
from tests.s3_server import free_ports, serving

from elastrain import s3, storage
from elastrain.observe.ledger import read_ledger
from elastrain.training.manifests import is_whole, read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

OUTAGE_S = 15.0
STEPS = 276
TRAINING = re.compile(rf"^training, waiting for storage · step (\d+)/{STEPS}", re.MULTILINE)
TWO = (*BITWISE, *(word for setting in ("workers={min: 2, max: 2}", "audit=true") for word in ("--set", setting)))
LONG = ("--set", "budget={epochs: 12}", "--set", "checkpoint={every_steps: 50, keep: 100}")


@pytest.fixture(scope="module")
def undisturbed(cli: Callable[..., Any]) -> str:
    """The digest of the run, on local folders, that nothing happens to."""
    return str(result(cli("train", SPEC, *TWO, *LONG, "--set", "name=without-outage"))["weights_sha256"])


@pytest.fixture
def begun(
    start: Callable[..., "subprocess.Popen[str]"], cli: Callable[..., Any], slow_task: Path
) -> Callable[[str], tuple[str, "subprocess.Popen[str]"]]:
    """Pack into a bucket and begin a run over it; returned once it has a checkpoint, with the run's URL."""

    def begin(bucket: str, folder: str = "") -> tuple[str, "subprocess.Popen[str]"]:
        folder = folder or bucket
        assert cli("pack", "digits", f"{bucket}/digits").returncode == 0
        places = (f"data.train={bucket}/digits/train", f"data.eval={bucket}/digits/test", f"storage={folder}/runs")
        changes = (*places, f"task={slow_task}:Slow", "name=outage")
        process = start("train", SPEC, *TWO, *LONG, *(word for change in changes for word in ("--set", change)))
        run = f"{folder}/runs/outage"
        there = f"{run}/checkpoints/step-00000100/manifest.json"
        wait_for(lambda: storage.exists(there) or process.poll() is not None)
        assert process.poll() is None
        return run, process

    return begin


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


@pytest.mark.parametrize("away", ["everything", "data"])
def test_a_run_trains_on_through_an_outage_and_says_that_it_waits(
    away: str,
    begun: Callable[..., Any],
    undisturbed: str,
    fault_proxy: Proxy,
    s3_server: Mapping[str, str],
    tmp_path: Path,
) -> None:
    run, process = begun(f"s3://{s3_server['BUCKET']}/outage-{away}", str(tmp_path) if away == "data" else "")
    fault_proxy.unplug()
    time.sleep(OUTAGE_S)
    fault_proxy.clear()
    said = check(run, process, undisturbed)
    steps = [int(step) for step in TRAINING.findall(said)]
    assert len(set(steps)) > 1, said


def test_a_run_survives_a_server_that_is_killed_and_started_again(
    begun: Callable[..., Any], undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = free_ports()
    with contextlib.ExitStack() as second:
        with serving(tmp_path, ports) as environment:
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            run, process = begun(f"s3://{environment['BUCKET']}/killed")
            os.kill(int(environment["SERVER_PID"]), signal.SIGKILL)
        time.sleep(OUTAGE_S)
        second.enter_context(serving(tmp_path, ports, environment["BUCKET"]))
        assert "waiting for storage" in check(run, process, undisturbed)


@pytest.mark.usefixtures("local_ray")
def test_what_ray_starts_can_tell_that_it_is_not_where_the_command_began() -> None:
    import ray

    assert s3.RAY_WORKER not in os.environ
    assert ray.get(ray.remote(lambda: s3.RAY_WORKER in os.environ).remote())
