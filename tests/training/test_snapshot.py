"""Snapshots: the bytes of checkpoints, made beside the training, and nothing that they meet touches it."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.harness import Classifier, Recorder, Seat, Setup, make_spec, small_state, train_alone
from torch import Tensor

from elastrain import storage
from elastrain.errors import StorageError
from elastrain.spec.train import CheckpointSpec
from elastrain.training import snapshot
from elastrain.training.checkpoint import Writer, load
from elastrain.training.manifests import adopt, folder, newest_whole, read_manifest, read_verified, unseal
from elastrain.training.reduce import Solo
from elastrain.training.snapshot import Snapshots


class Shelf:
    """A vault in this process; `meets` is raised by what comes, `waits` delays it."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[bytes, dict[str, bytes]]] = {}
        self.meets: Exception | None = None
        self.waits = threading.Event()
        self.waits.set()
        self.is_ready = True

    def ready(self) -> bool:
        """As told."""
        return self.is_ready

    def put(self, step: int, files: Iterable[tuple[str, bytes]], manifest: Callable[[], bytes]) -> None:
        """Keep them."""
        self.waits.wait(10)
        if self.meets is not None:
            raise self.meets
        arrived = dict(files)
        self.held[step] = (manifest(), arrived)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """A vault, and snapshots that are due at once."""
    monkeypatch.setattr(snapshot, "SNAPSHOT_S", 0.0)
    monkeypatch.setattr(snapshot, "STALLS", 0.0)
    return Shelf()


def taken(snapshots: Snapshots, tensors: dict[str, Tensor], step: int) -> None:
    """Take one and wait for it."""
    snapshots.take(tensors, {"step": step}, {"plan": 1})
    assert snapshots._thread is not None
    snapshots._thread.join(10)


def test_a_snapshot_has_the_bytes_of_a_checkpoint(shelf: Shelf, tmp_path: Path) -> None:
    tensors, _ = small_state()
    tensors["model/mask"] = torch.ones(3, dtype=torch.bool)
    writer = Writer(str(tmp_path), CheckpointSpec())
    writer.commit(tensors, {"step": 7}, {"plan": 1})
    writer.wait()
    taken(Snapshots(shelf, settle=lambda: None), tensors, 7)
    manifest, files = shelf.held[7]
    written = read_manifest(str(tmp_path), 7)
    assert {name: read_verified(str(tmp_path), 7, written, name) for name in written["files"]} == files
    assert {name: written[name] for name in ("step", "files", "info")} == {
        name: unseal(manifest, 7)[name] for name in ("step", "files", "info")
    }


def test_a_snapshot_is_a_copy_of_its_moment(shelf: Shelf) -> None:
    shelf.waits.clear()
    tensors, _ = small_state()
    snapshots = Snapshots(shelf, settle=lambda: None)
    snapshots.take(tensors, {"step": 1}, {})
    assert not snapshots.due(), "one is under way"
    tensors["model/weight"].zero_()
    shelf.waits.set()
    assert snapshots._thread is not None
    snapshots._thread.join(10)
    taken(Snapshots(shelf, settle=lambda: None), small_state()[0], 2)
    assert shelf.held[1][1] == shelf.held[2][1] | {"state.json": b'{"step": 1}'}
    assert snapshots.due()


def test_a_snapshot_counts_only_after_what_belongs_to_its_steps_is_safe(shelf: Shelf) -> None:
    def fail() -> None:
        raise OSError("the host is gone")

    snapshots = Snapshots(shelf, settle=fail)
    taken(snapshots, small_state()[0], 1)
    assert not shelf.held
    assert snapshots.events == [("snapshot_lost", {"step": 1, "reason": "the host is gone"})]


def test_a_loss_is_told_once_until_a_snapshot_succeeds_again(shelf: Shelf) -> None:
    snapshots = Snapshots(shelf, settle=lambda: None)
    for step, error in enumerate([OSError("a"), OSError("b"), None, OSError("c")]):
        shelf.meets = error
        taken(snapshots, small_state()[0], step)
    assert [(kind, fields["step"]) for kind, fields in snapshots.events] == [
        ("snapshot_lost", 0),
        ("snapshot", 2),
        ("snapshot_lost", 3),
    ]


def test_a_state_that_is_not_finite_is_not_kept(shelf: Shelf) -> None:
    tensors, _ = small_state()
    tensors["optim/weight"][3] = torch.nan
    snapshots = Snapshots(shelf, settle=lambda: None)
    taken(snapshots, tensors, 1)
    assert not shelf.held
    assert "optim/weight is not finite" in snapshots.events[0][1]["reason"]


