"""The feed: one Ray Data pipeline reads what the plan names, in its order; workers fetch blocks by address.

```
plan ─► read tasks (Ray Data) ─► Feeder actor: address → block ─► WorkerFeed: arrays, checked against the plan
```
The pipeline does not know the workers. A read task makes some blocks that follow each other, each row of which carries
epoch, step, slot and its index in the dataset, and the worker compares them with the plan. What no worker has committed
past stays with the feeder, so that a block can be asked for again.

A block of evaluation is read when a worker asks for it, in any order and as often as wanted: so nobody waits for what
another worker has used up, or a lost one never fetched.
"""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from elastrain import storage
from elastrain.data.blocks import (
    EVALUATION,
    INDEX,
    Address,
    FeedSpec,
    ReadBlock,
    arrays_of,
    block_size,
    eval_block_rows,
    eval_task,
    keeps_evaluation,
    reading_beside,
    task_of,
    train_tasks,
)
from elastrain.data.columns import Array
from elastrain.data.plan import AHEAD_BYTES, INDEX_BYTES
from elastrain.data.transforms import delivered_bytes
from elastrain.errors import DataError, ElastrainError, StorageError, ours

LEASE = 512  # blocks of one Ray Data execution: the work of each is an object in the driver
CLOSE_S = 10.0
LOOK_S = 0.2  # between two looks for a node that tasks may run on
HEAD, NODE_ID_LABEL = "node:__internal_head__", "ray.io/node-id"  # a resource of the head; a label of every node
SMALL_BYTES = 8 << 20  # of an epoch on this machine: one task reads them in no time, another would cost a process
PATIENCE_S = 1.0  # for a block that has been read to arrive; more where the slowest so far took long
PATIENCE_FACTOR = 2.0


def execute(
    blocks: Sequence[ReadBlock], *, reading: tuple[float, int], block_bytes: int, ahead_bytes: int
) -> Generator[Any, None, None]:
    """Read blocks of up to `block_bytes` in one streaming Ray Data execution; yield a reference to each, in order."""
    from elastrain.data.pipeline import references  # noqa: PLC0415 -- half a second: Ray Data, for the feeder alone

    where = {} if reading[0] else off_idle_head()
    yield from references(blocks, reading=reading, block_bytes=block_bytes, ahead_bytes=ahead_bytes, where=where)


