"""One step: its gradient is that of the mean loss, and what is done with it is what the spec says."""

import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.harness import (
    CPU,
    Adversarial,
    Classifier,
    Convolution,
    MemoryFeed,
    Seat,
    Setup,
    Tokens,
    Variational,
    lockstep,
    losses_of,
    make_spec,
    number,
    train_alone,
    train_together,
)
from torch import Tensor, nn

from elastrain.errors import DivergedError, SpecError
from elastrain.observe.ledger import Clock
from elastrain.training import precision
from elastrain.training.batches import Batches
from elastrain.training.reduce import Group, GroupLost, Solo, slots_of
from elastrain.training.state import TrainState, digest
from elastrain.training.step import StepResult, run_step
from elastrain.training.task import Batch, Loss, Losses, Task


def batches_of(setup: Setup) -> Batches:
    """The batches of one worker."""
    plan = setup.plan()
    return Batches(MemoryFeed(plan, setup.data(), None, end=setup.steps, block_rows=1), plan, CPU)


def steps(setup: Setup, state: TrainState, count: int, group: Any = None) -> StepResult:
    """Do some steps with one worker."""
    batches, group = batches_of(setup), group or Solo()
    slots = slots_of(0, 1, setup.spec.num_slots)
    for _ in range(count):
        result = run_step(state, batches, group, slots, clock=Clock(), flag=0.0, num_steps=setup.steps)
    return result


def whole_batch(setup: Setup, step: int) -> Batch:
    """All rows of a step as one batch."""
    plan, data = setup.plan(), setup.data()
    blocks = [plan.block(slot, plan.block_of(step)).rows(step, step + 1).row for slot in range(plan.slots)]
    rows = np.concatenate(blocks)
    assert len(rows) == plan.batch_rows(step)
    return Batch({name: torch.from_numpy(array[rows]) for name, array in data.items()})


def mean_gradient(setup: Setup, state: TrainState, step: int) -> tuple[list[Tensor], Tensor]:
    """Autograd's gradient of the mean loss over the whole batch, and that loss."""
    loss = state.task.losses(state.model, whole_batch(setup, step))["loss"]
    assert isinstance(loss, Loss)
    mean = loss.sum / loss.weight
    return list(torch.autograd.grad(mean, list(state.model.parameters()))), mean.detach()


@pytest.mark.parametrize("rows", [100, 50])  # 50: the last batch has 2 rows for 4 slots
@pytest.mark.parametrize("kind", [Classifier, Tokens])
def test_an_update_is_that_of_the_mean_loss(kind: type[Task], rows: int) -> None:
    spec = make_spec(
        precision="fp64",
        clip_norm=0.05,
        l1=0.01,
        optimizer={"name": "sgd", "lr": 0.5, "weight_decay": 0.1},
        schedule={"name": "linear"},
    )
    setup = Setup(spec=spec, kind=kind, rows=rows)
    state, reference = setup.state(), setup.state()
    parameters = list(reference.model.parameters())
    for step in range(setup.plan().steps_per_epoch + 1):
        gradients, loss = mean_gradient(setup, reference, step)
        gradients = [g + 0.01 * p.detach().sign() for g, p in zip(gradients, parameters, strict=True)]
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
        assert norm > 0.05, "the test is about clipping"
        lr = 0.5 * (1 - step / 8)
        with torch.no_grad():
            for gradient, parameter in zip(gradients, parameters, strict=True):
                parameter.sub_(lr * (gradient * (0.05 / (norm + 1e-6)) + 0.1 * parameter))
        result = steps(setup, state, 1)
        assert result.lr == lr
        assert result.grad_norm is not None
        assert torch.allclose(result.grad_norm, norm, rtol=1e-10)
        assert torch.allclose(result.totals[0, 0] / result.totals[0, 1], loss, rtol=1e-10)
        for one, other in zip(state.model.parameters(), parameters, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [Classifier, Tokens])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_micro_batches_change_nothing(kind: type[Task], rows: int) -> None:
    one = Setup(spec=make_spec(precision="fp64"), kind=kind)
    other = Setup(spec=make_spec(precision="fp64", micro_batch=rows), kind=kind)
    assert np.allclose(losses_of(train_alone(one)[0]), losses_of(train_alone(other)[0]), rtol=1e-10)


