"""A training script as one writes it by hand: DDP, fused AdamW, the loss read and noted at every step."""

import tempfile
import time
from typing import Any

import torch
import torch.distributed
from benchmarks.loop.work import batches_of, make_work, mean_loss, measured, new_model
from benchmarks.script import finish, in_ranks, options
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(rank: int, given: dict[str, Any], folder: str) -> list[tuple[float, float]]:
    """Train as one process; return (loss, time) of each step."""
    torch.set_num_threads(1)
    size, steps = given["workers"], given["steps"]
    work = make_work(given["model"], size, steps)
    batches = batches_of(work, rank, steps)
    model: nn.Module = new_model(work, torch.device("cpu"))
    if given["ddp"]:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        model = DistributedDataParallel(model)
    settings = work.spec.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    lines: list[tuple[float, float]] = []
    model.train()
    for batch in batches:
        loss = mean_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lines.append((loss.item(), time.time()))
    if given["ddp"]:
        torch.distributed.destroy_process_group()
    return lines


def main() -> None:
    """Train with one process a worker."""
    given = options()
    with tempfile.TemporaryDirectory() as folder:
        ranks = in_ranks(given["workers"], train, given, folder)
    losses = [sum(loss for loss, _ in step) / len(step) for step in zip(*ranks, strict=True)]
    finish(*measured([moment for _, moment in ranks[0]], losses))


if __name__ == "__main__":
    main()
