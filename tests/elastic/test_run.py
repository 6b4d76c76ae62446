"""Runs in real Ray Train workers: the same batches for any number of them."""

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import elastrain
from elastrain.elastic.holder import NAMESPACE
from elastrain.elastic.keep import descendants
from elastrain.observe.ledger import read_ledger, read_steps

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SPEC = str(ROOT / "pipelines" / "digits_mlp" / "train.yaml")
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


def three_epochs(spec_of: Callable[..., Any], size: int) -> elastrain.Run:
    """Three audited epochs on so many workers; trained by the first test that asks, and found finished by the next."""
    sized = f"workers={{min: {size}, max: {size}}}"
    return elastrain.train(spec_of(f"any-{size}", "precision=fp64", "data.slots=4", "audit=true", sized))


def test_any_number_of_workers_trains_on_the_same_batches(spec_of: Callable[..., Any]) -> None:
    """Three hold four slots between them, so one does the work of two. To the bit: `test_interrupted.py`."""
    one, many = (three_epochs(spec_of, number) for number in (1, 3))
    assert (one.result["workers"], many.result["workers"]) == (1, 3)
    assert audit_files(many.url) == audit_files(one.url)
    reference = losses(one.url)
    assert len(reference) == 69
    assert np.max(np.abs(losses(many.url) - reference) / np.abs(reference)) < 1e-10


def test_every_sample_is_trained_on_exactly_once_an_epoch(spec_of: Callable[..., Any]) -> None:
    run = three_epochs(spec_of, 3)
    audit = read_steps(f"{run.url}/audit")
    epoch, step, slot, row = (np.asarray(audit[name]) for name in ("epoch", "step", "slot", "row"))
    for number in range(3):
        assert sorted(row[epoch == number]) == list(range(1442))
    assert (epoch == step // 23).all()
    assert set(slot) == set(range(4))
    assert run.result["samples"] == 3 * 1442


def processes() -> set[str]:
    """What the processes of this one's Ray call themselves."""
    found = set()
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            found.add(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0])
    return found


def test_half_precision_learns_with_no_process_that_one_node_needs_not(
    spec_of: Callable[..., Any], slow_task: Path
) -> None:
    """In fp16; as bf16, what the spec says, does in `test_readme.py`. Nobody holds snapshots."""
    import ray

    from elastrain.training.snapshot import SNAPSHOT_S

    actors: list[dict[str, str]] = []
    titles: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            actors.extend(ray.util.list_named_actors(all_namespaces=True))
            titles.update(processes())

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            sized = ("budget={steps: 300}", "checkpoint.every_steps=1000", "workers={min: 1, max: 1}", "data.slots=1")
            changes = ("precision=fp16", f"task={slow_task}:Slow", *sized, "eval.every_steps=1000")
            run = elastrain.train(spec_of("half", *changes))
        finally:
            over.set()
        looking.result()
    assert any("RayTrainWorker" in title for title in titles), titles
    assert not [title for title in titles if "SynchronizationActor" in title or "_StatsActor" in title]
    assert not [actor for actor in actors if actor["namespace"] == NAMESPACE]
    ended = np.asarray(read_steps(f"{run.url}/metrics")["ended"])
    assert ended[-1] - ended[0] > SNAPSHOT_S, "time enough"
    assert not any("snapshot" in record["kind"] for record in read_ledger(run.url))
    assert run.metrics["accuracy"] > 0.9
    assert not Path(run.url, "audit").exists(), "nobody asked for one"


def test_a_finished_run_is_found_finished(spec_of: Callable[..., Any]) -> None:
    first = three_epochs(spec_of, 1)
    again = three_epochs(spec_of, 1)
    assert again.result["resumed_from"] == 69
    assert again.weights_sha256 == first.weights_sha256
    attempts = [record for record in read_ledger(first.url) if record["kind"] == "start"]
    assert len(attempts) == 1, "nothing was started again"


def test_weights_are_exported_with_the_same_digest(spec_of: Callable[..., Any], tmp_path: Path) -> None:
    from elastrain.training.checkpoint import read_weights
    from elastrain.training.export import export_weights
    from elastrain.training.state import digest

    run = three_epochs(spec_of, 1)
    found = export_weights(run.url, str(tmp_path / "model.safetensors"), step=None, weights="model")
    assert found["weights_sha256"] == run.weights_sha256
    assert digest(read_weights(tmp_path / "model.safetensors")) == run.weights_sha256
