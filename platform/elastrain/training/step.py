"""One step: for each phase the gradients of the slots at hand, one sum over all workers, one update.

Everything after the sum is computed by every worker from the same numbers, so all hold the same weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastrain.data.plan import hash64
from elastrain.errors import DivergedError, SpecError
from elastrain.observe.ledger import Clock
from elastrain.training.batches import Batches
from elastrain.training.optim import learning_factor
from elastrain.training.precision import forward_context
from elastrain.training.reduce import Group, sum_in_order
from elastrain.training.state import STATS, STEP, Phase, TrainState, seed_all
from elastrain.training.task import Batch, calling, phase_loss

TINY = 1e-30


@dataclass(slots=True)
class StepResult:
    """What a step reports: loss sums and weights as a device tensor (phases, 2), and flags: the stop flag comes first.

    Learning rate and gradient norm are those of the first phase.
    """

    totals: Tensor
    lr: float
    grad_norm: Tensor | None
    flags: Tensor


def run_step(
    state: TrainState,
    batches: Batches,
    group: Group,
    slots: Sequence[int],
    *,
    clock: Clock,
    flag: float,
    num_steps: int,
) -> StepResult:
    """Do step `state.step` on the slots that this worker holds and move `state` past it.

    `flag` is summed over all workers along with the gradients (a wish to stop). Raises GroupLost if a member is gone,
    SpecError if the task fails, DataError if a block cannot be had: `state` then stands at the phase that was not done,
    and the next call goes on from there.
    """
    factor = learning_factor(state.spec.schedule, state.step, num_steps)
    batches.move_to(state.step, slots, clock)
    while state.phase < len(state.phases):
        phase = state.phases[state.phase]
        _only_trains(state, phase)
        state.norms.begin()
        state.buffers.begin(moving=phase.moves is not False)
        try:
            totals, flags = _reduced(state, phase, batches, group, slots, clock=clock, flag=flag)
        except BaseException:
            state.norms.end(None)
            state.buffers.put_back()
            raise
        norm = _update(state, phase, phase.base_lr * factor)
        state.norm = norm if state.phase == 0 else state.norm
        state.done.append(totals)
        state.phase += 1
    state.samples += batches.plan.batch_rows(state.step)
    result = StepResult(torch.stack(state.done), state.phases[0].base_lr * factor, state.norm, flags)
    state.step, state.phase, state.done, state.norm = state.step + 1, 0, [], None
    return result


def _reduced(
    state: TrainState, phase: Phase, batches: Batches, group: Group, slots: Sequence[int], *, clock: Clock, flag: float
) -> tuple[Tensor, Tensor]:
    """Leave the gradient of the step's mean loss in the phase's buffer; return loss sum and weight, and the flags."""
    clock.switch("compute")
    gradients, rows = phase.gradients, batches.plan.batch_rows(state.step)
    gradients.attach()
    phase.total.begin()
    for slot in slots:
        phase.total.begin_slot(slot)
        state.buffers.begin_slot(slot)
        batch = batches.batch(slot)
        if batch is not None:
            seed_all(hash64(state.spec.data.seed, STEP, state.step, slot, state.phase), state.device)
            _backward(state, phase, batch, gradients.rows[slot], rows)
            state.buffers.end_slot(batches.plan.slot_rows(state.step, slot) / rows)
    gradients.check_attached()
    flags = gradients.flags  # zero so far, like all of the buffer
    if flag:
        flags[0] = flag
    if state.buffers.changed:
        flags[1] = 1.0
    clock.switch("reduce")
    phase.total.reduce(group)
    _move_buffers(state, phase, group, flags)
    clock.switch("compute")
    totals = sum_in_order(gradients.slot_rows[:, :STATS])
    state.norms.end(gradients.slot_rows[:, STATS:])
    # Without any weight there is nothing to learn from: the gradients stay zero then, and are not 0 / 0.
    gradients.values.mul_(rows / state.scale.value / totals[1].clamp_min(TINY))
    return totals, flags.clone()


def _move_buffers(state: TrainState, phase: Phase, group: Group, flags: Tensor) -> None:
    """Agree with all workers on the buffers that forwards changed; the first step of a phase tells whether any do."""
    if phase.moves is None:
        phase.moves = bool(state.buffers) and bool(flags[1] > 0)
    if phase.moves:
        state.buffers.end(group)
    elif state.buffers.changed:
        raise SpecError(
            f"task {state.spec.task}: buffer {state.buffers.changed[0]} changes in forward from step {state.step} on, "
            f"not from the first; change it in each step, or register it with persistent=False"
        )


def _backward(state: TrainState, phase: Phase, batch: Batch, row: Tensor, rows: int) -> None:
    """Add a slot's gradients to the buffer and its loss, weight and batch statistics to its `row`."""
    state.norms.begin_slot()
    for micro in split(batch, state.spec.micro_batch):
        with calling(state.spec.task, "losses()"), forward_context(state.spec.precision, state.device):
            loss = phase_loss(state.task, state.forward, micro, phase.name)
        with calling(state.spec.task, "the backward pass of its loss"):
            _propagate(loss.sum, loss.sum.new_full((), state.scale.value / rows))  # as of a product, for less
        row[0].add_(loss.sum.detach())
        row[1].add_(loss.weight)
    state.norms.end_slot(row[STATS:])


