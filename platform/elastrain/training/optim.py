"""Optimizers by name and schedules as pure functions of the step.

Also what an optimizer keeps, taken apart into tensors by name and JSON, and put together again to the bit.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastrain.data.transforms import load_object
from elastrain.errors import SpecError
from elastrain.spec.problems import nearest
from elastrain.spec.train import OptimizerSpec, ScheduleSpec

PLAIN = (type(None), bool, int, float, str)  # what JSON holds as it is
SET_ANEW = ("params", "lr")  # entries of a group that whoever resumes has, or sets at each step
# No step moves such an entry of a group: whoever resumes has it from the constructor.
CONSTANTS = (FunctionType, BuiltinFunctionType, type, torch.dtype, torch.device)


def check_phase_names(spec: OptimizerSpec, phases: Sequence[str]) -> None:
    """Raise SpecError if the spec has settings for a phase that is none of the task's."""
    for name in spec.phases:
        if name not in phases:
            there = ", ".join(phases)
            raise SpecError(f"optimizer.phases.{name}: the task's phases are {there}{nearest(name, phases)}")


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


def pack(optimizer: Optimizer, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """Return all that steps leave in an optimizer: JSON, and the tensors that it names, under `prefix`; no copies.

    Besides `state` that is every entry of `param_groups` but parameters, `lr` and constants. Raises SpecError for what
    neither JSON nor safetensors can hold.
    """
    kept = optimizer.state_dict()
    groups = [{k: entry for k, entry in group.items() if not _stays(k, entry)} for group in kept["param_groups"]]
    packing = _Packing(optimizer)
    return packing.pack({**kept, "param_groups": groups}, prefix), packing.tensors


def unpack(optimizer: Optimizer, packed: Any, tensors: Mapping[str, Tensor]) -> None:
    """Leave in an optimizer what `pack` took from one made alike; it gets copies of the tensors."""
    parameters = _parameters(optimizer)
    kept = _unpacked(packed, tensors, parameters[0].device, {_name(i): p for i, p in enumerate(parameters)})
    own = optimizer.state_dict()
    groups = [
        {k: entry for k, entry in mine.items() if _stays(k, entry) or k in theirs} | theirs
        for mine, theirs in zip(own["param_groups"], kept["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({**own, **kept, "param_groups": groups})
    # It gave each tensor its parameter's type, took text for a list, and tore apart what was one tensor in two places.
    for key, entry in kept["state"].items():
        optimizer.state[parameters[key] if isinstance(key, int) else key] = entry
    for mine, theirs in zip(optimizer.param_groups, kept["param_groups"], strict=True):
        mine.update(theirs)


class _Packing:
    """Turns values into JSON and `tensors` by name; a tensor in two places has one name, a parameter that of its place.

    In the JSON, an object with one of these keys stands for what JSON lacks: `tensor` (with its strides, and whether it
    is on the CPU though parameters are not), `dict` (a list of pairs: keys may be numbers), `tuple`, `numpy`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        parameters = _parameters(optimizer)
        self.tensors: dict[str, Tensor] = {}
        self._kind, self._device = type(optimizer).__name__, parameters[0].device
        self._names = {id(parameter): _name(index) for index, parameter in enumerate(parameters)}

    def pack(self, value: Any, name: str) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind in (list, tuple) or (kind is dict and all(type(key) in PLAIN for key in value)):
            return self._container(value, name)
        if kind in (Tensor, nn.Parameter) and value.layout is torch.strided and value.dtype != torch.complex128:
            return self._tensor(value, name)
        if isinstance(value, np.generic) and isinstance(value.item(), int | float):
            return {"numpy": [value.dtype.name, value.item()]}
        raise SpecError(
            f"optimizer {self._kind}: {name} is a {kind.__name__}, which a checkpoint cannot hold; keep numbers, text "
            f"and plain tensors there, in lists, tuples, and dicts by text or number, or choose another optimizer"
        )

    def _container(self, value: Any, name: str) -> Any:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        pairs = [[key, self.pack(entry, f"{name}/{key}")] for key, entry in entries]
        if isinstance(value, dict):
            return {"dict": pairs}
        items = [entry for _, entry in pairs]
        return {"tuple": items} if isinstance(value, tuple) else items

    def _tensor(self, value: Tensor, name: str) -> dict[str, Any]:
        if id(value) not in self._names:
            while name in self.tensors:
                name += "'"  # two places may read alike: a/b, and b in a
            self._names[id(value)], self.tensors[name] = name, value.detach()
        # Those of a copy, since a view may have gaps; dimensions in another order than rows first keep that order.
        strides = (value if value.is_contiguous() else torch.empty_like(value, device="meta")).stride()
        aside = value.device.type == "cpu" != self._device.type
        return {"tensor": self._names[id(value)], "strides": list(strides), "aside": aside}


def _unpacked(packed: Any, tensors: Mapping[str, Tensor], device: torch.device, made: dict[str, Tensor]) -> Any:
    """Return what was packed; `made` holds the tensors that are there by now."""

    def inner(entry: Any) -> Any:
        return _unpacked(entry, tensors, device, made)

    value = packed
    match packed:
        case list():
            value = [inner(entry) for entry in packed]
        case {"tuple": entries}:
            value = tuple(inner(entry) for entry in entries)
        case {"dict": pairs}:
            value = {key: inner(entry) for key, entry in pairs}
        case {"numpy": [kind, number]}:
            value = np.dtype(kind).type(number)
        case {"tensor": name, "strides": strides, "aside": aside}:
            if name not in made:
                stored, place = tensors[name], torch.device("cpu") if aside else device
                made[name] = torch.empty_strided(stored.shape, strides, dtype=stored.dtype, device=place).copy_(stored)
            value = made[name]
    return value


def _stays(key: str, entry: Any) -> bool:
    return key in SET_ANEW or isinstance(entry, CONSTANTS)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _name(index: int) -> str:
    return f"parameter {index}"
