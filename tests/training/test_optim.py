"""Optimizers against a few lines by hand, and schedules as pure functions of the step."""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

from elastrain.errors import SpecError
from elastrain.spec.train import OPTIMIZERS, OptimizerSpec, ScheduleSpec
from elastrain.training.optim import averaged, for_phase, learning_factor, make_optimizer

Floats = npt.NDArray[np.float64]
LR, DECAY, MU, BETAS, EPS = 0.1, 0.05, 0.8, (0.7, 0.9), 1e-3


def make(spec: OptimizerSpec, *parameters: nn.Parameter) -> Optimizer:
    """The optimizer over hidden matrices."""
    named = {f"{index}.weight": parameter for index, parameter in enumerate(parameters)}
    return make_optimizer(spec, named, dict.fromkeys(named, "matrices"))


class ByHand:
    """The formulas, for one matrix `w`; `g` is the gradient and `t` counts from 1."""

    def __init__(self, weight: Floats) -> None:
        self.w = weight.copy()
        self.m, self.v, self.z, self.x = np.zeros_like(weight), np.zeros_like(weight), weight.copy(), weight.copy()
        self.rows, self.columns = np.zeros((weight.shape[0], 1)), np.zeros((1, weight.shape[1]))
        self.product = 1.0

    def sgd(self, g: Floats, t: int) -> None:
        """Step down."""
        del t
        self.w = self.w - LR * (g + DECAY * self.w)

    full_batch = sgd

    def momentum(self, g: Floats, t: int, *, ahead: bool = False) -> None:
        """Keep the last updates."""
        g = g + DECAY * self.w
        self.m = MU * self.m + g if t > 1 else g
        self.w = self.w - LR * (g + MU * self.m if ahead else self.m)

    def nesterov(self, g: Floats, t: int) -> None:
        """Look ahead."""
        self.momentum(g, t, ahead=True)

    def _moments(self, g: Floats, t: int) -> tuple[Floats, Floats]:
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2
        return self.m / (1 - BETAS[0] ** t), self.v / (1 - BETAS[1] ** t)

    def adam(self, g: Floats, t: int) -> None:
        """Divide by the root of the second moment."""
        m, v = self._moments(g + DECAY * self.w, t)
        self.w = self.w - LR * m / (np.sqrt(v) + EPS)

    def adamw(self, g: Floats, t: int) -> None:
        """Adam with decay apart from the gradient."""
        m, v = self._moments(g, t)
        self.w = self.w * (1 - LR * DECAY) - LR * m / (np.sqrt(v) + EPS)

    def nadam(self, g: Floats, t: int) -> None:
        """Adam with Nesterov's momentum, which warms up."""
        g = g + DECAY * self.w
        now, later = (BETAS[0] * (1 - 0.5 * 0.96 ** (0.004 * step)) for step in (t, t + 1))
        _, v = self._moments(g, t)
        self.product *= now
        m = later * self.m / (1 - self.product * later) + (1 - now) * g / (1 - self.product)
        self.w = self.w - LR * m / (np.sqrt(v) + EPS)

    def radam(self, g: Floats, t: int) -> None:
        """Adam as soon as its second moment is known well enough, rectified."""
        m, _ = self._moments(g + DECAY * self.w, t)
        most = 2 / (1 - BETAS[1]) - 1
        length = most - 2 * t * BETAS[1] ** t / (1 - BETAS[1] ** t)
        if length > 5:
            share = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
            m = m * np.sqrt(share) * np.sqrt(1 - BETAS[1] ** t) / (np.sqrt(self.v) + EPS)
        self.w = self.w - LR * m

    def adagrad(self, g: Floats, t: int) -> None:
        """Divide by the root of the sum of squares."""
        del t
        g = g + DECAY * self.w
        self.v = self.v + g**2
        self.w = self.w - LR * g / (np.sqrt(self.v) + EPS)

    def rmsprop(self, g: Floats, t: int) -> None:
        """Divide by the root of the average of squares."""
        del t
        g = g + DECAY * self.w
        self.v = 0.99 * self.v + 0.01 * g**2
        self.m = MU * self.m + g / (np.sqrt(self.v) + EPS)
        self.w = self.w - LR * self.m

    def adafactor(self, g: Floats, t: int) -> None:
        """Keep the squares' rows and columns only; clip the update; scale it by the weights."""
        keep = 1 - t**-0.8
        self.rows = keep * self.rows + (1 - keep) * (g**2).mean(axis=1, keepdims=True)
        self.columns = keep * self.columns + (1 - keep) * (g**2).mean(axis=0, keepdims=True)
        update = g / np.sqrt(self.rows @ self.columns / self.rows.mean())
        update = update / max(1.0, float(np.sqrt((update**2).mean())))
        size = max(1e-3, float(np.sqrt((self.w**2).mean()))) * min(LR, t**-0.5)
        self.w = self.w * (1 - LR * DECAY) - size * update

    def lion(self, g: Floats, t: int) -> None:
        """Only signs."""
        del t
        sign = np.sign(BETAS[0] * self.m + (1 - BETAS[0]) * g)
        self.w = self.w * (1 - LR * DECAY) - LR * sign
        self.m = BETAS[1] * self.m + (1 - BETAS[1]) * g

    def schedule_free_sgd(self, g: Floats, t: int, *, momentum: float = MU) -> None:
        """Gradients at w, steps of z, whose average is x; w lies between them."""
        self.z = self.z - LR * (g + DECAY * self.w)
        self.x = (1 - 1 / t) * self.x + self.z / t
        self.w = (1 - momentum) * self.z + momentum * self.x

    def schedule_free_adamw(self, g: Floats, t: int) -> None:
        """The same with Adam's divisor."""
        _, v = self._moments(g, t)
        self.schedule_free_sgd(g / (np.sqrt(v) + EPS), t, momentum=BETAS[0])


