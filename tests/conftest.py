"""What tests of several folders share: a real S3 server, started when the first of them asks for it."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tests.fault_proxy import Proxy, proxying
from tests.s3_server import serving

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("steady", deadline=None)  # a loaded machine is no failure
settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put modules first whose tests may take longest: a long one that began last would have the machine for itself."""
    limits: dict[Path, float] = defaultdict(float)
    for item in items:
        limit = item.get_closest_marker("timeout")
        limits[item.path] = max(limits[item.path], limit.args[0] if limit else 0.0)
    items.sort(key=lambda item: -limits[item.path])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server for all tests, as what the environment must hold to reach it."""
    with serving(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture
def s3_bucket(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket's URL, which the environment of this process leads to."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server['BUCKET']}"


@pytest.fixture
def fault_proxy(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server, which the environment of this process leads to; faults are set by its methods."""
    with proxying(s3_server) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the cases of a module's benchmarks make their data, which several of them read; they can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield tmp_path_factory.mktemp("work")
