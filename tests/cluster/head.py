"""One Ray head with a dashboard on this machine's loopback, for tests: started on a leash, ended by its process id."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elastrain.elastic import keep
from elastrain.elastic.ray_inner import secure_new_cluster

START_S = 120.0


@dataclass(frozen=True)
class Head:
    """Where it is: `url` of the dashboard, `address` of Ray itself."""

    url: str
    address: str


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


@contextlib.contextmanager
def head(folder: Path, *, cpus: int, environment: dict[str, str]) -> Iterator[Head]:
    """Start a head with its files in `folder`, wait for its job server, and end all its processes afterwards."""
    secure_new_cluster()
    ports = {name: free_port() for name in ("dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")}
    command = [
        *(
            sys.executable,
            "-P",
            keep.__file__,
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            "--head",
        ),
        *("--port=0", f"--num-cpus={cpus}", "--num-gpus=0", f"--temp-dir={folder / 'ray'}", "--disable-usage-stats"),
        *("--dashboard-host=127.0.0.1", *(f"--{name}={port}" for name, port in ports.items()), "--no-monitor"),
        *(f"--object-store-memory={100 << 20}", "--include-log-monitor=false", "--node-ip-address=127.0.0.1"),
    ]
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    folder.mkdir()
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=kept | environment, start_new_session=True
        )
    try:
        assert process.stdin is not None
        written = folder / "ray" / "ray_current_cluster"
        deadline = time.monotonic() + START_S
        while not (written.exists() and written.read_text().strip() and _listens(ports["dashboard-port"])):
            said = (folder / "start.log").read_text()
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        yield Head(f"http://127.0.0.1:{ports['dashboard-port']}", written.read_text().strip())
    finally:
        process.stdin.close()
        process.wait(60)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
