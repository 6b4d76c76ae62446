"""Plain Ray Data from the server: `read_parquet(...).iter_batches`, one pass, no shuffle, no checksums verified."""

import time

import ray
import ray.data
from benchmarks.ingest.data import BATCH, tensors
from benchmarks.s3_ingest.server import FIRST_BYTE_MS, Served, served
from benchmarks.script import finish, options

from elastrain import s3
from elastrain.data.blocks import READERS
from elastrain.data.dataset import Dataset
from elastrain.elastic.session import ray_session


def deliver(server: Served, dataset: Dataset) -> tuple[float, float, int]:
    """Take every batch; return wall and processor seconds and bytes."""
    cpu, start, size = server.client_cpu_s(), time.perf_counter(), 0
    paths = [f"{server.url}/{shard.path}".removeprefix("s3://") for shard in dataset.shards]
    data = ray.data.read_parquet(paths, filesystem=s3.client(), columns=["image", "label"])
    for batch in data.iter_batches(batch_size=BATCH, batch_format="pyarrow", prefetch_batches=4):
        image, label = tensors(batch)
        size += image.nbytes + label.nbytes
    return time.perf_counter() - start, server.client_cpu_s() - cpu, size


def main() -> None:
    """Run it twice on a local Ray with as many logical CPUs as ours has; the first time starts all processes."""
    given = options()
    with served(given["url"]) as server, ray_session(None, cpus=1 + READERS):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        dataset = Dataset.open(given["url"])
        server.throttle(FIRST_BYTE_MS)
        deliver(server, dataset)
        wall_s, cpu_s, size = deliver(server, dataset)
    measures = {"mb_per_s": size / 1e6 / wall_s, "cpu_s_per_gb": cpu_s / size * 1e9}
    finish(measures, {"delivered_bytes": size})


if __name__ == "__main__":
    main()
