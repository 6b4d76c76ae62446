"""Ours: `pack`, with or without the steps that remove rows (here they find none)."""

import os
import tempfile
import time

from benchmarks.pack.data import digest, source_mib, watched
from benchmarks.script import finish, options, tree_cpu_s

from elastrain.data.chunks import PackOptions
from elastrain.data.pack import machine_cpus, pack_dataset
from elastrain.data.preparation import Preparation
from elastrain.elastic.session import ray_session


def main() -> None:
    """Pack once on a local Ray of all CPUs; its start is not counted."""
    given = options()
    prepare = Preparation(**given["prepare"])
    with tempfile.TemporaryDirectory(dir=given["work"]) as out:
        with ray_session(None, cpus=machine_cpus()), watched() as measures:
            before, start = tree_cpu_s(os.getpid()), time.perf_counter()
            result = pack_dataset(f"parquet:{given['source']}", out, PackOptions(prepare=prepare))
            measures["wall_s"] = time.perf_counter() - start
            measures["cpu_s"] = tree_cpu_s(os.getpid()) - before
        rows, content = digest(out)
    measures |= {"rows_per_s": rows / measures["wall_s"], "source_mib": source_mib(given["source"])}
    steps = result["cards"]["train"]["steps"]
    counters = {"rows": rows, "read": steps[0]["rows"], "removed": sum(step["removed"] for step in steps[1:])}
    finish(measures, counters, content)


if __name__ == "__main__":
    main()
