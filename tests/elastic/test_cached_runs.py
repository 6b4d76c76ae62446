"""Runs on data of a real S3 server with a cache: the same bits as without one, and shards are read once a node."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.test_run import BITWISE, SPEC, result
from tests.fault_proxy import Proxy

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_with_a_cache_comes_to_the_same_bits_and_the_next_one_reads_no_shard(
    cli: Callable[..., Any], fault_proxy: Proxy, tmp_path: Path
) -> None:
    url = f"s3://{fault_proxy.environment['BUCKET']}/cached"
    assert cli("pack", "digits", url, "--json").returncode == 0
    places = (f"data.train={url}/train", f"data.eval={url}/test", f"storage={tmp_path}", "budget={epochs: 2}")
    there = [*BITWISE, *(word for place in places for word in ("--set", place))]
    cached = ("--set", f"data.cache={{folder: {tmp_path / 'cache'}, max_bytes: 1GB}}")
    plain = result(cli("train", SPEC, *there, "--set", "name=plain"))
    filled = result(cli("train", SPEC, *there, *cached, "--set", "name=filled"))
    assert filled["weights_sha256"] == plain["weights_sha256"]
    assert any((tmp_path / "cache" / "entries").iterdir())

    fault_proxy.fault("403", method="GET", key="part-")  # a shard cannot be read any more
    again = result(cli("train", SPEC, *there, *cached, "--set", "name=again"))
    assert again["weights_sha256"] == plain["weights_sha256"]
    assert "403" not in fault_proxy.counts()
    refused = cli("train", SPEC, *there, "--set", "name=refused")
    assert refused.returncode == 5, refused.stderr
