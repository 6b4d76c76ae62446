"""Snapshots on other nodes: what is left of a run when its driver, its workers or the holder's node are lost."""

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.elastic.cell_harness import Nodes, groups, kill, several_nodes, until
from tests.elastic.conftest import SPEC
from tests.elastic.reference import Reference, begin_reference

from elastrain.elastic import holder as holder_module
from elastrain.elastic.holder import NAMESPACE, Holder, HolderVault, end_holder, holder_name, node_for_holder, recall
from elastrain.observe.ledger import Ledger, read_ledger, read_steps
from elastrain.training.manifests import described as description
from elastrain.training.manifests import newest_whole, read_manifests, seal

pytestmark = pytest.mark.timeout(300)


def snapshot_of(step: int, plan: Any = 1) -> tuple[bytes, dict[str, bytes]]:
    """A manifest and its files."""
    files = {"state.json": b"{}" * step, "model.safetensors": bytes(range(256)) * step}
    manifest = seal(step, {name: description(data) for name, data in files.items()}, {"plan": {"of": plan}})
    return manifest, files


def fill(holder: Holder, step: int, **changes: bytes) -> None:
    """Send a snapshot in pieces of 100 bytes; `changes` arrive other than they were sent."""
    manifest, files = snapshot_of(step)
    holder.begin(f"key-{step}", step, "attempt")
    for name, data in (files | changes).items():
        for at in range(0, len(data), 100):
            holder.add(f"key-{step}", name, data[at : at + 100])
    holder.close(f"key-{step}", manifest)


# --- the holder by itself


