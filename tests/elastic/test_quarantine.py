"""A run over data with a bad shard that is to be left out: the same for any number of workers, and for good."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import elastrain
from elastrain.data.dataset import Dataset

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.usefixtures("local_ray")
def test_a_bad_shard_is_left_out_of_a_run_for_good(
    cli: Callable[..., Any], spec_of: Callable[..., Any], tmp_path: Path
) -> None:
    packed = cli("pack", "digits", str(tmp_path), "--row-group-mib", "0.01", "--shard-mib", "0.02")
    assert packed.returncode == 0, packed.stderr
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

    runs = [train(f"quarantine-{size}", size, "data.on_bad_shard=quarantine") for size in (1, 3)]
    assert runs[0].weights_sha256 == runs[1].weights_sha256
    for run in runs:
        assert run.result["samples"] == 3 * left
        (told,) = [event for event in run.report()["events"] if event["kind"] == "quarantine"]
        assert (told["file"], told["rows"], told["step"]) == (str(path), lost, 0)

    path.write_bytes(good)
    again = train("quarantine-1", 2, "data.on_bad_shard=quarantine")
    assert (again.result["resumed_from"], again.weights_sha256) == (again.step, runs[0].weights_sha256)
