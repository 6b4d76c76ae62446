"""The training loop: step after step until the budget ends, the user stops it, or something breaks.

It never sees how many workers there are: at each step boundary it asks its seat for the group, and holds the slots that
fall to its rank. What it reports goes to a recorder; what it keeps is one state.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from elastrain.data.columns import Array
from elastrain.data.dataset import Dataset
from elastrain.data.plan import Plan
from elastrain.errors import DivergedError
from elastrain.observe.ledger import Clock
from elastrain.spec.train import TrainSpec
from elastrain.training.batches import Batches, Feed
from elastrain.training.checkpoint import Writer
from elastrain.training.evaluation import evaluate
from elastrain.training.reduce import Group, slots_of
from elastrain.training.state import TrainState, digest
from elastrain.training.step import StepResult, run_step

REPORT_S = 0.5
CUDA_READ_STEPS = 16  # reading a number from a GPU waits for it: losses are read this many steps at a time


class Seat(Protocol):
    """A worker's place in the run."""

    def group(self, step: int) -> Group:
        """Return the group of the coming step; it may be another one than before."""

    def wishes_stop(self) -> bool:
        """Say whether somebody asked the run to stop; all workers act on it at the same boundary."""


class Recorder(Protocol):
    """Where a worker's reports go, in order; nothing here waits, except `audited` and `settled`."""

    def audit(self, step: int, slot: int, columns: Mapping[str, Array]) -> None:
        """Hand over the samples of a slot in a step."""

    def audited(self) -> None:
        """Wait until everything handed over has arrived in the other process."""

    def settled(self) -> None:
        """Wait until everything reported has been written to storage; called beside the training."""

    def report(self, status: Mapping[str, Any]) -> None:
        """Hand over where this worker is and what its seconds were spent on."""

    def event(self, kind: str, **fields: Any) -> None:
        """Hand over something for the ledger."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One worker's training: `run` goes from `state.step` to `num_steps` and returns what the run came to."""

    spec: TrainSpec
    plan: Plan
    evaluation: Dataset | None
    eval_block_rows: int
    num_steps: int
    run_url: str
    state: TrainState
    feed: Feed
    seat: Seat
    recorder: Recorder
    clock: Clock
    info: Mapping[str, Any]
    _lines: list[tuple[float, ...]] = field(default_factory=list)
    _pending: list[tuple[int, StepResult]] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Train; return step, samples, metrics, weights_sha256 and whether the run was stopped before its end.

        Raises DivergedError, DataError, SpecError, StorageError; GroupLost if a member of the group is gone. A commit
        that is under way is finished in any case, so that nobody who takes over writes the same checkpoint.
        """
        writer = Writer(self.run_url, self.spec.checkpoint, settle=self.recorder.settled)
        try:
            return self._run(writer)
        finally:
            writer.join()
            self._written(writer)

    def _run(self, writer: Writer) -> dict[str, Any]:
        state = self.state
        batches = Batches(self.feed, self.plan, state.device)
        metrics: dict[str, float] = {}
        stop, last_report, group = False, 0.0, self.seat.group(state.step)
        state.model.train()
        while state.step < self.num_steps and not stop:
            group = self.seat.group(state.step)
            self._one(batches, group)
            stop = self._read(force=self._due(state.step))
            metrics = self._boundary(group, writer, stop=stop)
            now = time.perf_counter()
            if now - last_report > REPORT_S:
                last_report = now
                self._written(writer)
                self._report()
        self.clock.switch("checkpoint")
        writer.wait()
        self._written(writer)
        self._report()
        self.clock.switch("other")
        if not metrics and not stop:
            metrics = self._evaluate(group)
        return {
            "step": state.step,
            "samples": state.samples,
            "metrics": metrics,
            "weights_sha256": digest(state.model.state_dict()) if group.rank == 0 else "",
            "stopped": stop and state.step < self.num_steps,
        }

    def _one(self, batches: Batches, group: Group) -> None:
        state, step = self.state, self.state.step
        slots = slots_of(group.rank, group.size, self.plan.slots)
        batches.move_to(step, slots, self.clock)
        if self.spec.audit:
            # Before the sum: whoever dies after it has left its lines. A step that is done again replaces them.
            self._audit(batches, step, slots)
            self.recorder.audited()
        flag = float(group.rank == 0 and self.seat.wishes_stop())
        result = run_step(state, batches, group, slots, clock=self.clock, flag=flag, num_steps=self.num_steps)
        self._pending.append((step, result))
        if group.rank == 0 and step % self.plan.block_steps == 0:
            self.feed.release_before(self.plan.block_of(step))

    def _audit(self, batches: Batches, step: int, slots: range) -> None:
        epoch = step // self.plan.steps_per_epoch
        for slot in slots:
            rows = batches.rows(slot)
            if len(rows):
                constant = {"epoch": epoch, "step": step, "slot": slot}
                columns = {name: rows * 0 + value for name, value in constant.items()}
                self.recorder.audit(step, slot, {**columns, "row": rows})

    def _read(self, *, force: bool) -> bool:
        """Read the losses of finished steps; return whether a stop was asked for. Raises DivergedError."""
        if self.state.device.type == "cuda" and not force and self.state.step % CUDA_READ_STEPS:
            return False  # by the step, not by what is pending: all workers stop at the same one, newcomers included
        stop = False
        for step, result in self._pending:
            loss = sum(loss_sum / weight if weight else loss_sum for loss_sum, weight in result.totals.tolist())
            if not math.isfinite(loss) and (self.spec.precision != "fp16" or self.state.scale.value <= 1.0):
                raise DivergedError(
                    f"step {step}: the loss is {loss}; lower optimizer.lr (now {result.lr:g}), warm up longer or set "
                    f"clip_norm; the last checkpoint is kept, --fresh starts over"
                )
            stop = stop or float(result.flags[0]) > 0
            norm = math.nan if result.grad_norm is None else float(result.grad_norm)
            samples = float(self.plan.batch_rows(step))
            epoch = float(step // self.plan.steps_per_epoch)
            self._lines.append((float(step), epoch, samples, loss, result.lr, norm, time.time()))
        self._pending.clear()
        return stop

    def _due(self, step: int) -> bool:
        every = self.spec.eval.every_steps
        return (
            step >= self.num_steps
            or step % self.spec.checkpoint.every_steps == 0
            or (every is not None and step % every == 0)
        )

    def _boundary(self, group: Group, writer: Writer, *, stop: bool) -> dict[str, float]:
        """Evaluate and commit where it is due after a step; return the metrics if it evaluated."""
        step, every, metrics = self.state.step, self.spec.eval.every_steps, {}
        last = step >= self.num_steps
        if last or (every is not None and step % every == 0):
            metrics = self._evaluate(group)
        if last or stop or step % self.spec.checkpoint.every_steps == 0:
            self.clock.switch("checkpoint")
            if group.rank == 0:
                info = {**self.info, "metrics": metrics, "samples": self.state.samples, "complete": last}
                if last:
                    info["weights_sha256"] = digest(self.state.model.state_dict())
                self._report()  # before the commit, which settles what was reported
                writer.commit(self.state.tensors(), self.state.numbers(), info, buffers=self.state.buffer_names())
                self._written(writer)
        return metrics

    def _evaluate(self, group: Group) -> dict[str, float]:
        if self.evaluation is None:
            return {}
        self.clock.switch("evaluate")
        start = time.perf_counter()
        metrics = evaluate(self.state, self.feed, self.plan, self.evaluation, group, block_rows=self.eval_block_rows)
        if group.rank == 0:
            seconds = time.perf_counter() - start
            self.recorder.event("eval", step=self.state.step, metrics=metrics, seconds=seconds)
        return metrics

    def _written(self, writer: Writer) -> None:
        for entry in writer.written:
            self.recorder.event(
                "checkpoint",
                step=entry.step,
                bytes=entry.size_bytes,
                stall_s=entry.stall_s,
                write_s=entry.write_s,
            )
        writer.written.clear()

    def _report(self) -> None:
        lines = list(self._lines)
        self._lines.clear()
        self.recorder.report({"step": self.state.step, "lines": lines, "spent": self.clock.spent()})


def choose_device(gpus: float) -> torch.device:
    """Return the device of a worker: its first GPU where the spec gives it one, else the CPU."""
    return torch.device("cuda", 0) if gpus else torch.device("cpu")


def fix_threads(cpus: float) -> None:
    """Fix torch's threads, on which a sum's bits depend: one for each whole CPU of the worker, at least one."""
    torch.set_num_threads(max(1, int(cpus)))
