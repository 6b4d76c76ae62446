"""Optimizers by name and schedules as pure functions of the step.

Also what an optimizer keeps, taken apart into tensors by name and JSON, and put together again to the bit.
"""

import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from elastrain.training.groups import Kind, decay_groups, hidden_matrices
from elastrain.training.muon import MuonAdamW
from elastrain.training.shampoo import Shampoo

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
    try:
        return spec.with_settings(spec.phases.get(phase, {}))
    except ValueError as error:
        raise SpecError(f"optimizer.phases.{phase}: {error}") from error


@dataclass(frozen=True, slots=True)
class Rule:
    """How an optimizer is made from its name: a class, or the name of one in the extra, and what it takes of a spec."""

    kind: type[Optimizer] | str
    takes: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


FUSED = {"fused": True}  # one kernel an update, on CPU and GPU
ADAM = ("betas", "eps")
RULES = {
    "sgd": Rule(torch.optim.SGD, (), FUSED),
    "full_batch": Rule(torch.optim.SGD, (), FUSED),
    "momentum": Rule(torch.optim.SGD, ("momentum",), FUSED),
    "nesterov": Rule(torch.optim.SGD, ("momentum",), {**FUSED, "nesterov": True}),
    "adam": Rule(torch.optim.Adam, ADAM, FUSED),
    "adamw": Rule(torch.optim.AdamW, ADAM, FUSED),
    "nadam": Rule(torch.optim.NAdam, ADAM),
    "radam": Rule(torch.optim.RAdam, ADAM),
    "adagrad": Rule(torch.optim.Adagrad, ("eps",), FUSED),
    "rmsprop": Rule(torch.optim.RMSprop, ("momentum", "eps")),
    "adafactor": Rule(torch.optim.Adafactor),
    "muon": Rule(MuonAdamW, ("momentum", *ADAM)),
    "shampoo": Rule(Shampoo, ADAM),
    "lion": Rule("Lion", ("betas",)),
    "soap": Rule("SOAP", ADAM),
    "schedule_free_sgd": Rule("ScheduleFreeSGD", ("momentum",)),
    "schedule_free_adamw": Rule("ScheduleFreeAdamW", ADAM),
}


