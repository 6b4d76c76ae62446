"""The Ray that a command runs on: the one at an address, or a local one that starts and ends with the command."""

import contextlib
import logging
import math
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from elastrain.errors import ResourceError
from elastrain.spec.train import WorkersSpec

READERS = 2
CONNECT_S = 5.0


@contextlib.contextmanager
def ray_session(address: str | None, *, cpus: float) -> Iterator[None]:
    """Connect to `address`, else `RAY_ADDRESS`, else start a local Ray with at least `cpus` logical CPUs.

    An open connection of this process is used as it is. Raises ResourceError if no Ray answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    target = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do anyway; unset it warns
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if target and target != "local":
            # `ray start` turns token authentication on where a token is found; a client of an address does not
            _reachable(target)
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            ray.init(address=target, **quiet)
        else:
            ray.init(address="local", num_cpus=math.ceil(cpus), include_dashboard=False, **_quoted(), **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        where = f"no Ray answers at {target}" if target else "a local Ray did not start"
        raise ResourceError(f"{where}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _reachable(address: str) -> None:
    """Raise ConnectionError within seconds if nothing listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address.startswith("ray://"):
        raise ConnectionError("a Ray Client address; give HOST:PORT of the head itself, or auto on one of its nodes")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    elif address != "auto":
        raise ConnectionError("not auto and not HOST:PORT")


def _quoted() -> dict[str, Any]:
    """Quote the interpreter where its path has a space: Ray starts workers through a shell."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"runtime_env": {"py_executable": quoted}}


def embedded_cpus(workers: WorkersSpec) -> float:
    """Return the logical CPUs of an embedded Ray: all workers, and reading."""
    return workers.max * workers.cpus + READERS


def place_workers(
    workers: WorkersSpec, *, say: Callable[[str], None], stop: Callable[[], bool], pause: Callable[[], None]
) -> int:
    """Return how many workers fit, from min to max; below min wait, saying so.

    Raises ResourceError if the cluster can never hold min, InterruptedError if `stop` says so while waiting.
    """
    told = False
    while (free := fitting(workers, "free")) < workers.min:
        if fitting(workers, "total") < workers.min:
            raise ResourceError(_never(workers))
        if not told:
            held = ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0)
            say(f"waiting for room: {free} of at least {workers.min} workers fit now; {held:g} CPUs are held by others")
            told = True
        if stop():
            raise InterruptedError
        pause()
    return min(free, workers.max)


def _never(workers: WorkersSpec) -> str:
    need = f"{workers.cpus:g} CPUs" + (f" and {workers.gpus:g} GPUs" if workers.gpus else "")
    no_gpu = bool(workers.gpus) and not ray.cluster_resources().get("GPU")
    hint = "; Ray sees no GPU here: set workers.gpus: 0" if no_gpu else ""
    return (
        f"workers.min {workers.min} of {need} each: the cluster can hold {fitting(workers, 'total')}; lower "
        f"workers.min, workers.cpus or workers.gpus, or add nodes{hint}"
    )


def reading_resources(workers: WorkersSpec, size: int) -> tuple[float, int]:
    """Return (CPUs a read task, read tasks at once): what is free beside the workers; 0 CPUs where nothing is."""
    spare = int(ray.available_resources().get("CPU", 0.0) - size * workers.cpus)
    return (1.0, max(1, min(spare, max(READERS, size)))) if spare >= 1 else (0.0, READERS)


def fitting(workers: WorkersSpec, kind: str) -> int:
    """Count the workers that fit into the `free` or `total` resources, node by node: a worker does not span nodes."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    per_node = ray._private.state.available_resources_per_node() if kind == "free" else {}  # noqa: SLF001
    count = 0
    for node in nodes:
        held = per_node.get(node["NodeID"], {}) if kind == "free" else node["Resources"]
        fits = held.get("CPU", 0.0) / workers.cpus
        if workers.gpus:
            fits = min(fits, held.get("GPU", 0.0) / workers.gpus)
        count += math.floor(fits + 1e-9)
    return count
