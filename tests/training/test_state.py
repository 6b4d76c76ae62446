"""What optimizers keep, wherever they keep it: stored, restored and shared to the bit, or refused at once."""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.harness import (
    Adversarial,
    Classifier,
    Setup,
    lockstep,
    losses_of,
    make_spec,
    train_alone,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from elastrain.errors import SpecError
from elastrain.training.loop import Loop
from elastrain.training.optim import pack, unpack
from elastrain.training.reduce import Group
from elastrain.training.state import TrainState, digest


class Adaptive(Optimizer):
    """Keeps in its group what the next step depends on, as Prodigy and the schedule-free optimizers do."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.99), "d": 0.01, "k": 0, "top": np.float64(0.0), "dtype": torch.float32}
        super().__init__(params, {**defaults, "past": [0.0, 0.0], "sum": torch.zeros(()), "rule": abs, "mode": "train"})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update; nothing of it makes sense but that each entry moves and matters."""
        del closure
        for group in self.param_groups:
            first, second = group["betas"]
            assert isinstance(group["top"], np.float64)
            group["k"] += 1
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.mul_(first).add_(parameter.grad)
                group["sum"].mul_(second).add_(parameter.grad.square().sum())
            group["past"] = [group["past"][1], float(group["sum"])]
            group["top"] = max(group["top"], np.float64(group["past"][0]))
            group["d"] = max(group["d"], 0.01 * group["k"] * float(group["top"] + 1.0))
            for parameter in group["params"]:
                size = group["lr"] * group["d"] / (1.0 + group["past"][0]) if group["mode"] == "train" else 0.0
                parameter.data.sub_(self.state[parameter]["mean"], alpha=size)


class Preconditioned(Optimizer):
    """Keeps lists, nested dicts, text and nothing, as SOAP and Shampoo do; its bases are not in row-major order."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update along the eigenvectors of the gradients' second moments."""
        del closure
        of_all: Any = "all"  # a key that is no parameter
        self.state[of_all]["count"] = self.state[of_all].get("count", 0) + 1
        for parameter in self.param_groups[0]["params"]:
            state, gradient = self.state[parameter], parameter.grad
            if not state:
                moments = [torch.eye(size) for size in parameter.shape] if parameter.dim() == 2 else []
                state.update(GG=moments, Q=None, order="first", by_side={0: {"mean": torch.zeros_like(parameter)}})
                state["self"] = parameter
            for side, moment in enumerate(state["GG"]):
                moment.lerp_(gradient @ gradient.T if side == 0 else gradient.T @ gradient, 0.1)
            mean = state["by_side"][0]["mean"].mul_(0.9).add_(gradient)
            if state["Q"]:
                left, right = state["Q"]
                mean = left @ (left.T @ mean @ right).sign() @ right.T
            state["Q"] = [torch.linalg.qr(moment.T)[0].T for moment in state["GG"]]
            state["self"].data.sub_(mean, alpha=self.param_groups[0]["lr"] * (2.0 if state["order"] == "first" else 1))
            state["order"] = "later"


KINDS = ["tests.training.test_state:Adaptive", "tests.training.test_state:Preconditioned"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_setup(kind: str, **changes: Any) -> Setup:
    """A run with an optimizer of a kind."""
    return Setup(spec=make_spec(**{"optimizer.name": kind, "optimizer.lr": 0.01, **changes}), kind=Classifier)


@every_kind
def test_a_newcomer_receives_all_that_an_optimizer_keeps(kind: str) -> None:
    setup = make_setup(kind)
    whole, _ = train_alone(setup)

    def work(group: Group) -> tuple[str, str, list[float]]:
        state = setup.state()
        if group.rank == 1:
            half = make_setup(kind, **{"budget.steps": 4})
            train_alone(half, state)
        state.share(group, 1)
        later, _ = train_alone(setup, state)
        return digest(later.state.tensors()), json.dumps(later.state.numbers()), losses_of(later)

    found = lockstep(2, work)
    assert found == [(digest(whole.state.tensors()), json.dumps(whole.state.numbers()), losses_of(whole))] * 2


@every_kind
def test_a_step_of_the_copy_is_one_of_the_original(kind: str) -> None:
    loops: list[Loop] = []
    for _ in range(2):
        loop, _ = train_alone(make_setup(kind, **{"budget.steps": 3}))
        loops.append(loop)
    one, other = (loop.state for loop in loops)
    other.load(one.tensors(), json.loads(json.dumps(one.numbers())))
    assert structure(other.phases[0].optimizer) == structure(one.phases[0].optimizer)


def structure(optimizer: Optimizer) -> Any:
    """Types, keys, layouts and values of all that an optimizer keeps."""

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.stride(), value.tolist()
        if isinstance(value, dict):
            return [(key, told(entry)) for key, entry in value.items()]
        if isinstance(value, list | tuple):
            return type(value), [told(entry) for entry in value]
        return type(value), value

    return told(optimizer.state_dict())


def test_what_is_one_tensor_in_two_places_stays_one() -> None:
    def made() -> tuple[nn.Parameter, Optimizer]:
        parameter = nn.Parameter(torch.zeros(2))
        return parameter, torch.optim.SGD([parameter], lr=0.1)

    (parameter, one), (mine, other) = made(), made()
    total = torch.ones(3)
    one.param_groups[0]["total"] = total
    one.state[parameter].update({"total": total, "self": parameter, "a/b": torch.ones(1), "a": {"b": torch.zeros(1)}})
    kept, tensors = pack(one, "optim")
    assert len(tensors) == 3
    unpack(other, json.loads(json.dumps(kept)), tensors)
    state = other.state[mine]
    assert state["total"] is other.param_groups[0]["total"] is not total
    assert state["self"] is mine
    assert (float(state["a/b"]), float(state["a"]["b"])) == (1.0, 0.0)


def test_a_state_that_goes_back_forgets_what_came_later() -> None:
    setup = make_setup(KINDS[0])
    state, fresh = setup.state(), setup.state()
    train_alone(setup, state)
    state.phases[0].optimizer.param_groups[0]["later"] = 1
    state.load(fresh.tensors(), fresh.numbers())
    assert json.dumps(state.numbers()) == json.dumps(fresh.numbers())
    assert state.phases[0].optimizer.param_groups[0]["rule"] is abs


def test_a_view_is_stored_as_what_it_shows() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    one, other = (torch.optim.SGD([parameter], lr=0.1) for _ in range(2))
    one.state[parameter].update(wide=torch.arange(4.0).expand(3, 4), gaps=torch.arange(6.0)[::2])
    unpack(other, *pack(one, "optim"))
    assert other.state[parameter]["wide"].tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3
    assert other.state[parameter]["gaps"].tolist() == [0.0, 2.0, 4.0]


def test_what_lay_on_the_cpu_comes_back_there() -> None:
    """Counters do so beside parameters on a GPU; the meta device stands in for one."""
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    one, other = (torch.optim.SGD([parameter], lr=0.1) for _ in range(2))
    one.state[parameter].update(count=torch.tensor(3.0), mean=torch.zeros(2, device="meta"))
    kept, tensors = pack(one, "optim")
    unpack(other, kept, {name: torch.zeros(2) if tensor.is_meta else tensor for name, tensor in tensors.items()})
    state = other.state[parameter]
    assert (state["count"].device.type, float(state["count"]), state["mean"].device.type) == ("cpu", 3.0, "meta")


# --- what cannot be stored


class Odd(Optimizer):
    """Gradient descent with an object in its group (`group`) or, from the first update on, in its state (`state`)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, *, group: str = "", state: str = "") -> None:
        super().__init__(params, {"lr": lr, **({"odd": THINGS[group]} if group else {})})
        self._thing = THINGS[state] if state else None

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update."""
        del closure
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])
            if self._thing is not None:
                self.state[parameter]["odd"] = [1.0, self._thing]


