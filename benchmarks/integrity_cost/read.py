"""The read tasks of a run, one after the other in this process: what they cost without Ray around them."""

import hashlib
import time

from benchmarks.ingest.data import BATCH
from benchmarks.script import finish, options

from elastrain.data.blocks import FeedSpec, arrays_of, train_tasks
from elastrain.data.dataset import Dataset
from elastrain.data.plan import Plan


def main() -> None:
    """Read one epoch for the digest, which also opens the files, and the others against the clock."""
    given = options()
    dataset = Dataset.open(given["url"])
    plan = Plan.of(dataset, seed=0, global_batch=BATCH, slots=1)
    digest, rows, start, cpu = hashlib.sha256(), 0, 0.0, 0.0
    for epoch in range(given["epochs"] + 1):
        begin, end = epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch
        spec = FeedSpec(
            plan=plan, train=dataset, evaluation=None, transforms=(), begin=begin, end=end, reading=(1.0, 1)
        )
        if epoch == 1:
            start, cpu, rows = time.perf_counter(), time.process_time(), 0
        for address, make in train_tasks(spec):
            arrays = arrays_of(make()(), where=str(address))
            rows += len(arrays["label"])
            if epoch == 0:
                digest.update(arrays["image"].tobytes())
                digest.update(arrays["label"].tobytes())
    measures = {
        "rows_per_s": rows / (time.perf_counter() - start),
        "cpu_s_per_million_rows": (time.process_time() - cpu) / rows * 1e6,
    }
    finish(measures, {"rows": rows}, digest.hexdigest())


if __name__ == "__main__":
    main()
