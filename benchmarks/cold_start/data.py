"""Digits as `elastrain pack digits` leaves them, and the spec of a run of one step."""

from pathlib import Path

from benchmarks.machine import ROOT
from ruamel.yaml import YAML

from elastrain import storage
from elastrain.data.chunks import PackOptions
from elastrain.data.dataset import MANIFEST
from elastrain.data.pack import pack_dataset
from elastrain.elastic.session import ray_session

BATCH = 64


def prepare(work: Path) -> str:
    """Pack the digits, unless they are there; return the folder with train and test."""
    out = str(work / "digits")
    if all(storage.exists(f"{out}/{split}/{MANIFEST}") for split in ("train", "test")):
        return out
    with ray_session(None, cpus=2):
        pack_dataset("digits", out, PackOptions())
    return out


def write_spec(folder: Path, data: str) -> Path:
    """Write the spec of one step of the digits network with two workers; return its path."""
    spec = {
        "kind": "train",
        "name": "cold-start",
        "task": str(ROOT / "pipelines" / "digits_mlp" / "task.py") + ":DigitsMLP",
        "task_args": {"hidden": 128},
        "data": {"train": f"{data}/train", "global_batch": BATCH, "slots": 2},
        "optimizer": {"name": "adamw", "lr": 0.001},
        "budget": {"steps": 1},
        "workers": {"min": 2, "max": 2},
        "storage": str(folder / "runs"),
    }
    path = folder / "train.yaml"
    with path.open("w") as file:
        YAML().dump(spec, file)
    return path