def test_none_is_due_before_its_time_without_a_place_or_after_a_commit(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not Snapshots(None, settle=lambda: None).due()
    snapshots = Snapshots(shelf, settle=lambda: None)
    assert snapshots.due()
    shelf.is_ready = False
    assert not snapshots.due()
    shelf.is_ready = True
    monkeypatch.setattr(snapshot, "SNAPSHOT_S", 0.2)
    assert not Snapshots(shelf, settle=lambda: None).due()
    snapshots.postpone()
    assert not snapshots.due()
    time.sleep(0.2)
    assert snapshots.due()
    monkeypatch.setattr(snapshot, "STALLS", 1e9)
    taken(snapshots, small_state()[0], 1)
    time.sleep(0.2)
    assert not snapshots.due(), "a copy that takes long makes the next one come later"


# --- in the loop


def loop_with(shelf: Shelf, tmp_path: Path, **changes: Any) -> Any:
    setup = Setup(spec=make_spec(**changes), kind=Classifier, run_url=str(tmp_path))
    return replace(setup.loop(Seat(lambda _: Solo())), vault=shelf), setup


def test_a_run_goes_on_from_any_snapshot_to_the_same_bits(shelf: Shelf, tmp_path: Path) -> None:
    loop, setup = loop_with(shelf, tmp_path / "snapshots")
    whole = loop.run()
    assert loop.recorder.log.count("settled 8") >= 1, "the end is committed; a snapshot before may settle as late"
    assert shelf.held
    assert shelf.held.keys() <= set(range(1, 8))
    for step, (manifest, files) in shelf.held.items():
        run = str(tmp_path / f"from-{step}")
        adopt(run, step, manifest, lambda name, files=files: [files[name][:100], files[name][100:]])  # type: ignore[misc]
        saved = load(run, newest_whole(run, warn=pytest.fail) or 0)
        assert (saved.numbers["phase"], saved.info["complete"]) == (0, False)
        state = setup.state()
        state.load(saved.tensors, saved.numbers)
        _, again = train_alone(replace(setup, run_url=run), state)
        assert again["weights_sha256"] == whole["weights_sha256"]


def test_a_snapshot_has_the_lines_of_its_steps_settled_before(shelf: Shelf, tmp_path: Path) -> None:
    loop, _ = loop_with(shelf, tmp_path)
    settled: list[int] = []
    recorder: Recorder = loop.recorder
    put = shelf.put

    def noting(step: int, files: Iterable[tuple[str, bytes]], manifest: Callable[[], bytes]) -> None:
        put(step, files, manifest)
        settled.append(len(recorder.lines) - step)

    shelf.put = noting  # type: ignore[method-assign]
    loop.run()
    assert settled
    assert min(settled) >= 0
    assert {fields["step"] for kind, fields in recorder.events if kind == "snapshot"} <= shelf.held.keys()


def test_where_every_step_is_committed_or_a_vault_breaks_training_goes_on_as_without(
    shelf: Shelf, tmp_path: Path
) -> None:
    _, plain = train_alone(Setup(spec=make_spec(), kind=Classifier, run_url=str(tmp_path / "plain")))
    shelf.meets = RuntimeError("no such luck")
    loop, _ = loop_with(shelf, tmp_path / "broken")
    assert loop.run() == plain
    lost = [fields for kind, fields in loop.recorder.events if kind == "snapshot_lost"]
    assert len(lost) == 1


# --- from memory to disk


def held(shelf: Shelf) -> tuple[bytes, dict[str, bytes]]:
    taken(Snapshots(shelf, settle=lambda: None), small_state()[0], 3)
    return shelf.held[3]


def test_what_was_cut_off_before_is_replaced_by_a_snapshot(shelf: Shelf, tmp_path: Path) -> None:
    manifest, files = held(shelf)
    storage.put(storage.join(folder(str(tmp_path), 3), "model.safetensors"), b"half")
    adopt(str(tmp_path), 3, manifest, lambda name: [files[name]])
    assert newest_whole(str(tmp_path), warn=pytest.fail) == 3


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest"])
@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_broken_snapshot_becomes_no_checkpoint(name: str, harm: str, shelf: Shelf, tmp_path: Path) -> None:
    manifest, files = held(shelf)
    parts = {**files, "manifest": manifest}
    data = bytearray(parts[name])
    data[len(data) // 2] ^= 1
    parts[name] = bytes(data) if harm == "flip" else parts[name][:-1]
    with pytest.raises(ValueError, match="corrupted"):
        adopt(str(tmp_path), 3, parts["manifest"], lambda name: [parts[name]])
    assert newest_whole(str(tmp_path), warn=pytest.fail) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_snapshot_of_another_step_is_refused(shelf: Shelf) -> None:
    with pytest.raises(ValueError, match="the manifest of step 3"):
        unseal(held(shelf)[0], 4)


def test_storage_that_cannot_be_written_is_told_as_such(shelf: Shelf, tmp_path: Path) -> None:
    manifest, files = held(shelf)
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(StorageError):
        adopt(str(tmp_path), 3, manifest, lambda name: [files[name]])
