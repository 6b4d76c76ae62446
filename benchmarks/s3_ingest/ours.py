"""Ours: the same feed from the server without and with a time to the first byte, from the cache, and from a folder."""

import os
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from benchmarks.ingest.data import BATCH
from benchmarks.s3_ingest.server import FIRST_BYTE_MS, Served, served
from benchmarks.script import finish, options

from elastrain.data.blocks import READERS, FeedSpec
from elastrain.data.cache import Cache
from elastrain.data.dataset import Dataset
from elastrain.data.feed import FeederLogic, WorkerFeed
from elastrain.data.plan import Plan
from elastrain.elastic.session import ray_session
from elastrain.observe.ledger import Clock
from elastrain.training.batches import Batches


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What it took to deliver some epochs; `digest` is over labels and a line of each image, in order."""

    wall_s: float
    cpu_s: float
    requests: int
    delivered_bytes: int
    digest: int

    @property
    def mb_per_s(self) -> float:
        """Delivered megabytes a second."""
        return self.delivered_bytes / 1e6 / self.wall_s

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor seconds of the client for a gigabyte."""
        return self.cpu_s / self.delivered_bytes * 1e9

    def __add__(self, other: "Pass") -> "Pass":
        """Return both together, which delivered the same."""
        assert self.digest == other.digest
        return Pass(
            wall_s=self.wall_s + other.wall_s,
            cpu_s=self.cpu_s + other.cpu_s,
            requests=self.requests + other.requests,
            delivered_bytes=self.delivered_bytes + other.delivered_bytes,
            digest=self.digest,
        )


def deliver(server: Served, spec: FeedSpec) -> Pass:
    """Take every batch of the plan in this process, as a training loop would."""
    remote: Any = ray.remote  # its annotations know no actor options
    feeder = remote(num_cpus=0, max_concurrency=16)(FeederLogic).remote(spec)
    ray.get(feeder.__ray_ready__.remote())  # as the other sides' processes are there when their time begins
    requests, cpu, start, plan = server.requests(), server.client_cpu_s(), time.perf_counter(), spec.plan
    feed = WorkerFeed(feeder, spec, begin=spec.begin)
    batches, clock, digest, size = Batches(feed, plan, torch.device("cpu")), Clock(), 0, 0
    for step in range(spec.begin, spec.end):
        batches.move_to(step, [0], clock)
        if step % plan.block_steps == 0:
            feed.release_before(plan.block_of(step))
        batch = batches.batch(0)
        assert batch is not None
        for part in (batch["image"][:, 14], batch["label"]):
            digest = zlib.crc32(part.numpy().tobytes(), digest)
        size += batch["image"].nbytes + batch["label"].nbytes
    wall_s, cpu_s = time.perf_counter() - start, server.client_cpu_s() - cpu
    feed.close()
    ray.get(feeder.close.remote())
    ended = ray.get(feeder.__ray_call__.remote(lambda _: os.getpid()))
    ray.kill(feeder)
    while Path(f"/proc/{ended}").exists():  # so that its processor time leaves no later count
        time.sleep(0.01)
    return Pass(wall_s=wall_s, cpu_s=cpu_s, requests=server.requests() - requests, delivered_bytes=size, digest=digest)


def _in_turn(server: Served, passes: list[tuple[float, FeedSpec]]) -> list[Pass]:
    """Deliver each under its time to the first byte, forth and back; return the sum of both for each."""
    forth_and_back: list[list[Pass]] = []
    for turn in (passes, passes[::-1]):
        found = []
        for first_byte_ms, spec in turn:
            server.throttle(first_byte_ms)
            found.append(deliver(server, spec))
        forth_and_back.append(found)
    return [one + other for one, other in zip(forth_and_back[0], forth_and_back[1][::-1], strict=True)]


def main() -> None:
    """Run the passes on a local Ray, sized as `elastrain train` sizes its own."""
    given = options()
    torch.set_num_threads(1)
    with (
        served(given["url"]) as server,
        tempfile.TemporaryDirectory() as folder,
        ray_session(None, cpus=1 + READERS),
    ):
        local, remote = Dataset.open(given["url"]), Dataset.open(server.url)
        plan = Plan.of(local, seed=0, global_batch=BATCH, slots=1)
        k, cache = plan.steps_per_epoch, Cache(folder=folder, max_bytes=4 * local.size_bytes)
        here = FeedSpec(plan=plan, train=local, evaluation=None, transforms=(), begin=0, end=k, reading=(1.0, READERS))
        there = replace(here, train=remote)
        later = {"begin": k, "end": k * (1 + given["epochs"])}
        cached = replace(there, cache=cache)
        deliver(server, here)  # so that all processes have started
        near, far = _in_turn(server, [(0.0, there), (FIRST_BYTE_MS, there)])
        server.throttle(FIRST_BYTE_MS)
        filled = deliver(server, cached)
        again, folder_pass = _in_turn(
            server, [(FIRST_BYTE_MS, replace(cached, **later)), (FIRST_BYTE_MS, replace(here, **later))]
        )
    assert near.digest == far.digest == filled.digest
    assert again.digest == folder_pass.digest
    latency_s = far.requests * FIRST_BYTE_MS / 1000
    measures = {
        "mb_per_s": far.mb_per_s,
        "without_latency_mb_per_s": near.mb_per_s,
        "filling_mb_per_s": filled.mb_per_s,
        "cached_mb_per_s": again.mb_per_s,
        "local_mb_per_s": folder_pass.mb_per_s,
        "latency_s": latency_s,
        "hidden_share": 1.0 - max(0.0, far.wall_s - near.wall_s) / latency_s,
        "none": 0.0,
        "requests": float(far.requests),
        "cpu_s_per_gb": far.cpu_s_per_gb,
        "cached_cpu_s_per_gb": again.cpu_s_per_gb,
        "local_cpu_s_per_gb": folder_pass.cpu_s_per_gb,
    }
    counters = {
        "delivered_bytes": filled.delivered_bytes,
        "row_groups": len(local.group_rows),
        "requests_of_cached_epochs": again.requests,
    }
    finish(measures, counters)


if __name__ == "__main__":
    main()
