"""The feed's pipeline: read tasks of a Ray Data execution, each of which makes some blocks that follow each other.

Apart from the feed, which drivers load: Ray Data is for the process that reads.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from elastrain.data.blocks import ReadBlock, read_blocks
from elastrain.data.no_demand import ask_nothing

MAX_BLOCKS_A_TASK = 8


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """The work of one read task. Ray Data starts and ends a task in some 10 ms: blocks share that."""

    blocks: tuple[ReadBlock, ...]

    def __call__(self) -> Iterator[pa.Table]:
        """Yield the blocks one by one."""
        yield from read_blocks(self.blocks)


def grouped(blocks: Sequence[ReadBlock], *, at_once: int, most: int) -> list[ReadBlocks]:
    """Return the work of the read tasks, `at_once` of which run side by side: one block each, then 2, 4, … `most`.

    The first blocks are waited for, so they are read side by side.
    """
    tasks, place, size = [], 0, 1
    while place < len(blocks):
        for _ in range(at_once):
            if place < len(blocks):
                tasks.append(ReadBlocks(tuple(blocks[place : place + size])))
                place += size
        size = min(2 * size, most)
    return tasks


class PlannedRead(Datasource):
    """A Ray Data source with the tasks that it is given."""

    def __init__(self, tasks: Sequence[ReadBlocks]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # Ray has no types here
        self._tasks = tasks

    def get_name(self) -> str:
        """Return the name that Ray's dashboard shows."""
        return "ElastrainPlan"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the plan bounds memory, not Ray's estimate."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return the tasks as they are; parallelism does not change the plan."""
        del parallelism, per_task_row_limit, data_context
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(task, metadata) for task in self._tasks]


def references(
    blocks: Sequence[ReadBlock],
    *,
    reading: tuple[float, int],
    block_bytes: int,
    ahead_bytes: int,
    where: Mapping[str, Any],
) -> Generator[Any, None, None]:
    """Read blocks of up to `block_bytes` in one streaming execution; yield a reference to each, in order.

    `reading` is (CPUs a read task, read tasks at once), `where` the other options of a task.
    """
    num_cpus, at_once = reading
    most = max(1, min(MAX_BLOCKS_A_TASK, ahead_bytes // (at_once * max(1, block_bytes))))
    tasks = grouped(blocks, at_once=at_once, most=most)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # each table is a block at once; one of a single row cannot be cut
    context.memory_usage_poll_interval_s = None  # reading /proc costs each task a tenth of its time
    ask_nothing(context)
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=ahead_bytes)
    with ray.data.DataContext.current(context):
        dataset = ray.data.read_datasource(
            PlannedRead(tasks),
            override_num_blocks=len(tasks),
            num_cpus=num_cpus,
            concurrency=at_once,
            **where,
        )
        for bundle in dataset.iter_internal_ref_bundles():
            for entry in bundle.blocks:
                yield entry.ref
