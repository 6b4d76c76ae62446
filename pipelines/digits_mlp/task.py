"""The two-layer network of Elastrain's founding document: pixels - 128 - 10 with ReLU."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from elastrain import Batch, Loss, Ratio, Task


class DigitsMLP(Task):
    """Classifies images by one hidden layer. `task_args`: hidden (units), label_smoothing, dropout.

    Columns: `image` (height, width) of bytes, `label` of classes. Input and class sizes come from the data.
    """

    def build(self) -> nn.Module:
        """Return the network: (rows, pixels) -> (rows, classes)."""
        hidden = int(self.args.get("hidden", 128))
        pixels = math.prod(self.data.shape("image"))
        return nn.Sequential(
            nn.Linear(pixels, hidden),
            nn.ReLU(),
            nn.Dropout(float(self.args.get("dropout", 0.0))),
            nn.Linear(hidden, self.data.num_values("label")),
        )

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Loss]:
        """Cross entropy summed over the samples."""
        smoothing = float(self.args.get("label_smoothing", 0.0))
        logits = model(self.inputs(batch))
        labels = batch["label"].long()
        return {
            "loss": Loss(
                functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing), len(labels)
            )
        }

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Ratio]:
        """Share of samples whose largest logit is the label's."""
        hits = (model(self.inputs(batch)).argmax(dim=1) == batch["label"].long()).sum()
        return {"accuracy": Ratio(hits, len(batch["label"]))}

    def inputs(self, batch: Batch) -> Tensor:
        """Pixels as (rows, pixels) in 0…1: the largest byte of the data (16 in digits, 255 in MNIST) becomes 1."""
        image = batch["image"]
        largest = (self.data.columns["image"].num_values or 256) - 1
        return image.flatten(1).to(torch.get_default_dtype()) / largest
