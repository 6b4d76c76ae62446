"""What Arrow reads through s3fs: `pyarrow.dataset` over the shards, one pass, no shuffle, no checksums verified."""

import importlib
import os
import sys
import time
from typing import Any

import pyarrow.dataset
from benchmarks.ingest.data import BATCH, tensors
from benchmarks.s3_ingest.server import FIRST_BYTE_MS, Served, served
from benchmarks.script import finish, options

from elastrain.data.dataset import Dataset


def deliver(server: Served, dataset: Dataset, filesystem: Any) -> tuple[float, float, int]:
    """Take every batch; return wall and processor seconds and bytes."""
    cpu, start, size = server.client_cpu_s(), time.perf_counter(), 0
    paths = [f"{server.url}/{shard.path}".removeprefix("s3://") for shard in dataset.shards]
    data = pyarrow.dataset.dataset(paths, filesystem=filesystem, format="parquet")
    for batch in data.to_batches(columns=["image", "label"], batch_size=BATCH):
        image, label = tensors(batch)
        size += image.nbytes + label.nbytes
    return time.perf_counter() - start, server.client_cpu_s() - cpu, size


def main() -> None:
    """Run it twice in this process; the first time imports and connects."""
    given = options()
    with served(given["url"]) as server:
        dataset = Dataset.open(server.url)
        sys.path.insert(0, given["packages"])  # after all else is loaded, which has its own versions
        filesystem = importlib.import_module("s3fs").S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        server.throttle(FIRST_BYTE_MS)
        deliver(server, dataset, filesystem)
        wall_s, cpu_s, size = deliver(server, dataset, filesystem)
    finish({"mb_per_s": size / 1e6 / wall_s, "cpu_s_per_gb": cpu_s / size * 1e9}, {"delivered_bytes": size})


if __name__ == "__main__":
    main()
