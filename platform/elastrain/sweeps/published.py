"""What is published of optimizers: the settings that they come with, and the spaces in which others tuned them.

Spaces of adamw, nadam, nesterov, shampoo and adafactor are those of AlgoPerf's baselines (Dahl et al., "Benchmarking
Neural Network Training Algorithms", arXiv 2306.07179); the others are ours, and docs/optimizers.md says after what.
Settings are those of the paper, or of the library's default.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Range = tuple[float, float]


def _space(lr: Range, weight_decay: Range, **kept: Range) -> dict[str, Any]:
    """Return a space: `beta1` or `momentum` as the range of what is not kept."""
    field = {"beta1": "betas.0", "momentum": "momentum"}
    inverse = {field[name]: {"one_minus_log": each} for name, each in kept.items()}
    return {"lr": {"log": lr}, **inverse, "weight_decay": {"log": weight_decay}}


_ADAM_LR, _ADAM_DECAY = (1e-4, 1e-2), (5e-3, 1.0)
_SGD_LR, _SGD_DECAY = (2e-2, 5.0), (1e-7, 5e-5)
_COUPLED = (1e-7, 1e-3)
_SGD = _space(_SGD_LR, _SGD_DECAY)
_MOMENTUM = _space(_SGD_LR, _SGD_DECAY, momentum=(5e-3, 0.3))
_ADAM = _space(_ADAM_LR, _COUPLED, beta1=(0.02, 0.5))

# By name, the optimizer's fields as an arm's `optimizer` has them.
SPACES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sgd": _SGD,
        "full_batch": _SGD,
        "momentum": _MOMENTUM,
        "nesterov": _MOMENTUM,
        "adam": _ADAM,
        "radam": _ADAM,
        "adamw": _space(_ADAM_LR, _ADAM_DECAY, beta1=(0.02, 0.5)),
        "nadam": {
            **_space(_ADAM_LR, _ADAM_DECAY, beta1=(4e-3, 0.1)),
            "args": {"decoupled_weight_decay": True},
        },
        "adagrad": _space((1e-3, 1.0), _COUPLED),
        "rmsprop": _space((1e-5, 1e-2), _COUPLED, momentum=(0.02, 0.5)),
        "adafactor": _space(_ADAM_LR, (1e-3, 1.0)),
        "lion": _space((1e-5, 1e-3), (5e-2, 10.0), beta1=(0.02, 0.5)),
        "muon": _space((1e-4, 1e-1), _ADAM_DECAY, momentum=(0.01, 0.2)),
        "shampoo": _space(_ADAM_LR, _ADAM_DECAY, beta1=(0.01, 0.15)),
        "soap": _space(_ADAM_LR, _ADAM_DECAY, beta1=(0.01, 0.15)),
        "schedule_free_sgd": _space((0.1, 50.0), _SGD_DECAY, momentum=(0.02, 0.3)),
        "schedule_free_adamw": _space((1e-4, 3e-2), _ADAM_DECAY, beta1=(0.02, 0.2)),
    }
)

# Momentum, betas and eps are those that the spec puts in for a name; a learning rate it asks for.
SETTINGS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "sgd": {"lr": 0.1},
        "full_batch": {"lr": 0.1},
        "momentum": {"lr": 0.1},
        "nesterov": {"lr": 0.1},
        "adam": {"lr": 1e-3},
        "adamw": {"lr": 1e-3, "weight_decay": 0.01},
        "nadam": {"lr": 2e-3},
        "radam": {"lr": 1e-3},
        "adagrad": {"lr": 1e-2},
        "rmsprop": {"lr": 1e-2},
        "adafactor": {"lr": 1e-2},
        "lion": {"lr": 1e-4},
        "muon": {"lr": 1e-3, "weight_decay": 0.1},
        "shampoo": {"lr": 1e-3},
        "soap": {"lr": 3e-3, "weight_decay": 0.01},
        "schedule_free_sgd": {"lr": 1.0},
        "schedule_free_adamw": {"lr": 2.5e-3},
    }
)
