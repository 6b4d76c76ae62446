"""Plain Ray Tune: a function of its own per trial, actors used again, as many trials at once as there are cores."""

import tempfile
import time
from typing import Any

import ray
from benchmarks.script import finish, options, started
from benchmarks.sweep.work import Rows, check, measured, rows_of, settings, train
from ray import tune


def trial(config: dict[str, Any]) -> None:
    """Train and report every evaluation."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    place, setting = config["place"], tuple(config["setting"])
    train(
        setting,
        rows_of(config["rows"], 1),
        steps=config["steps"],
        report=lambda step, loss: tune.report({"step": step, "loss": loss, "place": place, "ended": time.time()}),
    )


def main() -> None:
    """Try every setting once; report."""
    given, began = options(), started()
    tried = settings(small=given["small"])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        space = {"rows": given["rows"], "steps": given["steps"]}
        places = [{**space, "place": place, "setting": list(setting)} for place, setting in enumerate(tried)]
        found = tune.Tuner(
            _unpacked,
            param_space={"given": tune.grid_search(places)},
            tune_config=tune.TuneConfig(metric="loss", mode="min", reuse_actors=True),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    last: list[dict[str, Any]] = [found[place].metrics or {} for place in range(len(found))]
    furthest = check({entry["place"]: entry["loss"] for entry in last}, Rows(given["rows"], 1))
    ended = [entry["ended"] for entry in last]
    finish({**measured(began, ended, len(tried)), "furthest": furthest}, {"trials": len(tried)})


def _unpacked(config: dict[str, Any]) -> None:
    trial(config["given"])


if __name__ == "__main__":
    main()
