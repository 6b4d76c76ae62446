"""Prove before anything is spent: data, one real step, memory, placement and storage, each tried and not guessed.

The first thing that fails is raised as the error that the run itself would have met, only sooner.
"""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from elastrain import storage
from elastrain.cluster.package import places
from elastrain.data.blocks import (
    FeedSpec,
    ReadBlock,
    arrays_of,
    block_size,
    eval_block_rows,
    eval_task,
    train_tasks,
)
from elastrain.data.cache import cache_of
from elastrain.data.columns import Array
from elastrain.data.forecast import forecast_run
from elastrain.data.plan import Plan
from elastrain.data.quarantine import opened
from elastrain.data.transforms import check_transforms
from elastrain.elastic.session import embedded_cpus, find_room, fitting, ray_session
from elastrain.errors import ResourceError, SpecError, StorageError
from elastrain.keys import check_key
from elastrain.observe.ledger import Clock
from elastrain.spec.train import TrainSpec, WorkersSpec
from elastrain.training.batches import Batches
from elastrain.training.evaluation import evaluate
from elastrain.training.loop import choose_device, fix_threads
from elastrain.training.reduce import Solo
from elastrain.training.state import TrainState
from elastrain.training.step import run_step
from elastrain.training.task import make_task

GIB = 1 << 30


def check_run(spec: TrainSpec, *, address: str | None = None, shared: Sequence[str] = ()) -> dict[str, Any]:
    """Return what was tried and what it showed; raises the error of the first thing that would stop the run.

    All machines of the Ray at `address` have mounted the folders that are `shared`.
    """
    found = [("spec", f"{spec.name}: every field is known and in range")]
    run_url = storage.absolute(storage.join(spec.storage, spec.name))
    if spec.checkpoint.encrypt is not None:
        check_key(spec.checkpoint.encrypt)
        found.append(("key", f"{spec.checkpoint.encrypt} opens what it has wrapped"))
    found.append(("storage", _storage(run_url)))
    feed = _feed(spec)
    found.append(("data", f"{feed.plan.num_rows:,} rows; columns {', '.join(c.name for c in feed.train.columns)}"))
    data = (feed.train, feed.evaluation)
    found += [("doubt", doubt) for held in data if held is not None and (doubt := held.doubt())]
    detail, state_bytes = _one_step(spec, feed)
    found.append(("step", detail))
    found.append(("memory", _memory(spec, state_bytes)))
    with ray_session(address, cpus=embedded_cpus(spec.workers), seen=places(spec), shared=shared):
        found.append(("workers", _placement(spec.workers)))
    return {"ok": True, "run": run_url, "checks": [{"name": name, "found": text} for name, text in found]}


def as_text(found: dict[str, Any]) -> str:
    """Return the findings as lines for people."""
    lines = [f"ok  {entry['name']:<8} {entry['found']}" for entry in found["checks"]]
    return "\n".join([*lines, "ready: elastrain train will start"])


def _storage(run_url: str) -> str:
    """Write, read back and remove a file where the run will write."""
    probe, data = storage.join(run_url, f".probe-{os.getpid()}"), os.urandom(4096)
    start = time.perf_counter()
    storage.put(probe, data)
    if storage.read_bytes(probe) != data:
        raise StorageError(f"{run_url}: a file read back is not the one written; choose another storage")
    storage.remove(probe)
    return f"{run_url} written and read in {1000 * (time.perf_counter() - start):.0f} ms"


def _feed(spec: TrainSpec) -> FeedSpec:
    train, evaluation = opened(spec.data)
    check_transforms(spec.data.transforms, train, evaluation)
    plan = Plan.of(train, seed=spec.data.seed, global_batch=spec.data.global_batch, slots=spec.num_slots)
    return FeedSpec(
        plan=plan,
        train=train,
        evaluation=evaluation,
        transforms=spec.data.transforms,
        begin=0,
        end=1,
        reading=(1.0, 1),
        cache=cache_of(spec.data.cache, train, evaluation),
    )


