"""Plain Ray Data: `read_parquet(...).iter_batches` in its fastest form, one execution over all epochs, no shuffle.

Its reader does not verify page checksums. `pyarrow` batches, since `iter_torch_batches` cannot take fixed-size bytes.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch
from benchmarks.ingest.data import BATCH, WARM, Meter, files, tensors
from benchmarks.ingest.result import combined
from benchmarks.script import finish, options

from elastrain.data.blocks import READERS
from elastrain.data.dataset import Dataset
from elastrain.elastic.session import ray_session


class Consumer:
    """Takes batches of its share of the data set."""

    def ready(self) -> None:
        """Return once all imports are done."""
        torch.set_num_threads(1)

    def run(self, data: Any, given: dict[str, Any], rows: int) -> dict[str, Any]:
        """Take batches to the end; return what the meter measured."""
        meter = Meter(rows=rows, epochs=given["epochs"], root=given["root"], start=given["start"])
        for batch in data.iter_batches(batch_size=BATCH, batch_format="pyarrow", prefetch_batches=given["prefetch"]):
            meter.take(*tensors(batch))
            if meter.done:
                break
        return {"measures": meter.measures(), "counters": {}, "digest": meter.digest}


def repeated(url: str, folder: str, times: int) -> list[str]:
    """Return the dataset's files `times` over, each time under another name: Ray Data reads a name only once."""
    links = []
    for turn in range(times):
        for file in files(str(Path(url).resolve())):
            link = Path(folder) / f"{turn:03}-{Path(file).name}"
            link.symlink_to(file)
            links.append(str(link))
    return links


def main() -> None:
    """Run one pipeline and its consumers on a local Ray with as many logical CPUs as ours has."""
    given = {**options(), "root": os.getpid()}
    size = given["consumers"]
    with ray_session(None, cpus=size + READERS):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        consumers: list[Any] = [ray.remote(num_cpus=1)(Consumer).remote() for _ in range(size)]
        dataset = Dataset.open(given["url"])
        with tempfile.TemporaryDirectory() as folder:
            ray.get([consumer.ready.remote() for consumer in consumers])
            given["start"] = time.perf_counter()
            paths = repeated(given["url"], folder, given["epochs"] + WARM + 2)
            data = ray.data.read_parquet(paths, columns=["image", "label"], override_num_blocks=len(paths))
            parts = data.streaming_split(size, equal=True) if size > 1 else [data]
            rows = dataset.num_rows // size
            calls = [c.run.remote(part, given, rows) for c, part in zip(consumers, parts, strict=True)]
            measures, counters, _ = combined(ray.get(calls))
    finish(measures, counters)


if __name__ == "__main__":
    main()
