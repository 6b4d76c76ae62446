"""A worker of a process history: seat and loop as in a run, with a pipe to the test where Ray's calls would be.

It asks the test at each place where something may happen to it, waits for the answer, and does what it says; so a
history can kill it between handing over its samples and the sum, in the middle of a commit, or while it joins. `Job`
says what it trains and, for controls, what is wrong with it. No Ray here.
"""

import faulthandler
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import numpy as np
import torch
import torch._dynamo  # the first optimizer of a process would import it, which takes a second; this is imported once
from tests.training.harness import Adversarial, Arrays, Classifier, Convolution, MemoryFeed, Setup, make_spec
from torch import Tensor, nn
from torch.nn import functional

from elastrain import storage
from elastrain.data.columns import Array
from elastrain.elastic.door import Door
from elastrain.elastic.protocol import Generation, Worker
from elastrain.elastic.seat import Dismissed, MemberSeat
from elastrain.errors import ConflictError, ours
from elastrain.observe.ledger import Clock
from elastrain.training import checkpoint
from elastrain.training.batches import ROW, STEP
from elastrain.training.loop import Lead, Loop
from elastrain.training.manifests import newest_whole
from elastrain.training.precision import fix_arithmetic
from elastrain.training.reduce import Group, GroupLost
from elastrain.training.state import TrainState
from elastrain.training.task import Batch, Loss, Losses, Task

SLOW_S = 0.3  # what a slow storage takes for a file
RAISED, DISMISSED = 3, 4  # exit codes


class Gpt(Task):
    """A transformer of one block with dropout and a causal mask."""

    def build(self) -> nn.Module:
        """8 tokens in, logits of 8 out."""
        return GptModel()

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Cross entropy over the tokens that are there."""
        tokens = batch["tokens"].long()
        targets = tokens[:, 1:].flatten()
        logits = model(tokens[:, :-1]).flatten(0, 1)
        loss = functional.cross_entropy(logits, targets, ignore_index=0, reduction="sum")
        return {"loss": Loss(loss, (targets > 0).sum())}


class GptModel(nn.Module):
    """(rows, 8) tokens to (rows, 8, 8) logits."""

    mask: Tensor
    width: ClassVar[int] = 16

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(8, self.width), nn.Embedding(8, self.width)
        self.inner, self.outer = nn.Linear(self.width, 3 * self.width), nn.Linear(self.width, self.width)
        self.norm, self.mlp = nn.LayerNorm(self.width), nn.Sequential(nn.Linear(self.width, 32), nn.GELU())
        self.head, self.dropout = nn.Linear(32, 8), nn.Dropout(0.2)
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend to earlier tokens."""
        hidden = self.dropout(self.tokens(tokens) + self.places.weight)
        query, key, value = self.inner(hidden).chunk(3, dim=-1)
        weights = torch.softmax(query @ key.transpose(1, 2) * self.width**-0.5 + self.mask, dim=-1)
        hidden = hidden + self.outer(self.dropout(weights) @ value)
        logits: Tensor = self.head(self.dropout(self.mlp(self.norm(hidden))))
        return logits


KINDS: dict[str, type[Task]] = {"mlp": Classifier, "cnn": Convolution, "gpt": Gpt, "gan": Adversarial}


def setup_of(kind: str, run_url: str, device: str, **changes: Any) -> Setup:
    """Return a run of 15 steps, three epochs, with whatever moves a state in it."""
    fields: dict[str, Any] = {
        "budget.steps": 15,
        "data.slots": 6,
        "optimizer": {"name": "adamw", "lr": 0.02, "weight_decay": 0.01},
        "task_args": {"dropout": 0.2} if kind == "mlp" else {},
        "clip_norm": 0.5,
        "ema": 0.9,
        "eval.every_steps": 5,
        "checkpoint": {"every_steps": 4, "keep": 2},
        "consistency": "bitwise",
        "audit": True,
        **changes,
    }
    spec = make_spec(**fields)
    return Setup(spec=spec, kind=KINDS[kind], eval_rows=40, run_url=run_url, device=torch.device(device))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all workers of an attempt are given. `variant` names what is wrong with them."""

    setup: Setup
    address: tuple[str, int]
    token: bytes
    resume: int | None
    lease_s: float
    timeout_s: float
    variant: str = ""


class Wire:
    """The pipe to the test, for any thread: what is told is not waited for, what is asked is."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._sending, self._asking = pipe, threading.Lock(), threading.Lock()

    def tell(self, kind: str, *arguments: Any) -> None:
        """Send."""
        with self._sending:
            self._pipe.send((kind, False, arguments))

    def ask(self, kind: str, *arguments: Any) -> Any:
        """Send, and wait for the answer."""
        with self._asking:
            with self._sending:
                self._pipe.send((kind, True, arguments))
            return self._pipe.recv()


