"""Runs on data of a real S3 server with a cache: the same bits as without one, and shards are read once a node."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fault_proxy import Proxy

import elastrain
from elastrain import storage
from elastrain.data.dataset import Dataset
from elastrain.elastic.session import ray_session
from elastrain.errors import StorageError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def ray_there(fault_proxy: Proxy) -> Iterator[None]:
    """A Ray whose processes reach the server as this one does."""
    del fault_proxy
    with ray_session("local", cpus=4):
        yield


@pytest.mark.usefixtures("ray_there")
def test_a_run_with_a_cache_comes_to_the_same_bits_and_the_next_one_reads_no_shard(
    cli: Callable[..., Any], spec_of: Callable[..., Any], fault_proxy: Proxy, tmp_path: Path
) -> None:
    url = f"s3://{fault_proxy.environment['BUCKET']}/cached"
    assert cli("pack", "digits", url, "--json").returncode == 0
    places = (f"data.train={url}/train", f"data.eval={url}/test", f"storage={tmp_path}", "budget={epochs: 2}")
    there = (*places, "consistency=bitwise", "data.slots=5")
    cached = f"data.cache={{folder: {tmp_path / 'cache'}, max_bytes: 1GB}}"
    plain = elastrain.train(spec_of("plain", *there, "workers={min: 1, max: 1}"))
    filled = elastrain.train(spec_of("filled", *there, cached))
    assert filled.weights_sha256 == plain.weights_sha256
    assert any((tmp_path / "cache" / "entries").iterdir())

    fault_proxy.fault("403", method="GET", key="part-")  # a shard cannot be read any more
    again = elastrain.train(spec_of("again", *there, cached))
    assert again.weights_sha256 == plain.weights_sha256
    assert "403" not in fault_proxy.counts()
    with pytest.raises(StorageError):
        storage.read_bytes(f"{url}/train/{Dataset.open(f'{url}/train').shards[0].path}")
