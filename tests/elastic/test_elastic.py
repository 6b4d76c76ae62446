"""A run whose worker and host die, and workers that raise: what goes on, and what ends the run.

Runs whose nodes come and go are in `test_autoscaling.py`, and, to the bit, in `test_verify.py`.
"""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.elastic.conftest import SPEC
from tests.elastic.reference import begin_reference

import elastrain
from elastrain.observe.ledger import read_ledger

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def events_of(run: str | Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind that the ledger holds so far."""
    there = Path(run, "ledger").exists()
    return [record for record in read_ledger(str(run)) if record["kind"] == kind] if there else []


def wait_for(what: Callable[[], Any]) -> Any:
    """Return what it comes to once it is true."""
    deadline = time.monotonic() + 300
    while not (found := what()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return found


RAISES = """

def is_first(marker):
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Raises(Slow):
    calls = 0

    def losses(self, model, batch):
        self.calls += model.training
        if self.calls > 80 and is_first(Path(__file__).with_name("raised")):  # in step 40 or so
            raise OSError("the machine")
        return super().losses(model, batch)
"""


def disturb(run: Path, fast: Path) -> None:
    """Once the worker that raised is made up for, kill the host; then the run need not take its time."""
    import ray

    try:
        wait_for(lambda: events_of(run, "worker_lost"))
        (started,) = events_of(run, "start")
        os.kill(ray._private.state.actors()[started["id"]]["Pid"], signal.SIGKILL)
    finally:
        fast.touch()


@pytest.mark.usefixtures("local_ray")
def test_a_run_waits_for_a_worker_in_place_of_one_that_raised_and_when_the_host_dies_goes_on_from_the_last_checkpoint(
    spec_of: Callable[..., Any], workspace: Path, slow_task: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slow_task.write_text(slow_task.read_text() + RAISES)
    fixed = ("precision=fp32", "consistency=bitwise", "data.slots=4", "budget={epochs: 10}", "task_args={hidden: 16}")
    slow = (f"task={slow_task}:Raises", "task_args.pause=0.1", "checkpoint={every_steps: 20}", "eval.every_steps=1000")
    spec = spec_of("hostless", *fixed, *slow, "workers={min: 2, max: 2}")
    reference = begin_reference(SPEC, [*fixed, "workers.max=1"], cwd=workspace)
    with ThreadPoolExecutor() as pool:
        disturbed = pool.submit(disturb, workspace / "runs" / "hostless", slow_task.with_name("fast"))
        found = elastrain.train(spec)
        disturbed.result()
    assert "waiting for 1 more worker" in capfd.readouterr().err
    (exception,) = events_of(found.url, "exception")
    assert "OSError: the machine" in exception["message"]
    (loss,) = events_of(found.url, "worker_lost")
    assert loss["workers"] == 2
    assert (found.result["restarts"], found.step) == (1, 230), "for the host, not for the worker"
    assert max(event["step"] for event in events_of(found.url, "start")) >= 20, "from a checkpoint"
    assert found.weights_sha256 == reference.weights_sha256()


@pytest.mark.parametrize(
    ("error", "passes"),
    [(OSError(), True), (RuntimeError(), True), (TypeError(), False), (NotImplementedError(), False)],
)
def test_another_process_may_fare_better_only_where_steps_have_gone_well_and_nobody_made_a_mistake(
    error: Exception, *, passes: bool
) -> None:
    """That a mistake then ends the run, with its own lines, is in `test_bad_input.py`."""
    from elastrain.elastic.worker import RunWorker

    worker = RunWorker.__new__(RunWorker)
    for stepped in (True, False):
        worker._seat = SimpleNamespace(has_stepped=stepped)  # type: ignore[assignment]
        assert worker.may_pass(error) is (passes and stepped)
