"""Packed digits, and the file that the peers train from: rows, their order, and the losses that are to come out."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.cold_start.data import prepare as pack
from benchmarks.sweep.work import (
    BATCH,
    RECORDED_EVERY,
    RECORDED_STEPS,
    Rows,
    recorded_settings,
    settings,
    train,
)
from pyarrow import parquet

from elastrain.data.dataset import Dataset
from elastrain.data.plan import Plan, hash64
from elastrain.training.state import INIT

SEED = 0
SLOTS = (1, 2)


def prepare(work: Path, *, small: bool, steps: int) -> dict[str, str]:
    """Return the paths of the packed data and of the peers' file for so many steps, both made if they are not there."""
    data = str(Path(pack(work)).resolve())
    path = work.resolve() / f"sweep-{'small' if small else 'whole'}-{steps}.npz"
    if not path.exists():
        _write(path, data, small=small, steps=steps)
    return {"data": data, "rows": str(path)}


def _write(path: Path, data: str, *, small: bool, steps: int) -> None:
    held: dict[str, Any] = {}
    for prefix, split in {"": "train", "eval_": "test"}.items():
        table = parquet.read_table(sorted(map(str, Path(data, split).glob("*.parquet"))))
        held[f"{prefix}image"] = np.stack([np.frombuffer(value.as_py(), np.uint8) for value in table["image"]])
        held[f"{prefix}label"] = table["label"].to_numpy()
    # As all sides have it: the bits of a sum depend on it, and long trials enlarge the difference.
    torch.set_num_threads(1)
    held["seed"] = np.int64(hash64(SEED, INIT) & 0x7FFFFFFFFFFFFFFF)
    for slots in SLOTS:
        held[f"order_{slots}"] = order(Dataset.open(f"{data}/train"), slots, max(steps, RECORDED_STEPS))
    np.savez(path, **held)
    for slots in SLOTS:
        rows = Rows(str(path), slots)
        held[f"loss_{slots}"] = np.array(
            [train(setting, rows, steps=steps, slots=range(slots)) for setting in settings(small=small)]
        )
    held["curves"] = np.array([_curve(setting, Rows(str(path), 1)) for setting in recorded_settings(small=small)])
    np.savez(path, **held)


def order(dataset: Dataset, slots: int, steps: int) -> np.ndarray[Any, Any]:
    """Return the rows of each slot in each step as our plan has them: (steps, slots, rows), −1 where there is none."""
    plan = Plan.of(dataset, seed=SEED, global_batch=BATCH, slots=slots)
    found = np.full((steps, slots, BATCH // slots), -1)
    for slot in range(slots):
        for block in range(plan.block_of(steps - 1) + 1):
            rows = plan.block(slot, block).rows(0, steps)
            for step in np.unique(rows.step):
                part = rows.row[rows.step == step]
                found[step, slot, : len(part)] = part
    return found


def _curve(setting: tuple[float, int], rows: Rows) -> list[float]:
    """Return the validation losses of a whole trial whose learning rate falls to nothing as half a cosine."""
    losses: list[float] = []
    train(
        setting,
        rows,
        steps=RECORDED_STEPS,
        every=RECORDED_EVERY,
        schedule=lambda share: (1 + math.cos(math.pi * share)) / 2,
        report=lambda _, loss: losses.append(loss),
    )
    return losses