FREE = ("schedule_free_sgd", "schedule_free_adamw")


def moved(name: str) -> tuple[nn.Parameter, Optimizer, ByHand, list[Floats]]:
    """A parameter after six updates, its optimizer, the same by hand, and what z was by hand after each."""
    rng = np.random.default_rng(0)
    weight, gradients = rng.normal(size=(3, 4)), [rng.normal(size=(3, 4)) for _ in range(6)]
    parameter, by_hand, past = nn.Parameter(torch.tensor(weight)), ByHand(weight), []
    spec = OptimizerSpec(name=name, lr=LR, weight_decay=DECAY, momentum=MU, betas=BETAS, eps=EPS)
    optimizer = make(spec, parameter)
    for step, gradient in enumerate(gradients, start=1):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        getattr(by_hand, name)(gradient, step)
        past.append(by_hand.z)
    return parameter, optimizer, by_hand, past


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"muon", "shampoo", "soap"}))  # these have tests of their own
def test_an_optimizer_does_what_its_formula_says(name: str) -> None:
    parameter, _, by_hand, _ = moved(name)
    assert np.allclose(parameter.detach().numpy(), by_hand.w, rtol=1e-10)


@pytest.mark.parametrize("name", FREE)
def test_what_a_schedule_free_optimizer_stands_for_is_the_average_of_its_steps(name: str) -> None:
    parameter, optimizer, by_hand, past = moved(name)
    before = parameter.detach().clone()
    ((same, average),) = averaged(optimizer)
    assert same is parameter
    assert np.allclose(average.numpy(), np.mean(past, axis=0), rtol=1e-10)
    assert np.allclose(average.numpy(), by_hand.x, rtol=1e-10)
    assert torch.equal(parameter, before), "to the bit"
    assert torch.equal(averaged(optimizer)[0][1], average), "as often as one asks"


