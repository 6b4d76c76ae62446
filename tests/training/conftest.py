"""What the tests of training share: `tests.training.harness`, made importable here and in child processes."""

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elastrain import storage

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


@pytest.fixture(scope="session", autouse=True)
def _server_of_forks() -> None:
    """Start it at once: importing torch takes it seconds, which pass while the first tests run."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pytest", "tests.training.harness"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ROOT, prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is for power cuts, which no test makes; on a busy disk it takes most of the time."""
    monkeypatch.setattr(storage, "_flush", lambda _: None)


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """One thread, and the default type of numbers as it was: a TrainState of fp64 sets it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