def test_a_holder_gives_back_what_it_was_sent() -> None:
    holder = Holder()
    fill(holder, 3)
    ((step, attempt, manifest),) = holder.held()
    assert (step, attempt, manifest) == (3, "attempt", snapshot_of(3)[0])
    for name, data in snapshot_of(3)[1].items():
        pieces = [holder.read(manifest, name, number) for number in range(-(-len(data) // 100) + 1)]
        assert pieces[-1] is None
        assert b"".join(piece for piece in pieces if piece is not None) == data


def test_never_more_than_two_are_in_memory_and_the_newest_come_first() -> None:
    holder = Holder()
    for step in (1, 2, 3):
        fill(holder, step)
    assert [step for step, _, _ in holder.held()] == [3, 2]
    holder.begin("key", 4, "attempt")
    assert [step for step, _, _ in holder.held()] == [3], "the one that comes has the place of the oldest"
    holder.begin("another", 5, "attempt")
    with pytest.raises(KeyError):
        holder.add("key", "state.json", b"")
    assert len(holder._coming) == 1


def test_what_did_not_arrive_whole_does_not_count() -> None:
    holder = Holder()
    fill(holder, 1)
    with pytest.raises(ValueError, match="not all"):
        fill(holder, 2, **{"state.json": b"{"})
    holder.begin("key", 3, "attempt")
    with pytest.raises(ValueError, match="corrupted"):
        holder.close("key", b"half")
    assert [step for step, _, _ in holder.held()] == [1]


# --- on a cluster


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with several_nodes() as made:
        yield made


def found(run: str) -> Any:
    """The holder of a run, None without one."""
    import ray

    try:
        return ray.get_actor(holder_name(run), namespace=NAMESPACE)
    except ValueError:
        return None


def asked(actor: Any, what: Callable[[Any], Any]) -> Any:
    """What an actor's process has to say."""
    import ray

    return ray.get(actor.__ray_call__.remote(what))


class Host:
    """As much of a host as a vault asks: who is where."""

    def __init__(self, busy: list[str]) -> None:
        import ray

        self._answer = ray.put((ray.get_runtime_context().get_node_id(), busy))
        self.nodes = self

    def remote(self) -> Any:
        """Answer."""
        return self._answer


@pytest.fixture
def vault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HolderVault]:
    """A vault of an attempt that has left a ledger."""
    monkeypatch.setattr(holder_module, "actor_id", lambda _: "attempt")
    monkeypatch.setattr(holder_module, "LOOK_S", 0.1)
    ledger = Ledger(str(tmp_path), 0)
    ledger.event("start", id="attempt")
    ledger.flush()
    yield HolderVault(Host([]), str(tmp_path))
    end_holder(str(tmp_path))
    assert not found(str(tmp_path))


def keep(vault: HolderVault, step: int, **changes: Any) -> None:
    manifest, files = snapshot_of(step, **changes)
    until(vault.ready)
    vault.put(step, iter(files.items()), lambda: manifest)


@pytest.mark.ray
def test_a_cluster_of_one_node_has_no_holder(nodes: Nodes, vault: HolderVault, tmp_path: Path) -> None:
    assert not nodes.ids
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert not vault.ready()
        time.sleep(0.05)
    assert not found(str(tmp_path))


@pytest.fixture(scope="module")
def three(nodes: Nodes) -> Nodes:
    """Two nodes for a worker each, and one that no worker fits on."""
    for cpus in (1, 1, 0):
        nodes.add(cpus)
    return nodes


@pytest.mark.ray
def test_a_holder_is_on_another_node_than_the_driver_and_rather_where_no_worker_is(three: Nodes) -> None:
    import ray

    driver = ray.get_runtime_context().get_node_id()
    for free in three.ids:
        assert node_for_holder(driver, [node for node in three.ids if node != free]) == free
    assert node_for_holder(driver, three.ids) in three.ids


@pytest.mark.ray
def test_the_newest_snapshot_becomes_a_checkpoint_and_the_holder_ends(
    three: Nodes, vault: HolderVault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del three
    monkeypatch.setattr(holder_module, "PIECE", 100)
    run, warnings = str(tmp_path), list[str]()
    for step in (3, 5):
        keep(vault, step)
    recall(run, {"of": 1}, warn=warnings.append)
    assert newest_whole(run, warn=pytest.fail) == 5
    assert warnings == ["going on from a snapshot of step 5"]
    assert not found(run)


@pytest.mark.ray
@pytest.mark.parametrize("why", ["older", "other plan", "other attempt"])
def test_a_snapshot_that_is_not_the_runs_future_is_not_used(
    why: str, three: Nodes, vault: HolderVault, tmp_path: Path
) -> None:
    del three
    run = str(tmp_path)
    if why == "older":
        keep(vault, 5)
        recall(run, {"of": 1}, warn=lambda _: None)
        before = newest_whole(run, warn=pytest.fail)
        vault._holder = None
        keep(vault, 4)
    else:
        before = None
        keep(vault, 5, plan=2 if why == "other plan" else 1)
    if why == "other attempt":
        ledger = Ledger(run, 1)
        ledger.event("start", id="later")
        ledger.flush()
    recall(run, {"of": 1}, warn=pytest.fail)
    assert newest_whole(run, warn=pytest.fail) == before
    assert not found(run)


@pytest.mark.ray
def test_a_holder_that_stands_still_is_given_up_and_another_one_made(
    three: Nodes, vault: HolderVault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    del three
    keep(vault, 1)
    first = found(str(tmp_path))
    pid = asked(first, lambda _: os.getpid())
    monkeypatch.setattr(holder_module, "ANSWER_S", 0.5)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ray.exceptions.GetTimeoutError):
            keep(vault, 2)
        monkeypatch.setattr(holder_module, "ANSWER_S", 20.0)
        keep(vault, 3)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert found(str(tmp_path)) != first
    assert held_by(found(str(tmp_path))) == [3]


@pytest.mark.ray
def test_a_vault_that_is_closed_makes_no_holder(three: Nodes, vault: HolderVault, tmp_path: Path) -> None:
    del three
    vault.close()
    assert not vault.ready()
    until(lambda: not vault._looks)
    assert not vault.ready()
    assert not found(str(tmp_path))


@pytest.mark.ray
@pytest.mark.usefixtures("three")
def test_a_holder_to_which_nobody_speaks_ends_itself() -> None:
    import ray

    remote: Any = ray.remote(Holder)
    name, spoken = holder_name("idle"), time.monotonic()
    made = remote.options(name=name, namespace=NAMESPACE, lifetime="detached", num_cpus=0).remote(1.0)
    while time.monotonic() < spoken + 3:
        ray.get(made.held.remote())
        time.sleep(0.2)
    until(lambda: not found("idle"))


# --- whole runs

STEPS = 400  # of half a second each until it is let go: three minutes of steps, for what takes half a minute of them


class Story:
    """A run of a task that takes its time until it is let go, by the command line on the cluster of the test."""

    def __init__(self, workspace: Path, task: Path, start: Callable[..., Any], address: str) -> None:
        self._fast = task.with_name("fast")
        self.run = workspace / "runs" / "story"
        self._start = start
        fixed = ("precision=fp32", "consistency=bitwise", "audit=true", f"budget={{steps: {STEPS}}}")
        self.settings = (*fixed, "eval.every_steps=5000", "checkpoint.every_steps=5000")
        slowly = (f"task={task}:Slow", "task_args={pause: 0.5}", "workers={min: 2, max: 2}", "name=story")
        changes = [("--set", text) for text in (*self.settings, *slowly)]
        self._command = ("train", str(SPEC), *itertools.chain(*changes), "--json", "--address", address)

    def begin(self) -> Any:
        """Start the command."""
        return self._start(*self._command)

    def let_go(self) -> None:
        """Sleep no more."""
        self._fast.touch()

    def events(self, kind: str, *, attempt: int) -> list[dict[str, Any]]:
        """What the ledger has of an attempt."""
        return [r for r in read_ledger(str(self.run)) if r["kind"] == kind and r["attempt"] == attempt]

    def snapshots(self, attempt: int) -> list[int]:
        """The steps of the snapshots of an attempt."""
        return [record["step"] for record in self.events("snapshot", attempt=attempt)]

    def began(self, attempt: int) -> int:
        """The step at which an attempt began."""
        return int(until(lambda: self.events("start", attempt=attempt), timeout=300)[0]["step"])

    def workers(self, attempt: int) -> list[int]:
        """The processes of an attempt's workers."""
        return [int(r["worker"].rsplit("-", 1)[1]) for r in self.events("seconds", attempt=attempt)]


def flip(holder: Any) -> None:
    """Flip a bit in the newest snapshot that a holder has."""

    def change(holder: Any) -> None:
        pieces = holder._whole[-1].files["model.safetensors"]
        data = bytearray(pieces[0])
        data[-5] ^= 1
        pieces[0] = bytes(data)

    asked(holder, change)


def node_of(holder: Any) -> str:
    def look(_: Any) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    return str(asked(holder, look))


def held_by(holder: Any) -> list[int]:
    """The steps of the snapshots that a holder has."""
    import ray

    return [step for step, _, _ in ray.get(holder.held.remote())]


@pytest.fixture
def story(three: Nodes, workspace: Path, slow_task: Path, start: Callable[..., Any]) -> Story:
    """The run that the test is about; it has not begun."""
    return Story(workspace, slow_task, start, three.cluster.address)


@pytest.fixture
def undisturbed(story: Story, workspace: Path) -> Iterator[Reference]:
    """The same run with no sleep, no losses and one worker; it is computed meanwhile."""
    reference = begin_reference(SPEC, [*story.settings, "data.slots=2", "workers.max=1"], cwd=workspace)
    yield reference
    reference.process.kill()
    reference.process.communicate()


@pytest.mark.ray
@pytest.mark.timeout(900)  # a run that is started four times; 70 s where nothing else runs
def test_a_run_goes_on_from_snapshots_whatever_is_lost_and_comes_out_the_same(
    three: Nodes, story: Story, undisturbed: Reference
) -> None:
    """Driver, then all workers, then the holder's node; no checkpoint is ever committed by a worker before the end."""
    run = str(story.run)
    driver = story.begin()
    until(lambda: len(story.snapshots(0)) >= 2, timeout=300)
    assert node_of(found(run)) == three.ids[-1], "where neither driver nor workers are"
    driver.kill()
    driver.communicate()
    assert read_manifests(run) == {}, "without snapshots it would begin at 0"
    last, before = held_by(found(run))
    flip(found(run))

    driver = story.begin()
    assert story.began(1) == before < last, "the broken one is passed over"
    assert list(read_manifests(run)) == [before]
    until(lambda: story.snapshots(1), timeout=300)
    kill(*story.workers(1))
    assert story.began(2) >= story.snapshots(1)[-1] > before

    until(lambda: story.snapshots(2), timeout=300)
    assert node_of(found(run)) == three.ids[-1]
    three.lose(three.ids[-1])
    lost = until(lambda: story.events("snapshot_lost", attempt=2), timeout=300)
    until(lambda: story.snapshots(2)[-1] > lost[0]["step"], timeout=300)
    assert node_of(found(run)) in three.ids, "with a worker, where there is no other"

    story.let_go()
    out, said = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    assert "is passed over" in said
    check_equal(json.loads(out.splitlines()[-1]), undisturbed)
    check_nothing_is_left(run)


def check_equal(result: dict[str, Any], undisturbed: Reference) -> None:
    """The same weights, and every sample once an epoch, whatever was redone."""
    assert (result["step"], result["restarts"]) == (STEPS, 1)
    assert result["resumed_from"] > 0
    assert result["weights_sha256"] == undisturbed.weights_sha256()
    audit = read_steps(f"{result['run']}/audit")
    epoch, row = (np.asarray(audit[name]) for name in ("epoch", "row"))
    for number in range(STEPS // 23):
        assert sorted(row[epoch == number]) == list(range(1442))


def check_nothing_is_left(run: str) -> None:
    import ray

    from elastrain.observe.report import read_report

    kinds = [event["kind"] for event in read_report(run)["events"]]
    assert kinds.count("snapshot_lost") == 1
    assert "snapshot" not in kinds
    assert not [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    assert not groups()
