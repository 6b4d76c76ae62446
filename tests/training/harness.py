"""Workers without Ray: an in-memory feed, tasks of each kind, and groups of workers in one process or in many.

`lockstep` runs W workers as threads of which only one computes at a time: the turn changes hands in collectives alone.
torch's default generators are global, and a worker seeds them before each slot, so no worker can disturb another.
`Processes` runs real ones, forked from a server that has torch imported already.
"""

import atexit
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tests.training.meeting import meet
from torch import Tensor, nn
from torch.nn import functional

from elastrain.data.columns import Array, Column
from elastrain.data.dataset import Dataset, Shard
from elastrain.data.plan import Plan
from elastrain.observe.ledger import Clock
from elastrain.spec.train import CheckpointSpec, TrainSpec
from elastrain.training import checkpoint
from elastrain.training.batches import EPOCH, ROW, SLOT, STEP
from elastrain.training.loop import Decision, Loop
from elastrain.training.reduce import Group, GroupLost, Solo
from elastrain.training.state import Position, TrainState, digest
from elastrain.training.task import Batch, DataInfo, Loss, Losses, Ratio, Task

CPU = torch.device("cpu")
EVAL_BLOCK_ROWS = 7
ANYWHERE = tempfile.mkdtemp(prefix="elastrain-runs-")  # for runs whose checkpoints nobody looks at
atexit.register(shutil.rmtree, ANYWHERE, ignore_errors=True)
Arrays = dict[str, Array]


# --- data


def make_arrays(rows: int, seed: int = 0) -> Arrays:
    """Rows with a vector, an image, a label that depends on them, and tokens with padding (0) of uneven length."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    lengths = rng.integers(1, 9, size=(rows, 1))
    tokens = (np.arange(9) + rng.integers(0, 7, size=(rows, 1))) % 7 + 1
    return {
        "x": x,
        "image": rng.integers(0, 255, size=(rows, 6, 6)).astype(np.uint8),
        "label": (x.sum(axis=1) > 0).astype(np.int64) + (x[:, 0] > 0.5),
        "tokens": np.where(np.arange(9) <= lengths, tokens, 0).astype(np.int32),
    }


def make_dataset(arrays: Arrays, group_rows: int = 10) -> Dataset:
    """The dataset of arrays, cut into row groups; no file stands behind it."""
    rows = len(arrays["x"])
    groups = [group_rows] * (rows // group_rows) + ([rows % group_rows] if rows % group_rows else [])
    values = {"label": 3, "tokens": 8, "image": 256}
    columns = [
        Column(name=n, dtype=str(a.dtype), shape=a.shape[1:], num_values=values.get(n)) for n, a in arrays.items()
    ]
    shard = Shard(path="part-0.parquet", size_bytes=1, row_groups=tuple(groups), footer="")
    name = f"{rows} rows in groups of {group_rows}"  # plans are equal where fingerprints are
    return Dataset(url="memory", columns=tuple(columns), shards=(shard,), fingerprint=name, packed=True)


class MemoryFeed:
    """Serves blocks straight from the plan and arrays; `taken` lists the addresses, `released` the releases."""

    def __init__(self, plan: Plan, arrays: Arrays, evaluation: Arrays | None, *, end: int, block_rows: int) -> None:
        self._plan, self._arrays, self._evaluation, self._end = plan, arrays, evaluation, end
        self._block_rows = block_rows
        self.taken: list[tuple[int, int]] = []
        self.released: list[int] = []
        self.evaluated: list[int] = []

    def prefetch(self, slots: Sequence[int], block: int) -> None:
        """Nothing to do."""

    def take(self, slot: int, block: int) -> Arrays | None:
        """Return a block, None if it has no rows."""
        self.taken.append((slot, block))
        rows = self._plan.block(slot, block).rows(0, self._end)
        if not len(rows.row):
            return None
        columns = {name: array[rows.row] for name, array in self._arrays.items()}
        return {EPOCH: rows.epoch, STEP: rows.step, SLOT: np.full(len(rows.row), slot), ROW: rows.row, **columns}

    def release_before(self, block: int) -> None:
        """Note it."""
        self.released.append(block)

    def evaluation(self, blocks: Sequence[int]) -> Iterator[tuple[int, Arrays]]:
        """Yield evaluation blocks."""
        assert self._evaluation is not None
        total = len(self._evaluation["x"])
        for block in blocks:
            row = np.arange(block * self._block_rows, min((block + 1) * self._block_rows, total))
            self.evaluated.extend(row.tolist())
            none = np.full(len(row), -1)
            yield (
                block,
                {EPOCH: none, STEP: none, SLOT: none, ROW: row, **{n: a[row] for n, a in self._evaluation.items()}},
            )


@dataclass
class Recorder:
    """Keeps what it is given; `log` has the order of calls."""

    lines: list[tuple[float, ...]] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    audits: list[tuple[int, int, Mapping[str, Array]]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def audit(self, step: int, slot: int, columns: Mapping[str, Array]) -> None:
        """Keep the samples of a slot in a step."""
        self.audits.append((step, slot, columns))
        self.log.append(f"audit {step}")

    def audited(self) -> None:
        """Note it."""
        self.log.append("audited")

    def settled(self) -> None:
        """Note how many steps have been reported."""
        self.log.append(f"settled {len(self.lines)}")

    def report(self, status: Mapping[str, Any]) -> None:
        """Keep the lines of metrics."""
        self.lines.extend(status["lines"])

    def result(self, found: Mapping[str, Any]) -> None:
        """Note it."""
        self.log.append(f"result {found['step']}")

    def event(self, kind: str, **fields: Any) -> None:
        """Keep an event."""
        self.events.append((kind, fields))


# --- tasks


class Classifier(Task):
    """An MLP with dropout. `task_args`: dropout, noise."""

    def build(self) -> nn.Module:
        """6 numbers to 3 classes."""
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(self.args.get("dropout", 0.0)), nn.Linear(16, 3))

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Cross entropy."""
        logits = model(number(batch["x"]))
        return {"loss": Loss(functional.cross_entropy(logits, batch["label"], reduction="sum"), len(logits))}

    def metrics(self, model: nn.Module, batch: Batch) -> dict[str, Ratio]:
        """Accuracy."""
        hits = (model(number(batch["x"])).argmax(1) == batch["label"]).sum()
        return {"accuracy": Ratio(hits, len(batch["label"]))}


