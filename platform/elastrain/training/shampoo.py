"""Shampoo with averages of its statistics, the step length of Adam, and a state of plain tensors."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

GRAFTING_EPS = 1e-8  # in the divisor of Adam, whose step length is taken
TINY = 1e-30


class Shampoo(Optimizer):
    """Gupta et al. 2018 (arXiv 1802.09568), with averages and grafting as in Shi et al. 2023 (arXiv 2309.06497).

    For a gradient G of k preconditioned dimensions: `F_i ← β₂F_i + (1−β₂)G₍ᵢ₎G₍ᵢ₎ᵀ` for each dimension i, an average M
    of G with β₁, and the update `F₁^(−1/2k) … F_k^(−1/2k) M`, as long as that of Adam (with 1e-8 in its divisor), which
    is also what is done until there are roots. Averages are freed of their start at zero. Roots are taken every
    `precondition_frequency` steps, in float64, of `F + eps·λ_max(F)·I`. A dimension longer than `max_precondition_dim`
    is left as it is. Weight decay is AdamW's. Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 1024,
    ) -> None:
        if precondition_frequency < 1 or max_precondition_dim < 1:
            raise ValueError("precondition_frequency and max_precondition_dim must be at least 1")
        settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        limits = {"precondition_frequency": precondition_frequency, "max_precondition_dim": max_precondition_dim}
        super().__init__(params, {"lr": lr, **settings, **limits, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; takes no closure."""
        assert closure is None, "gradients are there"
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(_start(parameter, group["max_precondition_dim"]))
                    update = _direction(parameter.grad, state, group)
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def _start(parameter: Tensor, longest: int) -> dict[str, Any]:
    """Return the state of a parameter before its first step; None stands for a dimension that is too long."""
    like = torch.zeros_like(parameter)
    factors = [like.new_zeros(size, size) if size <= longest else None for size in parameter.shape]
    return {"mean": like, "square": like.clone(), "factors": factors, "roots": []}


def _direction(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Move a parameter's averages on; return the update before it is multiplied by the learning rate."""
    (first, second), step = group["betas"], group["step"]
    state["mean"].lerp_(gradient, 1.0 - first)
    state["square"].mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
    for dim, factor in enumerate(state["factors"]):
        if factor is not None:
            rows = gradient.movedim(dim, 0).flatten(1) if gradient.dim() > 1 else gradient.unsqueeze(1)
            factor.lerp_(rows @ rows.T, 1.0 - second)
    there = [factor for factor in state["factors"] if factor is not None]
    fresh = 1.0 - second**step
    if there and step % group["precondition_frequency"] == 0:
        power, ridge = -0.5 / len(there), group["eps"]
        state["roots"] = [None if f is None else _root(f / fresh, power, ridge) for f in state["factors"]]
    mean: Tensor = state["mean"] / (1.0 - first**step)
    adam: Tensor = mean / ((state["square"] / fresh).sqrt_().add_(GRAFTING_EPS))
    if not state["roots"]:
        return adam
    found: Tensor = mean
    for dim, root in enumerate(state["roots"]):
        if root is not None:
            found = torch.tensordot(root, found, dims=([1], [dim])).movedim(0, dim)
    return found.mul(torch.linalg.vector_norm(adam) / torch.linalg.vector_norm(found).clamp_min(TINY))


def _root(factor: Tensor, power: float, ridge: float) -> Tensor:
    """Return `(factor + ridge·λ_max·I)^power` of a symmetric matrix without negative eigenvalues but for rounding."""
    values, vectors = torch.linalg.eigh(factor.double())
    values = (values.clamp_min(0.0) + ridge * values[-1].clamp_min(0.0)).clamp_min(TINY)
    root: Tensor = (vectors * values**power) @ vectors.T
    return root.to(factor.dtype)
