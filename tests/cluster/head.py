"""One Ray head with a dashboard on this machine's loopback, for tests: started on a leash, ended by its process id."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient  # type: ignore[attr-defined] # compiled

from elastrain.elastic import keep
from elastrain.elastic.ray_inner import secure_new_cluster

START_S = 120.0


@dataclass(frozen=True)
class Head:
    """Where it is: `url` of the dashboard, `address` of Ray itself, and the folder of all its files."""

    url: str
    address: str
    folder: Path

    @contextlib.contextmanager
    def node(self, folder: Path, **environment: str) -> Iterator[str]:
        """Start another node without CPUs, and yield its id."""

        def joined() -> list[str]:
            nodes = GcsClient(address=self.address).get_all_node_info()
            return [node.hex() for node, info in nodes.items() if info.labels.get("kind") == "spot"]

        options = (f"--address={self.address}", "--num-cpus=0", "--labels=kind=spot", "--dashboard-agent-listen-port=0")
        with _started(folder, *options, **environment) as wait:
            yield wait(joined)[0]


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


@contextlib.contextmanager
def head(folder: Path, *, cpus: int, environment: dict[str, str]) -> Iterator[Head]:
    """Start a head with its files in `folder`, wait for its job server, and end all its processes afterwards."""
    secure_new_cluster()
    ports = {name: free_port() for name in ("dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")}
    options = ("--head", "--port=0", f"--num-cpus={cpus}", "--dashboard-host=127.0.0.1", "--no-monitor")
    written = folder / "ray" / "ray_current_cluster"
    with _started(folder, *options, *(f"--{name}={port}" for name, port in ports.items()), **environment) as wait:
        wait(lambda: written.exists() and written.read_text().strip() and _listens(ports["dashboard-port"]))
        yield Head(f"http://127.0.0.1:{ports['dashboard-port']}", written.read_text().strip(), folder)


@contextlib.contextmanager
def _started(folder: Path, *options: str, **environment: str) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Start a node; yield what waits for something to be true while the node lives, and returns that."""
    command = [
        *(sys.executable, "-P", keep.__file__, str(Path(sys.executable).with_name("ray")), "start", "--block"),
        *(*options, f"--temp-dir={folder / 'ray'}", "--num-gpus=0", f"--object-store-memory={100 << 20}"),
        *("--disable-usage-stats", "--include-log-monitor=false"),
    ]
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    folder.mkdir()
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=kept | environment, start_new_session=True
        )

    def wait(what: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + START_S
        while not (found := what()):
            said = (folder / "start.log").read_text()
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        return found

    try:
        yield wait
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
