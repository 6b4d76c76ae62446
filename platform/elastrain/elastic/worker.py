"""What a Ray Train worker does: take a seat, load the state, run the loop.

It returns when it has no more to do, and when it has told the host of an error that ends the run. It raises where
another process in its place may fare better: Ray Train then starts one.
"""

import os
import secrets
import socket
import time
import traceback
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import torch

from elastrain.data.blocks import eval_block_rows
from elastrain.data.columns import Array
from elastrain.data.feed import WorkerFeed
from elastrain.elastic.config import LEASE_S, WorkerConfig
from elastrain.elastic.door import Door
from elastrain.elastic.holder import HolderVault
from elastrain.elastic.protocol import Worker
from elastrain.elastic.seat import Dismissed, MemberSeat
from elastrain.errors import ConflictError, ElastrainError, ResourceError, ours
from elastrain.observe.ledger import Clock
from elastrain.training import checkpoint
from elastrain.training.late_dynamo import defer_dynamo
from elastrain.training.loop import Loop, choose_device, fix_threads
from elastrain.training.manifests import newest_whole
from elastrain.training.precision import arithmetic, fix_arithmetic
from elastrain.training.state import TrainState
from elastrain.training.task import make_task

MAY_PASS = (RuntimeError, OSError, MemoryError)  # what the machine may do to one process; others are mistakes


class HostRecorder:
    """Reports to the host; calls are sent and not waited for, except in `audited`."""

    def __init__(self, host: Any, name: str) -> None:
        self._host, self._name = host, name
        self._lines: list[tuple[int, int, Mapping[str, Array]]] = []
        self._sent: list[Any] = []

    def audit(self, step: int, slot: int, columns: Mapping[str, Array]) -> None:
        """Hand over the samples of a slot in a step."""
        self._lines.append((step, slot, columns))

    def audited(self) -> None:
        """Wait until the host has them."""
        if self._lines:
            ray.get(self._host.audit.remote(self._lines))
            self._lines = []

    def arrived(self) -> None:
        """Wait until everything handed over has arrived."""
        ray.get(list(self._sent))

    def settled(self) -> None:
        """Wait until the host has written what was reported; the call to write may overtake those before it.

        Raises ConflictError if this worker was given up meanwhile: others train on, and what it has is not to count.
        """
        self.arrived()
        if not ray.get(self._host.sync.remote(self._name)):
            raise ConflictError("this worker was given up while it wrote a checkpoint")

    def report(self, status: Mapping[str, Any]) -> None:
        """Hand over position, seconds and lines of metrics."""
        self._note(self._host.report.remote(self._name, dict(status)))

    def result(self, found: Mapping[str, Any]) -> None:
        """Hand over what the run came to."""
        self.arrived()
        ray.get(self._host.result.remote(dict(found)))

    def event(self, kind: str, **fields: Any) -> None:
        """Hand over something for the ledger."""
        self._note(self._host.event.remote(kind, fields))

    def _note(self, sent: Any) -> None:
        """Keep a call until it has arrived."""
        _, under_way = ray.wait(self._sent, num_returns=len(self._sent), timeout=0) if self._sent else ([], [])
        self._sent = [*under_way, sent]


def work(config: WorkerConfig) -> None:
    """Train as one worker of the run."""
    defer_dynamo()
    name = f"{socket.gethostname()}-{secrets.token_hex(3)}-{os.getpid()}"
    worker = RunWorker(config, name)
    try:
        worker.train()
    except Dismissed as event:
        if event.again:
            raise
    except torch.OutOfMemoryError as error:
        message = (
            f"a worker ran out of GPU memory: lower micro_batch or data.global_batch, or raise data.slots ({error})"
        )
        ray.get(config.host.fail.remote(name, ResourceError.__name__, message))
    except Exception as error:
        known = ours(error)
        kind, text = type(known or ElastrainError()).__name__, str(known) if known else traceback.format_exc()
        if not worker.may_pass(error):
            ray.get(config.host.fail.remote(name, kind, text))
        elif not ray.get(config.host.tripped.remote(name, worker.step, kind, text)):
            raise
    finally:
        worker.close()


