"""Ray's documented pattern: a function of Tune that drives a TorchTrainer of its own for each trial.

It takes half a minute a trial, so few are run and the others are counted on to take as long.
"""

import os
import tempfile
import time
from typing import Any

import ray
from benchmarks.script import finish, options, started
from benchmarks.sweep.work import Rows, check, measured, settings, train
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback


def worker(config: dict[str, Any]) -> None:
    """Train this rank's share under DDP and report every evaluation."""
    import ray.train  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415

    torch.set_num_threads(1)
    context, place = ray.train.get_context(), config["place"]
    size, rank = context.get_world_size(), context.get_world_rank()
    train(
        tuple(config["setting"]),
        Rows(config["rows"], size),
        steps=config["steps"],
        slots=(rank,),
        wrap=DistributedDataParallel if size > 1 else lambda model: model,
        report=lambda step, loss: ray.train.report({"step": step, "loss": loss, "place": place, "ended": time.time()}),
    )


def driver(config: dict[str, Any]) -> None:
    """Run one trial as a training run."""
    given = config["given"]
    TorchTrainer(
        worker,
        train_loop_config=given,
        scaling_config=ScalingConfig(num_workers=given["workers"]),
        run_config=RunConfig(
            name=f"trial-{given['place']}",
            storage_path=given["folder"],
            callbacks=[TuneReportCallback()],  # type: ignore[list-item] # Ray's types name the class of another version
        ),
    ).fit()


def main() -> None:
    """Run the first few settings; report what all would take."""
    given, began = options(), started()
    if given["poll_s"] is not None:
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(given["poll_s"])
    tried, workers = settings(small=given["small"]), given["workers"]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        space = {"rows": given["rows"], "steps": given["steps"], "workers": workers, "folder": folder}
        places = [{**space, "place": place, "setting": list(tried[place])} for place in range(given["measured"])]
        found = tune.Tuner(
            tune.with_resources(driver, tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])),
            param_space={"given": tune.grid_search(places)},
            tune_config=tune.TuneConfig(metric="loss", mode="min", max_concurrent_trials=2 // workers),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    last: list[dict[str, Any]] = [found[place].metrics or {} for place in range(len(found))]
    furthest = check({entry["place"]: entry["loss"] for entry in last}, Rows(given["rows"], workers))
    measures = measured(began, [entry["timestamp"] for entry in last], len(tried))
    finish({**measures, "furthest": furthest}, {"measured": given["measured"], "workers": workers})


if __name__ == "__main__":
    main()
