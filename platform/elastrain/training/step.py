"""One step: for each phase the gradients of the slots at hand, one sum over all workers, one update.

Everything after the sum is computed by every worker from the same numbers, so all hold the same weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastrain.data.plan import hash64
from elastrain.observe.ledger import Clock
from elastrain.training.batches import Batches
from elastrain.training.optim import learning_factor
from elastrain.training.precision import forward_context
from elastrain.training.reduce import Group, sum_in_order
from elastrain.training.state import STATS, STEP, Phase, TrainState, seed_all
from elastrain.training.task import Batch, calling, phase_loss


@dataclass(slots=True)
class StepResult:
    """What a step reports: summed loss and weight as a device tensor (2,), learning rate, gradient norm, flags (2,)."""

    totals: Tensor
    lr: float
    grad_norm: Tensor | None
    flags: Tensor


def run_step(
    state: TrainState, batches: Batches, group: Group, slots: Sequence[int], *, clock: Clock, flag: float, num_steps: int
) -> StepResult:
    """Do step `state.step` on the slots that this worker holds and move `state` past it.

    `flag` is summed over all workers along with the gradients (a wish to stop). Raises GroupLost with `state` between
    two phases if a member is gone, SpecError if the task fails, DataError if a block cannot be had.
    """
    factor = learning_factor(state.spec.schedule, state.step, num_steps)
    batches.move_to(state.step, slots, clock)
    result = None
    for index, phase in enumerate(state.phases):
        _only_trains(state, phase)
        done = _run_phase(state, phase, index, batches, group, slots, clock, flag, factor)
        result = result or done
    assert result is not None
    state.samples += batches.plan.batch_rows(state.step)
    state.step += 1
    return result


def _run_phase(  # noqa: PLR0913 -- one call site; a bundle of these would have no meaning of its own
    state: TrainState,
    phase: Phase,
    index: int,
    batches: Batches,
    group: Group,
    slots: Sequence[int],
    clock: Clock,
    flag: float,
    factor: float,
) -> StepResult:
    clock.switch("compute")
    gradients, rows = phase.gradients, batches.plan.batch_rows(state.step)
    gradients.attach()
    gradients.tail[-1, 0] = flag
    state.norms.begin()
    for slot in slots:
        batch = batches.batch(slot)
        if batch is not None:
            seed_all(hash64(state.spec.data.seed, STEP, state.step, slot, index), state.device)
            _backward(state, phase, batch, gradients.tail[slot], rows)
    clock.switch("reduce")
    group.all_reduce(gradients.buffer)
    clock.switch("compute")
    slot_rows = gradients.tail[:-1]
    totals = sum_in_order(slot_rows[:, :STATS])
    state.norms.end(slot_rows[:, STATS:])
    gradients.values.mul_(rows / state.scale.value / totals[1].clamp_min(torch.finfo(totals.dtype).tiny))
    lr = phase.base_lr * factor
    norm = _update(state, phase, lr)
    return StepResult(totals.clone(), lr, norm, gradients.tail[-1].clone())


def _backward(state: TrainState, phase: Phase, batch: Batch, row: Tensor, rows: int) -> None:
    """Add a slot's gradients to the buffer and its loss, weight and batch statistics to its `row`."""
    state.norms.begin_slot()
    for micro in split(batch, state.spec.micro_batch):
        with calling(state.spec.task, "losses()"), forward_context(state.spec.precision, state.device):
            loss = phase_loss(state.task, state.forward, micro, phase.name)
        (loss.sum * (state.scale.value / rows)).backward()
        row[0] += loss.sum.detach()
        row[1] += loss.weight
    state.norms.end_slot(row[STATS:])


def _update(state: TrainState, phase: Phase, lr: float) -> Tensor | None:
    """Penalty, clipping, optimizer and averages from the reduced gradients; return the gradients' norm if it was needed."""
    spec, gradients, norm = state.spec, phase.gradients.values, None
    overflow = False
    if spec.clip_norm is not None or spec.precision == "fp16":
        norm = torch.linalg.vector_norm(gradients)
        overflow = spec.precision == "fp16" and not bool(torch.isfinite(norm))
    if not overflow:
        if spec.l1:
            for parameter in phase.gradients.parameters:
                parameter.grad.add_(parameter.detach().sign(), alpha=spec.l1)  # type: ignore[union-attr]
        if spec.clip_norm is not None and norm is not None:
            gradients.mul_((spec.clip_norm / (norm + 1e-6)).clamp_max(1.0))
        for group in phase.optimizer.param_groups:
            group["lr"] = lr
        phase.optimizer.step()
        _average(state, phase)
    if spec.precision == "fp16":
        state.scale.update(overflow=overflow)
    return norm


def _average(state: TrainState, phase: Phase) -> None:
    decay = state.spec.ema
    if decay is None:
        return
    trained = {id(parameter) for parameter in phase.gradients.parameters}
    named = [(n, p) for n, p in state.model.named_parameters() if id(p) in trained]
    torch._foreach_lerp_([state.ema[n] for n, _ in named], [p.detach() for _, p in named], 1.0 - decay)  # noqa: SLF001


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
