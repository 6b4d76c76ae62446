"""A real server behind the throttling proxy of the tests, with a dataset in it, and the processor time without them."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.script import descendants, tree_cpu_s
from tests.fault_proxy import Proxy, proxying  # noqa: TID251 -- one proxy for tests and benchmarks
from tests.s3_server import serving  # noqa: TID251 -- and one server

from elastrain import storage

FIRST_BYTE_MS, BYTES_PER_S = 30.0, 90e6


class Served:
    """A dataset on the server: its URL, the proxy before it, and whose processor time is not the client's."""

    def __init__(self, url: str, proxy: Proxy) -> None:
        self.url, self.proxy = url, proxy
        below = descendants(os.getpid())
        self._servers = [pid for pid in below if not any(pid in descendants(other) for other in below)]

    def throttle(self, first_byte_ms: float) -> None:
        """Set the time to the first byte, and the rate of a connection."""
        self.proxy.throttle(first_byte_ms=first_byte_ms, bytes_per_s=BYTES_PER_S)

    def requests(self) -> int:
        """Return how many requests have come."""
        counts = self.proxy.counts()
        return counts.get("GET", 0) + counts.get("HEAD", 0)

    def client_cpu_s(self) -> float:
        """Return the processor seconds of this process and all below it, the server and the proxy left out."""
        return tree_cpu_s(os.getpid()) - sum(map(tree_cpu_s, self._servers))


@contextlib.contextmanager
def served(local: str) -> Iterator[Served]:
    """Put a dataset's files on a fresh server; the environment leads to it. Call this before other processes start."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server, proxying(server) as proxy:
        os.environ.update(proxy.environment)
        os.environ["RAY_idle_worker_killing_time_threshold_ms"] = "600000"  # noqa: SIM112 -- or their time is not counted
        url = f"s3://{server['BUCKET']}/data"
        for path in Path(local).iterdir():
            storage.put(storage.join(url, path.name), path.read_bytes())
        yield Served(url, proxy)
