"""Plain Ray Data: `read_parquet(...).iter_batches` in its fastest form, one execution over all epochs, no shuffle.

Its reader does not verify page checksums. `pyarrow` batches, since `iter_torch_batches` cannot take fixed-size bytes.
"""

import os
from typing import Any

import ray
import ray.data
import torch

from benchmarks.ingest.data import BATCH, Meter, files, tensors
from benchmarks.ingest.result import combined
from benchmarks.script import finish, options
from elastrain.data.dataset import Dataset
from elastrain.elastic.session import READERS, ray_session


class Consumer:
    """Takes batches of its share of the data set."""

    def run(self, data: Any, given: dict[str, Any], rows: int) -> dict[str, Any]:
        """Take batches to the end; return what the meter measured."""
        torch.set_num_threads(1)
        meter = Meter(rows=rows, epochs=given["epochs"], root=given["root"])
        for batch in data.iter_batches(batch_size=BATCH, batch_format="pyarrow", prefetch_batches=given["prefetch"]):
            meter.take(*tensors(batch))
            if meter.done:
                break
        return {"measures": meter.measures(), "counters": {}, "digest": meter.digest}


def main() -> None:
    """Run one pipeline and its consumers on a local Ray with as many logical CPUs as ours has."""
    given = {**options(), "root": os.getpid()}
    size = given["consumers"]
    with ray_session(None, cpus=size + READERS):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        consumers = [ray.remote(num_cpus=1)(Consumer).remote() for _ in range(size)]
        dataset = Dataset.open(given["url"])
        paths = files(os.path.abspath(given["url"])) * (given["epochs"] + 3)
        data = ray.data.read_parquet(paths, columns=["image", "label"], override_num_blocks=len(paths))
        parts = data.streaming_split(size, equal=True) if size > 1 else [data]
        calls = [c.run.remote(part, given, dataset.num_rows // size) for c, part in zip(consumers, parts, strict=True)]
        measures, counters, _ = combined(ray.get(calls))
    finish(measures, counters)


if __name__ == "__main__":
    main()