def test_micro_batches_of_one_row_pass_batch_norm() -> None:
    setup = Setup(spec=make_spec(micro_batch=5, **{"data.slots": 4}), kind=Adversarial)  # 6 rows: 5 and 1
    assert all(np.isfinite(losses_of(train_alone(setup)[0])))


def test_a_batch_without_weight_learns_nothing() -> None:
    class Nothing(Classifier):
        def losses(self, model: nn.Module, batch: Batch) -> Losses:
            return {"loss": Loss(model(number(batch["x"])).sum() * 0.0, 0)}

    setup = Setup(spec=make_spec(optimizer={"name": "sgd", "lr": 0.1}), kind=Nothing)
    state = setup.state()
    before = digest(state.model.state_dict())
    result = steps(setup, state, 2)
    assert result.totals.tolist() == [[0.0, 0.0]]
    assert digest(state.model.state_dict()) == before


def test_full_batch_is_plain_gradient_descent() -> None:
    changes = {"data.global_batch": "all", "data.slots": 3, "optimizer": {"name": "full_batch", "lr": 0.3}}
    setup = Setup(spec=make_spec(precision="fp64", **changes), kind=Classifier)
    state, reference = setup.state(), setup.state()
    data = Batch({name: torch.from_numpy(array) for name, array in setup.data().items()})
    for _ in range(5):
        loss = reference.task.losses(reference.model, data)["loss"]
        assert isinstance(loss, Loss)
        gradients = torch.autograd.grad(loss.sum / loss.weight, list(reference.model.parameters()))
        with torch.no_grad():
            for gradient, parameter in zip(gradients, reference.model.parameters(), strict=True):
                parameter.sub_(0.3 * gradient)
    steps(setup, state, 5)
    for one, other in zip(state.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-10)


# --- precision, averages, compilation


def test_an_overflow_skips_the_update_and_halves_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "GROWTH_STEPS", 2)
    setup = Setup(spec=make_spec(precision="fp16", ema=0.9), kind=Classifier)
    state = setup.state()
    before = digest({**state.model.state_dict(), **{f"ema.{n}": t for n, t in state.ema.items()}})
    state.scale.value = 1e38
    result = steps(setup, state, 1)
    assert result.grad_norm is not None
    assert not torch.isfinite(result.grad_norm)
    assert digest({**state.model.state_dict(), **{f"ema.{n}": t for n, t in state.ema.items()}}) == before
    assert not state.phases[0].optimizer.state
    assert (state.step, state.scale.value, state.scale.good_steps) == (1, 0.5e38, 0)
    state.scale.value = 256.0
    steps(setup, state, 2)
    assert digest(state.model.state_dict()) != before
    assert (state.scale.value, state.scale.good_steps) == (512.0, 0)


class Rooted(Classifier):
    """Its loss is finite, its gradient is not: the square root at 0."""

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """A loss that is 0."""
        return {"loss": Loss((model(number(batch["x"])) * 0.0).sqrt().sum(), len(batch["x"]))}


def test_a_gradient_that_never_was_finite_is_no_overflow() -> None:
    setup = Setup(spec=make_spec(precision="fp16", **{"budget.steps": 40}), kind=Rooted)

    def work(group: Group) -> tuple[int, str]:
        loop = setup.loop(Seat(lambda _: group))
        with pytest.raises(DivergedError) as caught:
            loop.run()
        return loop.state.step, str(caught.value)

    (step, text), other = lockstep(2, work)
    assert (step, text) == other
    assert step == 16, "2^16 is halved sixteen times, then there is nothing to skip for"
    assert re.fullmatch(r"step 16: the gradient is not finite even with .*, use precision bf16 or fp32, .*", text)