THINGS: dict[str, Any] = {
    "Generator": torch.Generator(),
    "ndarray": np.zeros(3),
    "complex": 1j,
    "OrderedDict": OrderedDict(a=1),
    "dict": {(1, 2): 3},
    "Tensor": torch.zeros(3).to_sparse(),
}


@pytest.mark.parametrize("thing", THINGS)
def test_what_a_checkpoint_cannot_hold_is_refused_at_once(thing: str) -> None:
    def setup(place: str, steps: int = 8) -> Setup:
        changes = {"optimizer.args": {place: thing}, "precision": "fp16", "budget.steps": steps}
        return make_setup("tests.training.test_state:Odd", **changes)

    with pytest.raises(SpecError, match=rf"^optimizer Odd: optim/loss/param_groups/0/odd is a {thing}, which a"):
        setup("group").state()
    state = setup("state").state()
    state.scale.value = 1e38
    train_alone(setup("state", steps=1), state)  # the gradient overflows: there is no update yet
    state.scale.value = 256.0
    with pytest.raises(SpecError, match=rf"^optimizer Odd: optim/loss/state/0/odd/1 is a {thing}, which a") as caught:
        train_alone(setup("state"), state)
    assert state.step == 1
    assert "\n" not in str(caught.value)


# --- settings for phases


def made(kind: type[Any], *phases: str) -> TrainState:
    """A state whose spec has settings for phases."""
    return Setup(spec=make_spec(**{"optimizer.phases": {name: {"lr": 0.5} for name in phases}}), kind=kind).state()


def test_settings_for_a_phase_that_the_task_lacks_are_refused() -> None:
    there = "the task's phases are discriminator, generator"
    with pytest.raises(
        SpecError, match=rf"^optimizer\.phases\.discriminater: {there}; did you mean 'discriminator'\?$"
    ):
        made(Adversarial, "generator", "discriminater")
    with pytest.raises(SpecError, match=r"^optimizer\.phases\.critic: the task's phases are loss$"):
        made(Classifier, "critic")
    assert made(Classifier, "loss").phases[0].base_lr == 0.5
    assert [phase.base_lr for phase in made(Adversarial, "generator").phases] == [0.02, 0.5]
