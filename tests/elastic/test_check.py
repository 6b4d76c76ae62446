"""What `check` says before a run starts: what is wrong with it, and what it would wait for."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import elastrain
from elastrain.data.columns import to_table
from elastrain.elastic import check, session
from elastrain.elastic.check import as_text, check_run
from elastrain.elastic.keep import descendants
from elastrain.elastic.ray_inner import NodeType
from elastrain.errors import DataError, ResourceError, SpecError
from elastrain.spec.document import read_train
from elastrain.spec.offers import offer_of
from elastrain.spec.train import TrainSpec, WorkersSpec

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "pipelines" / "digits_mlp" / "train.yaml"


def images(folder: Path, dtype: str = "uint8", *, side: int = 8) -> str:
    """A plain folder of 200 images and labels."""
    folder.mkdir()
    rng = np.random.default_rng(side)
    pixels = rng.integers(0, 17, (200, side, side)).astype(dtype)
    table = to_table({"image": pixels, "label": rng.integers(0, 10, 200)})
    pq.write_table(table, folder / "a.parquet", write_page_checksum=True)
    return str(folder)


def read(tmp_path: Path, *changes: str) -> TrainSpec:
    train = images(tmp_path / "train")
    return read_train(
        SPEC, [f"storage={tmp_path}", f"data.train={train}", "data.eval=null", "precision=fp32", *changes]
    )


@pytest.mark.parametrize("verb", [elastrain.train, check_run])
def test_evaluation_data_of_another_kind_are_found_before_anything_starts(
    tmp_path: Path, verb: Callable[[TrainSpec], Any]
) -> None:
    other = images(tmp_path / "other", "float32")
    with pytest.raises(DataError, match=rf"{other}: column 'image' is float32\[8, 8\], but uint8\[8, 8\] in .*train"):
        verb(read(tmp_path, f"data.eval={other}"))
    assert not (tmp_path / "digits-mlp" / "checkpoints").exists()


@pytest.mark.parametrize("verb", [elastrain.train, check_run])
def test_a_transform_that_cannot_work_is_found_before_anything_starts(
    tmp_path: Path, verb: Callable[[TrainSpec], Any]
) -> None:
    with pytest.raises(DataError, match=r"flip needs images.*'label' is int64\[\]"):
        verb(read(tmp_path, "data.transforms=[{name: flip, column: label}]"))
    (tmp_path / "mine.py").write_text("def f(columns, seeds):\n    return columns['nothing']\n")
    (tmp_path / "train" / "a.parquet").unlink()
    (tmp_path / "train").rmdir()
    with pytest.raises(SpecError, match=r"mine.py:f raised KeyError: 'nothing' at .*mine.py line 2"):
        verb(read(tmp_path, f"data.transforms=[{{name: custom, function: '{tmp_path}/mine.py:f'}}]"))


@pytest.mark.parametrize("by", ["its autoscaler", "the labels of its head"])
def test_kinds_of_gpu_that_a_cluster_tells_of_count_before_a_node_is_there(
    monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    pools = [{"CPU": 8, "GPU": 8, f"accelerator_type:{kind}": 1} for kind in ("T4", "H100")]
    head = {"Alive": True, "Resources": {"CPU": 0.0}, "Labels": dict[str, str]()}
    if by == "its autoscaler":
        monkeypatch.setattr(session, "node_types", lambda: [NodeType(pool, 4) for pool in pools])
    else:
        monkeypatch.setattr(session, "node_types", list)
        head["Labels"] = {f"elastrain-pool/{at}": offer_of(pool) for at, pool in enumerate(pools)}
    monkeypatch.setattr("ray.nodes", lambda: [head])
    with pytest.raises(SpecError, match="the cluster has H100, T4, and a run must not mix them: name one"):
        session.check_kind(WorkersSpec(gpus=1))
    session.check_kind(WorkersSpec(gpus=1, accelerator="T4"))
    session.check_kind(WorkersSpec())


def test_where_room_is_lacking_is_a_finding_and_never_having_it_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> int:
        raise ResourceError("never")

    def wait(*_: Any, stop: Callable[[], bool], **__: Any) -> int:
        assert stop()
        raise InterruptedError

    workers = read_train(SPEC, ["workers={min: 2, max: 2}"]).workers
    monkeypatch.setattr(check, "fitting", lambda *_: 1)
    monkeypatch.setattr(check, "find_room", wait)
    assert check._placement(workers) == "1 of 2 to 2 workers fit now; a run would wait for room"
    monkeypatch.setattr(check, "find_room", never)
    with pytest.raises(ResourceError, match="never"):
        check._placement(workers)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_busy_cluster_is_a_finding(tmp_path: Path) -> None:
    import ray

    held = ray.util.placement_group([{"CPU": 8}])
    ray.get(held.ready())
    try:
        found = check_run(read(tmp_path))
    finally:
        ray.util.remove_placement_group(held)
    assert "0 of 1 to 2 workers fit now; a run would wait for room" in as_text(found)
    assert found["ok"]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_ray_of_ones_own_has_neither_an_autoscaler_nor_a_reader_of_logs() -> None:
    started = [Path(f"/proc/{pid}/cmdline") for pid in descendants(os.getpid())]
    commands = b"\n".join(path.read_bytes() for path in started if path.exists())
    assert b"raylet" in commands
    assert b"monitor.py" not in commands
