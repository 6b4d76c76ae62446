"""Blocks that lie on a node that is gone, which Ray does not know yet: workers go on without them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.elastic.cell_harness import several_nodes

from elastrain.data import feed as feed_module
from elastrain.data.blocks import Address, FeedSpec, ReadBlock, task_of
from elastrain.data.columns import to_table
from elastrain.data.dataset import Dataset
from elastrain.data.feed import FeederLogic, WorkerFeed
from elastrain.data.plan import Plan

ROWS = 512
SOON_S, LATE_MS = 20.0, 600_000


@pytest.fixture
def spec(tmp_path: Path) -> FeedSpec:
    """Four blocks of a megabyte: such a one lies in the memory of the node that has read it."""
    images = np.arange(ROWS * 4096, dtype=np.uint16).reshape(ROWS, 64, 64)
    pq.write_table(to_table({"image": images}), tmp_path / "0.parquet", row_group_size=64, write_page_checksum=True)
    data = Dataset.open(str(tmp_path))
    plan = replace(Plan.of(data, seed=0, global_batch=64, slots=1), block_steps=2)
    return FeedSpec(plan=plan, train=data, evaluation=data, transforms=(), begin=0, end=8, reading=(0.0, 1))


@pytest.mark.ray
def test_a_block_on_a_node_that_is_gone_is_read_by_the_worker(spec: FeedSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: list[Address] = []

    def counted(spec: FeedSpec, address: Address) -> ReadBlock:
        here.append(address)
        return task_of(spec, address)

    monkeypatch.setattr(feed_module, "task_of", counted)
    with several_nodes(looks_ms=LATE_MS) as nodes:
        node = nodes.add(1)
        remote: Any = ray.remote
        head = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # like a run's
        feeder = remote(num_cpus=0, max_concurrency=4, scheduling_strategy=head)(FeederLogic).remote(spec)
        worker = WorkerFeed(feeder, spec, begin=0)
        addresses = [(0, block) for block in range(2)]
        references = ray.get(feeder.get.remote(addresses))
        assert len(ray.wait(references, num_returns=2, timeout=SOON_S, fetch_local=False)[0]) == 2
        read = [*references, *ray.get(feeder.evaluation.remote(0))]
        ray.wait(read, num_returns=3, timeout=SOON_S, fetch_local=False)
        places = ray.experimental.get_object_locations(read).values()
        assert [place["node_ids"] for place in places] == [[node]] * 3, "nothing is read on a head without work"
        nodes.lose(node)
        for address in addresses:
            arrays = worker.take(*address)
            assert arrays is not None
            assert len(arrays["image"]) == 128
        assert here == addresses
        worker.close()
        ray.kill(feeder)
