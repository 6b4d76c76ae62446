"""Muon for the hidden matrices of a model and AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """torch's Muon over the groups `matrices` (two dimensions each), its AdamW over the groups `others`.

    Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. With `adjust_lr_fn: match_rms_adamw` (Liu et
    al. 2025, arXiv 2502.16982) an update is as large as AdamW's, so that one `lr` and one `weight_decay` do for both;
    `original` is Jordan's, for an `adamw_lr` of its own (`lr` where unset). Raises ValueError for settings out of
    range.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        *,
        lr: float,
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        adjust_lr_fn: str = "match_rms_adamw",
        **settings: Any,
    ) -> None:
        """Take `momentum`, `nesterov`, `ns_steps` and `ns_coefficients` for Muon, `betas` and `eps` for AdamW."""
        ratio = 1.0 if adamw_lr is None else adamw_lr / lr
        decay = settings.get("weight_decay", 0.0)
        self._rules: dict[str, Optimizer] = {"muon": Muon(matrices, lr=lr, adjust_lr_fn=adjust_lr_fn, **settings)}
        if others:
            rest = AdamW(others, lr=lr * ratio, weight_decay=decay, betas=betas, eps=eps, fused=True)
            self._rules["adamw"] = rest
        for rule, optimizer in self._rules.items():
            for group in optimizer.param_groups:
                group.update(rule=rule, lr_ratio=ratio if rule == "adamw" else 1.0)
        super().__init__([group for each in self._rules.values() for group in each.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; takes no closure."""
        assert closure is None, "gradients are there"
        for rule, optimizer in self._rules.items():
            # Given anew each time: loading a state replaces groups and state of this optimizer.
            optimizer.param_groups = [group for group in self.param_groups if group["rule"] == rule]
            optimizer.state = self.state
            optimizer.step()