def test_soap_without_bases_is_adamw_a_step_later() -> None:
    """Dimensions that are too long are not turned; the first gradient only starts the bases."""
    rng = np.random.default_rng(0)
    weight, gradients = rng.normal(size=(3, 4)), [rng.normal(size=(3, 4)) for _ in range(6)]
    parameter, by_hand = nn.Parameter(torch.tensor(weight)), ByHand(weight)
    args = {"max_precondition_dim": 1}
    optimizer = make(OptimizerSpec(name="soap", lr=LR, betas=BETAS, eps=1e-12, args=args), parameter)
    parameter.grad = torch.tensor(rng.normal(size=(3, 4)))
    optimizer.step()
    for step, gradient in enumerate(gradients, start=1):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        m, v = by_hand._moments(gradient, step)
        by_hand.w = by_hand.w - LR * m / np.sqrt(v)
    assert np.allclose(parameter.detach().numpy(), by_hand.w, rtol=1e-8)


def test_soap_turns_with_its_gradients() -> None:
    """An update in a turned basis is the turned update: what Adam lacks."""
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in (3, 4))
    gradients = [rng.normal(size=(3, 4)) for _ in range(8)]
    found = []
    for first, second in ((np.eye(3), np.eye(4)), (left, right)):
        parameter = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        args = {"precondition_frequency": 100}
        optimizer = make(OptimizerSpec(name="soap", lr=LR, args=args), parameter)
        for gradient in gradients:
            parameter.grad = torch.tensor(first @ gradient @ second)
            optimizer.step()
        found.append(parameter.detach().numpy())
    assert np.allclose(left @ found[0] @ right, found[1], atol=1e-6)


@pytest.mark.parametrize("name", ["momentum", "lion", "muon", "rmsprop", "soap"])
def test_what_is_not_set_is_what_was_published(name: str) -> None:
    spec = OptimizerSpec(name=name, lr=1.0)
    published = {"momentum": 0.9, "lion": (0.9, 0.99), "muon": 0.95, "rmsprop": 0.0, "soap": (0.95, 0.95)}
    assert published[name] in (spec.momentum, spec.betas)
    group = make(spec, nn.Parameter(torch.ones(2, 2))).param_groups[0]
    assert published[name] in (group.get("momentum"), group.get("betas"))
    assert OptimizerSpec(name=name, lr=1.0, momentum=0.5, betas=(0.5, 0.6)).momentum == 0.5


