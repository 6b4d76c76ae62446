"""What a Ray Train worker does: take a seat, load the state, run the loop, hand over the result.

It always returns normally; what went wrong is told to the host, which knows what to do about it.
"""

import os
import socket
import threading
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
from elastrain.elastic.config import WORKER_LOST, WorkerConfig
from elastrain.elastic.group import Door, Generation, ranked
from elastrain.elastic.membership import Worker
from elastrain.errors import ConflictError, ElastrainError, ResourceError, ours
from elastrain.observe.ledger import Clock
from elastrain.training import checkpoint
from elastrain.training.loop import Loop, choose_device, fix_threads
from elastrain.training.precision import arithmetic, fix_arithmetic
from elastrain.training.reduce import Group, GroupLost
from elastrain.training.state import TrainState
from elastrain.training.task import make_task

WISH_POLL_S = 0.25


class HostSeat:
    """A place in the membership: one generation until it is lost."""

    def __init__(self, host: Any, name: str, device: torch.device) -> None:
        context = ray.train.get_context()
        self._host, self._name, self._device = host, name, device
        self._door = Door(ray.util.get_node_ip_address())
        node = ray.get_runtime_context().get_node_id()
        self._me = Worker(
            name=name,
            node=node,
            place=context.get_world_rank(),
            store=self._door.address,
            arithmetic=arithmetic(device),
        )
        self._group: Group | None = None
        self._stop = False
        threading.Thread(target=self._watch, daemon=True).start()

    def group(self, step: int) -> Group:
        """Return the group of the coming step; the first call waits until all workers are there."""
        del step  # one generation for now: members do not change between steps
        if self._group is None:
            formed = ray.get(self._host.enter.remote(self._me))
            if formed is None:
                raise GroupLost("the run ended before all workers were there")
            number, workers = formed
            members = ranked([(w.name, w.node, w.place) for w in workers])
            first = next(w for w in workers if w.name == members[0])
            self._group = self._door.join(
                Generation(number=number, members=members, store=first.store), self._name, self._device
            )
        return self._group

    def wishes_stop(self) -> bool:
        """Say whether somebody asked the run to stop."""
        return self._stop

    def _watch(self) -> None:
        pause = threading.Event()
        while not self._stop and not pause.wait(WISH_POLL_S):
            try:
                self._stop = ray.get(self._host.wishes_stop.remote())
            except ray.exceptions.RayError:
                return


class HostRecorder:
    """Reports to the host; calls are sent and not waited for, except in `audited`."""

    def __init__(self, host: Any, name: str, *, lead: bool) -> None:
        self._host, self._name, self._lead = host, name, lead
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

    def settled(self) -> None:
        """Wait until the host has written what was reported; the call to write may overtake those before it."""
        ray.get(list(self._sent))
        ray.get(self._host.sync.remote())

    def report(self, status: Mapping[str, Any]) -> None:
        """Hand over position, seconds and lines of metrics."""
        self._note(self._host.report.remote(self._name, {**status, "lead": self._lead}))

    def event(self, kind: str, **fields: Any) -> None:
        """Hand over something for the ledger."""
        self._note(self._host.event.remote(kind, fields))

    def _note(self, sent: Any) -> None:
        """Keep a call until it has arrived."""
        _, under_way = ray.wait(self._sent, num_returns=len(self._sent), timeout=0) if self._sent else ([], [])
        self._sent = [*under_way, sent]


def work(config: WorkerConfig) -> None:
    """Train as one worker of the run; whatever happens is told to the host."""
    name = f"{socket.gethostname()}-{os.getpid()}"
    try:
        result = _train(config, name)
        ray.get(config.host.finish.remote(name, result))
    except GroupLost as error:
        ray.get(config.host.fail.remote(WORKER_LOST, f"a worker was lost ({str(error).splitlines()[0][:200]})"))
    except torch.OutOfMemoryError as error:
        message = (
            f"a worker ran out of GPU memory: lower micro_batch or data.global_batch, or raise data.slots ({error})"
        )
        ray.get(config.host.fail.remote(ResourceError.__name__, message))
    except Exception as error:  # noqa: BLE001 -- the border of the worker: nothing may get lost here
        known = ours(error)
        text = str(known) if known else traceback.format_exc()
        ray.get(config.host.fail.remote(type(known or ElastrainError()).__name__, text))


def _train(config: WorkerConfig, name: str) -> dict[str, Any]:
    spec = config.spec
    clock = Clock(before_s=max(0.0, time.time() - config.launched))
    fix_threads(spec.workers.cpus)
    fix_arithmetic(spec.consistency)
    device = choose_device(spec.workers.gpus)
    feed = WorkerFeed(config.feeder, config.feed, begin=config.feed.begin)
    state = TrainState(spec, make_task(spec, config.feed.train), device)
    seat = HostSeat(config.host, name, device)
    group = seat.group(0)
    if config.resume is not None and group.rank == 0:
        saved = checkpoint.load(config.run_url, config.resume)
        if spec.consistency == "bitwise" and saved.info["arithmetic"] != arithmetic(device):
            raise ConflictError(
                f"consistency: bitwise: {saved.url} was computed with {saved.info['arithmetic']}, here it would go on "
                f"with {arithmetic(device)}; use a machine of that kind, or begin a run of another name"
            )
        state.load(saved.tensors, saved.numbers)
    state.share(group, 0)
    evaluation = config.feed.evaluation
    loop = Loop(
        spec=spec,
        plan=config.feed.plan,
        evaluation=evaluation,
        eval_block_rows=eval_block_rows(evaluation) if evaluation else 1,
        num_steps=config.num_steps,
        run_url=config.run_url,
        state=state,
        feed=feed,
        seat=seat,
        recorder=HostRecorder(config.host, name, lead=group.rank == 0),
        clock=clock,
        info={**config.info, "arithmetic": arithmetic(device)},
    )
    try:
        return loop.run()
    finally:
        feed.close()
