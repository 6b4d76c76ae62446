"""A feed without a pipeline: a worker reads its blocks by itself, ahead of their use, and keeps them for the next run.

Runs of a sweep are many and mostly on the same data in the same order: what one has read and transformed, the next
one finds. A pipeline of Ray Data takes a second to start, which is as long as a whole trial may be.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from elastrain.data.blocks import EVALUATION, Address, FeedSpec, arrays_of, block_size, task_of
from elastrain.data.columns import Array

KEPT_BYTES = 256 << 20
THREADS = 2

Arrays = dict[str, Array]


class KeptBlocks:
    """Blocks that a process has read, by what decides their content; the least recently used go first."""

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        self._most, self._bytes = most_bytes, 0
        self._blocks: OrderedDict[Hashable, Arrays] = OrderedDict()
        self._lock = threading.Lock()
        self.reads = 0

    def get(self, key: Hashable, read: Callable[[], Arrays]) -> Arrays:
        """Return a block, read now if it is not kept; its arrays are shared: nobody changes them."""
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        arrays = read()
        size = _size(arrays)
        with self._lock:
            self.reads += 1
            if key not in self._blocks and size <= self._most:
                self._blocks[key], self._bytes = arrays, self._bytes + size
            while self._bytes > self._most:
                self._bytes -= _size(self._blocks.popitem(last=False)[1])
        return arrays


class DirectFeed:
    """A worker's end of a run whose blocks it reads itself, by the code of the read tasks: the same bytes come out."""

    def __init__(self, spec: FeedSpec, kept: KeptBlocks) -> None:
        self._spec, self._kept = spec, kept
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="direct-feed")
        self._pending: dict[Address, Future[Arrays]] = {}
        # Evaluation data are transformed with the statistics of the training data.
        shared = (repr(spec.transforms), tuple(column.name for column in spec.train.columns), spec.train.fingerprint)
        self._key = (*shared, *spec.plan.identity().values())
        self._eval_key = (*shared, spec.evaluation.fingerprint if spec.evaluation else "", spec.plan.seed)

    def prefetch(self, slots: Sequence[int], block: int) -> None:
        """Start to read the blocks (slot, block) of these slots."""
        spec = self._spec
        for slot in slots:
            address = (slot, block)
            if address not in self._pending and block_size(spec.plan, slot, block, spec.begin, spec.end):
                self._pending[address] = self._pool.submit(self._read, address)

    def take(self, slot: int, block: int) -> Arrays | None:
        """Wait for a block and return its columns; None if the slot has no rows in it; raises as reading does."""
        self.prefetch([slot], block)
        pending = self._pending.pop((slot, block), None)
        return None if pending is None else dict(pending.result())

    def release_before(self, block: int) -> None:
        """Do nothing: what is kept is bounded by its bytes."""

    def evaluation(self, blocks: Sequence[int]) -> Iterator[tuple[int, Arrays]]:
        """Yield (index, columns) of these evaluation blocks, two read ahead."""
        ahead = [self._pool.submit(self._read, (EVALUATION, index)) for index in blocks[:2]]
        for place, index in enumerate(blocks):
            arrays = ahead.pop(0).result()
            ahead += [self._pool.submit(self._read, (EVALUATION, later)) for later in blocks[place + 2 : place + 3]]
            yield index, dict(arrays)

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, address: Address) -> Arrays:
        slot, block = address
        spec, steps = self._spec, self._spec.plan.block_steps
        if slot == EVALUATION:
            key: Hashable = (*self._eval_key, block)
        else:
            span = (max(spec.begin, block * steps), min(spec.end, (block + 1) * steps))
            key = (*self._key, address, span)
        return self._kept.get(key, lambda: arrays_of(task_of(spec, address)(), where=f"block {address}"))


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
