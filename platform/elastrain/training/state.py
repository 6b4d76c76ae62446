"""The state of a run: weights, optimizers, averages, loss scale and position, as named tensors and plain numbers."""

import hashlib
import json
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastrain.data.plan import hash64
from elastrain.errors import ConflictError, SpecError
from elastrain.spec.train import TrainSpec
from elastrain.training.buffers import MovingBuffers
from elastrain.training.groups import kinds_of
from elastrain.training.norm import BatchNorms
from elastrain.training.optim import (
    averaged,
    averages_weights,
    check_phase_names,
    for_phase,
    make_optimizer,
    pack,
    unpack,
)
from elastrain.training.precision import LossScale
from elastrain.training.reduce import FlatGradients, Group
from elastrain.training.slotsum import SlotSum, slot_sum
from elastrain.training.task import Task, calling, check_phases, phase_parameters

INIT, STEP, EVALUATE = 101, 102, 103  # domains of seeds
Position = tuple[int, int]
"""Step, and how much of it is done: 0 as long as what is due before it (evaluation, commit) is not, else 1 + phases."""

STATS = 2  # loss sum and weight, first of the numbers that a slot adds to a step's sum


@dataclass(slots=True)
class Phase:
    """One phase of a step: its name, what it trains, and the setting that the schedule scales.

    `moves` says whether its forwards change buffers other than batch norm's; None until its first step. `checked` says
    whether what its optimizer keeps was seen to be storable: most of it is made in the first update.
    """

    name: str
    parameters: tuple[str, ...]
    optimizer: Optimizer
    gradients: FlatGradients
    total: SlotSum
    base_lr: float
    moves: bool | None = None
    checked: bool = False

    def pack(self) -> tuple[Any, dict[str, Tensor]]:
        """Return what the optimizer keeps, as JSON and tensors; raises SpecError if a checkpoint cannot hold it."""
        return pack(self.optimizer, f"optim/{self.name}")


