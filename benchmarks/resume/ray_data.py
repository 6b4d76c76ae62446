"""Plain Ray Data: a new iterator starts at row 0, so what was trained on is read and thrown away."""

import itertools
import time

import ray.data
from benchmarks.ingest.data import BATCH, files
from benchmarks.script import finish, options

from elastrain.data.blocks import READERS
from elastrain.data.dataset import Dataset
from elastrain.elastic.session import ray_session


def main() -> None:
    """Take batches up to the first one that was not trained on."""
    given = options()
    with ray_session(None, cpus=1 + READERS):
        ray.data.DataContext.get_current().enable_progress_bars = False
        start = time.perf_counter()
        step = int(-(-Dataset.open(given["url"]).num_rows // BATCH) * given["place"])
        data = ray.data.read_parquet(files(given["url"]), columns=["image", "label"])
        batches = data.iter_batches(batch_size=BATCH, batch_format="pyarrow", prefetch_batches=4)
        batch = next(itertools.islice(batches, step, None))
        seconds = time.perf_counter() - start
        assert len(batch["label"]) == BATCH
    finish({"first_batch_s": seconds}, {"step": step})


if __name__ == "__main__":
    main()
