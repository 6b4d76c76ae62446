"""The digits network, with a note of when it evaluates and trains."""

from collections.abc import Mapping

import torch
from benchmarks.sweep import moments
from torch import nn
from torch.nn import functional

from elastrain import Batch, Loss, Task


class Noted(Task):
    """Pixels - hidden - 10 with ReLU. `task_args`: hidden, and the folder that the notes go to."""

    def build(self) -> nn.Module:
        """Return the network: (rows, 64) -> (rows, 10)."""
        width = int(self.args["hidden"])
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Loss]:
        """Cross entropy summed over the samples."""
        if model.training:
            moments.trains(self, str(self.args["notes"]))
        labels = batch["label"].long()
        loss = functional.cross_entropy(model(batch["image"].flatten(1).float() / 16), labels, reduction="sum")
        if not torch.is_grad_enabled():
            moments.evaluates()
        return {"loss": Loss(loss, len(labels))}