def idle_head() -> str | None:
    """Return the id of a head that lends no CPU, which is there for drivers; None where it does."""
    heads = (node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"])
    return next((str(node["NodeID"]) for node in heads if not node["Resources"].get("CPU")), None)


def off_idle_head() -> dict[str, Any]:
    """Return the options of a task without CPUs that keep it off a head without work, unless nothing else is there."""
    head = idle_head()
    off = {"label_selector": {NODE_ID_LABEL: f"!in({head})"}, "fallback_strategy": [{"label_selector": {}}]}
    return off if head is not None else {}


class Stream:
    """A pipeline running in a thread: holds up to `capacity` blocks that nobody has released.

    `reading` is asked anew for each lease, so that it may follow the run; the leases of a pipeline that found no CPU
    free are short at first. On a cluster of nothing but a head without work it waits for the first node.
    """

    def __init__(
        self,
        tasks: Iterable[tuple[Address, Callable[[], ReadBlock]]],
        *,
        capacity: int,
        reading: Callable[[], tuple[float, int]],
        block_bytes: int,
        ahead_bytes: int,
    ) -> None:
        self._capacity, self._reading = capacity, reading
        self._execute = partial(execute, block_bytes=block_bytes, ahead_bytes=ahead_bytes)
        self._ready: dict[Address, Any] = {}
        self._error: ElastrainError | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(iter(tasks),), daemon=True)
        self._thread.start()

    def get(self, addresses: Sequence[Address]) -> list[Any]:
        """Wait for blocks and return their references; raises what the pipeline raised, DataError first of all."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._closed or all(a in self._ready for a in addresses))
            if self._error:
                raise self._error
            if self._closed:
                raise ElastrainError("the feed was closed while a worker waited for a block")
            return [self._ready[address] for address in addresses]

    def release(self, done: Callable[[Address], bool]) -> None:
        """Forget the blocks whose address is `done`."""
        with self._changed:
            self._ready = {address: ref for address, ref in self._ready.items() if not done(address)}
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading, wake whoever waits, and wait until Ray Data's execution has ended."""
        with self._changed:
            self._closed = True
            self._ready = {}
            self._changed.notify_all()
        self._thread.join(CLOSE_S)

    def _run(self, tasks: Iterator[tuple[Address, Callable[[], ReadBlock]]]) -> None:
        size = min(LEASE, self._capacity)
        try:
            self._wait_for_a_node()
            while self._wait_for_room():
                reading = self._reading()
                lease = list(itertools.islice(tasks, LEASE if reading[0] else size))
                size = min(LEASE, 2 * size)
                if not lease:
                    return
                work = [make() for _, make in lease]
                with contextlib.closing(self._execute(work, reading=reading)) as references:
                    for (address, _), reference in zip(lease, references, strict=True):
                        if not self._hold(address, reference):
                            return
        except Exception as error:  # noqa: BLE001 -- whatever it is, the workers that wait must hear of it
            with self._changed:
                self._error = ours(error) or StorageError(f"reading the data failed: {error!r}"[:2000])
                self._changed.notify_all()

    def _wait_for_a_node(self) -> None:
        while not self._closed and (head := idle_head()):
            if any(node["Alive"] and node["NodeID"] != head for node in ray.nodes()):
                return
            time.sleep(LOOK_S)

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._capacity)
            return not self._closed

    def _hold(self, address: Address, reference: Any) -> bool:
        with self._changed:
            self._wait_for_room()
            self._ready[address] = reference
            self._changed.notify_all()
            return not self._closed


def read_block(task: ReadBlock) -> pa.Table:
    """Do the work of one block by itself."""
    return task()


