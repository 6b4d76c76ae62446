"""The forecast counts what the blocks really do, and does not grow with the rows."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastrain.data import forecast
from elastrain.data.forecast import as_text, decoded_rows, forecast_run, read_amplification
from elastrain.data.plan import INDEX_BYTES, Plan
from elastrain.spec.document import read_train

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "pipelines" / "tiny_gpt" / "train.yaml"


def plan_of(groups: list[int], batch: int, slots: int, block_steps: int) -> Plan:
    return Plan(
        group_rows=np.array(groups),
        seed=3,
        global_batch=batch,
        slots=slots,
        block_steps=block_steps,
        row_bytes=10,
        fingerprint=str(groups),
    )


def counted(plan: Plan, end: int) -> int:
    """Rows decoded by the blocks of the steps [0, end), one block at a time."""
    ends = np.cumsum(plan.group_rows)
    total = 0
    for slot in range(plan.slots):
        for block in range(-(-end // plan.block_steps)):
            rows = plan.block(slot, block).rows(0, end).row
            total += int(plan.group_rows[np.unique(np.searchsorted(ends, rows, side="right"))].sum())
    return total


@settings(deadline=None)
@given(
    groups=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    batch=st.integers(1, 50),
    slots=st.integers(1, 5),
    block_steps=st.integers(1, 60),
    end=st.integers(1, 150),
)
def test_decoded_rows_are_those_of_the_blocks(
    groups: list[int], batch: int, slots: int, block_steps: int, end: int
) -> None:
    """Wherever the run ends, and however many epochs a block spans."""
    plan = plan_of(groups, max(batch, slots), slots, block_steps)
    assert decoded_rows(plan, end) == counted(plan, end)


def test_a_block_over_several_epochs_counts_them_all() -> None:
    """Each epoch deals other row groups to a slot: in three epochs it needs nearly all of them, once each."""
    plan = plan_of([1] * 320, 32, 2, 30)
    assert read_amplification(plan, 10) == 1.0, "the run ends after the first epoch"
    assert read_amplification(plan, 30) == counted(plan, 30) / 960
    assert 0.5 < read_amplification(plan, 30) < 640 / 960
    assert read_amplification(plan, 1000) == read_amplification(plan, 30)


def test_a_cut_block_of_very_many_rows_counts_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of([10] * 10, 10, 2, 30)
    exact = decoded_rows(plan, 1)
    assert exact == counted(plan, 1)
    monkeypatch.setattr(forecast, "MAX_CUT_ROWS", 10)
    assert decoded_rows(plan, 1) == decoded_rows(plan, 10) > exact


def test_many_blocks_are_weighed_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of([100] * 2000, 40, 4, 5)
    exact = read_amplification(plan, 10**9)
    monkeypatch.setattr(forecast, "MAX_STARTS", 300)
    assert abs(read_amplification(plan, 10**9) / exact - 1) < 0.1


def big_manifest(folder: Path, files: int, rows: int) -> None:
    shard = {"size_bytes": 100 * rows * 4098, "footer": "0" * 64, "sha256": "1" * 64}
    shards = [{**shard, "path": f"part-{i:05d}.parquet", "row_groups": [rows + i % 10] * 100} for i in range(files)]
    column = {"name": "tokens", "dtype": "uint16", "shape": [2049], "num_values": 50000, "mean": None, "std": None}
    manifest = {"format": 1, "fingerprint": "f" * 64, "packed": True, "columns": [column], "shards": shards}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_manifest.json").write_text(json.dumps(manifest))


def test_a_million_row_groups_are_counted_without_their_rows(tmp_path: Path) -> None:
    """A hundred billion rows: whatever grew with them would not come back."""
    big_manifest(tmp_path, 100, 10_000_000)
    changes = [f"data.train={tmp_path}", "data.eval=null", "data.global_batch=4096", "budget={epochs: 1}"]
    spec = read_train(SPEC, [*changes, "data.slots=64", "workers.max=64"])
    found = forecast_run(spec)
    assert found["rows"] == sum((10_000_000 + i % 10) * 100 for i in range(100))
    assert found["blocks"] > 1_000_000
    assert found["read_amplification"] > 1000
    assert "smaller row groups" in as_text(found)


def test_memory_is_counted_as_transforms_leave_the_rows(tmp_path: Path) -> None:
    """Bytes that become floats take four times the room, in the store and in a worker."""
    big_manifest(tmp_path, 1, 1000)
    changes = [f"data.train={tmp_path}", "data.eval=null", "data.global_batch=64", "budget={steps: 50}"]
    plain = forecast_run(read_train(SPEC, changes))
    scaled = forecast_run(read_train(SPEC, [*changes, "data.transforms=[{name: scale, column: tokens}]"]))
    rows = 50 * -(-64 // plain["slots"])
    assert plain["block_steps"] == scaled["block_steps"], "how rows travel does not change the order"
    for found, row_bytes in ((plain, 2 * 2049), (scaled, 4 * 2049)):
        assert found["block_bytes"] == rows * (row_bytes + INDEX_BYTES)
        assert found["feed_bytes"] == found["slots"] * found["block_bytes"]
        assert found["bytes_per_step"] == 64 * row_bytes
    assert scaled["worker_block_bytes"] / plain["worker_block_bytes"] == scaled["block_bytes"] / plain["block_bytes"]


def test_what_a_custom_function_makes_is_said_to_be_left_out(tmp_path: Path) -> None:
    big_manifest(tmp_path, 1, 1000)
    changes = [f"data.train={tmp_path}", "data.eval=null", "data.transforms=[{name: custom, function: 'mine:f'}]"]
    assert "mine:f not counted" in as_text(forecast_run(read_train(SPEC, changes)))


def test_files_that_cannot_be_verified_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"tokens": pa.array([[0] * 65] * 100, pa.list_(pa.uint16(), 65))}), tmp_path / "a.parquet")
    found = forecast_run(read_train(SPEC, [f"data.train={tmp_path}", "data.eval=null"]))
    assert f"warning      {tmp_path}: the files have no page checksums" in as_text(found)


def test_planning_a_small_run_takes_no_time(tmp_path: Path) -> None:
    """A block of the digits spans 64 epochs, all of which are counted."""
    big_manifest(tmp_path, 1, 15)
    spec = read_train(SPEC, [f"data.train={tmp_path}", "data.eval=null", "budget={epochs: 1000}"])
    start = time.perf_counter()
    found = forecast_run(spec)
    assert found["blocks"] >= found["slots"]
    assert time.perf_counter() - start < 0.3


def test_planning_loads_neither_torch_nor_ray_nor_pyarrow(tmp_path: Path) -> None:
    big_manifest(tmp_path, 10, 1000)
    code = (
        "import sys\nfrom elastrain.__main__ import main\n"
        f"sys.argv = ['elastrain', 'plan', {str(SPEC)!r}, '--set', 'data={{train: {tmp_path}, global_batch: 64}}']\n"
        "try:\n main()\nexcept SystemExit as end:\n assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'pyarrow', 'fsspec', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