def test_a_phase_of_another_name_has_what_was_published_for_that_name() -> None:
    base = OptimizerSpec(name="adamw", lr=0.1, eps=1e-3, phases={"one": {"name": "soap"}, "two": {"lr": 0.2}})
    one, two = for_phase(base, "one"), for_phase(base, "two")
    assert (one.betas, one.eps, one.lr) == ((0.95, 0.95), 1e-3, 0.1), "what the base sets is kept"
    assert (two.betas, two.eps, two.lr) == ((0.9, 0.999), 1e-3, 0.2)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("adamw", {"amsgrat": True}, "'amsgrat'.*optimizer.args"),
        ("adamw", {"lr": 1.0}, "args holds lr, which the schedule moves; set optimizer.lr"),
        ("lion", {"weight_decoupel": True}, "no argument 'weight_decoupel' .* did you mean 'weight_decouple'"),
        ("shampoo", {"precondition_frequency": 0}, "precondition_frequency .* must be at least 1"),
        ("muon", {"adjust_lr_fn": "wide"}, "wide is not supported"),
        ("muon", {"not_hidden": ["head.*"]}, r"not_hidden: 'head\.\*' matches none of 0\.weight"),
    ],
)
def test_arguments_are_obeyed_or_refused(name: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make(OptimizerSpec(name=name, lr=0.1, args=args), nn.Parameter(torch.ones(2, 2)))


def test_arguments_reach_the_class() -> None:
    args = {"amsgrad": True, "fused": False}
    group = make(OptimizerSpec(name="adamw", lr=0.1, args=args), nn.Parameter(torch.ones(2, 2))).param_groups[0]
    assert (group["amsgrad"], group["fused"]) == (True, False)


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(SpecError, match=r"^optimizer lion: .*: pip install 'elastrain\[optimizers\]'$"):
        make(OptimizerSpec(name="lion", lr=0.1), nn.Parameter(torch.ones(2, 2)))
    make(OptimizerSpec(name="muon", lr=0.1), nn.Parameter(torch.ones(2, 2)))


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
    return make(OptimizerSpec(name=name, lr=0.5, weight_decay=0.1, args=args), nn.Parameter(torch.ones(2)))


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


STEPS = st.integers(2, 400)
properties = settings(deadline=None, max_examples=60, derandomize=True)


@properties
@given(
    name=st.sampled_from(SCHEDULES),
    shape=st.sampled_from(["linear", "cosine", "sqrt"]),
    steps=STEPS,
    warm=st.floats(0.0, 0.9),
    final=st.floats(0.0, 1.0),
    decay=st.floats(0.05, 1.0),
)
def test_a_schedule_starts_and_ends_where_it_should(
    name: str, shape: str, steps: int, warm: float, final: float, decay: float
) -> None:
    """Whatever the settings: within bounds, no jump, from 1 after the warm-up to `final` just after the last step."""
    warmup = int(warm * steps)
    schedule = ScheduleSpec.model_validate(
        {"name": name, "warmup_steps": warmup, "final": final, "decay": decay, "shape": shape}
    )
    found = np.array([learning_factor(schedule, step, steps) for step in range(steps + 1)])
    assert np.all((found >= 0.0) & (found <= 1.0))
    assert found[warmup] == pytest.approx(0.04 if name == "one_cycle" else 1.0)
    if warmup:
        assert (found[0], found[warmup - 1]) == (1 / warmup, 1.0)
    if name in ("linear", "cosine", "wsd", "one_cycle"):
        assert found[steps] == pytest.approx(final, abs=1e-12)
    tail = found[warmup:]
    if name != "one_cycle":
        assert np.all(np.diff(tail) <= 1e-12)
    # The steepest slopes over the part after the warm-up: half a cosine's, over the part that it takes.
    steep = {"constant": 0.0, "linear": 1.0, "cosine": math.pi / 2, "one_cycle": math.pi / 2 / 0.3}
    slope = steep.get(name, math.pi / 2 / decay) / (steps - warmup)
    if name == "wsd" and shape == "sqrt":
        slope = math.sqrt(1 / decay / (steps - warmup))
    if name == "inverse_sqrt":
        slope = 0.3  # from 1 to 1/√2 where there is no warm-up
    assert np.all(np.abs(np.diff(tail)) <= slope + 1e-12)


def test_a_schedule_is_the_one_of_its_paper() -> None:
    """Against torch's, where torch has it, and the papers' formulas elsewhere."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=1001, final_div_factor=1e9)
    found = factors("one_cycle", 1000)
    for step in range(1000):
        assert found[step] == pytest.approx(optimizer.param_groups[0]["lr"], abs=6e-3)
        optimizer.step()
        cycle.step()
    noam = [min((step + 1) ** -0.5, (step + 1) * 50**-1.5) * 50**0.5 for step in range(500)]
    assert np.allclose(factors("inverse_sqrt", 500, warmup_steps=50), noam, atol=0.011)
    root = [1 - math.sqrt((step - 80) / 20) if step > 80 else 1.0 for step in range(100)]
    assert np.allclose(factors("wsd", 100, decay=0.2, shape="sqrt"), root)
    wave = [0.5 * (1 + math.cos(math.pi * max(0, step - 80) / 20)) for step in range(100)]
    assert np.allclose(factors("wsd", 100, decay=0.2, shape="cosine"), wave)


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
