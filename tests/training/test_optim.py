"""Optimizers against a few lines by hand, and schedules as pure functions of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from elastrain.errors import SpecError
from elastrain.spec.train import OPTIMIZERS, OptimizerSpec, ScheduleSpec
from elastrain.training.optim import for_phase, learning_factor, make_optimizer

Floats = npt.NDArray[np.float64]
LR, DECAY, MU, BETAS, EPS = 0.1, 0.05, 0.8, (0.7, 0.9), 1e-3


def by_hand(name: str, weight: Floats, gradients: list[Floats]) -> Floats:
    """The weights after updates with these gradients."""
    w = weight.copy()
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step, gradient in enumerate(gradients, start=1):
        g = gradient if name == "adamw" else gradient + DECAY * w
        if name in ("adam", "adamw"):
            w = w * (1 - LR * DECAY) if name == "adamw" else w
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g**2
            w = w - LR * m / (1 - BETAS[0] ** step) / (np.sqrt(v / (1 - BETAS[1] ** step)) + EPS)
        elif name in ("momentum", "nesterov"):
            m = MU * m + g if step > 1 else g
            w = w - LR * (g + MU * m if name == "nesterov" else m)
        else:
            w = w - LR * g
    return w


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_does_what_its_formula_says(name: str) -> None:
    rng = np.random.default_rng(0)
    weight, gradients = rng.normal(size=(3, 4)), [rng.normal(size=(3, 4)) for _ in range(6)]
    parameter = nn.Parameter(torch.tensor(weight))
    spec = OptimizerSpec(name=name, lr=LR, weight_decay=DECAY, momentum=MU, betas=BETAS, eps=EPS)
    optimizer = make_optimizer(spec, [parameter])
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    assert np.allclose(parameter.detach().numpy(), by_hand(name, weight, gradients), rtol=1e-12)


class Plain(Optimizer):
    """Gradient descent by a user, with an argument of its own."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, *, twist: float = 1.0) -> None:
        if twist < 0:
            raise ValueError("twist must not be negative")
        super().__init__(params, {"lr": lr, "twist": twist})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"] * group["twist"])


def no_optimizer() -> None:
    """Nothing of use."""


def custom(name: str, **args: Any) -> Optimizer:
    """An optimizer by the name of a class."""
    return make_optimizer(OptimizerSpec(name=name, lr=0.5, weight_decay=0.1, args=args), [nn.Parameter(torch.ones(2))])


def test_a_class_of_ones_own_gets_its_arguments() -> None:
    optimizer = custom("tests.training.test_optim:Plain", twist=2.0)
    assert optimizer.param_groups[0]["twist"] == 2.0
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert custom("torch.optim:RMSprop").param_groups[0]["weight_decay"] == 0.1
    assert custom("torch.optim:RMSprop", weight_decay=0.2).param_groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("tests.training.test_optim:Plain", {"twist": -1}, "twist must not be negative"),
        ("tests.training.test_optim:Plain", {"turn": 1}, "'turn'.*optimizer.args"),
        ("tests.training.test_optim:Nothing", {}, "has no 'Nothing'"),
        ("tests.training.test_optim:no_optimizer", {}, "not a class derived from torch.optim.Optimizer"),
        ("tests.training.nowhere:Plain", {}, "cannot import tests.training.nowhere"),
        ("nowhere.py:Plain", {}, "no file nowhere.py"),
        ("torch.nn:Linear", {}, "not a class derived from torch.optim.Optimizer"),
        ("torch.optim:LBFGS", {}, "its step.. needs a closure"),
    ],
)
def test_what_is_no_optimizer_is_named(name: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        custom(name, **args)
    assert name.split(":")[0] in str(caught.value)


def test_a_phase_has_settings_of_its_own() -> None:
    spec = OptimizerSpec(name="adam", lr=0.1, phases={"generator": {"lr": 0.2, "name": "sgd"}})
    assert (for_phase(spec, "generator").name, for_phase(spec, "generator").lr) == ("sgd", 0.2)
    assert (for_phase(spec, "discriminator").name, for_phase(spec, "discriminator").lr) == ("adam", 0.1)
    with pytest.raises(SpecError, match=r"optimizer\.phases\.generator"):
        for_phase(OptimizerSpec(name="adam", lr=0.1, phases={"generator": {"lr": -1}}), "generator")


# --- schedules

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt", "one_cycle")
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def factors(name: str, steps: int = 110, **fields: Any) -> list[float]:
    """The factor at each step."""
    schedule = ScheduleSpec.model_validate({"name": name, **fields})
    return [learning_factor(schedule, step, steps) for step in range(steps)]


def cosine(done: float) -> float:
    """Half a cosine wave from 1 to 0.2."""
    return 0.2 + 0.4 * (1 + math.cos(math.pi * done))


@every_schedule
def test_warm_up_rises_linearly(name: str) -> None:
    assert np.allclose(factors(name, warmup_steps=10)[:10], np.arange(1, 11) / 10)


@pytest.mark.parametrize(
    ("name", "start", "middle", "end"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 1.0, 0.6, 0.2 + 0.8 / 100),
        ("cosine", 1.0, 0.6, cosine(0.99)),
        ("wsd", 1.0, 1.0, 0.2 + 0.8 / 50),
        ("inverse_sqrt", 1.0, math.sqrt(10 / 60), math.sqrt(10 / 109)),
        (
            "one_cycle",
            0.04,
            cosine(2 / 7),
            cosine(0.69 / 0.7),
        ),
    ],
)
def test_a_schedule_goes_through_its_values(name: str, start: float, middle: float, end: float) -> None:
    found = factors(name, warmup_steps=10, final=0.2, decay=0.5)
    assert np.allclose([found[10], found[60], found[109]], [start, middle, end], rtol=1e-12)


def test_one_cycle_peaks_after_its_rise() -> None:
    found = factors("one_cycle", 100)
    assert int(np.argmax(found)) == 30
    assert found[30] == pytest.approx(1.0)


def test_wsd_stays_until_it_decays() -> None:
    found = factors("wsd", 100, decay=0.2)
    assert found[:81] == [1.0] * 81
    assert np.all(np.diff(found[80:]) < 0)


@every_schedule
def test_a_schedule_remembers_nothing(name: str) -> None:
    schedule = ScheduleSpec.model_validate({"name": name, "warmup_steps": 5})
    forward = [learning_factor(schedule, step, 40) for step in range(40)]
    backward = [learning_factor(schedule, step, 40) for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert all(0.0 <= factor <= 1.0 for factor in forward)


@every_schedule
@pytest.mark.parametrize("warmup", [0, 3, 50])
def test_a_schedule_has_a_value_everywhere(name: str, warmup: int) -> None:
    assert all(math.isfinite(factor) for factor in factors(name, 3, warmup_steps=warmup))
    schedule = ScheduleSpec.model_validate({"name": name, "warmup_steps": warmup})
    assert math.isfinite(learning_factor(schedule, 100, 3))
