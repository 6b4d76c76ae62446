"""What both sides of the loop case train: the same model, weights, batches and order, held in memory."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from benchmarks.machine import ROOT
from torch import Tensor, nn
from torch.nn import functional

from elastrain.data.columns import Array, Column
from elastrain.data.dataset import Dataset, Shard
from elastrain.data.plan import Plan, hash64
from elastrain.spec.train import BudgetSpec, CheckpointSpec, DataSpec, OptimizerSpec, TrainSpec, WorkersSpec
from elastrain.training.loop import CUDA_READ_STEPS
from elastrain.training.state import INIT, seed_all
from elastrain.training.task import make_task

SEED = 0
WARM_STEPS = 20
GPU_WARM_STEPS = 2 * CUDA_READ_STEPS - 1  # the last of those whose losses are read together
GPT = {"n_layer": 4, "n_head": 4, "n_embd": 64}
GPU_GPT = {"n_layer": 12, "n_head": 12, "n_embd": 768}  # the size of GPT-2 small


@dataclass(frozen=True, kw_only=True)
class Work:
    """The columns in memory, the dataset that describes them, and the spec over it."""

    spec: TrainSpec
    dataset: Dataset
    arrays: dict[str, Array]
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much work: rows in the data, rows and slots of a step, steps, and the workers that share them."""

    held: int
    rows: int
    slots: int
    workers: int
    steps: int


def gpu_work(given: Mapping[str, Any], consistency: Literal["sample", "bitwise"]) -> Work:
    """Return the work of `gpt`, in the size of GPT-2 small and bf16, or of `mlp`, for one GPU.

    `given`: `model`, `slots`, `steps`, and the `rows` of a step; a row of `gpt` is 64 tokens.
    """
    model = given["model"]
    size = Size(held=4096, rows=given["rows"], slots=given["slots"], workers=1, steps=given["steps"])
    work = work_of(model, size, consistency)
    changes = {"precision": "bf16", "task_args": GPU_GPT} if model == "gpt" else {}
    return replace(work, spec=work.spec.model_copy(update=changes))


def make_work(model: str, workers: int, steps: int) -> Work:
    """Return the work of `gpt` (about 10 ms a step on one core) or `mlp` (under 1 ms), one slot a worker."""
    held, rows = (2048, 7) if model == "gpt" else (4096, 32)
    return work_of(model, Size(held=held, rows=rows * workers, slots=workers, workers=workers, steps=steps))


def work_of(model: str, size: Size, consistency: Literal["sample", "bitwise"] = "sample") -> Work:
    """Return the work of a model in a size; `held` rows are cut into four row groups."""
    generator = np.random.default_rng(SEED)
    arrays: dict[str, Array]
    if model == "gpt":
        tokens = generator.integers(0, 256, (size.held, 65)).astype(np.uint16)
        arrays, args, task = {"tokens": tokens}, GPT, "tiny_gpt/task.py:TinyGPT"
        columns = [Column(name="tokens", dtype="uint16", shape=(65,), num_values=256)]
    else:
        image = generator.integers(0, 17, (size.held, 8, 8)).astype(np.uint8)
        label = generator.integers(0, 10, size.held).astype(np.uint8)
        arrays, args, task = {"image": image, "label": label}, {"hidden": 128}, "digits_mlp/task.py:DigitsMLP"
        columns = [Column(name="image", dtype="uint8", shape=(8, 8), num_values=17)]
        columns.append(Column(name="label", dtype="uint8", shape=(), num_values=10))
    shard = Shard(path="memory", size_bytes=0, row_groups=(size.held // 4,) * 4, footer="")
    dataset = Dataset(url="memory", columns=tuple(columns), shards=(shard,), fingerprint="memory", packed=True)
    spec = TrainSpec(
        name=f"loop-{model}",
        task=str(ROOT / "pipelines" / task),
        task_args=args,
        data=DataSpec(train="memory", global_batch=size.rows, slots=size.slots, seed=SEED),
        optimizer=OptimizerSpec(name="adamw", lr=1e-4),
        budget=BudgetSpec(steps=size.steps),
        workers=WorkersSpec(min=size.workers, max=size.workers),
        checkpoint=CheckpointSpec(every_steps=10 * size.steps),
        consistency=consistency,
    )
    plan = Plan.of(dataset, seed=SEED, global_batch=size.rows, slots=size.slots)
    return Work(spec=spec, dataset=dataset, arrays=arrays, plan=plan)


def new_model(work: Work, device: torch.device) -> nn.Module:
    """Return the model with the weights that our state would give it."""
    seed_all(hash64(SEED, INIT), device)
    return make_task(work.spec, work.dataset).build().to(device)


def batches_of(work: Work, slot: int, steps: int) -> list[dict[str, Tensor]]:
    """Return a slot's batch of each step as the plan has it."""
    found = []
    for block in range(work.plan.block_of(steps - 1) + 1):
        rows = work.plan.block(slot, block).rows(0, steps)
        cuts = np.flatnonzero(np.diff(rows.step)) + 1
        found += [
            {name: torch.from_numpy(array[part]) for name, array in work.arrays.items()}
            for part in np.split(rows.row, cuts)
        ]
    return found


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of a batch, written as one would by hand."""
    if "tokens" in batch:
        tokens = batch["tokens"].long()
        return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    image = batch["image"].flatten(1).float() / 16
    return functional.cross_entropy(model(image), batch["label"].long())


def measured(moments: Sequence[float], losses: Sequence[float]) -> tuple[dict[str, float], dict[str, int], str]:
    """Return microseconds a step (median, mean) after the warm-up, the counters, and the last loss as a digest.

    The loss has three decimals: the sides add in different orders.
    """
    steps = [(later - earlier) * 1e6 for earlier, later in itertools.pairwise(moments[WARM_STEPS:])]
    measures = {"step_us": statistics.median(steps), "mean_step_us": statistics.fmean(steps)}
    return measures, {"steps": len(losses)}, f"{losses[-1]:.3f}"


def measured_on_gpu(moments: Sequence[float], losses: Sequence[float]) -> tuple[dict[str, float], dict[str, int]]:
    """Return the mean microseconds of a step, the most memory held, the last loss, and the counters.

    Of a GPU's steps one knows the time where their losses are read.
    """
    seconds = moments[-1] - moments[GPU_WARM_STEPS]
    step_us = seconds / (len(moments) - 1 - GPU_WARM_STEPS) * 1e6
    measures = {"step_us": step_us, "peak_mb": torch.cuda.max_memory_allocated() / 1e6, "loss": losses[-1]}
    return measures, {"steps": len(losses)}
