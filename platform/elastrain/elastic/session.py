"""The Ray that a command runs on: the one at an address, or a local one that starts and ends with the command."""

import contextlib
import logging
import math
import os
import shlex
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from elastrain.cluster.doors import check_tls
from elastrain.cluster.folders import more_machines, refuse_unseen
from elastrain.data.blocks import READERS, reading_beside
from elastrain.elastic.policy import sizes_at_start
from elastrain.elastic.ray_inner import (
    NODE_TYPE_LABEL,
    NodeType,
    autoscaler,
    available_per_node,
    check_token,
    deaths_untold,
    draining_nodes,
    enable_token_auth,
    node_types,
    orphaned_groups,
    patient_start,
    secure_new_cluster,
    without_monitors,
)
from elastrain.errors import ResourceError, SpecError
from elastrain.spec.offers import KIND, offered
from elastrain.spec.train import WorkersSpec

CONNECT_S = 5.0


@contextlib.contextmanager
def ray_session(
    address: str | None, *, cpus: float, seen: Collection[str] = (), shared: Sequence[str] = ()
) -> Iterator[None]:
    """Connect to `address`, else `RAY_ADDRESS`, else start a local Ray with at least `cpus` logical CPUs.

    An open connection of this process is used as it is. Raises ResourceError if no Ray answers at the address,
    SpecError if it has machines that do not see one of the places `seen`; all have mounted the folders `shared`.
    """
    if ray.is_initialized():
        _check_folders(seen, shared)
        yield
        return
    target = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do anyway; unset it warns
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if target and target != "local":
            _reachable(target)
            enable_token_auth()
            if target != "auto":
                check_token(target)
            ray.init(address=target, **quiet)
        else:
            secure_new_cluster()
            with without_monitors(), patient_start():
                ray.init(address="local", num_cpus=math.ceil(cpus), include_dashboard=False, **_quoted(), **quiet)
    except Exception as error:  # a bare one where a node does not start in time
        if target and target != "local":
            raise ResourceError(f"no Ray answers at {target}: {error}") from error
        raise ResourceError(f"a local Ray did not start: {error}; see what `elastrain doctor` finds") from error
    try:
        _check_folders(seen, shared)
        with deaths_untold():
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a wish to stop; the second one ends the process as usual.

    Ray takes SIGTERM for itself when it starts: this comes after it. Outside the main thread it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        del frame
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _reachable(address: str) -> None:
    """Raise ConnectionError within seconds if nothing listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address.startswith("ray://"):
        raise ConnectionError("a Ray Client address; give HOST:PORT of the head itself, or auto on one of its nodes")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            raise ConnectionError(
                f"{error}; start it there with `ray start --head`, or check --address and RAY_ADDRESS: without both a "
                f"local Ray is started"
            ) from error
        check_tls(host, int(port))
    elif address != "auto":
        raise ConnectionError("not auto and not HOST:PORT: give one of them")


def _check_folders(seen: Collection[str], shared: Sequence[str]) -> None:
    if seen:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        hosts, ids = ({node[key] for node in nodes} for key in ("NodeManagerHostname", "NodeID"))
        refuse_unseen(seen, more_machines(hosts, ids, managed=autoscaler() is not None), shared)


def _quoted() -> dict[str, Any]:
    """Quote the interpreter where its path has a space: Ray starts workers through a shell."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"runtime_env": {"py_executable": quoted}}


def embedded_cpus(workers: WorkersSpec) -> float:
    """Return the logical CPUs of an embedded Ray: all workers, and reading."""
    return workers.max * workers.cpus + READERS


def find_room(
    workers: WorkersSpec, *, say: Callable[[str], None], stop: Callable[[], bool], pause: Callable[[], None]
) -> dict[str, int]:
    """Return how many workers to start on which nodes, min to max together; below min wait, saying so.

    {} where only an autoscaler can make the room: it must be asked for. Raises ResourceError if the cluster can never
    hold min, SpecError as `check_kind`, InterruptedError if `stop` says so while waiting.
    """
    check_kind(workers)
    told = False
    while not (sizes := sizes_at_start(room(workers), workers.min, workers.max)):
        total = fitting(workers, "total")
        if total < workers.min and total + addable(workers) < workers.min:
            raise ResourceError(_never(workers))
        if addable(workers):
            return {}
        if not told:
            free = fitting(workers, "free")
            held = ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0)
            say(f"waiting for room: {free} of at least {workers.min} workers fit now; {held:g} CPUs are held by others")
            told = True
        if stop():
            raise InterruptedError
        pause()
    return sizes


def check_kind(workers: WorkersSpec, key: str = "workers.accelerator") -> None:
    """Raise SpecError if a worker fits on several kinds of GPU and the spec's `key` names none."""
    if not workers.gpus or workers.accelerator is not None:
        return
    alive = [node for node in ray.nodes() if node["Alive"]]
    there = [node["Resources"] for node in alive] + [dict(kind.resources) for kind in node_types()]
    there += [held for node in alive for held in offered(node["Labels"])]
    kinds = sorted({kind[0] for held in there if _fits(workers, held) and (kind := _gpus(held))})
    if len(kinds) > 1:
        raise SpecError(
            f"{key}: the cluster has {', '.join(kinds)}, and a run must not mix them: name one, as in "
            f"--set {key}={kinds[0]}"
        )


