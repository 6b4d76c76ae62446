"""Runs over data with a bad shard that is to be left out, and over data that are deleted or rewritten under them."""

import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.elastic.test_run import SPEC, wait_for

import elastrain
from elastrain import storage
from elastrain.data.columns import Column
from elastrain.data.dataset import MANIFEST, Dataset, fingerprint
from elastrain.data.pack import pack_dataset
from elastrain.data.shards import ShardWriter
from elastrain.data.sources import PackOptions
from elastrain.errors import DataError
from elastrain.training.manifests import newest_whole

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.usefixtures("local_ray")
def test_a_bad_shard_is_left_out_of_a_run_for_good(spec_of: Callable[..., Any], tmp_path: Path) -> None:
    pack_dataset("digits", str(tmp_path), PackOptions(row_group_bytes=10_000, shard_bytes=20_000))
    data = Dataset.open(str(tmp_path / "train"))
    bad = data.shards[1]
    path = Path(data.url, bad.path)
    good = path.read_bytes()
    path.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    lost = sum(bad.row_groups)
    left = data.num_rows - lost

    def train(name: str, size: int, *changes: str) -> Any:
        workers = f"workers={{min: {size}, max: {size}}}"
        return elastrain.train(
            spec_of(name, f"data.train={data.url}", "consistency=bitwise", "data.slots=4", workers, *changes)
        )

    runs = [train(f"quarantine-{size}", size, "data.on_bad_shard=quarantine") for size in (1, 2)]
    assert runs[0].weights_sha256 == runs[1].weights_sha256
    for run in runs:
        assert run.result["samples"] == 3 * left
        (told,) = [event for event in run.report()["events"] if event["kind"] == "quarantine"]
        assert (told["file"], told["rows"], told["step"]) == (str(path), lost, 0)

    path.write_bytes(good)
    again = train("quarantine-1", 2, "data.on_bad_shard=quarantine")
    assert (again.result["resumed_from"], again.weights_sha256) == (again.step, runs[0].weights_sha256)


def pack_large(folder: Path, value: int) -> None:
    """More shards than a reader keeps open, of rows so large that few of them are read ahead of their use."""
    columns = [Column(name="image", dtype="uint8", shape=(512, 512, 3)), Column(name="label", dtype="uint8", shape=())]
    with ShardWriter(str(folder), columns, PackOptions(row_group_bytes=1, shard_bytes=1)) as writer:
        for label in range(96):
            writer.write(
                {"image": np.full((1, 512, 512, 3), value, np.uint8), "label": np.full(1, label % 10, np.uint8)}
            )
        shards, found = writer.finish()
    held = fingerprint(found, shards)
    made = Dataset(url=str(folder), columns=found, shards=tuple(shards), fingerprint=held, packed=True)
    storage.put_json(storage.join(str(folder), MANIFEST), made.manifest())


LARGE = (
    "task_args={hidden: 1}",
    "optimizer.lr=1.0e-9",
    "data.global_batch=8",
    "data.slots=1",
    "workers={min: 1, max: 1}",
    "data.eval=null",
)
ENDLESS = (*LARGE, "budget={steps: 1000000}", "checkpoint.every_steps=20")


@pytest.mark.usefixtures("local_ray")
def test_data_that_are_deleted_while_a_run_reads_them_end_it_with_a_sentence_and_exit_code_four(
    start: Callable[..., "subprocess.Popen[str]"], workspace: Path, tmp_path: Path
) -> None:
    import ray

    pack_large(tmp_path / "train", 3)
    changes = (*ENDLESS, f"data.train={tmp_path}/train", "name=deleted", "precision=fp32")
    sets = [word for change in changes for word in ("--set", change)]
    process = start("train", SPEC, *sets, "--address", ray.get_runtime_context().gcs_address)
    run = str(workspace / "runs" / "deleted")
    wait_for(lambda: newest_whole(run, warn=pytest.fail) or process.poll() is not None)
    shutil.rmtree(tmp_path / "train")
    out, said = process.communicate(timeout=300)
    assert (process.returncode, out) == (4, ""), said
    line = said.splitlines()[-1]
    assert line.startswith(f"elastrain: error: {tmp_path}/train/part-"), said
    assert line.endswith(": the file is gone; restore it, or pack the data again"), said
    assert "Traceback" not in said
    assert newest_whole(run, warn=pytest.fail), "what was committed is kept"


@pytest.mark.usefixtures("local_ray")
def test_data_that_are_rewritten_while_a_run_reads_them_end_it_with_a_sentence_that_names_them(
    spec_of: Callable[..., Any], workspace: Path, tmp_path: Path
) -> None:
    pack_large(tmp_path / "train", 3)
    pack_large(tmp_path / "other", 4)
    run = str(workspace / "runs" / "rewritten")

    def rewrite() -> None:
        wait_for(lambda: newest_whole(run, warn=lambda _: None))
        for path in sorted((tmp_path / "other").iterdir()):
            path.replace(tmp_path / "train" / path.name)

    rewriting = threading.Thread(target=rewrite)
    rewriting.start()
    with pytest.raises(DataError, match=rf"^{tmp_path}/train/part-\d+.parquet: .*; restore the file") as caught:
        elastrain.train(spec_of("rewritten", *ENDLESS, f"data.train={tmp_path}/train"))
    rewriting.join()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    assert newest_whole(run, warn=pytest.fail), "what was committed is kept"
