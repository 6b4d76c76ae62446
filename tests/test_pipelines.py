"""Contract of every pipeline: its spec reads, names data that `make data` packs, and its task fits the interface."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from elastrain.data.columns import Array, to_table
from elastrain.data.dataset import Dataset
from elastrain.data.forecast import as_text, forecast_run
from elastrain.spec.document import read_train
from elastrain.spec.train import TrainSpec

ROOT = Path(__file__).parents[1]
PIPELINES = sorted(path.parent.name for path in (ROOT / "pipelines").glob("*/train.yaml"))
COLUMNS: dict[str, dict[str, Array]] = {
    "digits_mlp": {
        "image": np.arange(64 * 200, dtype=np.uint8).reshape(200, 8, 8) % 17,
        "label": (np.arange(200) % 10).astype(np.uint8),
    },
    "tiny_gpt": {"tokens": (np.arange(65 * 200) * 7 % 251).astype(np.uint8).reshape(200, 65)},
}


@pytest.fixture
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small dataset with the columns of the pipeline under test, as plain Parquet."""
    pq.write_table(to_table(COLUMNS[request.getfixturevalue("name")]), tmp_path / "rows.parquet", row_group_size=50)
    return tmp_path


def spec_of(name: str, data: Path) -> TrainSpec:
    changes = [f"data.train={data}", f"data.eval={data}", f"storage={data / 'runs'}"]
    return read_train(ROOT / "pipelines" / name / "train.yaml", changes)


@pytest.mark.parametrize("name", PIPELINES)
def test_it_has_a_readme_and_packed_data(name: str) -> None:
    spec = read_train(ROOT / "pipelines" / name / "train.yaml")
    assert (ROOT / "pipelines" / name / "README.md").is_file()
    packed = re.findall(r" pack \S+ (\S+)", (ROOT / "Makefile").read_text())
    folder = str(Path(spec.data.train).relative_to(Path.cwd()).parent)
    assert folder in packed


@pytest.mark.parametrize("name", PIPELINES)
def test_it_can_be_planned(name: str, data: Path) -> None:
    spec = spec_of(name, data)
    found = forecast_run(spec)
    assert found["rows"] == 200
    assert found["samples"] > 0
    assert f"{found['steps']:,}" in as_text(found)


@pytest.mark.parametrize("name", PIPELINES)
def test_its_task_fits_the_interface(name: str, data: Path) -> None:
    import torch

    from elastrain.training.task import Batch, make_task, phase_loss

    spec = spec_of(name, data)
    found = Dataset.open(spec.data.train)
    counted = tuple(replace(c, num_values=int(COLUMNS[name][c.name].max()) + 1) for c in found.columns)
    task = make_task(spec, replace(found, columns=counted))  # `pack` would have counted the values
    model = task.build()
    arrays = COLUMNS[name]
    batch = Batch({column: torch.from_numpy(array[:8].copy()) for column, array in arrays.items()})
    for phase in task.phases:
        loss = phase_loss(task, model, batch, phase)
        assert torch.isfinite(loss.sum)
        loss.sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