class Convolution(Task):
    """A small CNN with batch norm. `task_args`: channels_last."""

    def build(self) -> nn.Module:
        """(rows, 6, 6) bytes to 3 classes."""
        layers = [
            nn.Unflatten(1, (1, 6)),
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, bias=False),  # a bias before batch norm has no gradient but noise, which Adam enlarges
            nn.BatchNorm2d(4, momentum=None),
            nn.Flatten(),
            nn.Linear(64, 3),
        ]
        model = nn.Sequential(*layers)
        if self.args.get("channels_last"):
            for parameter in [p for p in model.parameters() if p.dim() == 4]:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Cross entropy; the images are changed in place, as a task may."""
        logits = model(number(batch["image"]).div_(255.0))
        return {"loss": Loss(functional.cross_entropy(logits, batch["label"], reduction="sum"), len(logits))}


class Tokens(Task):
    """Next-token prediction with padding: the weight of a loss is the number of real tokens."""

    def build(self) -> nn.Module:
        """Embedding, GRU, and an output tied to the embedding."""
        return TokenModel()

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Cross entropy over the tokens that are there."""
        tokens = batch["tokens"].long()
        targets = tokens[:, 1:].flatten()
        logits = model(tokens[:, :-1]).flatten(0, 1)
        loss = functional.cross_entropy(logits, targets, ignore_index=0, reduction="sum")
        return {"loss": Loss(loss, (targets > 0).sum())}


class TokenModel(nn.Module):
    """(rows, length) tokens to (rows, length, 8) logits; a persistent mask with -inf is among its buffers."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Embedding(8, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 8, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend to earlier tokens with equal weights, then mix."""
        hidden = self.tokens(tokens)
        hidden = hidden + torch.tanh(self.mix(torch.softmax(self.mask, dim=1) @ hidden))
        logits: Tensor = self.head(hidden)
        return logits


