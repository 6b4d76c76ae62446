"""Runs whose nodes come and go, whose host dies, and whose workers raise: what goes on, and what ends the run."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import elastrain
from elastrain.elastic.keep import descendants
from elastrain.elastic.local_cluster import LocalCluster, start_cluster
from elastrain.observe.ledger import read_ledger, read_steps

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SPEC = str(ROOT / "pipelines" / "digits_mlp" / "train.yaml")
FIXED = ("--set", "precision=fp32", "--set", "consistency=bitwise", "--set", "data.slots=4", "--json")


def events_of(run: str, kind: str) -> list[dict[str, Any]]:
    """The events of a kind that the ledger holds so far."""
    return [record for record in read_ledger(run) if record["kind"] == kind] if Path(run, "ledger").exists() else []


def wait_for(what: Callable[[], object], *, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with start_cluster(nodes=1, cpus=1) as made:
        yield made


class Training(threading.Thread):
    """A run in a thread of its own, which can be watched from its ledger."""

    def __init__(self, spec: Any) -> None:
        super().__init__(daemon=True)
        self._spec = spec
        self.run_url = str(Path("runs", spec.name).absolute())
        self.outcome: elastrain.Run | BaseException | None = None

    def run(self) -> None:
        """Train."""
        try:
            self.outcome = elastrain.train(self._spec)
        except BaseException as error:  # noqa: BLE001 -- looked at by the test
            self.outcome = error

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind so far, unless the run has failed."""
        assert not isinstance(self.outcome, BaseException), self.outcome
        return events_of(self.run_url, kind)


def test_a_run_grows_onto_a_node_that_comes_and_leaves_one_that_goes(
    cluster: LocalCluster, spec_of: Callable[..., Any]
) -> None:
    import ray

    changes = ("data.slots=4", "audit=true", "budget={steps: 12000}", "consistency=bitwise", "workers.max=2")
    training = Training(spec_of("nodes", *changes))
    training.start()
    wait_for(lambda: events_of(training.run_url, "checkpoint"))
    cluster.add()
    wait_for(lambda: training.events("resize"))
    first = {record["worker"] for record in events_of(training.run_url, "seconds")}
    (grown,) = training.events("resize")
    assert (grown["before"], grown["workers"]) == (1, 2)
    (joined,) = grown["joined"]
    nodes = {member["node"] for member in training.events("cell")}
    assert len(nodes) == 2
    cluster.drain(training.events("cell")[0]["node"])
    wait_for(lambda: training.events("preemption"))
    (left,) = training.events("preemption")
    assert (left["before"], left["workers"], left["steps_redone"]) == (2, 1, 0)
    assert set(left["left"]) == first - {joined}
    cluster.add()
    wait_for(lambda: len(training.events("resize")) == 2)
    here = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    member = next(node for node in training.events("cell")[-1:])["node"]
    assert member in here
    cluster.lose(member)
    wait_for(lambda: training.events("worker_lost"))
    training.join(240)
    assert isinstance(training.outcome, elastrain.Run), training.outcome
    assert (training.outcome.step, training.outcome.result["restarts"]) == (12000, 0)
    audit = read_steps(f"{training.outcome.url}/audit")
    assert len(audit) == len({*zip(audit["step"].to_pylist(), audit["row"].to_pylist(), strict=True)})
    assert len(audit) == training.outcome.result["samples"]


def test_when_the_host_dies_the_run_goes_on_from_the_last_checkpoint(
    cli: Callable[..., Any], start: Callable[..., Any], workspace: Path
) -> None:
    arguments = ("train", SPEC, *FIXED, "--set", "budget={epochs: 60}", "--set", "workers={min: 2, max: 2}")
    process = start(*arguments, "--set", "name=hostless")
    run = workspace / "runs" / "hostless"
    wait_for(lambda: list((run / "checkpoints").glob("*/manifest.json")))
    hosts = [
        pid for pid in descendants(process.pid) if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Host")
    ]
    os.kill(hosts[0], signal.SIGKILL)
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    found = json.loads(out.splitlines()[-1])
    assert (found["restarts"], found["step"]) == (1, 1380)
    reference = json.loads(cli(*arguments, "--set", "name=hosted").stdout.splitlines()[-1])
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

    def losses(self, model, batch):
        self.calls += model.training
        if self.calls > 80 and (self.always or not os.path.exists(self.marker)):
            open(self.marker, "w").close()
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


@pytest.mark.parametrize("error", ["OSError", "TypeError"])
def test_an_exception_that_comes_again_ends_the_run_with_its_traceback(
    cli: Callable[..., Any], workspace: Path, error: str
) -> None:
    done = cli(*raising(workspace, error, always=True))
    assert done.returncode == 2
    assert f"{error}: the machine, or a mistake" in done.stderr
    assert "raises.py" in done.stderr


def test_below_its_minimum_a_run_waits_and_says_so(start: Callable[..., Any], workspace: Path) -> None:
    process = start(
        "train",
        SPEC,
        *FIXED,
        "--set",
        "budget={epochs: 60}",
        "--set",
        "workers={min: 2, max: 2}",
        "--set",
        "name=short",
    )
    run = str(workspace / "runs" / "short")
    wait_for(lambda: list(Path(run, "checkpoints").glob("*/manifest.json")))
    names = [record["worker"] for record in events_of(run, "seconds")]
    os.kill(int(names[0].rsplit("-", 1)[1]), signal.SIGKILL)
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "waiting for 1 more of at least 2 workers" in said
    assert json.loads(out.splitlines()[-1])["restarts"] == 0
    (loss,) = events_of(run, "worker_lost")
    assert loss["workers"] == 2