class Places:
    """Asks the test, at each place, what is to happen there."""

    def __init__(self, wire: Wire, clock: Clock) -> None:
        self._wire, self._clock, self._asked = wire, clock, ("", -1, -1)
        self.state: TrainState | None = None
        self.generation = 0
        self.reached = 0  # the step of whoever has the state: a newcomer has none

    def at(self, place: str) -> None:
        """Stand at a place; a second time in one step and generation is not asked for."""
        assert self.state is not None
        step = max(self.state.step, self.reached)
        if (place, step, self.generation) == self._asked:
            return
        self._asked = (place, step, self.generation)
        computes, doing = threading.current_thread() is threading.main_thread(), self._clock.running()[0]
        if computes:
            self._clock.switch("data")  # a test that is slow to answer is no worker that stands still
        answer = self._wire.ask("at", place, step, self.generation)
        if computes:
            self._clock.switch(doing)
        if answer == "raise":
            raise RuntimeError("something that another process might not meet")
        if answer == "hang":
            time.sleep(600)
        if answer == "slow":
            time.sleep(SLOW_S)

    def forward(self) -> None:
        """Stand before a forward."""
        assert self.state is not None
        self.at(f"phase {self.state.phase}" if self.state.model.training else "evaluation")


class PipeRecorder:
    """Reports over the pipe, in the order and with the waits of `worker.HostRecorder`."""

    def __init__(self, wire: Wire, places: Places, name: str) -> None:
        self._wire, self._places, self._name = wire, places, name
        self._lines: list[tuple[int, int, Mapping[str, Array]]] = []

    def audit(self, step: int, slot: int, columns: Mapping[str, Array]) -> None:
        """Hand over the samples of a slot in a step."""
        self._lines.append((step, slot, columns))

    def audited(self) -> None:
        """Wait until the test has them, then see what happens."""
        self._wire.ask("audit", self._lines, self._places.generation)
        self._lines = []
        self._places.at("audited")

    def arrived(self) -> None:
        """Wait until everything has arrived: the pipe keeps the order."""
        self._wire.ask("arrived")

    def settled(self) -> None:
        """Wait until what was reported is in storage; raises ConflictError if this worker was given up."""
        self._places.at("commit")
        if not self._wire.ask("sync", self._name):
            raise ConflictError("this worker was given up while it wrote a checkpoint")

    def report(self, status: Mapping[str, Any]) -> None:
        """Hand over position, seconds and lines of metrics."""
        self._wire.tell("report", self._name, dict(status))

    def result(self, found: Mapping[str, Any]) -> None:
        """Hand over what the run came to."""
        self._wire.ask("result", dict(found))

    def event(self, kind: str, **fields: Any) -> None:
        """Hand over something for the ledger."""
        self._wire.tell("event", kind, fields)


class WatchedDoor(Door):
    """A door at which something may happen: before the members connect, and before each broadcast."""

    def __init__(self, host: str, token: bytes, places: Places) -> None:
        super().__init__(host, token)
        self._places = places

    def join(self, generation: Generation, name: str, device: torch.device, lost: threading.Event) -> Group:
        """See `Door.join`."""
        self._places.generation = generation.number
        source = None if generation.source is None else generation.members[generation.source].position
        self._places.reached = source[0] if source else 0
        self._places.at("join")
        group: Any = super().join(generation, name, device, lost)
        send, sent = group.broadcast, iter(range(1 << 30))

        def broadcast(tensor: Tensor, source: int) -> None:
            if next(sent) == 3:  # two make the header; this is among the weights
                self._places.at("broadcast")
            send(tensor, source)

        group.broadcast = broadcast
        whole: Group = group
        return whole


# --- what is wrong in the controls


class Skipping(Loop):
    """A loop that takes the step in flight for done when its group is lost."""

    def _one(self, batches: Any, group: Group, writer: Any, lead: Lead) -> None:
        try:
            super()._one(batches, group, writer, lead)
        except GroupLost:
            self.state.step, self.state.phase = self.state.step + 1, 0
            raise


