"""The training loop: step after step until the budget ends, the user stops it, or something breaks.

It never sees how many workers there are: at each step boundary it asks its seat for the group, and holds the slots that
fall to its rank. What it reports goes to a recorder; what it keeps is one state.
"""

import math
import os
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
from elastrain.spec.accelerators import FAKE_GPUS
from elastrain.spec.train import TrainSpec
from elastrain.training.batches import Batches, Feed
from elastrain.training.checkpoint import Writer
from elastrain.training.evaluation import evaluate
from elastrain.training.reduce import Group, GroupLost, slots_of
from elastrain.training.snapshot import Snapshots, Vault
from elastrain.training.state import Position, TrainState, digest
from elastrain.training.step import StepResult, run_step

REPORT_S = 0.5
KEPT_S, KEPT = 5.0, 1000  # lines are kept for so long, by their own time, and so many in any case
CUDA_READ_STEPS = 16  # reading a number from a GPU waits for it: losses are read this many steps at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What rank 0 was told, summed along with a step's gradients so that all workers act on it at the same boundary.

    `stop`: commit and end. `change`: the members change. `commit`: write a checkpoint before that, for nobody stays.
    `leave` is for rank 0 alone: it will not be among the next members.
    """

    stop: bool = False
    change: bool = False
    commit: bool = False
    leave: bool = False

    def flag(self) -> float:
        """Return it as a number that a sum over workers keeps, where all others add 0."""
        return float(self.stop + 2 * self.change + 4 * self.commit)

    @staticmethod
    def of(flag: float) -> "Decision":
        """Return what a flag says."""
        bits = int(flag)
        return Decision(stop=bool(bits & 1), change=bool(bits & 2), commit=bool(bits & 4))


class Seat(Protocol):
    """A worker's place in the run."""

    def group(self, state: TrainState) -> Group:
        """Return the group of the coming step, `state` brought in line with it; raises GroupLost.

        It may be another one than before, and the state another worker's: further, or where this one had none.
        """

    def decision(self) -> Decision:
        """Return what this worker was told; that of rank 0 counts."""

    def change(self) -> None:
        """Take note that all members change groups now."""

    def lost(self) -> None:
        """Take note that the group has failed: the next one is to be another."""

    def noted(self, position: Position) -> None:
        """Take note that a checkpoint of this position is in storage."""


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

    def result(self, found: Mapping[str, Any]) -> None:
        """Hand over what the run came to, and wait until it has arrived; the first one counts."""


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
    vault: Vault | None = None  # where snapshots go, if anywhere
    _pending: list[tuple[int, StepResult]] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Train; return step, samples, metrics, weights_sha256 (of rank 0) and whether the run was stopped.

        When a member of the group is gone, go on in the next one from the phase that was not done. Raises
        DivergedError, DataError, SpecError, StorageError, and what the seat raises. A commit that is under way is
        finished in any case.
        """
        writer = Writer(self.run_url, self.spec.checkpoint, settle=self.recorder.settled)
        batches = Batches(self.feed, self.plan, self.state.device)
        lead = Lead(Snapshots(self.vault, settle=self.recorder.settled, encrypt=self.spec.checkpoint.encrypt))
        self.state.model.train()
        try:
            while True:
                try:
                    return self._run(writer, batches, lead)
                except GroupLost:
                    self._read(force=True)  # who comes new takes over the lines of the steps that are done
                    self.clock.switch("wait")
                    self.seat.lost()
                    self.state.renew()
        finally:
            writer.join()
            self._written(writer)

    def _run(self, writer: Writer, batches: Batches, lead: "Lead") -> dict[str, Any]:
        state = self.state
        while True:
            position = state.position()
            group = self.seat.group(state)
            lead.look(group, state, taken=state.position() != position)
            ends = state.step >= self.num_steps or state.stopping
            if lead.leads and not state.due and not state.phase:
                self._keep(writer, lead, ends=ends)
            if state.due or (state.step >= self.num_steps and state.evaluated != state.step):
                self._boundary(group, writer, lead)
            elif ends:
                return self._end(group, writer, lead)
            else:
                self._one(batches, group, writer, lead)
            now = time.perf_counter()
            if now - lead.reported > REPORT_S:
                self._written(writer)
                self._report(lead)

    def _end(self, group: Group, writer: Writer, lead: "Lead") -> dict[str, Any]:
        """Have everything in storage and the result delivered before anybody leaves: rank 0 may be lost until then."""
        state = self.state
        self.clock.switch("checkpoint")
        writer.wait()
        self._written(writer)
        self._report(lead)
        self.clock.switch("other")
        result = {
            "step": state.step,
            "samples": state.samples,
            "metrics": dict(state.metrics),
            "weights_sha256": digest(state.model.state_dict()) if group.rank == 0 else "",
            "stopped": state.step < self.num_steps,
        }
        if group.rank == 0:
            self.recorder.result(result)
        group.all_reduce(torch.zeros(1, device=state.device))
        return result

    def _one(self, batches: Batches, group: Group, writer: Writer, lead: "Lead") -> None:
        state, step = self.state, self.state.step
        slots = slots_of(group.rank, group.size, self.plan.slots)
        batches.move_to(step, slots, self.clock)
        if self.spec.audit:
            # Before the sum: whoever dies after it has left its lines. A step that is done again replaces them.
            self.clock.switch("data")  # a host that is slow to answer is no worker that stands still
            self._audit(batches, step, slots)
            self.recorder.audited()
        told = self.seat.decision() if group.rank == 0 else Decision()
        result = run_step(state, batches, group, slots, clock=self.clock, flag=told.flag(), num_steps=self.num_steps)
        self._pending.append((step, result))
        if group.rank == 0 and step % self.plan.block_steps == 0:
            self.feed.release_before(self.plan.block_of(step))
        decided = self._read(force=self._is_due(state.step))
        state.due = self._is_due(state.step) or decided.stop or decided.commit
        state.stopping, lead.commits = decided.stop, decided.commit
        if decided.change and not decided.commit:
            if told.leave:
                writer.wait()  # before another one leads and writes
            self.seat.change()

    def _audit(self, batches: Batches, step: int, slots: range) -> None:
        epoch = step // self.plan.steps_per_epoch
        for slot in slots:
            rows = batches.rows(slot)
            if len(rows):
                constant = {"epoch": epoch, "step": step, "slot": slot}
                columns = {name: rows * 0 + value for name, value in constant.items()}
                self.recorder.audit(step, slot, {**columns, "row": rows})

    def _read(self, *, force: bool) -> Decision:
        """Read the losses of finished steps; return what was decided in the last one. Raises DivergedError."""
        if self.state.device.type == "cuda" and not force and self.state.step % CUDA_READ_STEPS:
            return Decision()  # by the step, not by what is pending: all workers stop at the same one
        decided = Decision()
        for step, result in self._pending:
            loss = sum(loss_sum / weight if weight else loss_sum for loss_sum, weight in result.totals.tolist())
            if not math.isfinite(loss) and (self.spec.precision != "fp16" or self.state.scale.value <= 1.0):
                raise DivergedError(
                    f"step {step}: the loss is {loss}; lower optimizer.lr (now {result.lr:g}), warm up longer or set "
                    f"clip_norm; the last checkpoint is kept, --fresh starts over"
                )
            decided = Decision.of(float(result.flags[0]))
            norm = math.nan if result.grad_norm is None else float(result.grad_norm)
            samples = float(self.plan.batch_rows(step))
            epoch = float(step // self.plan.steps_per_epoch)
            self.state.lines.append((float(step), epoch, samples, loss, result.lr, norm, time.time()))
        self._pending.clear()
        return decided

    def _is_due(self, step: int) -> bool:
        every = self.spec.eval.every_steps
        return (
            step >= self.num_steps
            or step % self.spec.checkpoint.every_steps == 0
            or (every is not None and step % every == 0)
        )

    def _boundary(self, group: Group, writer: Writer, lead: "Lead") -> None:
        """Evaluate and commit where it is due after a step."""
        state, step, every = self.state, self.state.step, self.spec.eval.every_steps
        last = step >= self.num_steps
        state.metrics = self._evaluate(group) if last or (every is not None and step % every == 0) else {}
        state.due, state.evaluated = False, step
        due = last or state.stopping or lead.commits or step % self.spec.checkpoint.every_steps == 0
        if due and step != state.stored:
            self.clock.switch("checkpoint")
            if group.rank == 0:
                self._commit(writer, lead)
        if lead.commits:
            writer.wait()
            self._written(writer)
            lead.commits = False
            self.seat.change()

    def _keep(self, writer: Writer, lead: "Lead", *, ends: bool) -> None:
        """Between two steps: commit what another lead may not have, else take a snapshot where it is time for one."""
        state = self.state
        if lead.owes:
            if ends or state.step > lead.since:
                self._commit(writer, lead)
        elif max(0, state.stored) < state.step < self.num_steps and not self._pending and lead.snapshots.due():
            self.clock.switch("checkpoint")
            self._report(lead)  # before the snapshot, which settles what was reported
            lead.snapshots.take(state.tensors(), state.numbers(), self._info(), buffers=state.buffer_names())

    def _commit(self, writer: Writer, lead: "Lead") -> None:
        state = self.state
        self._report(lead)  # before the commit, which settles what was reported
        writer.commit(state.tensors(), state.numbers(), self._info(), buffers=state.buffer_names())
        self._written(writer)
        lead.owes = False
        lead.snapshots.postpone()

    def _info(self) -> dict[str, Any]:
        """Return what a checkpoint says of itself."""
        state, last = self.state, self.state.step >= self.num_steps
        metrics = state.metrics if state.evaluated == state.step else {}
        info = {**self.info, "metrics": metrics, "samples": state.samples, "complete": last}
        return info | ({"weights_sha256": digest(state.model.state_dict())} if last else {})

    def _evaluate(self, group: Group) -> dict[str, float]:
        if self.evaluation is None:
            return {}
        start = time.perf_counter()
        rows, clock = self.eval_block_rows, self.clock
        metrics = evaluate(self.state, self.feed, self.plan, self.evaluation, group, block_rows=rows, clock=clock)
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
            self.seat.noted((entry.step, 1))
        writer.written.clear()

    def _report(self, lead: "Lead") -> None:
        """Report where this worker is. All keep the last lines of metrics: who comes after rank 0 sends them again."""
        while lead.snapshots.events:
            kind, fields = lead.snapshots.events.pop(0)
            self.recorder.event(kind, **fields)
        lines, sent = self.state.lines, lead.sent
        spent = self.clock.spent()
        report = {"step": self.state.step, "spent": spent, "lead": lead.leads, "generation": lead.generation}
        self.recorder.report({**report, "lines": [line for line in lines if line[0] > sent] if lead.leads else []})
        if lines:
            lead.sent = lines[-1][0]
            while len(lines) > KEPT and lines[-1][-1] - lines[0][-1] > KEPT_S:
                lines.popleft()
        lead.reported = time.perf_counter()


@dataclass(slots=True)
class Lead:
    """What a worker keeps in mind of its generation: whether it leads, and what whoever led before may not have done.

    `sent`: the step of the last line that was sent. `owes`: what was due may not have been committed. Another one led
    before, maybe up to the middle of a commit; it may be at that still, so what is owed is written a step later than
    `since`, in a folder of its own. Or this one has taken over the state of a member that was past a boundary, where
    only who leads commits. `commits`: a commit is due before the members change.
    """

    snapshots: Snapshots
    generation: int = 0
    leads: bool = False
    owes: bool = False
    since: int = 0
    commits: bool = False
    sent: float = -1.0
    reported: float = 0.0

    def look(self, group: Group, state: TrainState, *, taken: bool) -> None:
        """Take note of the generation of a group, which begins with this state; nothing is owed of one from storage.

        `taken`: the state is another member's, further than this one's was.
        """
        if group.generation != self.generation:
            leads = group.rank == 0
            if leads and (taken or not self.leads):
                self.sent, self.since = -1.0, state.step
                self.owes = group.generation > 1 and state.step != state.stored
            self.generation, self.leads = group.generation, leads
            self.owes = self.owes and leads


def choose_device(gpus: float) -> torch.device:
    """Return the device of a worker: its first GPU where the spec gives it one, else the CPU.

    The CPU, too, on nodes whose GPUs are names (`elastrain cluster local`), which say so in their environment.
    """
    return torch.device("cuda", 0) if gpus and FAKE_GPUS not in os.environ else torch.device("cpu")


def fix_threads(cpus: float) -> None:
    """Fix torch's threads, on which a sum's bits depend: one for each whole CPU of the worker, at least one."""
    torch.set_num_threads(max(1, int(cpus)))
