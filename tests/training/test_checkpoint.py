"""Checkpoints: bit-exact, whole or not there, and the run that goes on from one is the run that was never cut."""

import base64
import errno
import hashlib
import json
import random
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.harness import (
    Adversarial,
    Classifier,
    Convolution,
    Processes,
    Setup,
    Tokens,
    commit_without_room,
    die_in_a_commit,
    losses_of,
    make_spec,
    small_state,
    train_alone,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from elastrain import conditional, storage
from elastrain.errors import ConflictError, DivergedError, SpecError, StorageError
from elastrain.spec.train import OPTIMIZERS, CheckpointSpec
from elastrain.training import checkpoint
from elastrain.training.checkpoint import Writer, load, read_weights
from elastrain.training.export import export_weights
from elastrain.training.loop import Loop
from elastrain.training.manifests import folder, newest_whole, read_manifests, retain, write_manifest
from elastrain.training.state import TrainState, digest
from elastrain.training.task import Batch, Losses


class Halves(Optimizer):
    """Momentum kept in bfloat16, with a counter of whole numbers: torch would load both as the weights' type."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(
                        count=torch.zeros((), dtype=torch.int64),
                        mean=torch.zeros_like(parameter, dtype=torch.bfloat16),
                        last=0.5,
                        deep={"er": torch.ones(3), "number": 1},
                    )
                state["count"] += 1
                state["last"] *= 0.9
                state["mean"].mul_(0.9).add_(parameter.grad)
                parameter.data.sub_(state["mean"].float(), alpha=group["lr"])


def trained(setup: Setup, run: Path, **changes: Any) -> tuple[Setup, Loop, dict[str, Any]]:
    """Train, with a checkpoint at each step."""
    every = {"every_steps": 1, "keep": 100, **changes}
    spec = setup.spec.model_copy(update={"checkpoint": CheckpointSpec.model_validate(every)})
    kept = Setup(spec=spec, kind=setup.kind, run_url=str(run), eval_rows=setup.eval_rows)
    return kept, *train_alone(kept)


def resumed(setup: Setup, step: int) -> TrainState:
    """A new state at a stored step."""
    saved, state = load(setup.run_url, step), setup.state()
    state.load(saved.tensors, saved.numbers)
    return state


def files_in(run: str, step: int) -> dict[str, Path]:
    """The files in the folder of a step, by their names without what tells writers apart."""
    return {path.name.rpartition("-")[2]: path for path in Path(folder(run, step)).iterdir()}


def bits(state: TrainState) -> dict[str, str]:
    """A digest of each tensor."""
    return {name: digest({name: tensor}) for name, tensor in state.tensors().items()}


SETUPS = {
    **{name: Setup(spec=make_spec(ema=0.9, **{"optimizer.name": name}), kind=Classifier) for name in OPTIMIZERS[:3]},
    **{name: Setup(spec=make_spec(**{"optimizer.name": name}), kind=Classifier) for name in ("adam", "adamw")},
    "full_batch": Setup(
        spec=make_spec(**{"optimizer.name": "full_batch", "data.global_batch": "all"}), kind=Classifier
    ),
    "custom": Setup(spec=make_spec(**{"optimizer.name": "tests.training.test_checkpoint:Halves"}), kind=Classifier),
    **{
        name.lower(): Setup(
            spec=make_spec(**{"optimizer.name": f"tests.training.test_state:{name}", "optimizer.lr": 0.01}),
            kind=Classifier,
        )
        for name in ("Adaptive", "Preconditioned")
    },
    "fp16": Setup(spec=make_spec(precision="fp16", task_args={"dropout": 0.2}), kind=Classifier),
    "fp64": Setup(spec=make_spec(precision="fp64", schedule={"name": "cosine"}), kind=Classifier),
    "convolution": Setup(spec=make_spec(task_args={"channels_last": True}), kind=Convolution),
    "adversarial": Setup(spec=make_spec(ema=0.9), kind=Adversarial),
    "tied": Setup(spec=make_spec(ema=0.9), kind=Tokens),
}


@pytest.mark.parametrize("name", SETUPS)
def test_a_state_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    setup, loop, _ = trained(SETUPS[name], tmp_path, every_steps=100)
    state = resumed(setup, setup.steps)
    assert bits(state) == bits(loop.state)
    assert state.numbers() == loop.state.numbers()
    for one, other in zip(state.phases, loop.state.phases, strict=True):
        for mine, theirs in zip(one.gradients.parameters, other.gradients.parameters, strict=True):
            held, expected = one.optimizer.state[mine], other.optimizer.state[theirs]
            assert {k: v.stride() for k, v in held.items() if isinstance(v, Tensor)} == {
                k: v.stride() for k, v in expected.items() if isinstance(v, Tensor)
            }
    assert sorted(files_in(str(tmp_path), 8)) == sorted(
        ["manifest.json", "state.json", "model.safetensors"]
        + ["average.safetensors"] * bool(setup.spec.ema)
        + ["optimizer.safetensors"] * (name not in ("sgd", "full_batch"))
    ), "safetensors and JSON, nothing that can hold code"


@pytest.mark.parametrize("name", sorted(SETUPS.keys() - {"sgd", "nesterov", "adam", "adamw", "full_batch"}))
def test_a_run_resumed_at_any_step_is_the_run_that_was_not_cut(name: str, tmp_path: Path) -> None:
    setup, loop, result = trained(SETUPS[name], tmp_path)
    for step in range(1, setup.steps):
        later, found = train_alone(
            Setup(spec=setup.spec, kind=setup.kind, run_url=str(tmp_path / "later")), resumed(setup, step)
        )
        assert found["weights_sha256"] == result["weights_sha256"]
        assert bits(later.state) == bits(loop.state)
        assert losses_of(later) == losses_of(loop)[step:]
        assert found["samples"] == result["samples"]


def test_a_loaded_state_shares_no_memory(tmp_path: Path) -> None:
    setup, loop, _ = trained(SETUPS["adamw"], tmp_path, every_steps=100)
    before, other = bits(loop.state), setup.state()
    other.load(loop.state.tensors(), loop.state.numbers())
    for tensor in other.tensors().values():
        tensor.zero_()
    assert bits(loop.state) == before


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    setup, _, _ = trained(SETUPS["adamw"], tmp_path, every_steps=100)
    with pytest.raises(ConflictError, match="its model is not the one"):
        resumed(Setup(spec=setup.spec, kind=Convolution, run_url=setup.run_url), setup.steps)


# --- broken checkpoints


def test_a_flipped_bit_is_refused_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    setup, _, _ = trained(SETUPS["adversarial"], tmp_path)
    run, last = setup.run_url, setup.steps
    files = sorted(files_in(run, last).values())
    assert len(files) == 5
    rng = random.Random(0)  # noqa: S311 -- positions of a test
    for path in files:
        data = path.read_bytes()
        for position in [rng.randrange(8 * len(data)) for _ in range(40)]:
            flipped = bytearray(data)
            flipped[position // 8] ^= 1 << position % 8
            path.write_bytes(flipped)
            warnings: list[str] = []
            assert newest_whole(run, warn=warnings.append) == last - 1
            assert len(warnings) == 1
            assert str(path) in warnings[0]
            with pytest.raises(StorageError, match=path.name) as caught:
                load(run, last)
            assert str(path) in str(caught.value)
        path.write_bytes(data)
        assert newest_whole(run, warn=warnings.append) == last


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "manifest.json"])
@pytest.mark.parametrize("change", ["removed", "truncated", "emptied", "longer"])
def test_a_damaged_file_is_refused(name: str, change: str, tmp_path: Path) -> None:
    setup, _, _ = trained(SETUPS["adamw"], tmp_path)
    path = files_in(setup.run_url, 8)[name]
    data = path.read_bytes()
    if change == "removed":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[:-1], "emptied": b"", "longer": data + b"\n"}[change])
    warnings: list[str] = []
    assert newest_whole(setup.run_url, warn=warnings.append) == 7
    no_checkpoint = name == "manifest.json" and change == "removed"  # cut off while it was written: nothing to warn of
    assert len(warnings) == (0 if no_checkpoint else 1)
    with pytest.raises(StorageError, match="no checkpoint" if no_checkpoint else name):
        load(setup.run_url, 8)


def test_a_renamed_checkpoint_is_none(tmp_path: Path) -> None:
    setup, _, _ = trained(SETUPS["adamw"], tmp_path)
    Path(folder(setup.run_url, 8)).rename(folder(setup.run_url, 9))
    (tmp_path / "checkpoints" / "step-new").mkdir()
    warnings: list[str] = []
    assert newest_whole(setup.run_url, warn=warnings.append) == 7
    assert "the manifest of step 8" in warnings[0]
    assert list(read_manifests(setup.run_url)) == list(range(1, 8))


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest_whole(str(tmp_path), warn=pytest.fail) is None
    assert read_manifests(str(tmp_path / "nowhere")) == {}


def test_a_writer_that_is_killed_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    runs = [str(tmp_path / str(file)) for file in range(4)]
    with Processes() as processes:
        started = [processes.start(die_in_a_commit, run, file) for file, run in enumerate(runs)]
        for process in started:
            process.join(20)
            assert process.exitcode == -9
    for run in runs:
        assert Path(folder(run, 2)).exists(), "it died too early"
        assert newest_whole(run, warn=pytest.fail) == 1
        assert torch.equal(load(run, 1).tensors["model/weight"], small_state()[0]["model/weight"])
        writer = Writer(run, CheckpointSpec(keep=1))
        writer.commit(small_state()[0], {"step": 2}, {})
        writer.wait()
        assert newest_whole(run, warn=pytest.fail) == 2
        assert torch.equal(load(run, 2).tensors["model/weight"], small_state()[0]["model/weight"])
        writer.commit(small_state()[0], {"step": 3}, {})
        writer.wait()
        assert not Path(folder(run, 2)).exists(), "what the killed one left goes with the step"
        assert not [path for path in Path(run).rglob("*") if path.name.endswith(".tmp")]


# --- no room


def check_full(run: str, kind: str, text: str) -> None:
    """The error is one sentence with the place, and the checkpoint before is all that is left."""
    assert kind == "StorageError"
    assert folder(run, 2) in text
    assert newest_whole(run, warn=pytest.fail) == 1
    assert [path.name for path in Path(run, "checkpoints").iterdir()] == ["step-00000001"]


def test_no_room_is_a_storage_error_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    with Processes() as processes:
        processes.start(commit_without_room, str(tmp_path))
        ((kind, text),) = processes.results()
    check_full(str(tmp_path), kind, text)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    mount = ["/usr/bin/mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if not Path(mount[0]).exists() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield tmp_path
    subprocess.run(["/usr/bin/umount", tmp_path], check=True)


def test_a_full_disk_is_a_storage_error_and_the_checkpoint_before_stays(small_disk: Path) -> None:
    run = str(small_disk / "run")
    writer = Writer(run, CheckpointSpec())
    writer.commit(*small_state(), {})
    writer.commit(small_state(100_000)[0], {"step": 2}, {})
    with pytest.raises(StorageError) as caught:
        writer.wait()
    check_full(run, "StorageError", str(caught.value))
    writer.commit(small_state()[0], {"step": 3}, {})  # there is room again
    writer.wait()
    assert newest_whole(run, warn=pytest.fail) == 3


@pytest.mark.parametrize("place", ["_text", "_save", "write_manifest", "_placed"])
def test_a_write_that_fails_anywhere_leaves_nothing(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(str(tmp_path), CheckpointSpec())
    writer.commit(*small_state(), {})
    writer.wait()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, place, full)
    writer.commit(small_state()[0], {"step": 2}, {})
    with pytest.raises(StorageError, match=r"step 2|step-00000002"):
        writer.wait()
    assert newest_whole(str(tmp_path), warn=pytest.fail) == 1
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    writer.wait()  # an error is told once


def test_what_belongs_to_a_checkpoint_is_safe_before_it_exists(tmp_path: Path) -> None:
    found = []
    writer = Writer(str(tmp_path), CheckpointSpec(), settle=lambda: found.append(list(read_manifests(str(tmp_path)))))
    for step in (1, 2):
        writer.commit(small_state()[0], {"step": step}, {})
    writer.wait()
    assert found == [[], [1]]

    def fail() -> None:
        raise OSError("the host is gone")

    writer = Writer(str(tmp_path), CheckpointSpec(), settle=fail)
    writer.commit(small_state()[0], {"step": 3}, {})
    with pytest.raises(StorageError, match="the host is gone"):
        writer.wait()
    assert newest_whole(str(tmp_path), warn=pytest.fail) == 2


STALE = ("before it writes", "while it writes", "before it asks", "after it has asked", "before it fails")


class Sleeper:
    """Stands still at a place of a commit, meanwhile another worker commits the same step; then it goes on."""

    def __init__(self, run: str, place: str, spec: CheckpointSpec, patch: pytest.MonkeyPatch) -> None:
        self._run, self._place, self._spec, self.slept = run, place, spec, False
        self.theirs = {name: tensor + 1 for name, tensor in small_state()[0].items()}
        self._placed, check = checkpoint._placed, checkpoint.check_finite
        put, create = storage.put, conditional.create
        patch.setattr(checkpoint, "_placed", self._third)
        patch.setattr(checkpoint, "check_finite", self._before(check, "before it writes"))
        patch.setattr(storage, "put", self._before(put, "after it has asked"))
        patch.setattr(conditional, "create", self._before(create, "after it has asked"))

    def _before(self, call: Callable[..., Any], place: str) -> Callable[..., Any]:
        def done(*given: Any) -> Any:
            self._at(place)
            return call(*given)

        return done

    def _at(self, place: str) -> None:
        if place != self._place or self.slept:
            return
        self.slept = True
        other = Writer(self._run, self._spec)
        other.commit(self.theirs, {"step": 1}, {})
        other.wait()
        if place == "before it fails":
            raise StorageError("no room")

    def _third(self, url: str, write: Any) -> dict[str, Any]:
        if url.endswith("optimizer.safetensors"):
            self._at("while it writes")
            self._at("before it fails")
        return self._placed(url, write)

    def settle(self) -> None:
        """Ask whether its checkpoint may exist."""
        self._at("before it asks")
        if self.slept:
            raise ConflictError("given up")


@pytest.mark.slow
@pytest.mark.parametrize("place", STALE)
def test_who_was_given_up_and_wakes_harms_no_checkpoint_on_s3(
    place: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{s3_bucket}/woken-{place.replace(' ', '-')}"
    sleeper = Sleeper(run, place, CheckpointSpec(), monkeypatch)
    writer = Writer(run, CheckpointSpec(), settle=sleeper.settle)
    writer.commit(*small_state(), {})
    with pytest.raises((ConflictError, StorageError)):
        writer.wait()
    assert sleeper.slept
    assert newest_whole(run, warn=pytest.fail) == 1
    assert torch.equal(load(run, 1).tensors["model/weight"], sleeper.theirs["model/weight"])
    assert len(storage.list_files(folder(run, 1))) == 5, "and nothing of the other is left"


@pytest.mark.parametrize("encrypt", [None, "main"])
@pytest.mark.parametrize("place", STALE)
def test_who_was_given_up_and_wakes_harms_no_checkpoint_of_the_one_that_leads_now(
    place: str, encrypt: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", base64.b64encode(bytes(32)).decode())
    spec = CheckpointSpec(encrypt=encrypt)
    sleeper = Sleeper(str(tmp_path), place, spec, monkeypatch)
    writer = Writer(str(tmp_path), spec, settle=sleeper.settle)
    writer.commit(*small_state(), {})
    with pytest.raises((ConflictError, StorageError)):
        writer.wait()
    assert sleeper.slept
    assert newest_whole(str(tmp_path), warn=pytest.fail) == 1
    assert torch.equal(load(str(tmp_path), 1).tensors["model/weight"], sleeper.theirs["model/weight"])
    assert len(list(Path(folder(str(tmp_path), 1)).iterdir())) == 5, "and nothing of the other is left"


# --- what is not worth keeping


def test_a_state_that_is_not_finite_is_not_committed(tmp_path: Path) -> None:
    writer = Writer(str(tmp_path), CheckpointSpec())
    writer.commit(*small_state(), {})
    for number, (name, value) in enumerate([("model/weight", float("nan")), ("optim/weight", float("inf"))]):
        tensors, _ = small_state()
        tensors[name][7] = value
        writer.commit(tensors, {"step": 2 + number}, {})
        with pytest.raises(DivergedError, match=f"step {2 + number}: {name}"):
            writer.wait()
    tensors, _ = small_state()
    tensors["model/mask"] = torch.tensor([0.0, -torch.inf])
    writer.commit(tensors, {"step": 5}, {}, buffers=frozenset(["model/mask"]))
    writer.wait()
    tensors["model/mask"][0] = torch.nan
    writer.commit(tensors, {"step": 6}, {}, buffers=frozenset(["model/mask"]))
    with pytest.raises(DivergedError, match="model/mask"):
        writer.wait()
    assert list(read_manifests(str(tmp_path))) == [1, 5]


def test_training_that_diverges_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Diverging(Classifier):
        calls = 0

        def losses(self, model: nn.Module, batch: Batch) -> Losses:
            type(self).calls += 1
            if self.calls > 4 * 5:
                batch["x"].fill_(torch.nan)
            return super().losses(model, batch)

    with pytest.raises(DivergedError, match="step 5: the loss is nan"):
        trained(Setup(spec=make_spec(), kind=Diverging), tmp_path)
    assert newest_whole(str(tmp_path), warn=pytest.fail) == 5


def test_a_commit_under_way_is_finished_when_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Classifier):
        calls = 0

        def losses(self, model: nn.Module, batch: Batch) -> Losses:
            type(self).calls += 1
            if self.calls > 4 * 3:
                raise ValueError("no more")
            return super().losses(model, batch)

    save = checkpoint._save

    def slowly(*arguments: Any) -> None:
        time.sleep(0.1)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "_save", slowly)
    with pytest.raises(SpecError, match="no more"):
        trained(Setup(spec=make_spec(), kind=Failing), tmp_path)
    assert newest_whole(str(tmp_path), warn=pytest.fail) == 3


# --- retention


def kept(run: Path, values: list[float | None], *, newest: int | None = None, **spec: Any) -> list[int]:
    """Which steps stay of checkpoints with these metrics at steps 1, 2 and so on."""
    for step, value in enumerate(values, start=1):
        storage.put(storage.join(folder(str(run), step), "state.json"), b"{}")
        broken = newest is not None and step > newest
        files = {"state.json": {"bytes": 9, "sha256": ""}} if broken else {}
        write_manifest(str(run), step, files, {"metrics": {} if value is None else {"val_loss": value}})
    retain(str(run), CheckpointSpec.model_validate(spec), newest=newest or len(values))
    assert sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir()) == list(read_manifests(str(run)))
    return list(read_manifests(str(run)))


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    nan = float("nan")
    assert kept(tmp_path / "1", [3, 1, 2, 4, 5], keep=2) == [2, 4, 5]
    assert kept(tmp_path / "2", [3, 1, 2, 9, 5], keep=1, goal="max") == [4, 5]
    assert kept(tmp_path / "3", [3, 1, 1, 4, 5], keep=1) == [3, 5], "of equals the newest"
    assert kept(tmp_path / "4", [3, 1, 2, 4, 5], keep=2, best=None) == [4, 5]
    assert kept(tmp_path / "5", [3, 1, 2, 4, 5], keep=2, best="accuracy") == [4, 5]
    assert kept(tmp_path / "6", [3, None, 2, nan, None], keep=1) == [3, 5]
    assert kept(tmp_path / "7", [2, 1], keep=5) == [1, 2]


def test_retention_removes_what_a_run_went_back_from(tmp_path: Path) -> None:
    """Steps 4 and 5 were broken, the run went on from 2 and commits 3 again: that one must stay."""
    assert kept(tmp_path, [1, 2, 3, 4, 5], newest=3, keep=1, best=None) == [3]


def test_a_worker_that_has_ceased_to_lead_removes_nothing_of_the_one_that_leads_now(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        write_manifest(str(tmp_path), step, {}, {})
    retain(str(tmp_path), CheckpointSpec(keep=1), newest=3)
    assert list(read_manifests(str(tmp_path))) == [1, 2, 3, 4, 5]


def test_retention_removes_half_written_folders_once_they_are_old(tmp_path: Path) -> None:
    for step in (2, 4, 9):
        storage.put(storage.join(folder(str(tmp_path), step), "state.json"), b"{}")
    for step in (3, 5, 6):
        write_manifest(str(tmp_path), step, {}, {})
    retain(str(tmp_path), CheckpointSpec(keep=2), newest=6)
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["5", "6", "9"]


def test_a_run_keeps_as_many_as_its_spec_says(tmp_path: Path) -> None:
    setup = Setup(spec=make_spec(**{"eval.every_steps": 1}), kind=Classifier, eval_rows=20)
    kept_setup, loop, _ = trained(setup, tmp_path, keep=2)
    manifests = read_manifests(kept_setup.run_url)
    assert list(manifests)[-2:] == [7, 8]
    values = {e["step"]: e["metrics"]["val_loss"] for kind, e in loop.recorder.events if kind == "eval"}  # type: ignore[attr-defined]
    assert min(values, key=values.__getitem__) in manifests
    assert len(manifests) <= 3
    assert manifests[8]["info"]["complete"]
    assert manifests[8]["info"]["metrics"]["val_loss"] == values[8]


@pytest.mark.parametrize(("best", "hint"), [("acuracy", "; did you mean 'accuracy'?"), ("f1", "")])
def test_a_best_that_is_no_metric_is_refused_at_the_first_evaluation(best: str, hint: str, tmp_path: Path) -> None:
    setup = Setup(spec=make_spec(**{"eval.every_steps": 3}), kind=Classifier, eval_rows=20)
    with pytest.raises(SpecError) as caught:
        trained(setup, tmp_path, best=best)
    assert str(caught.value) == f"checkpoint.best: the metrics are val_loss, accuracy, not {best!r}{hint}"
    assert newest_whole(str(tmp_path), warn=pytest.fail) == 2, "what was trained up to there is not lost"
    assert trained(setup, tmp_path / "other", best="accuracy")[2]["step"] == 8
    assert trained(setup, tmp_path / "none", best=None)[2]["step"] == 8


def test_a_run_without_evaluation_has_no_best(tmp_path: Path) -> None:
    setup = Setup(spec=make_spec(), kind=Classifier)
    assert trained(setup, tmp_path, best="accuracy")[2]["step"] == 8


# --- export


def test_exports_have_the_digest_of_the_run(tmp_path: Path) -> None:
    setup, _, result = trained(SETUPS["tied"], tmp_path / "run")
    out = tmp_path / "model.safetensors"
    found = export_weights(setup.run_url, str(out), step=None, weights="model")
    (other := tmp_path / "other").touch()
    for file in (out, *files_in(setup.run_url, 8).values()):
        assert file.stat().st_mode == other.stat().st_mode, "who may read other files may read this one"
    assert found == {"file": str(out), "step": 8, "weights_sha256": result["weights_sha256"]}
    tensors = load_file(str(out))
    assert digest(tensors) == result["weights_sha256"]
    assert torch.equal(tensors["tokens.weight"], tensors["head.weight"])
    assert set(read_weights(out)) == set(tensors)


def test_averages_of_tied_weights_are_exported_under_each_name(tmp_path: Path) -> None:
    setup, loop, result = trained(SETUPS["tied"], tmp_path / "run")
    out = tmp_path / "ema.safetensors"
    found = export_weights(setup.run_url, str(out), step=8, weights="ema")
    tensors = load_file(str(out))
    assert digest(tensors) == found["weights_sha256"] != result["weights_sha256"]
    assert torch.equal(tensors["tokens.weight"], loop.state.ema["tokens.weight"])
    assert torch.equal(tensors["tokens.weight"], tensors["head.weight"])
    fresh = setup.state().model
    fresh.load_state_dict(tensors)
    assert torch.equal(fresh.get_parameter("head.weight"), loop.state.ema["tokens.weight"])


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    setup, _, _ = trained(SETUPS["adamw"], tmp_path / "run")
    out = str(tmp_path / "out.safetensors")
    with pytest.raises(SpecError, match="set ema"):
        export_weights(setup.run_url, out, step=None, weights="ema")
    with pytest.raises(SpecError, match="choose model or ema"):
        export_weights(setup.run_url, out, step=None, weights="all")
    with pytest.raises(SpecError, match="no run with a whole checkpoint"):
        export_weights(str(tmp_path / "nowhere"), out, step=None, weights="model")
    with pytest.raises(StorageError, match="no checkpoint"):
        export_weights(setup.run_url, out, step=99, weights="model")
    (tmp_path / "broken").write_bytes(b"rubbish")
    with pytest.raises(StorageError, match="not a readable safetensors file"):
        read_weights(tmp_path / "broken")
    assert not Path(out).exists()


def test_the_digest_is_over_names_types_shapes_and_bytes() -> None:
    tensors = {
        "a": torch.tensor([1.0, 2.0]),
        "b": torch.tensor([[True], [False]]),
        "c": torch.tensor(3, dtype=torch.bfloat16),
    }
    assert digest(tensors) == digest(dict(reversed(tensors.items())))
    assert digest(tensors) != digest({**tensors, "a": torch.tensor([[1.0, 2.0]])})
    assert digest(tensors) != digest({**tensors, "a": torch.tensor([1.0, 2.0], dtype=torch.float64)})
    assert digest(tensors) != digest({"d": tensors["a"], "b": tensors["b"], "c": tensors["c"]})
    assert digest({"a": torch.ones(2, 3).t()}) == digest({"a": torch.ones(3, 2)})
    by_hand = hashlib.sha256(
        b"a\0float32\0[2]\0\0\0\x80\x3f\0\0\0\x40" + b"b\0bool\0[2, 1]\0\1\0" + b"c\0bfloat16\0[]\0\x40\x40"
    )
    assert digest(tensors) == by_hand.hexdigest()
    assert digest(tensors) == "b84cd8caed5b4474ffb06658c5302994e7b58f51e8e7cf45db6651766586c1bf", "stable for ever"


def test_numbers_are_json(tmp_path: Path) -> None:
    setup, loop, _ = trained(SETUPS["custom"], tmp_path, every_steps=100)
    stored = json.loads(files_in(setup.run_url, 8)["state.json"].read_text())
    assert stored == loop.state.numbers()
    assert (stored["step"], stored["phase"], stored["samples"]) == (8, 0, 8 * 24 - 20)
    kept = dict(dict(stored["optim"]["loss"]["dict"])["state"]["dict"])
    assert dict(kept[0]["dict"])["last"] == pytest.approx(0.5 * 0.9**8)