def make_optimizer(spec: OptimizerSpec, named: Mapping[str, nn.Parameter], kinds: Mapping[str, Kind]) -> Optimizer:
    """Return the optimizer that the spec names over the parameters `named`, whose `kinds` are those of `kinds_of`.

    Groups may have an `lr_ratio`, their share of the learning rate. Raises SpecError for arguments that it does not
    take, for a missing extra, and where there is nothing of the kind that it is for.
    """
    rule = RULES.get(spec.name)
    kind = _class(spec.name, rule)
    given: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    if rule is not None:
        given |= {name: getattr(spec, name) for name in rule.takes} | dict(rule.fixed)
    elif "weight_decay" not in inspect.signature(kind).parameters:
        del given["weight_decay"]
    given |= spec.args
    _check_arguments(spec, kind, given)
    try:
        optimizer = _made(spec, kind, given, named, kinds)
        inspect.signature(optimizer.step).bind()
    except (TypeError, ValueError, RuntimeError) as error:
        why = "its step() needs a closure" if "closure" in str(error) else error
        raise SpecError(f"optimizer {spec.name}: {why}; check lr and optimizer.args, or choose another") from error
    if averages_weights(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _class(name: str, rule: Rule | None) -> type[Optimizer]:
    """Return an optimizer's class; raises SpecError if it is none, or of an extra that is not installed."""
    if rule is None:
        kind = load_object(name, where="optimizer.name")
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise SpecError(f"optimizer {name}: not a class derived from torch.optim.Optimizer")
        return kind
    if isinstance(rule.kind, str):
        try:
            found: type[Optimizer] = getattr(importlib.import_module("pytorch_optimizer"), rule.kind)
        except ImportError as error:
            raise SpecError(
                f"optimizer {name}: it is in the pytorch-optimizer package: pip install 'elastrain[optimizers]'"
            ) from error
        return found
    return rule.kind


def _check_arguments(spec: OptimizerSpec, kind: type[Optimizer], given: Mapping[str, Any]) -> None:
    """Refuse what a class would drop in silence: the extra's classes take any keyword."""
    if "lr" in spec.args:
        raise SpecError(f"optimizer {spec.name}: args holds lr, which the schedule moves; set optimizer.lr")
    if spec.name in RULES and isinstance(RULES[spec.name].kind, str):
        known = [name for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD]
        for name in given:
            if name not in known:
                raise SpecError(f"optimizer {spec.name}: no argument {name!r} in optimizer.args{nearest(name, known)}")
    if spec.no_decay and "weight_decay" not in given:
        raise SpecError(f"optimizer {spec.name}: it takes no weight_decay; remove optimizer.no_decay")


def _made(
    spec: OptimizerSpec,
    kind: type[Optimizer],
    given: dict[str, Any],
    named: Mapping[str, nn.Parameter],
    kinds: Mapping[str, Kind],
) -> Optimizer:
    """Return the optimizer over its groups; a single group is given as parameters, which every class takes."""
    if kind is not MuonAdamW:
        groups = decay_groups(named, kinds, spec.no_decay)
        single = len(groups) == 1 and "weight_decay" not in groups[0]
        return kind(list(named.values()) if single else groups, **given)
    hidden = hidden_matrices(kinds, given.pop("not_hidden", ()))
    if not hidden:
        raise SpecError(f"optimizer {spec.name}: the model has no hidden matrix for it to train; choose adamw")
    parts = [{n: p for n, p in named.items() if (n in hidden) == matrix} for matrix in (True, False)]
    matrices, others = (decay_groups(part, kinds, spec.no_decay) for part in parts)
    return MuonAdamW(matrices, others, **given)


def averages_weights(optimizer: Optimizer) -> bool:
    """Say whether an optimizer trains at other weights than those it stands for: schedule-free ones do."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


@torch.no_grad()
def averaged(optimizer: Optimizer) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each parameter of an optimizer that averages weights, and a new tensor with its average.

    The parameters are left as they were, to the bit, which the optimizer's own way back does not do.
    """
    parameters = _parameters(optimizer)
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    found = [parameter.detach().clone() for parameter in parameters]
    optimizer.train()  # type: ignore[attr-defined]
    for parameter, before in zip(parameters, kept, strict=True):
        parameter.copy_(before)
    return list(zip(parameters, found, strict=True))


def learning_factor(schedule: ScheduleSpec, step: int, num_steps: int) -> float:
    """Return the factor of the learning rate at a step of 0…num_steps−1; warm-up rises linearly from 1/warmup.

    Sources: cosine, Loshchilov and Hutter 2017 (arXiv 1608.03983); one_cycle, Smith and Topin 2018 (arXiv 1708.07120),
    rising over the first 30 %; wsd, Hu et al. 2024 (arXiv 2404.06395), `shape` sqrt as in Hägele et al. 2024 (arXiv
    2405.18392); inverse_sqrt, Vaswani et al. 2017 (arXiv 1706.03762).

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
            factor = _decayed(schedule, min(1.0, max(0.0, (done - (1.0 - schedule.decay)) / schedule.decay)))
        case "inverse_sqrt":
            factor = math.sqrt(max(warm, 1) / max(step, warm, 1))
        case "one_cycle":
            rise = done / 0.3
            factor = _cosine(0.04, 1.0, rise) if rise < 1.0 else _cosine(1.0, final, (done - 0.3) / 0.7)
    return factor


def _decayed(schedule: ScheduleSpec, done: float) -> float:
    """Return where the decay of wsd is when `done` of it (0 to 1) is behind."""
    if schedule.shape == "cosine":
        return _cosine(1.0, schedule.final, done)
    return 1.0 + (schedule.final - 1.0) * (math.sqrt(done) if schedule.shape == "sqrt" else done)


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