class FeederLogic:
    """The feeder without its actor: the training stream, and the blocks of evaluation."""

    def __init__(self, spec: FeedSpec) -> None:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        self._spec = spec
        self._beside: tuple[int, float] | None = None
        plan = spec.plan
        near = not spec.transforms and storage.is_local(spec.train.url)
        self._small = near and spec.train.row_bytes * spec.train.num_rows <= SMALL_BYTES
        row_bytes = delivered_bytes(spec.transforms, spec.train.columns) + INDEX_BYTES
        block_bytes = plan.block_steps * row_bytes * -(-plan.global_batch // plan.slots)
        self._train = Stream(
            train_tasks(spec),
            capacity=2 * plan.slots,
            reading=self._reading,
            block_bytes=block_bytes,
            ahead_bytes=max(AHEAD_BYTES, plan.slots * block_bytes),
        )
        # No CPU: workers hold theirs while they wait, and what reads ahead for training may hold all others.
        self._read: Any = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(read_block)
        self._where: dict[str, Any] | None = None  # looked for when the first is read: workers are there by then
        self._keeps = spec.evaluation is not None and keeps_evaluation(spec.evaluation, spec.transforms)
        self._kept: dict[int, Any] = {}
        self._lock = threading.Lock()

    def get(self, addresses: Sequence[Address]) -> list[Any]:
        """Return references to training blocks once they are there."""
        return self._train.get(addresses)

    def evaluation(self, index: int) -> list[Any]:
        """Return a reference to an evaluation block that is being read; kept, if the data are small, for all rounds."""
        with self._lock:
            self._where = off_idle_head() if self._where is None else self._where
            reference = self._kept.get(index) or self._read.options(**self._where).remote(eval_task(self._spec, index))
            if self._keeps:
                self._kept[index] = reference
        return [reference]

    def read_beside(self, workers: int, kept: float) -> None:
        """Read beside so many workers from the next lease on, and keep so many CPUs free for those that may come."""
        self._beside = (workers, kept)

    def _reading(self) -> tuple[float, int]:
        reading = self._spec.reading
        if self._beside is not None:
            workers, kept = self._beside
            reading = reading_beside(workers, ray.available_resources().get("CPU", 0.0) - kept)
        return (reading[0], 1) if self._small else reading

    def release_before(self, block: int) -> None:
        """Forget training blocks (slot, j) with j < `block`: every worker has committed past them."""
        self._train.release(lambda address: address[1] < block)

    def close(self) -> None:
        """Stop all reading."""
        self._train.close()


class WorkerFeed:
    """A worker's end: fetches blocks ahead of time and checks them; its arrays are read-only views of the store."""

    def __init__(self, feeder: Any, spec: FeedSpec, *, begin: int) -> None:
        self._feeder, self._spec, self._begin = feeder, spec, begin
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="feed")
        self._pending: dict[Address, Future[dict[str, Array]]] = {}
        self._patience_s = PATIENCE_S

    def prefetch(self, slots: Sequence[int], block: int) -> None:
        """Start to fetch the blocks (slot, block) of these slots."""
        for slot in slots:
            address = (slot, block)
            if address not in self._pending and block_size(self._spec.plan, slot, block, self._begin, self._spec.end):
                self._pending[address] = self._pool.submit(self._fetch, address)

    def take(self, slot: int, block: int) -> dict[str, Array] | None:
        """Wait for a block and return its columns with the index columns; None if the slot has no rows in it.

        Raises DataError if it cannot be read or is not what the plan says.
        """
        self.prefetch([slot], block)
        pending = self._pending.pop((slot, block), None)
        return None if pending is None else pending.result()

    def release_before(self, block: int) -> None:
        """Tell the feeder that every worker has committed past the blocks before `block`."""
        self._feeder.release_before.remote(block)

    def evaluation(self, blocks: Sequence[int]) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield (index, columns) of these evaluation blocks, two fetched ahead; every round is read alike."""
        addresses = [(EVALUATION, index) for index in blocks]
        ahead = [self._pool.submit(self._fetch, address) for address in addresses[:2]]
        for place, index in enumerate(blocks):
            arrays = ahead.pop(0).result()
            ahead += [self._pool.submit(self._fetch, address) for address in addresses[place + 2 : place + 3]]
            yield index, arrays

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, address: Address) -> dict[str, Array]:
        slot, index = address
        try:
            asked = self._feeder.evaluation.remote(index) if slot == EVALUATION else self._feeder.get.remote([address])
            table = self._arrived(address, ray.get(asked)[0])
        except Exception as error:
            raise (ours(error) or StorageError(f"block {address} did not arrive: {error!r}"[:2000])) from error
        arrays = arrays_of(table, where=f"block {address}")
        self._check(address, arrays)
        return arrays

    def _arrived(self, address: Address, reference: Any) -> pa.Table:
        """Wait for a block; read it here if it has been read elsewhere and does not come.

        The node where it lies may be gone, and it takes Ray up to half a minute to see that and read it again.
        """
        start = time.monotonic()
        while True:
            try:
                table = ray.get(reference, timeout=self._patience_s)
            except ray.exceptions.GetTimeoutError:
                if ray.wait([reference], timeout=0, fetch_local=False)[0]:
                    return task_of(self._spec, address)()
            else:
                self._patience_s = max(self._patience_s, PATIENCE_FACTOR * (time.monotonic() - start))
                return table

    def _check(self, address: Address, arrays: dict[str, Array]) -> None:
        """Raise DataError unless the block holds exactly the plan's samples in the plan's order."""
        slot, block = address
        epoch, step, slots, row = (arrays[name] for name in INDEX)
        if slot == EVALUATION:
            data = self._spec.evaluation
            size = eval_block_rows(data) if data else 0
            first = block * size
            good = data is not None and np.array_equal(row, np.arange(first, min(first + size, data.num_rows)))
        else:
            expected = self._spec.plan.block(slot, block).rows(self._begin, self._spec.end)
            good = (
                np.array_equal(row, expected.row)
                and np.array_equal(step, expected.step)
                and np.array_equal(epoch, expected.epoch)
                and bool((slots == slot).all())
            )
        if not good:
            raise DataError(
                f"block {address} does not hold the samples that the plan names: the feed is broken, report it"
            )
