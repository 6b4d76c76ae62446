"""A worker's whole ingest of each kind, in turn on one Ray, and what share of it is the hashes'."""

import os
import tempfile
import time
from dataclasses import replace
from typing import Any

import ray
from benchmarks.ingest.data import WARM
from benchmarks.ingest.ours import Consumer
from benchmarks.integrity_cost.data import KINDS
from benchmarks.integrity_cost.read import in_turn, spec_of
from benchmarks.script import finish, options

from elastrain.data.blocks import READERS
from elastrain.data.feed import FeederLogic
from elastrain.elastic.session import ray_session


def ingest(consumer: Any, url: str, given: dict[str, Any]) -> dict[str, Any]:
    """Let a consumer take some epochs of a dataset; return what its meter measured."""
    spec = spec_of(url)
    spec = replace(spec, end=spec.end * (given["epochs"] + WARM + 1), reading=(1.0, READERS))
    remote: Any = ray.remote  # its annotations know no actor options
    feeder = remote(num_cpus=0, max_concurrency=10)(FeederLogic).remote(spec)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = ray.get(
            consumer.run.remote(feeder, spec, 0, folder, {**given, "start": time.perf_counter()})
        )
    ray.get(feeder.close.remote())
    ray.kill(feeder)
    return found


def main() -> None:
    """Take the kinds forth and back, the better of both passes; then read tasks in this process, for the shares."""
    given = {**options(), "root": os.getpid(), "consumers": 1}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with ray_session(None, cpus=1 + READERS):
        remote: Any = ray.remote
        consumer = remote(num_cpus=1)(Consumer).remote()
        ray.get(consumer.ready.remote())
        for kind in (*KINDS, *KINDS[::-1]):
            found[kind].append(ingest(consumer, given["urls"][kind], given))
    measures: dict[str, float] = {}
    for kind, passes in found.items():
        for name, measure in (("rows_per_s", "rows_per_s"), ("cpu", "cpu_s_per_million_rows")):
            best = max if name == "rows_per_s" else min
            measures[f"{name}_{kind}"] = best(one["measures"][measure] for one in passes)
    alone, rows, _ = in_turn(given["urls"], given["turns"])
    for kind in KINDS:
        more = alone[f"cpu_{kind}"] - alone["cpu_unchecked"]
        measures[f"share_{kind}"] = more / max(measures[f"cpu_{kind}"], 1e-9)  # few rows may take less than a tick
    digests = {one["digest"] for passes in found.values() for one in passes}
    assert len(digests) == 1
    finish(measures, {"rows": rows}, f"{digests.pop():016x}")


if __name__ == "__main__":
    main()
