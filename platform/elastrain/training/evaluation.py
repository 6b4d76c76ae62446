"""Evaluation: every sample once, in fixed batches whose sums are added in order, whoever computed them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from elastrain.data.blocks import keeps_evaluation
from elastrain.data.columns import Array
from elastrain.data.dataset import Dataset
from elastrain.data.plan import Plan, hash64
from elastrain.errors import SpecError
from elastrain.observe.ledger import Clock
from elastrain.training.batches import EPOCH, ROW, SLOT, STEP, Feed, tensor_of
from elastrain.training.manifests import check_best
from elastrain.training.precision import forward_context
from elastrain.training.reduce import Group, sum_in_order
from elastrain.training.state import EVALUATE, TrainState, broadcast_object, seed_all
from elastrain.training.task import Batch, calling, metric_ratios, phase_loss

SMALL_BATCH_BYTES = 64 << 10


def batch_size(plan: Plan, row_bytes: int, micro_batch: int | None) -> int:
    """Return the rows of an evaluation forward: `micro_batch`, else a slot's, more where rows are small."""
    slot = min(-(-plan.global_batch // plan.slots), 4096)
    return micro_batch or max(slot, SMALL_BATCH_BYTES // max(1, row_bytes), 1)


def evaluate(
    state: TrainState, feed: Feed, plan: Plan, dataset: Dataset, group: Group, *, block_rows: int, clock: Clock
) -> dict[str, float]:
    """Return `val_loss` and the task's metrics over the whole dataset.

    Blocks of `block_rows` rows are dealt to the workers; batches, where there are fewer blocks than workers, unless the
    data are read anew each time: then one worker reads a block, and some have nothing to do. With several phases there
    is a `val_loss_<phase>` for each, and `val_loss` is their sum. Waiting for blocks is booked under `data`, each batch
    anew under `evaluate`, so that one that takes too long can be told from many; waiting for the others under `reduce`.
    Raises SpecError if the task fails, or `checkpoint.best` is none of the metrics.
    """
    size = batch_size(plan, dataset.row_bytes, state.spec.micro_batch)
    num_blocks = -(-dataset.num_rows // block_rows)
    by_block = num_blocks >= group.size or not keeps_evaluation(dataset, state.spec.data.transforms)
    mine = range(group.rank, num_blocks, group.size) if by_block else range(num_blocks)
    per_block = -(-block_rows // size)
    sums: dict[int, dict[str, tuple[float, float]]] = {}
    with _evaluating(state):
        clock.switch("data")
        for block, arrays in feed.evaluation(list(mine)):
            for place, batch in enumerate(_batches(arrays, size, state.device)):
                clock.switch("evaluate")
                index = block * per_block + place
                if by_block or index % group.size == group.rank:
                    seed_all(hash64(state.spec.data.seed, EVALUATE, index), state.device)
                    sums[index] = _sums(state, batch)
            clock.switch("data")
    clock.switch("reduce")  # from here on it is others that may take long
    names = broadcast_object(group, list(sums[0]) if 0 in sums else [], 0, state.device)
    table = torch.zeros(num_blocks * per_block, 2 * len(names), dtype=torch.float64)
    for index, entry in sums.items():
        if entry.keys() != set(names):
            raise SpecError(
                f"task {state.spec.task}: metrics() gives {sorted(entry)} on one batch and {sorted(names)} on another; "
                f"give all of them on each, Ratio(0, 0) where there is nothing"
            )
        table[index] = torch.tensor([number for name in names for number in entry[name]], dtype=torch.float64)
    shared = table.to(state.device)
    group.all_reduce(shared)
    totals = sum_in_order(shared.cpu()).tolist()
    metrics = {n: totals[2 * i] / totals[2 * i + 1] if totals[2 * i + 1] else 0.0 for i, n in enumerate(names)}
    losses = [value for name, value in metrics.items() if name.startswith("val_loss_")]
    found = {"val_loss": sum(losses), **metrics} if losses else metrics
    check_best(state.spec.checkpoint, found)
    return found


def _batches(arrays: dict[str, Array], size: int, device: torch.device) -> Iterator[Batch]:
    columns = {n: tensor_of(a, device) for n, a in arrays.items() if n not in (EPOCH, STEP, SLOT, ROW)}
    rows = len(arrays[ROW])
    for first in range(0, rows, size):
        yield Batch({name: tensor[first : first + size] for name, tensor in columns.items()})


def _sums(state: TrainState, batch: Batch) -> dict[str, tuple[float, float]]:
    task, found = state.task, {}
    with torch.no_grad(), forward_context(state.spec.precision, state.device):
        for phase in task.phases:
            with calling(state.spec.task, "losses() in evaluation"):
                loss = phase_loss(task, state.model, batch.clone(), phase)
            name = "val_loss" if len(task.phases) == 1 else f"val_loss_{phase}"
            found[name] = (float(loss.sum), float(loss.weight))
        with calling(state.spec.task, "metrics()"):
            metrics = metric_ratios(task, state.model, batch.clone())
        for name, ratio in metrics.items():
            if name in found:
                raise SpecError(f"task {state.spec.task}: metric {name!r} is the loss's own name; choose another")
            found[name] = (float(ratio.numerator), float(ratio.denominator))
    return found


@contextmanager
def _evaluating(state: TrainState) -> Iterator[None]:
    """Put the model into evaluation mode, with the averaged weights where the run has them; nothing in it moves."""
    state.buffers.begin(moving=False)
    averages = state.averages()
    kept = {name: p.detach().clone() for name, p in state.model.named_parameters()} if averages else {}
    state.model.eval()
    try:
        with torch.no_grad():
            for name, parameter in state.model.named_parameters():
                if averages:
                    parameter.copy_(averages[name])
        yield
    finally:
        with torch.no_grad():
            for name, parameter in state.model.named_parameters():
                if kept:
                    parameter.copy_(kept[name])
        state.buffers.put_back()
        state.model.train()
