"""The read tasks of a run, one after the other in this process: what they cost without Ray around them."""

import hashlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace

from benchmarks.ingest.data import BATCH
from benchmarks.integrity_cost.data import KINDS
from benchmarks.script import finish, options

from elastrain.data.blocks import FeedSpec, arrays_of, train_tasks
from elastrain.data.dataset import Dataset
from elastrain.data.plan import Plan


def spec_of(url: str) -> FeedSpec:
    """Return the reading of one epoch."""
    dataset = Dataset.open(url)
    plan = Plan.of(dataset, seed=0, global_batch=BATCH, slots=1)
    end = plan.steps_per_epoch
    return FeedSpec(plan=plan, train=dataset, evaluation=None, transforms=(), begin=0, end=end, reading=(1.0, 1))


def rows_of(spec: FeedSpec, digest: "hashlib._Hash | None" = None) -> int:
    """Read the blocks of a spec; return their rows."""
    rows = 0
    for address, make in train_tasks(spec):
        arrays = arrays_of(make()(), where=str(address))
        rows += len(arrays["label"])
        if digest is not None:
            digest.update(arrays["image"].tobytes())
            digest.update(arrays["label"].tobytes())
    return rows


def in_turn(urls: Mapping[str, str], turns: int) -> tuple[dict[str, float], int, str]:
    """Read one epoch of each kind for the digest, which also opens the files; then one of each kind a turn.

    Return the median of rows_per_s_<kind> over turns, and the least of cpu_<kind>, in seconds a million rows: whatever
    else runs on the machine only adds to it. Then the rows of an epoch, and the digest of all.
    """
    specs = {kind: spec_of(urls[kind]) for kind in KINDS}
    digests, rows = {kind: hashlib.sha256() for kind in KINDS}, 0
    for kind, spec in specs.items():
        rows_of(spec, digests[kind])
    assert len({digest.hexdigest() for digest in digests.values()}) == 1
    wall_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cpu_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for epoch in range(1, turns + 1):
        for kind in KINDS if epoch % 2 else KINDS[::-1]:
            k = specs[kind].end
            spec = replace(specs[kind], begin=epoch * k, end=(epoch + 1) * k)
            wall, cpu = time.perf_counter(), time.process_time()
            rows = rows_of(spec)
            wall_s[kind].append(time.perf_counter() - wall)
            cpu_s[kind].append(time.process_time() - cpu)
    measures = {f"rows_per_s_{kind}": rows / statistics.median(wall_s[kind]) for kind in KINDS}
    measures |= {f"cpu_{kind}": min(cpu_s[kind]) / rows * 1e6 for kind in KINDS}
    return measures, rows, digests["ours"].hexdigest()


def main() -> None:
    """Measure what a read task does."""
    given = options()
    measures, rows, digest = in_turn(given["urls"], given["turns"])
    finish(measures, {"rows": rows}, digest)


if __name__ == "__main__":
    main()