def test_an_overflow_at_a_scale_above_one_is_skipped() -> None:
    setup = Setup(spec=make_spec(precision="fp16"), kind=Rooted)
    state = setup.state()
    state.scale.value = 2.0
    steps(setup, state, 1)
    assert (state.step, state.scale.value) == (1, 1.0)
    with pytest.raises(DivergedError):
        steps(setup, state, 1)
    assert state.step == 1


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_learns_and_keeps_float32_weights(name: str) -> None:
    setup = Setup(spec=make_spec(precision=name, **{"budget.steps": 40}), kind=Classifier)
    loop, _ = train_alone(setup)
    losses = losses_of(loop)
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert {tensor.dtype for tensor in loop.state.model.state_dict().values()} == {torch.float32}
    exact = losses_of(train_alone(Setup(spec=make_spec(**{"budget.steps": 40}), kind=Classifier))[0])
    assert exact != losses
    assert np.allclose(exact, losses, rtol=0.05)


@pytest.mark.parametrize("kind", [Classifier, Adversarial])
def test_averages_follow_their_formula(kind: type[Task]) -> None:
    setup = Setup(spec=make_spec(precision="fp64", ema=0.8), kind=kind)
    state = setup.state()
    expected = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    for _ in range(4):
        steps(setup, state, 1)
        expected = {n: 0.8 * expected[n] + 0.2 * p.detach() for n, p in state.model.named_parameters()}
    assert all(torch.allclose(state.ema[name], value, rtol=1e-10) for name, value in expected.items())


def compiled_losses(kind: type[Task]) -> tuple[list[float], list[float]]:
    """Losses of an eager and a compiled run."""
    eager = Setup(spec=make_spec(), kind=kind)
    compiled = Setup(spec=make_spec(compile=True), kind=kind)
    return losses_of(train_alone(eager)[0]), losses_of(train_alone(compiled)[0])


