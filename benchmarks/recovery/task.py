"""A small network on the digits with a sleep in each forward: it stands in for computing, and leaves the cores free."""

import time
from collections.abc import Mapping

from torch import nn
from torch.nn import functional

from elastrain import Batch, Loss, Task


class Sleepy(Task):
    """Pixels - 128 - 10 with ReLU. `task_args`: forward_s, the seconds that a forward of a slot sleeps."""

    def build(self) -> nn.Module:
        """Return the network: (rows, 64) -> (rows, 10)."""
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Loss]:
        """Cross entropy summed over the samples, after the sleep."""
        time.sleep(float(self.args["forward_s"]))
        labels = batch["label"].long()
        logits = model(batch["image"].flatten(1).float() / 8 - 1)
        return {"loss": Loss(functional.cross_entropy(logits, labels, reduction="sum"), len(labels))}