def _propagate(loss: Tensor, gradient: Tensor) -> None:
    """Do what `loss.backward(gradient)` does, without what that does first.

    To compare the two shapes it loads sympy: 0.4 s of a core in a worker's first step, for which the run stands still
    that it joins. And it takes 20 µs each time.
    """
    engine: Any = torch.autograd.Variable._execution_engine  # noqa: SLF001 -- no public way past the comparison
    engine.run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)  # noqa: FBT003


def _update(state: TrainState, phase: Phase, lr: float) -> Tensor | None:
    """Penalty, clipping, optimizer and averages from the reduced gradients; return their norm if it was needed."""
    spec, gradients, norm = state.spec, phase.gradients.values, None
    overflow = False
    if spec.l1:
        for parameter in phase.gradients.parameters:
            parameter.grad.add_(parameter.detach().sign(), alpha=spec.l1)  # type: ignore[union-attr]
    if spec.clip_norm is not None or spec.precision == "fp16":
        norm = torch.linalg.vector_norm(gradients)
        overflow = spec.precision == "fp16" and not bool(torch.isfinite(norm))
    if not overflow:
        if spec.clip_norm is not None and norm is not None:
            gradients.mul_((spec.clip_norm / (norm + 1e-6)).clamp_max(1.0))
        _move_weights(state, phase, lr)
    if spec.precision == "fp16":
        _rescale(state, lr, overflow=overflow)
    return norm


def _move_weights(state: TrainState, phase: Phase, lr: float) -> None:
    for group in phase.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    phase.optimizer.step()
    if not phase.checked:
        phase.pack()
        phase.checked = True
    _average(state, phase)


def _rescale(state: TrainState, lr: float, *, overflow: bool) -> None:
    """Move the loss scale on; raise DivergedError where lowering it cannot help any more."""
    if overflow and state.scale.value <= 1.0:
        raise DivergedError(
            f"step {state.step}: the gradient is not finite even with the loss scale down at 1; lower optimizer.lr "
            f"(now {lr:g}), use precision bf16 or fp32, or look for 0/0 and the root of 0 in the task; the last "
            f"checkpoint is kept, --fresh starts over"
        )
    state.scale.update(overflow=overflow)


def _average(state: TrainState, phase: Phase) -> None:
    if state.spec.ema is not None:
        averages = [state.ema[name] for name in phase.parameters]
        parameters = [parameter.detach() for parameter in phase.gradients.parameters]
        torch._foreach_lerp_(averages, parameters, 1.0 - state.spec.ema)


def _only_trains(state: TrainState, phase: Phase) -> None:
    """With several phases, let only this phase's parameters collect gradients."""
    if len(state.phases) == 1:
        return
    for other in state.phases:
        for parameter in other.gradients.parameters:
            parameter.requires_grad_(other is phase)


def split(batch: Batch, rows: int | None) -> Iterator[Batch]:
    """Yield micro-batches of at most `rows` rows."""
    total = len(next(iter(batch.values())))
    if rows is None or rows >= total:
        yield batch
        return
    for first in range(0, total, rows):
        yield Batch({name: tensor[first : first + rows] for name, tensor in batch.items()})