class RunWorker:
    """A worker from its start to its end."""

    def __init__(self, config: WorkerConfig, name: str) -> None:
        self._config, self._name = config, name
        self._clock = Clock(before_s=max(0.0, time.time() - config.launched))
        self._recorder = HostRecorder(config.host, name)
        self._vault = HolderVault(config.host, config.run_url)
        self._state: TrainState | None = None
        self._seat: MemberSeat | None = None
        self._feed: WorkerFeed | None = None

    @property
    def step(self) -> int:
        """Steps done."""
        return -1 if self._state is None else self._state.step

    def may_pass(self, error: BaseException) -> bool:
        """Say whether another process might not meet the same error: where steps have gone well before it, here."""
        cause = error.__cause__ if ours(error) is not None else error
        passes = isinstance(cause, MAY_PASS) and not isinstance(cause, NotImplementedError | RecursionError)
        return passes and self._seat is not None and self._seat.has_stepped

    def close(self) -> None:
        """Leave the membership, so that the others need not wait."""
        self._vault.close()
        if self._seat is not None:
            self._seat.close()
        if self._feed is not None:
            self._feed.close()

    def train(self) -> None:
        """Train until the run ends, or there is no place for this worker in it any more.

        Raises Dismissed, and what the loop raises.
        """
        config, spec = self._config, self._config.spec
        fix_threads(spec.workers.cpus)
        fix_arithmetic(spec.consistency, compiles=spec.compile)
        device = choose_device(spec.workers.gpus)
        self._feed = WorkerFeed(config.feeder, config.feed, begin=config.feed.begin)
        state = TrainState(spec, make_task(spec, config.feed.train), device)
        self._state, self._seat = state, self._take_seat(device)
        evaluation = config.feed.evaluation
        loop = Loop(
            spec=spec,
            plan=config.feed.plan,
            evaluation=evaluation,
            eval_block_rows=eval_block_rows(evaluation) if evaluation else 1,
            num_steps=config.num_steps,
            run_url=config.run_url,
            state=state,
            feed=self._feed,
            seat=self._seat,
            recorder=self._recorder,
            clock=self._clock,
            info={**config.info, "arithmetic": arithmetic(device)},
            vault=self._vault,
        )
        loop.run()

    def _take_seat(self, device: torch.device) -> MemberSeat:
        config, spec = self._config, self._config.spec
        address, token = ray.get(config.host.here.remote(self._name, ray.get_runtime_context().current_actor))
        door = Door(ray.util.get_node_ip_address(), token)
        me = Worker(
            name=self._name,
            node=ray.get_runtime_context().get_node_id(),
            place=ray.train.get_context().get_world_rank(),
            door=door.address,
            cell=config.cell,
            arithmetic=arithmetic(device),
        )
        return MemberSeat(
            address,
            token,
            me=me,
            door=door,
            device=device,
            clock=self._clock,
            lease_s=min(LEASE_S, spec.workers.timeout_s),
            timeout_s=spec.workers.timeout_s,
            restore=self._restore,
            before_entering=self._recorder.arrived,
        )

    def _restore(self, state: TrainState, generation: int) -> None:
        """Load what the run goes on from: at first what its driver has chosen, later what is newest."""
        config = self._config
        step = config.resume if generation == 1 else newest_whole(config.run_url, warn=lambda _: None)
        if step is None:
            return
        saved = checkpoint.load(config.run_url, step)
        own = arithmetic(state.device)
        if config.spec.consistency == "bitwise" and saved.info["arithmetic"] != own:
            raise ConflictError(
                f"consistency: bitwise: {saved.url} was computed with {saved.info['arithmetic']}, here it would go on "
                f"with {own}; use a machine of that kind, or begin a run of another name"
            )
        state.load(saved.tensors, saved.numbers)
