"""Whatever is wrong is one sentence with place and remedy, the right exit code, and nothing committed is lost."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import elastrain
from elastrain.__main__ import main
from elastrain.elastic import session
from elastrain.elastic.check import check_run
from elastrain.errors import DataError, DivergedError, ResourceError, SpecError, StorageError
from elastrain.lock import locked
from elastrain.observe.actions import read_actions
from elastrain.training.checkpoint import read_weights
from elastrain.training.export import export_weights

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SPEC = str(ROOT / "pipelines" / "digits_mlp" / "train.yaml")
SHORT = ("--set", "budget={steps: 30}", "--set", "workers={min: 1, max: 1}", "--set", "precision=fp32")

ALONE = "workers={min: 1, max: 1}"
BASE = ("budget={steps: 30}", ALONE, "checkpoint.every_steps=10")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def refused(done: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    said = done.stderr.splitlines()[-1] if code != 2 else done.stderr
    for word in words:
        assert word in said, said
    assert "Traceback" not in done.stderr


def train(cli: Cli, name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return cli("train", SPEC, *SHORT, "--set", f"name={name}", *arguments)


@pytest.fixture
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `elastrain …` as `cli` does, but in this process: for what is refused before a Ray is needed."""
    monkeypatch.chdir(workspace)

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        monkeypatch.setattr(sys, "argv", ["elastrain", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(left.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def finished(spec_of: Callable[..., Any], tmp_path: Path) -> elastrain.Run:
    """A copy, `base` in the test's folder, of a finished run, which the first test that asks for it has trained."""
    run = elastrain.train(spec_of("base", *BASE))
    shutil.copytree(run.url, tmp_path / "base")
    return elastrain.Run(str(tmp_path / "base"), run.result)


@pytest.fixture
def broken(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the packed training data, to be broken."""
    return Path(shutil.copytree(workspace / "data" / "digits" / "train", tmp_path / "train"))


def shard(folder: Path) -> Path:
    return next(folder.glob("*.parquet"))


def test_missing_data(cli: Cli) -> None:
    refused(train(cli, "x", "--set", "data.train=data/nothing"), 4, "data/nothing", "no such dataset", "pack")


def test_an_empty_folder(here: Cli, tmp_path: Path) -> None:
    refused(train(here, "x", "--set", f"data.train={tmp_path}"), 4, str(tmp_path), "no Parquet files")


def test_the_folder_above_the_splits(here: Cli, workspace: Path) -> None:
    above = f"{workspace}/data/digits"
    refused(
        train(here, "x", "--set", "data.train=data/digits"), 4, f"{above} holds the splits test, train: give {above}"
    )


def test_a_manifest_that_cannot_be_read(here: Cli, broken: Path) -> None:
    (broken / "_manifest.json").write_bytes((broken / "_manifest.json").read_bytes()[:100])
    refused(train(here, "x", "--set", f"data.train={broken}"), 4, "_manifest.json", "elastrain pack … --overwrite")


def test_packs_that_are_refused(here: Cli, workspace: Path) -> None:
    with locked(f"{workspace}/data/busy", remedy="wait"):
        refused(here("pack", "digits", "data/busy"), 3, f"process {os.getpid()}", "choose another folder")
    (workspace / "file").write_text("in the way")
    refused(here("pack", "digits", "file/x"), 5, f"{workspace}/file/x")


@pytest.mark.usefixtures("local_ray")
def test_a_damaged_shard_is_never_trained_on(spec_of: Callable[..., Any], broken: Path) -> None:
    """What else may happen to a file, `tests/data/test_dataset.py` does to it."""
    file = shard(broken)
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"corrupted|page checksum mismatch") as caught:
        elastrain.train(spec_of("damaged", f"data.train={broken}", ALONE))
    assert str(file) in str(caught.value)


def test_mixed_schemas(here: Cli, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [1, 2], "label": [0, 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [1.5, 2.5], "label": [0, 1]}), tmp_path / "b.parquet")
    refused(train(here, "x", "--set", f"data.train={tmp_path}"), 4, "b.parquet", "'image'", "double", "int64")


@pytest.mark.usefixtures("local_ray")
def test_a_column_that_the_task_needs_and_the_data_lack(spec_of: Callable[..., Any], tmp_path: Path) -> None:
    pq.write_table(pa.table({"pixels": np.arange(200) % 5, "label": np.arange(200) % 10}), tmp_path / "a.parquet")
    spec = spec_of("lacking", f"data.train={tmp_path}", "data.eval=null", ALONE)
    for verb in (elastrain.train, check_run):
        with pytest.raises(DataError, match=r"'image'.*pixels, label"):
            verb(spec)


def test_impossible_values_and_unknown_keys(here: Cli) -> None:
    refused(train(here, "x", "--set", "optimizer.lr=-1"), 2, "optimizer.lr", "-1")
    refused(train(here, "x", "--set", "optimizer.momentun=0.9"), 2, "momentun", "did you mean", "momentum")
    refused(train(here, "x", "--set", "task=nowhere.py:Digits"), 2, "nowhere.py")
    refused(train(here, "x", "--set", "transforms=1"), 2, "transforms")


@pytest.mark.usefixtures("local_ray")
def test_a_bug_in_the_task_comes_with_its_own_lines(spec_of: Callable[..., Any], tmp_path: Path) -> None:
    text = (ROOT / "pipelines" / "digits_mlp" / "task.py").read_text()
    (tmp_path / "bug.py").write_text(text.replace('labels = batch["label"].long()', "labels = 1 / 0", 1))
    with pytest.raises(SpecError, match="ZeroDivisionError") as caught:
        elastrain.train(spec_of("bug", f"task={tmp_path / 'bug.py'}:DigitsMLP", ALONE))
    assert "labels = 1 / 0" in str(caught.value)
    assert "elastrain/training" not in str(caught.value)


@pytest.mark.usefixtures("local_ray")
def test_more_than_the_cluster_can_hold(spec_of: Callable[..., Any]) -> None:
    with pytest.raises(ResourceError, match=r"workers\.gpus: 0"):
        elastrain.train(spec_of("greedy", "workers.gpus=1"))
    with pytest.raises(ResourceError, match="the cluster can hold 2"):
        elastrain.train(spec_of("greedy", "data.slots=3", "workers={min: 3, max: 3, cpus: 4}"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "somewhere"])
def test_an_address_where_no_ray_is(address: str) -> None:
    with pytest.raises(OSError, match=r"refused|Ray Client|HOST:PORT"):
        session._reachable(address)


def test_storage_that_cannot_be_written(here: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(train(here, "x", "--set", f"storage={tmp_path / 'file'}"), 5, str(tmp_path / "file"))


@pytest.mark.usefixtures("local_ray")
def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(spec_of: Callable[..., Any], tmp_path: Path) -> None:
    spec = spec_of("diverged", "optimizer={name: sgd, lr: 1.0e+30}", "schedule={}", "checkpoint.every_steps=1", ALONE)
    with pytest.raises(DivergedError, match=r"the loss is.*optimizer\.lr"):
        elastrain.train(spec)
    found = export_weights(f"{spec.storage}/diverged", str(tmp_path / "kept"), step=None, weights="model")
    assert all(tensor.isfinite().all() for tensor in read_weights(found["file"]).values())
    assert elastrain.DivergedError.exit_code == 7


@pytest.mark.usefixtures("local_ray")
def test_another_dataset_or_seed_is_refused_and_fresh_starts_over(
    spec_of: Callable[..., Any], here: Cli, finished: elastrain.Run, tmp_path: Path
) -> None:
    there = ("--set", f"storage={tmp_path}")
    refused(train(here, "base", *there, "--set", "data.seed=1"), 3, "data.seed: 0 -> 1", "--fresh")
    refused(train(here, "base", *there, "--set", "data.train=data/digits/test"), 3, "training data", "--fresh")
    refused(train(here, "base", *there, "--set", "optimizer.lr=0.5"), 3, "optimizer.lr", "0.5")
    assert finished.report()["weights_sha256"] == finished.weights_sha256
    changed = spec_of("base", *BASE, f"storage={tmp_path}", "data.seed=1")
    assert elastrain.train(changed, fresh=True).weights_sha256 != finished.weights_sha256
    assert "seed: 1" in (tmp_path / "base" / "spec.yaml").read_text()
    noted = [each["action"] for each in read_actions(str(tmp_path))]
    assert noted == ["delete", "start"], "what was refused has done nothing"


@pytest.mark.usefixtures("local_ray")
def test_fresh_removes_nothing_before_the_new_run_can_start(
    spec_of: Callable[..., Any], cli: Cli, here: Cli, finished: elastrain.Run, tmp_path: Path
) -> None:
    there, kept = ("--fresh", "--set", f"storage={tmp_path}"), sorted(Path(finished.url).rglob("*"))
    refused(train(here, "base", *there, "--set", "data.slots=100"), 2, "slots")
    refused(train(cli, "base", *there, "--address", "127.0.0.1:1"), 6, "127.0.0.1:1", "refused")
    with pytest.raises(ResourceError):
        elastrain.train(spec_of("base", f"storage={tmp_path}", "workers.gpus=1"), fresh=True)
    assert sorted(Path(finished.url).rglob("*")) == kept


@pytest.mark.usefixtures("local_ray")
def test_a_finished_run_is_known_by_its_checkpoint(
    spec_of: Callable[..., Any], finished: elastrain.Run, tmp_path: Path
) -> None:
    ledger = next(Path(finished.url, "ledger").iterdir())
    lines = [line for line in ledger.read_text().splitlines(keepends=True) if '"kind": "end"' not in line]
    ledger.write_text("".join(lines))
    again = elastrain.train(spec_of("base", *BASE, f"storage={tmp_path}"))
    for key in ("step", "samples", "metrics", "weights_sha256"):
        assert again.result[key] == finished.result[key] is not None
    other = elastrain.train(spec_of("base", *BASE, f"storage={tmp_path}", "data.eval=data/digits/train"))
    assert other.result["metrics"] != finished.result["metrics"], "other evaluation data, another evaluation"
    assert other.weights_sha256 == finished.weights_sha256


@pytest.mark.usefixtures("local_ray")
def test_damaged_records_are_named(spec_of: Callable[..., Any], finished: elastrain.Run, tmp_path: Path) -> None:
    file = next(Path(finished.url, "metrics").iterdir())
    data = bytearray(file.read_bytes())
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(3)
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    data[begin + chunk.total_compressed_size - 1] ^= 1  # the last byte of a page; headers have no checksum
    file.write_bytes(data)
    with pytest.raises(StorageError, match="damaged") as caught:
        elastrain.train(spec_of("base", *BASE, f"storage={tmp_path}", "budget={steps: 40}"))
    assert str(file) in str(caught.value)


def test_two_runs_on_one_directory(cli: Cli, workspace: Path) -> None:
    with locked(str(workspace / "runs" / "busy"), remedy="wait"):
        refused(train(cli, "busy"), 3, f"process {os.getpid()}", "another name")


@pytest.mark.usefixtures("local_ray")
def test_a_broken_checkpoint_is_passed_over(
    spec_of: Callable[..., Any], finished: elastrain.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (newest,) = Path(finished.url, "checkpoints", "step-00000030").glob("*-model.safetensors")
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    went_on = elastrain.train(spec_of("base", *BASE, f"storage={tmp_path}", "budget={steps: 40}"))
    assert str(newest) in capsys.readouterr().err
    assert went_on.result["resumed_from"] == 20


@pytest.mark.usefixtures("local_ray")
def test_a_full_disk_keeps_what_was_committed(spec_of: Callable[..., Any], small_disk: Path, tmp_path: Path) -> None:
    changes = (f"storage={small_disk}", "task_args={hidden: 2048}", "checkpoint={every_steps: 5, keep: 100}", ALONE)
    with pytest.raises(StorageError, match="the disk is full"):
        elastrain.train(spec_of("full", *changes))
    kept = export_weights(str(small_disk / "full"), str(tmp_path / "kept"), step=None, weights="model")
    assert kept["step"] > 0
