"""A script for one GPU as one writes it by hand: autocast, fused AdamW, gradients accumulated over the slots.

The loss is read as often as ours reads it, since reading waits for the GPU; batches are copied from pinned memory.
"""

import time
from typing import Any

import torch
from benchmarks.loop.work import batches_of, gpu_work, mean_loss, measured_on_gpu, new_model
from benchmarks.script import finish, options

from elastrain.training.loop import CUDA_READ_STEPS


def train(given: dict[str, Any]) -> list[tuple[float, float]]:
    """Train; return (loss, time) of each step, the time being that at which the loss was read."""
    slots, steps, device = given["slots"], given["steps"], torch.device("cuda", 0)
    work = gpu_work(given, "sample")
    held = [batches_of(work, slot, steps) for slot in range(slots)]
    pinned = [[{k: v.pin_memory() for k, v in batch.items()} for batch in batches] for batches in held]
    model = new_model(work, device)
    settings = work.spec.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    lines: list[tuple[float, float]] = []
    pending: list[torch.Tensor] = []
    model.train()
    for step in range(steps):
        total = torch.zeros((), device=device)
        for slot in range(slots):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in pinned[slot][step].items()}
            with torch.autocast("cuda", torch.bfloat16, enabled=work.spec.precision == "bf16"):
                loss = mean_loss(model, batch) / slots
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        pending.append(total)
        if (step + 1) % CUDA_READ_STEPS == 0 or step + 1 == steps:
            losses = torch.stack(pending).tolist()
            lines += [(loss, time.time()) for loss in losses]
            pending.clear()
    return lines


def main() -> None:
    """Train and tell."""
    lines = train(options())
    finish(*measured_on_gpu([moment for _, moment in lines], [loss for loss, _ in lines]))


if __name__ == "__main__":
    main()
