"""The forecast counts what the blocks really do, and does not grow with the rows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastrain.data import forecast
from elastrain.data.forecast import as_text, decoded_rows, forecast_run
from elastrain.data.plan import Plan
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


def counted(plan: Plan) -> int:
    """Rows decoded by the first epoch's blocks, one row group at a time."""
    ends = np.cumsum(plan.group_rows)
    total = 0
    for slot in range(plan.slots):
        for block in range(-(-plan.steps_per_epoch // plan.block_steps)):
            rows = plan.block(slot, block).rows(0, plan.steps_per_epoch).row
            total += int(plan.group_rows[np.unique(np.searchsorted(ends, rows, side="right"))].sum())
    return total


@given(
    groups=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    batch=st.integers(1, 50),
    slots=st.integers(1, 5),
    block_steps=st.integers(1, 9),
)
def test_decoded_rows_are_those_of_the_blocks(groups: list[int], batch: int, slots: int, block_steps: int) -> None:
    plan = plan_of(groups, min(batch, sum(groups)), slots, block_steps)
    if plan.steps_per_epoch % plan.block_steps:
        plan = plan_of(groups, plan.global_batch, slots, plan.steps_per_epoch)
    assert decoded_rows(plan) == counted(plan)


def test_many_blocks_are_weighed_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of([100] * 2000, 40, 4, 5)
    exact = decoded_rows(plan)
    monkeypatch.setattr(forecast, "MAX_STARTS", 300)
    assert abs(decoded_rows(plan) / exact - 1) < 0.1


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
