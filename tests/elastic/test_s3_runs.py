"""Data and runs on a real S3 server, through a network that fails them: the same bits as on a local folder.

One history on one Ray, whose processes reach the server through a proxy: a run that is killed, goes on, and waits for
storage that is away. Each test looks at a part of what came of it.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.conftest import SLOW, command, environment
from tests.elastic.test_run import SPEC, losses, result, wait_for
from tests.fault_proxy import Proxy, proxying
from tests.s3_server import SECRET_KEY, free_ports, serving
from tests.test_uploads import abandon

import elastrain
from elastrain import s3, storage
from elastrain.data.dataset import Dataset
from elastrain.data.pack import pack_dataset
from elastrain.data.sources import PackOptions
from elastrain.elastic.session import ray_session
from elastrain.errors import StorageError
from elastrain.observe.actions import read_actions
from elastrain.observe.ledger import read_ledger
from elastrain.observe.report import read_report
from elastrain.spec.document import read_train
from elastrain.training.manifests import is_whole, newest_whole, read_manifest, revoke
from elastrain.uploads import unfinished

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

FAULTS = ("503", "500", "reset", "truncate", "lost")
OUTAGE_S = 10.0  # longer than anybody waits for a server that never answered, and than a lease is left alone
EVERY, STEPS = 10, 230
SAME = ("precision=fp32", "consistency=bitwise", "data.slots=5", "audit=true", "budget={epochs: 10}")
WAITING = re.compile(rf"^training, waiting for storage · step (\d+)/{STEPS}")


def files_of(url: str) -> dict[str, bytes]:
    """The files of a dataset, without the mark that their names have on S3 of who wrote them."""
    files = [file.path for file in storage.list_files(url)]
    return {re.sub(r"-[0-9a-f]{8}(?=\.parquet)", "", path): storage.read_bytes(f"{url}/{path}") for path in files}


@dataclass(kw_only=True)
class Store:
    """A server that may be killed and started again, behind a proxy."""

    folder: Path
    ports: list[int]
    server: dict[str, str]
    proxy: Proxy
    later: contextlib.ExitStack

    @property
    def url(self) -> str:
        """Its bucket."""
        return f"s3://{self.server['BUCKET']}"

    def kill(self) -> None:
        """End the server as a power cut would."""
        os.kill(int(self.server["SERVER_PID"]), signal.SIGKILL)

    def start_again(self) -> None:
        """Start the server that was killed."""
        self.server = self.later.enter_context(serving(self.folder, self.ports, self.server["BUCKET"]))

    @contextlib.contextmanager
    def disturbed(self) -> Iterator[Callable[[], dict[str, int]]]:
        """Have a fifth of all requests fail, each half second in another way; yield what counts them by kind."""
        ended, told = threading.Event(), threading.Lock()  # one asks the proxy at a time
        before = self.proxy.counts()

        def disturb() -> None:
            for number, kind in enumerate(itertools.cycle(FAULTS)):
                with told:
                    self.proxy.fault(kind, share=0.2, seed=number)
                if ended.wait(0.5):
                    return

        def counts() -> dict[str, int]:
            with told:
                found = self.proxy.counts()
            return {kind: found.get(kind, 0) - before.get(kind, 0) for kind in FAULTS}

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            yield counts
        finally:
            ended.set()
            thread.join()
            self.proxy.clear()


class Driver:
    """`elastrain …` in a process, whose words can be read while it runs."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            command(*arguments),
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)

    def end(self) -> "subprocess.CompletedProcess[str]":
        """Wait for its end; return what it printed."""
        with self.process:  # which closes its pipes
            assert self.process.stdout
            out = self.process.stdout.read()
            self._reading.join()
        return subprocess.CompletedProcess([], self.process.returncode, out, "".join(self.lines))

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        self.process.kill()

    def wait_for(self, what: Callable[[], object]) -> None:
        """Wait for what happens while it runs; asked twice a second, since each question may be a request."""

        def asked() -> object:
            time.sleep(0.5)
            assert self.process.poll() is None, self.end()
            return what()

        wait_for(asked)

    def wait_out(self) -> None:
        """Wait until it has told at two steps that storage is away."""
        begin, known = time.monotonic() + OUTAGE_S, len(self.lines)

        def told() -> bool:
            return len({found[1] for line in self.lines[known:] if (found := WAITING.match(line))}) > 1

        self.wait_for(lambda: time.monotonic() > begin and told())

    def wait_until_it_only_trains(self) -> None:
        """Wait until it says no more that it waits."""
        self.wait_for(lambda: self.lines[-1].startswith("training · "))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A server, and a Ray whose processes reach it as this one does."""
    folder, ports = tmp_path_factory.mktemp("store"), free_ports()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as later:
        server = later.enter_context(serving(folder, ports))
        proxy = later.enter_context(proxying(server))
        for name, value in proxy.environment.items():
            patch.setenv(name, value)
        later.enter_context(ray_session("local", cpus=4))
        yield Store(folder=folder, ports=ports, server=server, proxy=proxy, later=later)


def train(workspace: Path, name: str, *changes: str) -> elastrain.Run:
    """Train from Python what nobody disturbs, on local data unless told."""
    data = workspace / "data" / "digits"
    places = (f"storage={workspace}/runs", f"data.train={data}/train", f"data.eval={data}/test")
    return elastrain.train(read_train(SPEC, [f"name={name}", *SAME, *places, "workers={min: 1, max: 1}", *changes]))


@pytest.fixture(scope="module")
def reference(store: Store, workspace: Path) -> elastrain.Run:
    """The run on a local folder, on one worker."""
    del store  # only its Ray is needed
    return train(workspace, "beside-s3")


@pytest.fixture(scope="module")
def places(store: Store, workspace: Path) -> tuple[str, ...]:
    """Data and runs in the bucket."""
    url = f"{store.url}/digits"
    assert pack_dataset("digits", url, PackOptions())["splits"]["train"]["rows"] == 1442
    assert files_of(url) == files_of(str(workspace / "data" / "digits"))
    return (f"data.train={url}/train", f"data.eval={url}/test", f"storage={store.url}/runs")


@dataclass(kw_only=True)
class History:
    """What came of the run."""

    run: str
    changes: tuple[str, ...]
    refused: "subprocess.CompletedProcess[str]"
    pid: int  # of the driver that was killed
    said: list[str]  # by the one that was killed, and by the one that went on
    hit: dict[str, int]  # requests that failed the one that went on, before storage went away altogether
    ended: dict[str, Any]
    cache: Path


@pytest.fixture(scope="module")
def history(
    store: Store, places: tuple[str, ...], cli: Callable[..., Any], workspace: Path, tmp_path_factory: Any
) -> History:
    """A run of a task that takes its time: killed, gone on with, and for a while without storage."""
    import ray

    folder = tmp_path_factory.mktemp("task")
    (folder / "slow.py").write_text((Path(SPEC).parent / "task.py").read_text() + SLOW)
    slowly = (f"task={folder}/slow.py:Slow", "task_args={pause: 0.2}")
    changes = (*SAME, *places, *slowly, "name=killed", f"checkpoint={{every_steps: {EVERY}, keep: 100}}")
    cached = f"data.cache={{folder: {folder}/cache, max_bytes: 1GB}}"
    run, address = f"{store.url}/runs/killed", ray.get_runtime_context().gcs_address

    def begin(*more: str) -> list[str]:
        sets = [word for change in (*changes, "workers={min: 2, max: 2}", *more) for word in ("--set", change)]
        return ["train", SPEC, "--json", "--address", address, *sets]

    def committed() -> int:
        return newest_whole(run, warn=pytest.fail) or 0

    with contextlib.ExitStack() as later:
        with store.disturbed():
            first = Driver(workspace, begin())
            later.callback(first.kill)
            first.wait_for(lambda: committed() >= EVERY)
            refused = cli(*begin())
            first.kill()
            assert not first.end().stdout, "it had to be killed before its end"
        abandon(f"{run}/checkpoints/step-00000999/model.safetensors", f"{run}/audit/00000999.parquet")
        before = committed()
        with store.disturbed() as hit:
            second = Driver(workspace, begin(cached))
            later.callback(second.kill)
            second.wait_for(lambda: committed() > before and min(hit().values()) > 0)
            counts = hit()
        assert unfinished(run) == [], "what killed writers were sending is ended, also where requests fail"
        second.wait_until_it_only_trains()
        store.proxy.unplug()
        store.kill()
        second.wait_out()
        store.proxy.clear()
        store.start_again()
        (folder / "fast").touch()
        ended = second.end()
    return History(
        run=run,
        changes=changes,
        refused=refused,
        pid=first.process.pid,
        said=["".join(first.lines), ended.stderr],
        hit=counts,
        ended=result(ended),
        cache=folder / "cache",
    )


def test_a_run_on_s3_that_is_killed_goes_on_to_the_bits_of_one_on_a_local_folder(
    history: History, reference: elastrain.Run, store: Store
) -> None:
    """And the network fails it in all ways, again and again."""
    run, ended = history.run, history.ended
    assert min(history.hit.values()) > 0, history.hit
    assert ended["resumed_from"] >= EVERY, history.said[0]
    assert (ended["step"], ended["workers"]) == (STEPS, 2)
    assert ended["weights_sha256"] == reference.weights_sha256
    assert files_of(f"{run}/audit") == files_of(f"{reference.url}/audit")
    assert losses(run).tolist() == losses(reference.url).tolist()

    again = elastrain.train(read_train(SPEC, list(history.changes)))
    assert (again.result["resumed_from"], again.weights_sha256) == (STEPS, ended["weights_sha256"])
    told = [(each["action"], each["attempt"]) for each in read_actions(f"{store.url}/runs") if each["run"] == run]
    assert told == [("start", 0), ("resume", 1)], "who is refused, or has nothing to do, is not noted"


def test_while_storage_is_away_a_run_trains_on_and_loses_nothing_that_it_has_acknowledged(history: History) -> None:
    """The network went away, and the server was killed and started again; it said so, or there were no history."""
    assert history.ended["restarts"] == 0, history.said[1]
    told = [record for record in read_ledger(history.run) if record["kind"] == "checkpoint"]
    last = [record["step"] for record in told if record["attempt"] == 1]
    assert last == list(range(history.ended["resumed_from"] + EVERY, STEPS + 1, EVERY))
    assert all(is_whole(history.run, each["step"], read_manifest(history.run, each["step"])) for each in told)


def test_a_command_that_trains_what_another_one_trains_is_refused(history: History) -> None:
    assert history.refused.returncode == 3, history.refused.stderr
    words = history.refused.stderr.splitlines()[-1]
    assert words.startswith(f"elastrain: error: {history.run}: in use by process {history.pid} of ")
    assert "wait for it, stop it, or give this run another name; if it is dead, the same command takes over" in words


def test_the_page_of_a_run_on_s3_lies_beside_it_and_nothing_holds_the_secret(
    history: History, cli: Callable[..., Any]
) -> None:
    page = cli("report", history.run, "--json")
    assert page.returncode == 0, page.stderr
    assert json.loads(page.stdout)["run"] == history.run
    assert storage.read_bytes(f"{history.run}/report.html").startswith(b"<!")
    everything = "".join(history.said) + page.stdout + page.stderr + str(files_of(history.run))
    assert SECRET_KEY not in everything


def test_the_next_run_with_the_same_cache_reads_no_shard_and_comes_to_the_same_bits(
    history: History, reference: elastrain.Run, store: Store, places: tuple[str, ...], workspace: Path
) -> None:
    """The one before, which filled it, came to the bits of the one without a cache."""
    assert any((history.cache / "entries").iterdir())
    here = (*places[:2], f"storage={workspace}/runs")
    store.proxy.fault("403", method="GET", key="part-")  # a shard cannot be read any more
    try:
        again = train(workspace, "cached", *here, f"data.cache={{folder: {history.cache}, max_bytes: 1GB}}")
        assert again.weights_sha256 == reference.weights_sha256
        assert "403" not in store.proxy.counts()
        with pytest.raises(StorageError):
            storage.read_bytes(f"{store.url}/digits/train/{Dataset.open(f'{store.url}/digits/train').shards[0].path}")
    finally:
        store.proxy.clear()


def test_a_run_that_is_taken_over_stops(store: Store, places: tuple[str, ...], workspace: Path) -> None:
    import ray

    run = f"{store.url}/runs/held"
    endless = ("name=held", "budget={epochs: 2000}", f"checkpoint.every_steps={EVERY}", "workers={min: 1, max: 1}")
    sets = [word for change in (*SAME, *places, *endless) for word in ("--set", change)]
    driver = Driver(workspace, ["train", SPEC, "--json", "--address", ray.get_runtime_context().gcs_address, *sets])
    try:
        driver.wait_for(lambda: newest_whole(run, warn=lambda _: None) is not None)
        storage.put_json(f"{run}/.lock", {"token": "another", "pid": 7, "user": "who", "host": "came", "counter": 99})
        revoke(run)
        newest = newest_whole(run, warn=lambda _: None)
        done = driver.end()
    finally:
        driver.kill()
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    words = done.stderr.splitlines()[-1]
    assert words.startswith(f"elastrain: error: {run}: was taken over by process 7 of who on came while this process")
    assert newest_whole(run, warn=lambda _: None) == newest
    assert storage.read_json(f"{run}/.lock")["counter"] == 99, "who was taken over leaves the lock alone"


def test_what_cannot_work_is_one_sentence_and_exit_code_five(
    store: Store,
    places: tuple[str, ...],
    cli: Callable[..., Any],
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = cli("report", "s3://key:hidden@bucket/runs/x")
    assert (told.returncode, told.stdout) == (5, "")
    assert told.stderr.startswith("elastrain: error: s3://***@bucket/runs/x")
    assert ": a URL is no place for credentials" in told.stderr
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-and-wrong")
    done = cli("train", SPEC, "--set", places[0])
    assert done.returncode == 5, done.stderr
    said = [done.stderr.splitlines()[-1].removeprefix("elastrain: error: ")]
    for action in (
        lambda: train(workspace, "x", places[2]),
        lambda: pack_dataset("digits", f"{store.url}/elsewhere", PackOptions()),
        lambda: read_report(f"{store.url}/runs/x"),
    ):
        with pytest.raises(StorageError) as caught:
            action()
        said.append(str(caught.value))
    for words in said:
        assert words.startswith("cannot ")
        assert "AWS_SECRET_ACCESS_KEY" in words
        assert "\n" not in words
    assert "hidden" not in done.stderr + done.stdout + "".join(said)
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("store")
def test_what_ray_starts_can_tell_that_it_is_not_where_the_command_began() -> None:
    import ray

    assert s3.RAY_WORKER not in os.environ
    assert ray.get(ray.remote(lambda: s3.RAY_WORKER in os.environ).remote())