def alike(workers: WorkersSpec, fits: Mapping[str, int], nodes: Collection[str]) -> dict[str, int]:
    """Return what fits where, less nodes with another kind of GPU than `nodes` have, if the run names none."""
    if not workers.gpus or workers.accelerator is not None or not nodes:
        return dict(fits)
    kinds = {node["NodeID"]: _gpus(node["Resources"]) for node in ray.nodes()}
    ours = [kinds[node] for node in nodes if node in kinds]
    return {node: n for node, n in fits.items() if kinds.get(node) in ours}


def _gpus(held: Mapping[str, float]) -> tuple[str, ...]:
    """Return the names that a node has for its kind of accelerator: one, unless somebody gave it more.

    >>> _gpus({"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0})
    ('H100',)
    """
    return tuple(sorted(name.removeprefix(KIND) for name in held if name.startswith(KIND)))


def _never(workers: WorkersSpec) -> str:
    no_gpu = bool(workers.gpus) and not ray.cluster_resources().get("GPU")
    hint = "; Ray sees no GPU here: set workers.gpus: 0" if no_gpu else ""
    holds = fitting(workers, "total") + addable(workers)
    return (
        f"workers.min {workers.min} of {workers.in_words()} each: the cluster can hold {holds}; lower "
        f"workers.min, workers.cpus or workers.gpus, or add nodes{hint}"
    )


def reading_resources(workers: WorkersSpec, size: int) -> tuple[float, int]:
    """Return (CPUs a read task, read tasks at once) beside `size` workers that are still to be started."""
    return reading_beside(size, ray.available_resources().get("CPU", 0.0) - size * workers.cpus)


def fitting(workers: WorkersSpec, kind: str) -> int:
    """Count the workers that fit into the `free` or `total` resources, node by node: a worker does not span nodes."""
    if kind == "free":
        return sum(room(workers).values())
    return sum(_fits(workers, node["Resources"]) for node in ray.nodes() if node["Alive"])


def largest(workers: WorkersSpec) -> int:
    """Return how many workers the largest node holds when nothing else is on it."""
    return max((_fits(workers, node["Resources"]) for node in ray.nodes() if node["Alive"]), default=0)


def room(workers: WorkersSpec) -> dict[str, int]:
    """Return how many workers fit now, by node id; none on a node that is about to be taken away.

    What cells asked for that were dead when it came is freed, for the next time: nobody knows of it, and it would hold
    its room until the job ends.
    """
    for group in orphaned_groups():
        remove_placement_group(group)
    free, draining = available_per_node(), draining_nodes()
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return {node: _fits(workers, free.get(node, {})) for node in alive if node not in draining}


def addable(workers: WorkersSpec) -> int:
    """Return how many workers more than now an autoscaler could make room for; 0 without one.

    Where it does not say what it could add, as many as the run may use: what it cannot place it will say.
    """
    if not node_types():
        return workers.max if autoscaler() else 0
    most = sum(
        _fits(workers, kind.resources) * kind.most
        for kind in _unbounded(_kinds_for(workers, node_types()), workers.max)
    )
    return max(0, most - fitting(workers, "total"))


def largest_addable(workers: WorkersSpec) -> int:
    """Return how many workers fit on the largest node that an autoscaler could add now; 0 without one.

    A type of which there are as many nodes as there may be adds none: a cell of its size would be asked for in vain.
    """
    if not node_types():
        return addable(workers)
    up = Counter(node["Labels"].get(NODE_TYPE_LABEL) for node in ray.nodes() if node["Alive"])
    kinds = [kind for kind in _kinds_for(workers, node_types()) if kind.most < 0 or up[kind.name] < kind.most]
    return max((_fits(workers, kind.resources) for kind in kinds), default=0)


def _kinds_for(workers: WorkersSpec, kinds: list[NodeType]) -> list[NodeType]:
    """Leave out nodes with GPUs for work on CPUs, where the others hold `workers.min`: nobody pays for idle GPUs.

    >>> cpu, gpu = NodeType({"CPU": 32.0}, 8), NodeType({"CPU": 192.0, "GPU": 8.0}, 4)
    >>> [len(_kinds_for(workers, [cpu, gpu])) for workers in (WorkersSpec(), WorkersSpec(gpus=1), WorkersSpec(cpus=64))]
    [1, 2, 2]
    """
    plain = [kind for kind in kinds if not kind.resources.get("GPU")]
    held = sum(_fits(workers, kind.resources) * (kind.most if kind.most >= 0 else workers.min) for kind in plain)
    return plain if not workers.gpus and held >= workers.min else kinds


def _unbounded(kinds: list[NodeType], enough: int) -> list[NodeType]:
    """Read "any number of nodes" as one for each worker, beside those that are there."""
    there = len(ray.nodes())
    return [kind if kind.most >= 0 else NodeType(kind.resources, enough + there) for kind in kinds]


def _fits(workers: WorkersSpec, held: Mapping[str, float]) -> int:
    """Return how many workers what is `held` is enough for; none where a kind of GPU is wanted and another is there.

    >>> h100 = {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
    >>> [_fits(WorkersSpec(gpus=1, accelerator=kind), h100) for kind in (None, "H100", "T4")]
    [8, 8, 0]
    """
    fits = min(held.get(name, 0.0) / need for name, need in workers.needs().items())
    return math.floor(fits + 1e-9)
