"""A real S3 server on this machine: SeaweedFS on loopback, with credentials, ports and a folder of its own.

`python tests/s3_server.py COMMAND …` runs a command beside one, with what it needs to know in the environment.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "testaccess", "testsecret123"
START_S = 60.0


@contextlib.contextmanager
def serving(folder: Path, ports: list[int] | None = None, bucket: str | None = None) -> Iterator[dict[str, str]]:
    """Run a server that keeps its files in `folder`; yield the environment by which it is reached.

    `BUCKET` in it names a bucket that is there, `SERVER_PID` the process, for who wants to kill it. The same folder,
    ports and bucket again are the same server, started again. Raises RuntimeError if no server comes up.
    """
    # fresh: should another server have the ports, it does not know this one
    bucket = bucket or f"bucket-{secrets.token_hex(4)}"
    process, environment = _started(folder, ports, bucket) if ports else _begun(folder, bucket)
    try:
        yield environment
    finally:
        _end(process)


def _begun(folder: Path, bucket: str) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    """Start a server on ports of its choice, which another one that starts may take at the same moment."""
    for _ in range(4):
        with contextlib.suppress(RuntimeError):
            return _started(folder, free_ports(), bucket)
    return _started(folder, free_ports(), bucket)


def _started(folder: Path, ports: list[int], bucket: str) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            _command(folder / "files", bucket, ports), env={**os.environ, **keys}, stdout=log, stderr=log
        )
    environment = {
        **keys,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "BUCKET": bucket,
        "SERVER_PID": str(process.pid),
    }
    try:
        _await(process, environment, folder / "log")
    except BaseException:
        _end(process)
        raise
    return process, environment


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _command(files: Path, bucket: str, ports: list[int]) -> list[str]:
    files.mkdir(exist_ok=True)
    names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
    return [
        str(Path(sysconfig.get_path("scripts")) / "weed"),
        *("-logtostderr=true", "mini", f"-dir={files}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-s3.autoCreateBucket=false", f"-bucket={bucket}"),
        *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
    ]


def free_ports() -> list[int]:
    """Return the ports of a server: nobody listens on them, nor 10,000 above each, where the server speaks gRPC.

    None is one that Ray's workers take (up to 19,999) or that the kernel gives to whoever connects (from 32,768).
    """
    found: list[int] = []
    while len(found) < 5:
        port = 20000 + secrets.randbelow(2700)
        if port not in found and _is_free(port) and _is_free(port + 10000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _await(process: subprocess.Popen[bytes], environment: Mapping[str, str], log: Path) -> None:
    from pyarrow import fs

    where = environment["AWS_ENDPOINT_URL"].removeprefix("http://")
    client = fs.S3FileSystem(
        access_key=ACCESS_KEY, secret_key=SECRET_KEY, endpoint_override=where, scheme="http", region="us-east-1"
    )
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            path = f"{environment['BUCKET']}/.probe"
            with client.open_output_stream(path) as stream:  # a bucket may be there before there is room in it
                stream.write(b"1")
            client.delete_file(path)
            return
        time.sleep(0.2)
    raise RuntimeError(f"no S3 server came up; its last words:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, serving(Path(place)) as reached:
        sys.exit(subprocess.run(sys.argv[1:], env={**os.environ, **reached}, check=False).returncode)