class Careless(MemberSeat):
    """A seat whose newcomer takes over where the others are, but not their weights."""

    def _share(self, state: TrainState, group: Group, generation: Generation) -> None:
        own = {name: tensor.clone() for name, tensor in state.tensors().items() if name.startswith("model/")}
        super()._share(state, group, generation)
        if generation.number > 1 and not self._whole:
            state.model.load_state_dict({name.removeprefix("model/"): tensor for name, tensor in own.items()})


class Disorderly(MemoryFeed):
    """A feed that serves rows in another order than the plan's, and says that they are in that order."""

    def take(self, slot: int, block: int) -> Arrays | None:
        """Return a block with its first two samples exchanged."""
        found = super().take(slot, block)
        if found is not None and len(found[ROW]) > 1:
            order = [1, 0, *range(2, len(found[ROW]))]
            found = {name: array if name.startswith("elastrain.") else array[order] for name, array in found.items()}
        return found


class Padded(MemoryFeed):
    """Fills the short last step of an epoch with rows that the epoch has had, as samplers do for even workers."""

    def take(self, slot: int, block: int) -> Arrays | None:
        """Return a block, one row of each epoch's last step in it twice."""
        arrays = super().take(slot, block)
        if arrays is None:
            return None
        last = arrays[STEP] % self._plan.steps_per_epoch == self._plan.steps_per_epoch - 1
        order = np.sort(np.concatenate([np.arange(len(last)), np.flatnonzero(last)[:1]]))
        return {name: array[order] for name, array in arrays.items()}


# --- the process


def work(job: Job, wire: Wire, name: str, place: int) -> None:
    """Train as one worker, as `worker.RunWorker` does."""
    setup, clock = job.setup, Clock()
    places = Places(wire, clock)
    fix_arithmetic(setup.spec.consistency)
    state = places.state = setup.state()
    first = next(iter(state.model.children()))  # both of a GAN's phases go through its first
    first.register_forward_pre_hook(lambda *_: places.forward())
    door = WatchedDoor("127.0.0.1", job.token, places)
    recorder = PipeRecorder(wire, places, name)
    seat = (Careless if job.variant == "careless" else MemberSeat)(
        job.address,
        job.token,
        me=Worker(name=name, node=f"node-{place % 2}", place=place, door=door.address),
        door=door,
        device=setup.device,
        clock=clock,
        lease_s=job.lease_s,
        timeout_s=job.timeout_s,
        restore=lambda state, generation: restore(job, state, generation),
        before_entering=recorder.arrived,
    )
    try:
        loop = replace(setup.loop(seat, state), recorder=recorder, clock=clock)  # type: ignore[arg-type]
        if job.variant in ("disorderly", "padded"):
            feed: Any = loop.feed
            kind = Disorderly if job.variant == "disorderly" else Padded
            own = kind(feed._plan, feed._arrays, feed._evaluation, end=feed._end, block_rows=feed._block_rows)
            loop = replace(loop, feed=own)
        if job.variant == "skipping":
            loop = Skipping(**{key: value for key, value in vars(loop).items() if not key.startswith("_")})
        loop.run()
    finally:
        seat.close()


def restore(job: Job, state: TrainState, generation: int) -> None:
    """Load what is in storage, as `worker.RunWorker` does."""
    url = job.setup.run_url
    step = job.resume if generation == 1 else newest_whole(url, warn=lambda _: None)
    if step is not None:
        saved = checkpoint.load(url, step)
        state.load(saved.tensors, saved.numbers)


def in_process(pipe: Connection, number: int) -> None:
    """Wait to be seated, then work; how it ended goes to the test, as `worker.work` tells the host."""
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)  # where a history does not end, it says where its workers are
    setattr(storage, "_flush", lambda _: None)  # noqa: B010 -- a flush is for power cuts, which no test makes
    wire, name = Wire(pipe), f"{number}-{os.getpid()}"
    os.environ["NCCL_HOSTID"] = name  # NCCL refuses two members on one GPU, unless they say to be on different hosts
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    job, place = wire.ask("seat")
    try:
        work(job, wire, name, place)
    except Dismissed as event:
        wire.tell("dismissed", str(event))
        os._exit(DISMISSED)
    except Exception as error:  # noqa: BLE001 -- brought to the test
        cause = error.__cause__ if ours(error) else error
        ended = wire.ask("raised", type(cause).__name__, traceback.format_exc())
        os._exit(RAISED if not ended else 1)
    wire.tell("finished")
    os._exit(0)
