"""`cluster plan` says which nodes a run would start, as Ray's own scheduler does, and what can never fit."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from elastrain.__main__ import app
from elastrain.cluster.document import read_cluster
from elastrain.cluster.forecast import as_text, forecast_cluster
from elastrain.cluster.scheduling import Cell, launches
from elastrain.errors import ResourceError, SpecError
from elastrain.spec.cluster import ClusterSpec
from elastrain.spec.document import train_spec
from elastrain.spec.train import TrainSpec

ROOT = Path(__file__).parents[2]
T4, H100 = ({"gpus": 1, "accelerator": kind} for kind in ("T4", "H100"))


def cluster(name: str, *sets: str) -> ClusterSpec:
    return read_cluster(ROOT / "clusters" / f"{name}.yaml", sets).spec


def a_run(**workers: Any) -> TrainSpec:
    slots = workers.get("max", 1)
    return train_spec(
        {
            "name": "planned",
            "task": "package.module:Task",
            "data": {"train": "data", "global_batch": 1024, "slots": slots},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "budget": {"steps": 1},
            "workers": workers,
        }
    )


def nodes_of(found: dict[str, Any]) -> dict[str, int]:
    return {node["pool"]: node["count"] for node in found["nodes"]}


def test_a_run_of_gpus_starts_the_pool_that_comes_first() -> None:
    found = forecast_cluster(cluster("aws"), a_run(min=8, max=20, cpus=4, gpus=1, accelerator="H100"))
    assert nodes_of(found) == {"h100-spot": 3}
    assert found["cells"] == [8, 8, 4]
    assert found["workers"] == {"min": 8, "max": 20, "held": 20}
    assert found["never_fit"] == 0
    assert found["per_h"] == pytest.approx(3 * 26.0 + 0.4032)
    assert found["watts"] == pytest.approx(3 * 8500 + 65)
    assert found["without_spot"]["nodes"] == {"h100": 3}
    assert found["without_spot"]["per_h"] > found["per_h"]
    assert found["first_step_s"] == 500.0
    assert "3 x h100-spot" in as_text(found)


def test_where_a_pool_is_full_the_next_one_goes_on() -> None:
    found = forecast_cluster(cluster("aws"), a_run(min=8, max=80, cpus=4, gpus=1, accelerator="H100"))
    assert nodes_of(found) == {"h100-spot": 8, "h100": 2}


def test_kinds_of_gpus_are_never_mixed_by_accident() -> None:
    run = a_run(min=1, max=8, cpus=1, gpus=1)
    with pytest.raises(SpecError, match="T4, L4, A100, H100, and a run must not mix them: name one"):
        forecast_cluster(cluster("aws"), run)
    # What Ray would do if nobody asked: the demand of one gang, unpacked, goes to whatever fits it best.
    loose = [Cell(size=1, resources={"CPU": 1, "GPU": 1})] * 8
    assert len(launches(cluster("aws").pools, loose).nodes) > 1
    named = [Cell(size=1, resources=a_run(**H100).workers.needs())] * 8
    assert launches(cluster("aws").pools, named).nodes == {"h100-spot": 1}
    # One kind needs no choice.
    assert nodes_of(forecast_cluster(cluster("onprem"), run)) == {"h100": 4}


@pytest.mark.parametrize(
    ("workers", "error", "text"),
    [
        ({**H100, "accelerator": "H200"}, SpecError, "aws has T4, L4, A100, H100"),
        ({**H100, "gpus": 9}, ResourceError, "hold a worker of 1 CPUs and 9 GPUs (H100): they lend cpu-data 32"),
        ({"cpus": 193}, ResourceError, "can ever hold a worker of 193 CPUs"),
        ({**T4, "min": 5, "max": 5}, ResourceError, "hold 4 workers of planned at most"),
    ],
)  # fmt: skip
def test_what_never_fits_is_an_error(workers: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        forecast_cluster(cluster("aws"), a_run(**workers))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("workers", "text"),
    [
        ({"gpus": 1, "accelerator": "H10"}, "did you mean 'H100'"),
        ({"accelerator": "H100"}, "accelerator H100 needs gpus"),
    ],
)
def test_a_run_names_a_gpu_that_ray_knows(workers: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        a_run(**workers)


def test_more_workers_than_the_pools_hold_are_told() -> None:
    found = forecast_cluster(cluster("aws"), a_run(min=2, max=6, cpus=1, gpus=1, accelerator="T4"))
    assert nodes_of(found) == {"t4-dev": 4}
    assert (found["workers"]["held"], found["never_fit"]) == (4, 2)
    assert any("2 workers never fit" in each for each in found["warnings"])


def test_all_nodes_are_asked_for_at_once() -> None:
    one, three = (forecast_cluster(cluster("aws"), a_run(min=n, max=3, **T4)) for n in (1, 3))
    assert three["first_step_s"] == one["first_step_s"]


def test_work_on_cpus_starts_no_gpus_where_other_pools_hold_it() -> None:
    small = forecast_cluster(cluster("aws"), a_run(min=1, max=2))
    assert nodes_of(small) == {"cpu-data": 1}
    assert small["warnings"] == []
    large = forecast_cluster(cluster("aws"), a_run(min=1, max=300))
    assert nodes_of(large) == {"cpu-data": 8}
    assert (large["workers"]["held"], large["never_fit"]) == (256, 44)
    forced = forecast_cluster(cluster("aws"), a_run(min=257, max=300))
    assert any("for CPUs alone" in each for each in forced["warnings"])


def test_work_on_cpus_is_put_on_no_accelerator_that_happens_to_be_there() -> None:
    """As at run time, where it is asked for with a selector: Ray by itself would take what is up, or the next best."""
    asked = [Cell(size=1, resources={"CPU": 1}, plain=plain) for plain in (True, False)]
    pools = cluster("aws", "pools.1.min=1").pools
    assert launches(pools, asked[:1] * 34).nodes == {"cpu-data": 2, "t4-dev": 1}
    assert launches(pools, asked[1:] * 34).nodes == {"cpu-data": 1, "t4-dev": 1}
    assert launches(pools, asked[:1] * 300).num_infeasible == 44
    found = forecast_cluster(cluster("aws", "pools.1.min=1"), a_run(min=1, max=34))
    assert nodes_of(found) == {"cpu-data": 2, "t4-dev": 1}
    tpus = forecast_cluster(cluster("gcp"), a_run(min=1, max=1000))
    assert nodes_of(tpus) == {"cpu-data": 8}, "a TPU is no CPU"


def test_nodes_that_are_always_up_are_counted_and_warned_of() -> None:
    found = forecast_cluster(cluster("aws", "pools.0.min=2"), a_run(min=1, max=2))
    assert nodes_of(found) == {"cpu-data": 2}
    assert any("without any run" in each for each in found["warnings"])


def test_unknown_prices_stay_unknown() -> None:
    found = forecast_cluster(cluster("kuberay"), a_run(min=1, max=2))
    assert (found["per_h"], found["watts"]) == (None, None)
    assert "price unknown" in as_text(found)


def plan(*arguments: str) -> Result:
    run = str(ROOT / "pipelines" / "tiny_gpt" / "train.yaml")
    return CliRunner().invoke(app, ["cluster", "plan", str(ROOT / "clusters" / "aws.yaml"), run, *arguments])


def test_the_verb_prints_one_object_or_a_text() -> None:
    gpus = ("--set", "workers={min: 1, max: 4, cpus: 4, gpus: 1, accelerator: A100}")
    done = plan("--json", *gpus)
    assert json.loads(done.stdout)["nodes"][0]["pool"] == "a100"
    assert "1 x a100" in plan(*gpus).stdout
    assert isinstance(plan("--set", "workers={gpus: 9, accelerator: A100}").exception, ResourceError)
