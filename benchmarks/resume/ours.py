"""Ours: feeder and feed of a run that begins at a step within an epoch; nothing of what came before is read."""

import time
from typing import Any

import ray
from benchmarks.ingest.data import BATCH
from benchmarks.script import finish, options

from elastrain.data.blocks import READERS, FeedSpec, train_tasks
from elastrain.data.dataset import Dataset
from elastrain.data.feed import FeederLogic, WorkerFeed
from elastrain.data.plan import Plan
from elastrain.elastic.session import ray_session
from elastrain.observe.ledger import Clock
from elastrain.training.batches import Batches
from elastrain.training.loop import choose_device


def main() -> None:
    """Take the first batch of a feed that begins at a place of the first epoch."""
    given = options()
    with ray_session(None, cpus=1 + READERS):
        remote: Any = ray.remote  # its annotations know no actor options
        start = time.perf_counter()
        dataset = Dataset.open(given["url"])
        plan = Plan.of(dataset, seed=0, global_batch=BATCH, slots=1)
        step, reading = int(plan.steps_per_epoch * given["place"]), (1.0, READERS)
        end = plan.steps_per_epoch * 2
        spec = FeedSpec(plan=plan, train=dataset, evaluation=None, transforms=(), begin=step, end=end, reading=reading)
        feeder = remote(num_cpus=0, max_concurrency=10)(FeederLogic).remote(spec)
        feed = WorkerFeed(feeder, spec, begin=step)
        batches = Batches(feed, plan, choose_device(0.0))
        batches.move_to(step, [0], Clock())
        batch = batches.batch(0)
        seconds = time.perf_counter() - start
        assert batch is not None
        assert len(batch["label"]) == BATCH
        feed.close()
    first = next(make for _, make in train_tasks(spec))()
    finish({"first_batch_s": seconds}, {"step": step, "row_groups_of_the_first_block": len(first.sources)})


if __name__ == "__main__":
    main()
