"""Real runs: a packed dataset, the command line in processes of its own, and one Ray for the runs made from Python."""

import fcntl
import json
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastrain import storage

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "pipelines" / "digits_mlp" / "train.yaml"

Cli = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """A process's environment without a Ray address, so that every command starts a Ray of its own."""
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "elastrain", *arguments]


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/digits`, packed as a user packs it: once for all processes that run tests side by side."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "packed"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            done = subprocess.run(
                command("pack", "digits", "data/digits", "--json"),
                cwd=folder,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout.splitlines()[-1])["splits"]["train"]["rows"] == 1442
            lock.write("packed")
    return folder


@pytest.fixture(scope="module")
def workspace(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/digits` and with the runs of one module, whose names no other module knows."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "data").symlink_to(packed / "data")
    return folder


@pytest.fixture(scope="module")
def cli(workspace: Path) -> Cli:
    """Run `elastrain …` in the workspace and return what it printed and its exit code."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            cwd=workspace,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def start(workspace: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `elastrain …` in the workspace; whatever still runs at the end of the test is killed by its process id."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command(*arguments),
            cwd=workspace,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for all runs of a module that are made from Python."""
    from elastrain.elastic.session import ray_session

    with ray_session("local", cpus=8):
        yield


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """However a run on a Ray that goes on ends, it leaves no placement group and holds no CPU."""
    yield
    if "local_ray" in request.fixturenames:
        import ray

        deadline = time.monotonic() + 20
        while ray.available_resources().get("CPU") != 8.0 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ray.available_resources().get("CPU") == 8.0
        assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}


@pytest.fixture
def spec_of(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Read the digits spec with changes, as somebody in the workspace would."""
    from elastrain.spec.document import read_train

    monkeypatch.chdir(workspace)

    def read(name: str, *changes: str) -> Any:
        return read_train(SPEC, [f"name={name}", "budget={epochs: 3}", "precision=fp32", *changes])

    return read


SLOW = """

import time
from pathlib import Path


class Slow(DigitsMLP):
    def __init__(self, data, pause=0.025, **args):
        super().__init__(data, **args)
        self.pause = pause

    def losses(self, model, batch):
        if not Path(__file__).with_name("fast").exists():
            time.sleep(self.pause)
        return super().losses(model, batch)
"""


@pytest.fixture
def slow_task(tmp_path: Path) -> Path:
    """A file with a task `Slow`: the digits', which takes its time until there is a file `fast` beside it."""
    task = tmp_path / "slow.py"
    task.write_text((SPEC.parent / "task.py").read_text() + SLOW)
    return task


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; only root can mount one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount")
    yield folder
    subprocess.run(["/bin/umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def _server_of_forks() -> None:
    """Import torch once, in the server from which the workers of process histories are forked."""
    preload = ["pytest", "tests.training.harness", "tests.elastic.process_worker"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()


@pytest.fixture
def forked_workers(_server_of_forks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What process histories need. A flush is for power cuts, which no test makes."""
    monkeypatch.setattr(storage, "_flush", lambda _: None)
