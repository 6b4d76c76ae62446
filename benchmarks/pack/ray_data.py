"""Plain Ray Data: `read_parquet(...).write_parquet(...)` with the same codec, in whatever order it likes."""

import os
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import ray.data
from benchmarks.pack.data import digest, source_mib, watched
from benchmarks.script import finish, options, tree_cpu_s

from elastrain.data.pack import machine_cpus
from elastrain.elastic.session import ray_session


def main() -> None:
    """Read and write once on a local Ray of all CPUs; its start is not counted."""
    given = options()
    with tempfile.TemporaryDirectory(dir=given["work"]) as out:
        with ray_session(None, cpus=machine_cpus()), watched() as measures:
            ray.data.DataContext.get_current().enable_progress_bars = False
            before, start = tree_cpu_s(os.getpid()), time.perf_counter()
            ray.data.read_parquet(given["source"], file_extensions=["parquet"]).write_parquet(out, compression="lz4")
            measures["wall_s"] = time.perf_counter() - start
            measures["cpu_s"] = tree_cpu_s(os.getpid()) - before
        rows, content = digest(out)
    measures |= {"rows_per_s": rows / measures["wall_s"], "source_mib": source_mib(given["source"])}
    read = sum(pq.read_metadata(path).num_rows for path in Path(given["source"]).glob("*.parquet"))
    finish(measures, {"rows": rows, "read": read}, content)


if __name__ == "__main__":
    main()