class Variational(Task):
    """A variational autoencoder, which samples in forward."""

    def build(self) -> nn.Module:
        """6 numbers to 2 latent ones and back."""
        return nn.ModuleDict({"encoder": nn.Linear(6, 4), "decoder": nn.Linear(2, 6)})

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Reconstruction and divergence."""
        assert isinstance(model, nn.ModuleDict)
        x = number(batch["x"])
        mean, log_var = model["encoder"](x).chunk(2, dim=1)
        sample = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        divergence = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
        return {"loss": Loss((model["decoder"](sample) - x).square().sum() + divergence, len(x))}


class Adversarial(Task):
    """Two phases, two optimizers; a batch norm in the generator, spectral norm in the discriminator."""

    phases: ClassVar[tuple[str, ...]] = ("discriminator", "generator")

    def build(self) -> nn.Module:
        """A generator of 6 numbers out of 3 and its judge."""
        spectral = torch.nn.utils.parametrizations.spectral_norm
        judge = nn.Sequential(spectral(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 1))
        maker = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        return nn.ModuleDict({"discriminator": judge, "generator": maker})

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """The usual pair, each computed in its phase only."""
        return {"discriminator": lambda: self._judged(model, batch), "generator": lambda: self._made(model, batch)}

    def _judged(self, model: nn.Module, batch: Batch) -> Loss:
        assert isinstance(model, nn.ModuleDict)
        x = number(batch["x"])
        made = model["generator"](torch.randn(len(x), 3, device=x.device)).detach()
        loss = functional.softplus(-model["discriminator"](x)) + functional.softplus(model["discriminator"](made))
        return Loss(loss.sum(), len(x))

    def _made(self, model: nn.Module, batch: Batch) -> Loss:
        assert isinstance(model, nn.ModuleDict)
        rows = len(batch["x"])
        made = model["generator"](torch.randn(rows, 3, device=next(model.parameters()).device))
        return Loss(functional.softplus(-model["discriminator"](made)).sum(), rows)


def number(tensor: Tensor) -> Tensor:
    """The tensor in the type of the run, with memory of its own only if the type is another."""
    return tensor.to(torch.get_default_dtype())


# --- a run


def make_spec(**changes: Any) -> TrainSpec:
    """A spec of 8 steps; keys with dots go into sections (`**{"data.slots": 3}`)."""
    fields: dict[str, Any] = {
        "name": "run",
        "task": "tests.training.harness:Classifier",
        "data": {"train": "memory", "global_batch": 24, "slots": 4, "seed": 3},
        "optimizer": {"name": "adamw", "lr": 0.02, "weight_decay": 0.01},
        "budget": {"steps": 8},
        "checkpoint": {"every_steps": 1000},
    }
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = fields
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return TrainSpec.model_validate(fields)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run's parts that no worker changes. Step blocks are short, so that several are crossed."""

    spec: TrainSpec
    kind: type[Task]
    rows: int = 100
    eval_rows: int = 0
    block_steps: int = 3
    run_url: str = ANYWHERE
    arrays: Arrays | None = None
    device: torch.device = CPU

    @property
    def steps(self) -> int:
        """The budget."""
        assert self.spec.budget.steps is not None
        return self.spec.budget.steps

    def data(self) -> Arrays:
        """The rows to train on."""
        return self.arrays if self.arrays is not None else make_arrays(self.rows)

    def plan(self) -> Plan:
        """The plan over them."""
        data = self.spec.data
        whole = Plan.of(
            make_dataset(self.data()), seed=data.seed, global_batch=data.global_batch, slots=self.spec.num_slots
        )
        return replace(whole, block_steps=self.block_steps)

    def state(self) -> TrainState:
        """A new state."""
        task = self.kind(DataInfo.of(make_dataset(self.data())), **self.spec.task_args)
        return TrainState(self.spec, task, self.device)

    def loop(self, seat: "Seat", state: TrainState | None = None) -> Loop:
        """A worker's loop over a state (a new one if none is given)."""
        plan, evaluation = self.plan(), make_arrays(self.eval_rows, seed=1) if self.eval_rows else None
        return Loop(
            spec=self.spec,
            plan=plan,
            evaluation=None if evaluation is None else make_dataset(evaluation),
            eval_block_rows=EVAL_BLOCK_ROWS,
            num_steps=self.steps,
            run_url=self.run_url,
            state=state or self.state(),
            feed=MemoryFeed(plan, self.data(), evaluation, end=self.steps, block_rows=EVAL_BLOCK_ROWS),
            seat=seat,
            recorder=Recorder(),
            clock=Clock(),
            info={},
        )


class Seat:
    """A place in groups that are given from outside: `groups(step)`."""

    def __init__(self, groups: Callable[[int], Group], *, stop_at: int | None = None) -> None:
        self._groups, self._stop_at, self._step = groups, stop_at, 0

    def group(self, state: TrainState) -> Group:
        """Return the group of a step."""
        self._step = state.step
        return self._groups(state.step)

    def decision(self) -> Decision:
        """Stop when the step has come to stop at."""
        return Decision(stop=self._stop_at is not None and self._step >= self._stop_at)

    def change(self) -> None:
        """Nothing is decided here."""

    def lost(self) -> None:
        """There is no other group."""
        raise GroupLost("a member of the only group is gone")

    def noted(self, position: Position) -> None:
        """Nobody needs to know."""


