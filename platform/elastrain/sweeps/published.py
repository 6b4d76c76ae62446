"""What is published of optimizers: the settings that they come with, and the spaces in which others tuned them.

Spaces of adamw, nesterov and shampoo are those of AlgoPerf's external tuning (Dahl et al., "Benchmarking Neural
Network Training Algorithms", arXiv 2306.07179); an optimizer beside them has the space of the nearest of the three, its
learning rate as far from it as its publication says (lion: a third to a tenth of adamw's; arXiv 2302.06675). Settings
are those of the paper, or of the library's default.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Space = Mapping[str, Mapping[str, Any]]

_ADAM_LR, _ADAM_BETA1 = {"log": [1e-4, 1e-2]}, {"one_minus_log": [0.02, 0.5]}
_SGD_LR, _SGD_MOMENTUM = {"log": [0.02, 5.0]}, {"one_minus_log": [5e-3, 0.3]}
_SGD_DECAY, _ADAM_DECAY = {"log": [1e-7, 5e-5]}, {"log": [5e-3, 1.0]}
_SGD: Space = {"lr": _SGD_LR, "weight_decay": _SGD_DECAY}
_MOMENTUM: Space = {"lr": _SGD_LR, "momentum": _SGD_MOMENTUM, "weight_decay": _SGD_DECAY}
_ADAM: Space = {"lr": _ADAM_LR, "betas.0": _ADAM_BETA1}
_ADAMW: Space = {"lr": _ADAM_LR, "betas.0": _ADAM_BETA1, "weight_decay": _ADAM_DECAY}

SPACES: Mapping[str, Space] = MappingProxyType(
    {
        "sgd": _SGD,
        "full_batch": _SGD,
        "momentum": _MOMENTUM,
        "nesterov": _MOMENTUM,
        "adam": _ADAM,
        "adamw": _ADAMW,
        "nadam": _ADAM,
        "radam": _ADAM,
        "adagrad": {"lr": {"log": [1e-3, 1e-1]}},
        "rmsprop": {"lr": _ADAM_LR},
        "adafactor": {"lr": {"log": [1e-3, 1e-1]}},
        "lion": {**_ADAMW, "lr": {"log": [1e-5, 3e-3]}},
        "muon": {"lr": _ADAM_LR, "momentum": {"one_minus_log": [0.01, 0.2]}, "weight_decay": _ADAM_DECAY},
        "shampoo": {"lr": _ADAM_LR, "betas.0": {"one_minus_log": [1e-2, 0.15]}},
        "soap": _ADAMW,
        "schedule_free_sgd": {"lr": {"log": [0.1, 50.0]}, "momentum": {"one_minus_log": [0.02, 0.5]}},
        "schedule_free_adamw": {**_ADAMW, "lr": {"log": [5e-4, 5e-2]}},
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