class TrainState:
    """Everything that a step changes. `model` is the plain module, `forward` the one to call (compiled where asked).

    Phases before `phase` of step `step` are done: `done` holds their loss sums and weights, `norm` the gradient's norm
    in the first if it was needed. `due`: evaluation or commit before the step are not. `stored`: the step of the
    checkpoint that it comes from. `metrics` are those of the step `evaluated`. `stopping`: the run ends here. `lines`
    are the last steps' lines of metrics: whoever leads next sends them again.
    """

    def __init__(self, spec: TrainSpec, task: Task, device: torch.device) -> None:
        self.spec, self.task, self.device = spec, task, device
        dtype = torch.float64 if spec.precision == "fp64" else torch.float32
        torch.set_default_dtype(dtype)
        check_phase_names(spec.optimizer, task.phases)
        seed_all(hash64(spec.data.seed, INIT), device)
        with calling(spec.task, "build()"):
            self.model = task.build().to(device=device, dtype=dtype)
        self.norms = BatchNorms(self.model)
        self.buffers = MovingBuffers(self.model, spec.num_slots, spec.consistency)
        check_phases(task, self.model)
        self.forward = self._compiled() if spec.compile else self.model
        self.phases = [self._phase(name) for name in task.phases]
        self.ema = self._first_averages() if spec.ema else {}
        self._check_averages()
        self.scale = LossScale.of(spec.precision)
        self.step, self.phase, self.samples = 0, 0, 0
        self.done: list[Tensor] = []
        self.norm: Tensor | None = None
        self.due, self.stopping, self.stored, self.evaluated = False, False, -1, -1
        self.metrics: dict[str, float] = {}
        self.lines: deque[tuple[float, ...]] = deque()

    def position(self) -> Position:
        """Return how far the state is."""
        return (self.step, 0 if self.due else 1 + self.phase)

    def renew(self) -> None:
        """Put new memory in the place of gradients: a sum that was given up may still write into the old one."""
        for phase in self.phases:
            phase.gradients = FlatGradients(
                phase.gradients.parameters, slots=self.spec.num_slots, width=STATS + self.norms.width
            )
            phase.total = slot_sum(phase.gradients.buffer, self.spec.num_slots, self.spec.consistency)

    def _compiled(self) -> nn.Module:
        """Compile the model; where there are phases, their children, which are what a task then calls."""
        if len(self.task.phases) == 1:
            return torch.compile(self.model)  # type: ignore[return-value]
        for name in self.task.phases:
            self.model.get_submodule(name).compile()
        return self.model

    def _first_averages(self) -> dict[str, Tensor]:
        """Return the parameters' averages at the start, under each name of a tied one."""
        averages = {id(parameter): parameter.detach().clone() for parameter in self.model.parameters()}
        return {name: averages[id(p)] for name, p in self.model.named_parameters(remove_duplicate=False)}

    def _check_averages(self) -> None:
        """Raise SpecError if weights would be averaged twice."""
        twice = [phase.name for phase in self.phases if self.ema and averages_weights(phase.optimizer)]
        if twice:
            raise SpecError(
                f"ema: the optimizer of phase {twice[0]} averages the weights itself; remove ema, or choose an "
                f"optimizer that is not schedule-free"
            )

    def averages(self) -> dict[str, Tensor]:
        """Return the weights to evaluate, under each name of a tied one; nothing if they are those of `model`.

        They are `ema`'s, or what schedule-free optimizers stand for, beside the weights of other phases.
        """
        optimizers = [phase.optimizer for phase in self.phases if averages_weights(phase.optimizer)]
        if not optimizers:
            return self.ema
        found = {id(parameter): average for optimizer in optimizers for parameter, average in averaged(optimizer)}
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: found.get(id(parameter), parameter.detach()) for name, parameter in named}

    def _phase(self, name: str) -> Phase:
        settings = for_phase(self.spec.optimizer, name)
        names, parameters = zip(*phase_parameters(self.task, self.model, name), strict=True)
        named = dict(zip(names, parameters, strict=True))
        optimizer = make_optimizer(settings, named, kinds_of(self.model, named))
        gradients = FlatGradients(parameters, slots=self.spec.num_slots, width=STATS + self.norms.width)
        total = slot_sum(gradients.buffer, self.spec.num_slots, self.spec.consistency)
        phase = Phase(name, names, optimizer, gradients, total, settings.lr)
        phase.pack()  # what cannot be stored is refused here, not at the first commit
        return phase

    def tensors(self) -> dict[str, Tensor]:
        """Return the state's tensors by name (`model/…`, `ema/…`, `optim/<phase>/…`), no copies."""
        named = {f"model/{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        named |= {f"ema/{name}": tensor for name, tensor in self.averages().items()}
        for phase in self.phases:
            named |= phase.pack()[1]
        return named

    def buffer_names(self) -> frozenset[str]:
        """Return which of `tensors` are buffers: constants, such as a mask, may be infinite."""
        return frozenset(f"model/{name}" for name, _ in self.model.named_buffers(remove_duplicate=False))

    def numbers(self) -> dict[str, Any]:
        """Return the rest of the state as a JSON object: position, loss scale, and what optimizers keep besides."""
        return {
            "step": self.step,
            "phase": self.phase,
            "samples": self.samples,
            "moves": [phase.moves for phase in self.phases],
            "loss_scale": [self.scale.value, self.scale.good_steps],
            "optim": {phase.name: phase.pack()[0] for phase in self.phases},
        }

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take over a copy of a state; raises ConflictError if it is one of another model."""
        try:
            self.model.load_state_dict(_under(tensors, "model/"))
        except RuntimeError as error:
            raise ConflictError(
                f"task {self.spec.task}: its model is not the one whose weights were stored; undo the change, give the "
                f"run another name, or start over with --fresh ({' '.join(str(error).split())[:300]})"
            ) from error
        for name, average in self.ema.items():
            average.copy_(tensors[f"ema/{name}"])
        for phase, moves in zip(self.phases, numbers["moves"], strict=True):
            unpack(phase.optimizer, numbers["optim"][phase.name], tensors)
            phase.moves = moves
        self.step, self.phase, self.samples = numbers["step"], numbers["phase"], numbers["samples"]
        self.scale, self.done, self.norm = LossScale(*numbers["loss_scale"]), [], None
        self.due, self.stored = False, self.step

    def share(self, group: Group, source: int) -> None:
        """Make every member's state that of rank `source`: what a newcomer starts from."""
        header = {
            "numbers": self.numbers(),
            "moment": [self.due, self.stopping, self.stored, self.evaluated, self.metrics],
            "done": [totals.tolist() for totals in self.done],
            "lines": list(self.lines),
            "norm": None if self.norm is None else self.norm.tolist(),
            "tensors": {n: [str(t.dtype), list(t.shape)] for n, t in self.tensors().items()},
        }
        header = broadcast_object(group, header, source, self.device)
        own = self.tensors()
        received: dict[str, Tensor] = {}
        for name, (dtype, shape) in header["tensors"].items():
            mine = own.get(name)
            tensor = mine.clone() if group.rank == source and mine is not None else _empty(dtype, shape)
            moved = tensor.to(self.device).contiguous()
            group.broadcast(moved, source)
            received[name] = moved
        if group.rank != source:
            self.load(received, header["numbers"])
            self.due, self.stopping, self.stored, self.evaluated, self.metrics = header["moment"]
            self.lines = deque(map(tuple, header["lines"]))
            like = self.phases[0].gradients.buffer
            self.done = [like.new_tensor(totals) for totals in header["done"]]
            self.norm = None if header["norm"] is None else like.new_tensor(header["norm"])


def digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over a model's state in name order: name, dtype, shape, little-endian bytes."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def seed_all(seed: int, device: torch.device) -> None:
    """Seed what forwards draw from: torch's, numpy's and Python's generators. 7 µs; torch.manual_seed takes 120."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 -- the one that users' code shares
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    if device.type == "cuda":
        torch.cuda.init()  # makes the generators, once
        torch.cuda.default_generators[device.index or 0].manual_seed(seed & 0x7FFFFFFFFFFFFFFF)


def broadcast_object(group: Group, value: Any, source: int, device: torch.device) -> Any:
    """Return the JSON value of rank `source` on every member."""
    if group.size == 1:
        return value
    data = json.dumps(value).encode()
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    group.broadcast(length, source)
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if group.rank == source:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    group.broadcast(buffer, source)
    return json.loads(bytes(buffer.cpu().numpy()))


def _empty(dtype: str, shape: list[int]) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))


def _under(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: value for name, value in flat.items() if name.startswith(prefix)}