def losses_of(loop: Loop) -> list[float]:
    """The losses that a worker reported or, where it did not lead, would have; in the order of steps."""
    assert isinstance(loop.recorder, Recorder)
    return [
        loss for _, loss in sorted({line[0]: line[3] for line in (*loop.recorder.lines, *loop.state.lines)}.items())
    ]


def train_alone(setup: Setup, state: TrainState | None = None, **seat: Any) -> tuple[Loop, dict[str, Any]]:
    """Run one worker; return its loop and result."""
    group = Solo()
    loop = setup.loop(Seat(lambda _: group, **seat), state)
    return loop, loop.run()


# --- several workers in one process


class Lockstep:
    """Groups for threads that take turns; a turn ends in a collective or with the thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._turn, self._left = 0, set(range(size))
        self._changed = threading.Condition()
        self._parts: dict[int, list[Tensor]] = {}
        self._broken = False

    def wait_turn(self, rank: int) -> None:
        """Wait until it is this rank's turn; raises GroupLost if another one failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == rank or self._broken)
            if self._broken:
                raise GroupLost("another thread failed")

    def yield_turn(self, rank: int) -> None:
        """Hand the turn to the next thread that is still at work."""
        with self._changed:
            later = [(rank + 1 + offset) % self.size for offset in range(self.size)]
            self._turn = next((other for other in later if other in self._left), -1)
            self._changed.notify_all()

    def leave(self, rank: int, *, failed: bool) -> None:
        """The thread ends."""
        with self._changed:
            self._left.discard(rank)
            self._broken = self._broken or failed
        self.yield_turn(rank)

    def exchange(self, rank: int, number: int, tensor: Tensor) -> list[Tensor]:
        """Return all members' tensors of collective `number`, in rank order."""
        self._parts.setdefault(number, []).append(tensor.clone())
        self.yield_turn(rank)
        self.wait_turn(rank)
        parts = self._parts[number]
        assert len(parts) == self.size, "the members do not call the same collectives"
        self._parts.pop(number - 2, None)
        return parts


class LockstepMember:
    """A Group of threads that take turns."""

    generation = 1

    def __init__(self, lockstep: Lockstep, rank: int) -> None:
        self.rank, self.size, self._lockstep, self._number = rank, lockstep.size, lockstep, 0

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum, added in rank order."""
        total = torch.zeros_like(tensor)
        for part in self._next(tensor):
            total += part
        tensor.copy_(total)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace a tensor by the source's."""
        tensor.copy_(self._next(tensor)[source])

    def all_to_all(self, output: Tensor, tensor: Tensor, received: list[int], sent: list[int]) -> None:
        """Take from each member's tensor what it sends to this rank; its sizes are those that this one expects."""
        sizes = self._next(torch.tensor(sent))
        parts = [part.split(cuts.tolist()) for part, cuts in zip(self._next(tensor), sizes, strict=True)]
        assert [len(part[self.rank]) for part in parts] == received
        output.copy_(torch.cat([part[self.rank] for part in parts]))

    def all_gather(self, output: Tensor, tensor: Tensor) -> None:
        """Join the tensors of all members."""
        output.copy_(torch.cat(self._next(tensor)))

    def _next(self, tensor: Tensor) -> list[Tensor]:
        self._number += 1
        return self._lockstep.exchange(self.rank, self._number, tensor)