@pytest.mark.parametrize("kind", [Classifier, Convolution, Adversarial])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute")
def test_tracing_for_compilation_changes_nothing(kind: type[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as torch.compile captures it, hooks of batch norm included, run without a compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    eager, compiled = compiled_losses(kind)
    assert np.allclose(eager, compiled, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compilation_changes_nothing() -> None:
    eager, compiled = compiled_losses(Convolution)
    assert np.allclose(eager, compiled, rtol=1e-3)


# --- randomness and memory of the task's own


class Mixup(Classifier):
    """Draws from numpy's and Python's own generators, as much code does, and changes its batch in place."""

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Cross entropy on mixed inputs."""
        share = np.random.beta(0.4, 0.4) + random.random()  # noqa: NPY002, S311 -- what the test is about
        batch["x"].mul_(share).add_(batch["x"].flip(0))
        return super().losses(model, batch)


def test_generators_of_numpy_and_python_are_seeded_per_slot() -> None:
    setup = Setup(spec=make_spec(precision="fp64"), kind=Mixup)
    alone = losses_of(train_alone(setup)[0])
    assert np.allclose(alone, losses_of(train_together(setup, 3)[0]), rtol=1e-10)


def test_phases_draw_numbers_of_their_own() -> None:
    drawn = []

    class Drawing(Adversarial):
        def losses(self, model: nn.Module, batch: Batch) -> Losses:
            drawn.append(float(torch.rand(())))
            return super().losses(model, batch)

    setup = Setup(spec=make_spec(), kind=Drawing)
    steps(setup, setup.state(), 2)
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 4


def test_a_batch_may_be_changed_in_place() -> None:
    setup = Setup(spec=make_spec(), kind=Classifier)
    batches = batches_of(setup)
    batches.move_to(0, range(4), Clock())
    one, other = batches.batch(0), batches.batch(0)
    assert one is not None
    assert other is not None
    one["x"].zero_()
    assert other["x"].abs().sum() > 0
    assert np.array_equal(batches.rows(0), setup.plan().block(0, 0).rows(0, 1).row)


# --- a lost group


class Failing(Solo):
    """A group of one that loses itself at collective `number`."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def all_reduce(self, tensor: Tensor) -> None:
        """Fail at the time, and leave rubbish, as a sum that was cut off does."""
        if self.left == 0:
            tensor.fill_(7)
            raise GroupLost("gone")
        self.left -= 1


@pytest.mark.parametrize("kind", [Classifier, Convolution, Adversarial, Variational])
@pytest.mark.parametrize("number", range(3))
def test_a_step_that_was_cut_off_is_done_again_alike(kind: type[Task], number: int) -> None:
    setup = Setup(spec=make_spec(ema=0.9), kind=kind)
    undisturbed, state = setup.state(), setup.state()
    expected = steps(setup, undisturbed, 4)
    steps(setup, state, 3)
    group = Failing(number)
    try:
        result = steps(setup, state, 1, group)
    except GroupLost:
        result = steps(setup, state, 1)
    assert torch.equal(result.totals, expected.totals)
    assert {n: digest({n: t}) for n, t in state.tensors().items()} == {
        n: digest({n: t}) for n, t in undisturbed.tensors().items()
    }
    assert state.numbers() == undisturbed.numbers()


def test_what_a_newcomer_receives_has_the_phase_in_it() -> None:
    setup = Setup(spec=make_spec(), kind=Adversarial)
    undisturbed, survivor, newcomer = setup.state(), setup.state(), setup.state()
    steps(setup, undisturbed, 3)
    steps(setup, survivor, 2)
    with pytest.raises(GroupLost):
        steps(setup, survivor, 1, Failing(2))  # in the generator's sum: the discriminator has moved already
    assert (survivor.step, survivor.phase) == (2, 1)
    newcomer.load(survivor.tensors(), survivor.numbers())
    steps(setup, newcomer, 1)
    assert digest(newcomer.tensors()) == digest(undisturbed.tensors())


# --- tasks that are wrong


def broken(change: Callable[[nn.Module, Batch], None]) -> type[Task]:
    """A classifier that does something else first."""

    class Broken(Classifier):
        calls = 0

        def losses(self, model: nn.Module, batch: Batch) -> Losses:
            type(self).calls += 1
            if self.calls > 5:
                change(model, batch)
            return super().losses(model, batch)

        def build(self) -> nn.Module:
            model = super().build()
            model.register_buffer("count", torch.zeros((), dtype=torch.int64))
            return model

    return Broken


def test_a_buffer_that_begins_to_change_late_is_refused() -> None:
    setup = Setup(spec=make_spec(), kind=broken(lambda model, _: model.get_buffer("count").add_(1)))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="buffer count changes in forward from step 1 on"):
        steps(setup, setup.state(), 3)


def test_gradients_that_were_cleared_are_refused() -> None:
    setup = Setup(spec=make_spec(), kind=broken(lambda model, _: model.zero_grad()))
    with pytest.raises(SpecError, match="zero_grad"):
        steps(setup, setup.state(), 3)


def test_a_loss_without_gradient_is_refused() -> None:
    class Detached(Classifier):
        def losses(self, model: nn.Module, batch: Batch) -> Losses:
            del model
            return {"loss": Loss(batch["x"].sum(), 1)}

    setup = Setup(spec=make_spec(), kind=Detached)
    with pytest.raises(SpecError, match="backward pass"):
        steps(setup, setup.state(), 1)


def test_a_parameter_of_no_phase_is_refused() -> None:
    class Stray(Adversarial):
        def build(self) -> nn.Module:
            model = super().build()
            model.add_module("shared", nn.Linear(1, 1))
            return model

    with pytest.raises(SpecError, match="weight belongs to none of the phases"):
        Setup(spec=make_spec(), kind=Stray).state()


def test_a_counter_in_a_buffer_counts_steps_on_any_number_of_workers() -> None:
    class Counter(nn.Linear):
        """Counts its calls, by addition and by replacing the tensor."""

        seen: Tensor

        def __init__(self) -> None:
            super().__init__(6, 3)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("count").add_(1)
            self.seen = 0.9 * self.seen + 0.1 * x.mean(0)
            return super().forward(x)

    class Counting(Classifier):
        def build(self) -> nn.Module:
            return Counter()

    setup = Setup(spec=make_spec(precision="fp64"), kind=Counting)
    alone, together = train_alone(setup)[0], train_together(setup, 3)
    seen = torch.zeros(6, dtype=torch.float64)
    for step in range(8):
        seen = 0.9 * seen + 0.1 * whole_batch(setup, step)["x"].double().mean(0)
    for loop in (alone, *together):
        assert int(loop.state.model.get_buffer("count")) == 8
        assert torch.allclose(loop.state.model.get_buffer("seen"), seen, rtol=1e-10)
