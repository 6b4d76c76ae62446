"""Runs whose nodes come and go, whose host dies, and whose workers raise: what goes on, and what ends the run."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastrain.elastic.keep import descendants
from elastrain.elastic.local_cluster import LocalCluster, start_cluster
from elastrain.observe.ledger import read_ledger, read_steps
from elastrain.observe.report import read_report

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SPEC = str(ROOT / "pipelines" / "digits_mlp" / "train.yaml")
FIXED = ("--set", "precision=fp32", "--set", "consistency=bitwise", "--set", "data.slots=4", "--json")


def events_of(run: str, kind: str) -> list[dict[str, Any]]:
    """The events of a kind that the ledger holds so far."""
    return [record for record in read_ledger(run) if record["kind"] == kind] if Path(run, "ledger").exists() else []


def wait_for(what: Callable[[], object], *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with start_cluster(nodes=1, cpus=1) as made:
        yield made


def test_a_run_grows_onto_a_node_that_comes_and_leaves_one_that_goes(
    cluster: LocalCluster, start: Callable[..., Any], workspace: Path
) -> None:
    import ray

    changed = ("name=nodes", "audit=true", "budget={steps: 400000}", "workers={min: 1, max: 2}")
    sets = [part for change in changed for part in ("--set", change)]
    process = start("train", SPEC, *FIXED, *sets, "--address", cluster.address)
    run = str(workspace / "runs" / "nodes")

    def told(kind: str, count: int = 1) -> list[dict[str, Any]]:
        wait_for(lambda: process.poll() is not None or len(events_of(run, kind)) >= count)
        assert process.poll() is None, process.communicate()
        return events_of(run, kind)

    told("checkpoint")
    cluster.add()
    (grown,) = told("resize")
    assert (grown["before"], grown["workers"]) == (1, 2)
    first, second = told("cell")
    assert first["node"] != second["node"]
    cluster.drain(first["node"])
    (left,) = told("preemption")
    assert (left["before"], left["workers"], left["steps_redone"]) == (2, 1, 0)
    assert set(left["left"]).isdisjoint(grown["joined"])
    cluster.add()
    told("resize", 2)
    third = told("cell", 3)[-1]
    assert third["node"] in {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    cluster.lose(third["node"])
    (loss,) = told("worker_lost")
    assert loss["node"] == third["node"]
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert read_report(run)["restarts"] == 0
    audit = read_steps(f"{run}/audit")
    lines = [*zip(audit["epoch"].to_pylist(), audit["row"].to_pylist(), strict=True)]
    assert len(lines) == len(set(lines)), "nothing was trained on twice"
    steps = audit["step"].to_pylist()
    assert set(steps) == set(range(max(steps) + 1))
    assert out == ""


def test_below_its_minimum_a_run_waits_and_when_the_host_dies_it_goes_on_from_the_last_checkpoint(
    cli: Callable[..., Any], start: Callable[..., Any], workspace: Path
) -> None:
    arguments = ("train", SPEC, *FIXED, "--set", "budget={epochs: 120}")
    process = start(*arguments, "--set", "name=hostless", "--set", "workers={min: 2, max: 2}")
    run = workspace / "runs" / "hostless"
    wait_for(lambda: list((run / "checkpoints").glob("*/manifest.json")))
    names = [record["worker"] for record in events_of(str(run), "seconds")]
    os.kill(int(names[0].rsplit("-", 1)[1]), signal.SIGKILL)
    wait_for(lambda: process.poll() is not None or events_of(str(run), "worker_lost"))
    hosts = [
        pid for pid in descendants(process.pid) if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Host")
    ]
    os.kill(hosts[0], signal.SIGKILL)
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "waiting for 1 more worker" in said
    (loss,) = events_of(str(run), "worker_lost")
    assert loss["workers"] == 2
    found = json.loads(out.splitlines()[-1])
    assert (found["restarts"], found["step"]) == (1, 2760), "for the host, not for the worker"
    reference = json.loads(cli(*arguments, "--set", "name=hosted", "--set", "workers={min: 1, max: 1}").stdout)
    assert found["weights_sha256"] == reference["weights_sha256"]


TASK = f'''
import builtins
import importlib.util
import os

spec = importlib.util.spec_from_file_location("digits_task", {str(ROOT / "pipelines" / "digits_mlp" / "task.py")!r})
digits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digits)


class Raises(digits.DigitsMLP):
    """Raises once in step 40 or so: as an exception named `error`, and again and again where it is to."""

    def __init__(self, data, *, error, marker, always, **arguments):
        super().__init__(data, **arguments)
        self.error, self.marker, self.always, self.calls = error, marker, always, 0

    def is_first(self):
        try:
            open(self.marker, "x").close()
        except FileExistsError:
            return False
        return True

    def losses(self, model, batch):
        self.calls += model.training
        if self.calls > 80 and (self.always or self.is_first()):
            raise getattr(builtins, self.error)("the machine, or a mistake")
        return super().losses(model, batch)
'''


def raising(folder: Path, error: str, *, always: bool) -> tuple[str, ...]:
    """Arguments of a run on two workers whose task raises."""
    task = folder / "raises.py"
    task.write_text(TASK)
    marker = folder / f"{error}-{always}"
    arguments = f"task_args={{hidden: 16, error: {error}, marker: {marker}, always: {str(always).lower()}}}"
    fixed = ("--set", "workers={min: 1, max: 2}", "--set", f"name={error}-{always}".lower())
    return ("train", SPEC, *FIXED, *fixed, "--set", f"task={task}:Raises", "--set", arguments)


def test_an_exception_of_one_worker_costs_a_step(cli: Callable[..., Any], workspace: Path) -> None:
    done = cli(*raising(workspace, "OSError", always=False))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["restarts"], found["step"]) == (0, 690)
    (event,) = events_of(found["run"], "exception")
    assert "OSError: the machine, or a mistake" in event["message"]
    assert len(events_of(found["run"], "worker_lost")) == 1


def test_an_exception_that_comes_again_ends_the_run_with_its_traceback(
    cli: Callable[..., Any], workspace: Path
) -> None:
    done = cli(*raising(workspace, "TypeError", always=True))
    assert done.returncode == 2
    assert "TypeError: the machine, or a mistake" in done.stderr
    assert "raises.py" in done.stderr
