"""Ours: `elastrain.sweep` over the same settings as a grid, and what it leaves behind."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.script import finish, options, started
from benchmarks.sweep.left import left_behind
from benchmarks.sweep.work import BATCH, EVERY, Rows, check, measured, settings
from ruamel.yaml import YAML

import elastrain
from elastrain.elastic.session import ray_session
from elastrain.observe.ledger import read_ledger
from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.document import sweep_spec

TASK = {"task": str(ROOT / "pipelines" / "digits_mlp" / "task.py") + ":DigitsMLP"}


def spec_of(folder: Path, given: dict[str, Any], *, task: dict[str, Any] = TASK, **changes: Any) -> SweepSpec:
    """Return the spec of the sweep with these changes, its base, which trains `task`, written to `folder`."""
    workers, steps = given["workers"], given["steps"]
    base = {
        "kind": "train",
        "name": "base",
        **task,
        "data": {"train": f"{given['data']}/train", "eval": f"{given['data']}/test"},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "budget": {"steps": steps},
        "workers": {"min": workers, "max": workers},
    }
    base["data"] |= {"global_batch": BATCH, "slots": workers, "seed": 0}
    path = folder / "train.yaml"
    with path.open("w") as file:
        YAML().dump(base, file)
    tried = settings(small=given["small"])
    rates, widths = (list(dict.fromkeys(setting[place] for setting in tried)) for place in (0, 1))
    return sweep_spec(
        {
            "kind": "sweep",
            "name": "sweep",
            "base": str(path),
            "storage": str(folder / "runs"),
            "objective": {"metric": "val_loss", "every": EVERY, "max_steps": steps},
            "space": {"optimizer.lr": {"grid": rates}, "task_args.hidden": {"grid": widths}},
            "search": {"method": "grid"},
            "budget": {"unit": "trials", "per_arm": len(tried)},
            **changes,
        }
    )


def main() -> None:
    """Run the sweep on a Ray of its own; report."""
    given, began = options(), started()
    tried = settings(small=given["small"])
    with tempfile.TemporaryDirectory() as name, ray_session(None, cpus=max(2, os.cpu_count() or 1)):
        ray_s = time.time() - began
        found = elastrain.sweep(spec_of(Path(name), given))
        whole_s = time.time() - began
        left = left_behind()
        ended = [event["t"] for event in read_ledger(found.url) if event["kind"] == "ended"]
        begun = [event["t"] for event in read_ledger(found.url) if event["kind"] == "eval"]
        losses = {
            tried.index((trial.point["optimizer.lr"], trial.point["task_args.hidden"])): trial.value
            for trial in found.trials()
        }
    furthest = check(
        {place: loss for place, loss in losses.items() if loss is not None}, Rows(given["rows"], given["workers"])
    )
    parts = {"ray_s": ray_s, "first_evaluation_s": begun[0] - began, "whole_s": whole_s}
    finish(
        {**measured(began, ended, len(tried)), **parts, "furthest": furthest},
        {"trials": len(ended), "workers": given["workers"], "left_behind": left},
    )


if __name__ == "__main__":
    main()