class DirectFeed:
    """The blocks of a FeedSpec, read here and now: what a worker gets, without Ray."""

    def __init__(self, spec: FeedSpec, *, eval_rows: int) -> None:
        self._spec, self._eval_rows = spec, eval_rows

    def prefetch(self, slots: Sequence[int], block: int) -> None:
        """Nothing: blocks are read when they are taken."""

    def take(self, slot: int, block: int) -> dict[str, Array] | None:
        """Read a block; None if the slot has no rows in it."""
        if not block_size(self._spec.plan, slot, block, self._spec.begin, self._spec.end):
            return None
        return _read(next(make for address, make in train_tasks(self._spec) if address == (slot, block))())

    def release_before(self, block: int) -> None:
        """Nothing is held."""

    def evaluation(self, blocks: Sequence[int]) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield the first rows of the first evaluation block."""
        del blocks
        arrays = _read(eval_task(self._spec, 0))
        yield 0, {name: array[: self._eval_rows] for name, array in arrays.items()}


def _read(task: ReadBlock) -> dict[str, Array]:
    return {name: np.array(array) for name, array in arrays_of(task(), where="the first block").items()}


def _one_step(spec: TrainSpec, feed: FeedSpec) -> tuple[str, int]:
    """Do the run's first step on its first samples with all slots in this process, and evaluate one batch."""
    fix_threads(spec.workers.cpus)
    device = choose_device(spec.workers.gpus)
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("cpu")  # the driver's machine need not be one of the workers'
    state = TrainState(spec, make_task(spec, feed.train), device)
    direct = DirectFeed(feed, eval_rows=feed.plan.global_batch)
    start = time.perf_counter()
    result = run_step(
        state,
        Batches(direct, feed.plan, device),
        Solo(),
        range(feed.plan.slots),
        clock=Clock(),
        flag=0.0,
        num_steps=max(1, spec.budget.steps or feed.plan.steps_per_epoch),
    )
    seconds = time.perf_counter() - start
    loss = float((result.totals[:, 0] / result.totals[:, 1]).sum())
    if not np.isfinite(loss):
        raise SpecError(f"the first step's loss is {loss}; check the task's losses and the data's range")
    text = f"loss {loss:.4f} on {feed.plan.batch_rows(0)} samples in {1000 * seconds:.0f} ms"
    if feed.evaluation is not None:
        rows = eval_block_rows(feed.evaluation)
        metrics = evaluate(state, direct, feed.plan, feed.evaluation, Solo(), block_rows=rows, clock=Clock())
        text += f"; evaluation gives {', '.join(metrics)}"
    return text, sum(t.numel() * t.element_size() for t in state.tensors().values())


def _placement(workers: WorkersSpec) -> str:
    """Say how many workers fit now; raises ResourceError if the cluster can never hold as many as it must."""
    try:
        size = sum(find_room(workers, say=lambda _: None, stop=lambda: True, pause=lambda: None).values())
    except InterruptedError:
        free = fitting(workers, "free")
        return f"{free} of {workers.min} to {workers.max} workers fit now; a run would wait for room"
    if not size:
        return f"none of {workers.min} to {workers.max} workers fits now; a run would ask the autoscaler for room"
    return f"{size} of {workers.min} to {workers.max} workers fit"


def _memory(spec: TrainSpec, state_bytes: int) -> str:
    """Compare what the run will hold on this machine with what is free here."""
    planned = forecast_run(spec)
    workers = spec.workers.max
    need = planned["feed_bytes"] + workers * (3 * state_bytes + planned["worker_block_bytes"])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > total:
        raise ResourceError(
            f"the run needs about {need / GIB:.1f} GiB for {workers} workers, this machine has {total / GIB:.1f}: use "
            f"fewer workers, a smaller model or a smaller data.global_batch"
        )
    return f"about {need / GIB:.2f} GiB for {workers} workers, activations aside; {free / GIB:.1f} GiB are free here"
