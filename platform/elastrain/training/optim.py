"""Optimizers by name and schedules as pure functions of the step."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from elastrain.data.transforms import load_object
from elastrain.errors import SpecError
from elastrain.spec.train import OptimizerSpec, ScheduleSpec


def for_phase(spec: OptimizerSpec, phase: str) -> OptimizerSpec:
    """Return the optimizer of a phase: the spec with the phase's own settings; raises SpecError if they are wrong."""
    own = spec.phases.get(phase, {})
    try:
        return OptimizerSpec.model_validate({**spec.model_dump(exclude={"phases"}), **own})
    except ValueError as error:
        raise SpecError(f"optimizer.phases.{phase}: {error}") from error


def make_optimizer(spec: OptimizerSpec, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Return the optimizer that the spec names over `parameters`; raises SpecError for arguments it does not take.

    torch's own are used in their fused form: one kernel an update, on CPU and GPU.
    """
    common: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    match spec.name:
        case "sgd" | "full_batch":
            return torch.optim.SGD(parameters, **common, fused=True)
        case "momentum" | "nesterov":
            return torch.optim.SGD(
                parameters, **common, momentum=spec.momentum, nesterov=spec.name == "nesterov", fused=True
            )
        case "adam":
            return torch.optim.Adam(parameters, **common, betas=spec.betas, eps=spec.eps, fused=True)
        case "adamw":
            return torch.optim.AdamW(parameters, **common, betas=spec.betas, eps=spec.eps, fused=True)
        case _:
            return _custom(spec, parameters)


def _custom(spec: OptimizerSpec, parameters: Sequence[nn.Parameter]) -> Optimizer:
    kind = load_object(spec.name, where="optimizer.name")
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise SpecError(f"optimizer {spec.name}: not a class derived from torch.optim.Optimizer")
    given = {"lr": spec.lr, **spec.args}
    if "weight_decay" in inspect.signature(kind).parameters:
        given.setdefault("weight_decay", spec.weight_decay)
    try:
        optimizer = kind(parameters, **given)
        inspect.signature(optimizer.step).bind()
    except (TypeError, ValueError, RuntimeError) as error:
        why = "its step() needs a closure" if "closure" in str(error) else error
        raise SpecError(f"optimizer {spec.name}: {why}; check lr and optimizer.args, or choose another") from error
    return optimizer


def learning_factor(schedule: ScheduleSpec, step: int, num_steps: int) -> float:
    """Return the factor of the learning rate at a step of 0…num_steps−1; warm-up rises linearly from 1/warmup.

    Sources: cosine, Loshchilov and Hutter 2017 (arXiv 1608.03983); one_cycle, Smith and Topin 2018 (arXiv 1708.07120),
    rising over the first 30 %; wsd, Hu et al. 2024 (arXiv 2404.06395), linear decay; inverse_sqrt, Vaswani et al. 2017.

    >>> [round(learning_factor(ScheduleSpec(name="linear", warmup_steps=2), k, 6), 2) for k in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warm = schedule.warmup_steps
    if step < warm:
        return (step + 1) / warm
    left, final = max(1, num_steps - warm), schedule.final
    done = min(1.0, (step - warm) / left)
    factor = 1.0
    match schedule.name:
        case "linear":
            factor = 1.0 + (final - 1.0) * done
        case "cosine":
            factor = _cosine(1.0, final, done)
        case "wsd":
            factor = 1.0 + (final - 1.0) * max(0.0, (done - (1.0 - schedule.decay)) / schedule.decay)
        case "inverse_sqrt":
            factor = math.sqrt(max(warm, 1) / max(step, warm, 1))
        case "one_cycle":
            rise = done / 0.3
            factor = _cosine(0.04, 1.0, rise) if rise < 1.0 else _cosine(1.0, final, (done - 0.3) / 0.7)
    return factor


def _cosine(start: float, stop: float, done: float) -> float:
    """Return the value on the way from `start` (done 0) to `stop` (done 1), along half a cosine wave."""
    return stop + (start - stop) * 0.5 * (1.0 + math.cos(math.pi * done))
