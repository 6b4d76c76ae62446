"""Ours: the feeder, each worker's feed and its batches, as the training loop uses them; shuffled by the plan."""

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from benchmarks.ingest.data import BATCH, WARM, Meter
from benchmarks.ingest.result import combined
from benchmarks.script import finish, options
from tests.training.meeting import meet  # noqa: TID251 -- one way to meet for tests and benchmarks

from elastrain.data.blocks import READERS, FeedSpec, train_tasks
from elastrain.data.columns import Array
from elastrain.data.dataset import Dataset
from elastrain.data.feed import FeederLogic, WorkerFeed
from elastrain.data.plan import Plan
from elastrain.elastic.session import ray_session
from elastrain.observe.ledger import Clock
from elastrain.training.batches import Batches
from elastrain.training.reduce import slots_of


class Counted(WorkerFeed):
    """The worker's feed, counting what comes out of the object store."""

    blocks = object_bytes = 0

    def take(self, slot: int, block: int) -> dict[str, Array] | None:
        """Return the block as it is."""
        arrays = super().take(slot, block)
        if arrays is not None:
            self.blocks += 1
            self.object_bytes += sum(array.nbytes for array in arrays.values())
        return arrays


class Consumer:
    """A worker without a model: takes the batches of its slots, in step with the others at each new block."""

    def ready(self) -> None:
        """Return once all imports are done."""
        torch.set_num_threads(1)

    def run(self, feeder: Any, spec: FeedSpec, rank: int, folder: str, given: dict[str, Any]) -> dict[str, Any]:
        """Take every batch of the plan; return what the meter measured."""
        size, plan = given["consumers"], spec.plan
        group = meet(Path(folder), rank, size)
        feed = Counted(feeder, spec, begin=0)
        batches, clock, slots = Batches(feed, plan, torch.device("cpu")), Clock(), slots_of(rank, size, plan.slots)
        meter = Meter(rows=plan.num_rows // size, epochs=given["epochs"], root=given["root"], start=given["start"])
        for step in range(spec.end):
            batches.move_to(step, slots, clock)
            if step % plan.block_steps == 0:
                group.all_reduce(torch.zeros(1))
                if rank == 0:
                    feed.release_before(plan.block_of(step))
            for slot in slots:
                batch = batches.batch(slot)
                if batch is not None:
                    meter.take(batch["image"], batch["label"])
        feed.close()
        spent = clock.spent()
        counters = {"blocks": feed.blocks, "object_store_bytes": feed.object_bytes, "rows": meter.rows}
        return {
            "measures": {**meter.measures(), "waited_s": spent["data"]},
            "counters": counters,
            "digest": meter.digest,
        }


def main() -> None:
    """Run feeder and consumers on a local Ray, sized as `elastrain train` sizes its own."""
    given = {**options(), "root": os.getpid()}
    size = given["consumers"]
    with ray_session(None, cpus=size + READERS):
        remote: Any = ray.remote  # its annotations know no actor options
        consumers = [remote(num_cpus=1)(Consumer).remote() for _ in range(size)]
        ray.get([consumer.ready.remote() for consumer in consumers])
        given["start"] = time.perf_counter()
        dataset = Dataset.open(given["url"])
        plan = Plan.of(dataset, seed=0, global_batch=BATCH * size, slots=size)
        steps = plan.steps_per_epoch * (given["epochs"] + WARM + 1)
        reading = (1.0, READERS)
        spec = FeedSpec(plan=plan, train=dataset, evaluation=None, transforms=(), begin=0, end=steps, reading=reading)
        feeder = remote(num_cpus=0, max_concurrency=2 * size + 8)(FeederLogic).remote(spec)
        with tempfile.TemporaryDirectory() as folder:
            results = ray.get([c.run.remote(feeder, spec, rank, folder, given) for rank, c in enumerate(consumers)])
    read = sum(len(make().sources) for _, make in train_tasks(replace(spec, end=steps)))
    measures, counters, digest = combined(results)
    finish(measures, {**counters, "row_groups_read": read}, digest)


if __name__ == "__main__":
    main()
