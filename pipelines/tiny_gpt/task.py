"""A small GPT on tokens: learned positions, pre-norm blocks, causal attention, output weights tied to the input.

Shapes: B rows, T tokens, D width, V vocabulary. Architecture and initialisation as in GPT-2 (Radford et al. 2019).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from elastrain import Batch, Loss, Task


class Block(nn.Module):
    """One transformer block: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to earlier tokens, then transform each by itself."""
        x = x + self.dropout(self.project(self._attend(self.norm_attention(x))))
        change: Tensor = self.dropout(self.narrow(functional.gelu(self.widen(self.norm_mlp(x)))))
        return x + change

    def _attend(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        # (B, T, 3D) -> three of (B, heads, T, D / heads)
        q, k, v = (
            part.view(rows, length, self.heads, -1).transpose(1, 2) for part in self.attention(x).split(width, 2)
        )
        rate = self.rate if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return y.transpose(1, 2).reshape(rows, length, width)


class GPT(nn.Module):
    """Tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, vocabulary: int, context: int, layers: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                scale = 0.02 / math.sqrt(2 * layers) if name.endswith(("project.weight", "narrow.weight")) else 0.02
                nn.init.normal_(parameter, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each next token."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class TinyGPT(Task):
    """Predicts the next token. `task_args`: n_layer, n_head, n_embd, dropout. Column: `tokens` (context + 1)."""

    def build(self) -> nn.Module:
        """Return a GPT whose context and vocabulary come from the data."""
        (length,) = self.data.shape("tokens")
        return GPT(
            vocabulary=self.data.num_values("tokens"),
            context=length - 1,
            layers=int(self.args.get("n_layer", 4)),
            heads=int(self.args.get("n_head", 4)),
            width=int(self.args.get("n_embd", 128)),
            dropout=float(self.args.get("dropout", 0.0)),
        )

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Loss]:
        """Cross entropy in nats, summed over the tokens."""
        tokens = batch["tokens"].long()
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        return {"loss": Loss(loss, tokens[:, 1:].numel())}