def lockstep(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """Run `work(group)` as `size` workers in turn; return what they returned in rank order, raise what one raised."""
    shared, results, errors = Lockstep(size), [None] * size, []

    def run(rank: int) -> None:
        failed = True
        try:
            shared.wait_turn(rank)
            results[rank] = work(LockstepMember(shared, rank) if size > 1 else Solo())
            failed = False
        except BaseException as error:  # noqa: BLE001 -- brought to the caller's thread
            errors.append(error)
        finally:
            shared.leave(rank, failed=failed)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def train_together(setup: Setup, size: int) -> list[Loop]:
    """Run `size` workers in turn; return their loops."""

    def work(group: Group) -> Loop:
        loop = setup.loop(Seat(lambda _: group))
        loop.run()
        return loop

    return lockstep(size, work)


# --- several workers in processes


class Processes:
    """Starts functions of this module in processes; use as a context: what still runs at its end is killed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._results: Any = None
        self.started: list[BaseProcess] = []

    def __enter__(self) -> "Processes":
        self._results = self._context.SimpleQueue()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
            process.join()

    def start(self, work: Callable[..., Any], *arguments: Any) -> BaseProcess:
        """Start `work(*arguments)`; its result, or the error's text, will be among `results`."""
        process = self._context.Process(target=_in_process, args=(self._results, len(self.started), work, arguments))
        process.start()
        self.started.append(process)
        return process

    def result(self) -> tuple[int, Any]:
        """Wait for the next result; return which process it is from and what it returned, or its exception."""
        number, value = self._results.get()
        return number, value

    def results(self) -> list[Any]:
        """Wait for all; return what they returned in the order of starting, raise what one raised."""
        found = dict(self.result() for _ in self.started)
        for value in found.values():
            if isinstance(value, BaseException):
                raise value
        return [found[number] for number in sorted(found)]


def _in_process(results: Any, number: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        value = work(*arguments)
    except BaseException as error:  # noqa: BLE001 -- brought to the test
        value = (
            RuntimeError(f"{type(error).__name__}: {error}")
            if not isinstance(error, GroupLost)
            else GroupLost(str(error))
        )
    results.put((number, value))


def losses_together(setup: Setup, folder: Path, rank: int, size: int) -> list[float]:
    """Train as one of `size` processes; return the losses."""
    group = meet(folder, rank, size)
    loop = setup.loop(Seat(lambda _: group))
    loop.run()
    return losses_of(loop)


def die_in_a_sum(folder: Path, rank: int) -> float:
    """Sum with another process, which dies without a word; return the seconds until it was noticed."""
    group = meet(folder, rank, 2)
    tensor = torch.ones(1000)
    group.all_reduce(tensor)
    assert tensor[0] == 2.0
    if rank == 1:
        os.kill(os.getpid(), 9)
    start = time.perf_counter()
    try:
        group.all_reduce(tensor)
    except GroupLost:
        return time.perf_counter() - start
    raise AssertionError("the sum went through")


GENERATIONS = {0: "abcd", 4: "ac", 8: "cea"}  # from which step on who trains, in rank order


class Leaving(Exception):  # noqa: N818 -- an event
    """The worker is not in the next group."""


def train_through_changes(setup: Setup, folder: Path, name: str) -> tuple[list[float], list[int]]:
    """Train as a named worker as long as it is a member; return its losses, and the number of workers at each."""
    state = setup.state()
    groups: dict[int, Group] = {}
    sizes: list[int] = []

    def group(step: int) -> Group:
        first = max(start for start in GENERATIONS if start <= step)
        members = GENERATIONS[first]
        if name not in members:
            raise Leaving
        if first not in groups:
            groups[first] = meet(folder, members.index(name), len(members), first)
            state.share(groups[first], members.index("a"))  # who was there from the start
            assert state.step == first
        sizes.append(len(members))
        return groups[first]

    loop = setup.loop(Seat(group), state)
    if name == "e":
        group(8)  # its state is that of step 8 before the loop begins
    try:
        loop.run()
    except Leaving:
        loop._read(force=True)
    return losses_of(loop), sizes


def share_state(setup: Setup, folder: Path, rank: int) -> tuple[str, dict[str, Any]]:
    """Take over the state of rank 1 of two, which has trained; return digest and numbers."""
    state = setup.state()
    if rank == 1:
        train_alone(setup, state)
    state.share(meet(folder, rank, 2), 1)
    return digest(state.tensors()), state.numbers()


# --- writers that die or find no room


def small_state(size: int = 1000) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state with three files."""
    tensors = {f"{part}/weight": torch.arange(float(size)) for part in ("model", "optim", "ema")}
    return tensors, {"step": 1}


def die_in_a_commit(run: str, file: int) -> None:
    """Commit step 1, then die inside step 2 when half of file number `file` is written (3: before the manifest)."""
    writer = checkpoint.Writer(run, CheckpointSpec())
    tensors, numbers = small_state()
    writer.commit(tensors, numbers, {})
    writer.wait()
    save, count = checkpoint._save, iter(range(10))

    def cut_off(tensors: dict[str, Tensor], path: Path, target: str) -> None:
        save(tensors, path, target)
        if next(count) == file:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def no_manifest(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._save = cut_off
    setattr(checkpoint, "write_manifest", no_manifest)  # noqa: B010 -- mypy knows that nobody should
    writer.commit(tensors, {"step": 2}, {})
    writer.wait()


def commit_without_room(run: str) -> tuple[str, str]:
    """Commit step 1, then step 2 where no file may grow past 64 KiB; return the error's class and text."""
    writer = checkpoint.Writer(run, CheckpointSpec())
    tensors, numbers = small_state()
    writer.commit(tensors, numbers, {})
    writer.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
    try:
        writer.commit(small_state(100_000)[0], {"step": 2}, {})
        writer.wait()
    except Exception as error:  # noqa: BLE001 -- its class is what the test is about
        return type(error).__name__, str(error)
    return "nothing", "went wrong"
