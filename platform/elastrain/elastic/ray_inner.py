"""What the project uses of Ray's inner interfaces, apart from Ray Train's, each in one small function.

Ray Train's are in `trainer.py`: importing them takes two seconds, and only a cell's own process needs them. Nothing
else in the package reaches into Ray. Both are made for one minor version of Ray; `tests/elastic/test_ray_inner.py`
says what has changed when the next one differs.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray._private.parameter
import ray._private.state
import ray._private.worker
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup as token
from ray._raylet import GcsClient  # type: ignore[attr-defined] # compiled
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.util.placement_group import PlacementGroup

from elastrain.cluster.environment import NO_EXPORTERS
from elastrain.elastic import no_agent
from elastrain.errors import ResourceError

STATUS_S, SLOW_S, PAUSE_S = 10.0, 60.0, 1.0  # an answer of the GCS; how often it is asked again, and how soon
NODE_S, START_LOOK_S = 180.0, 0.2  # how long a node may take to start, and how often it is looked for
NODE_ID_LABEL = "ray.io/node-id"  # what every raylet labels itself with
NODE_TYPE_LABEL = "ray.io/node-group"  # and those that an autoscaler has started


@dataclass(frozen=True, slots=True)
class NodeType:
    """What an autoscaler can add: nodes with these resources, `most` of them (-1: any number), labelled with `name`."""

    resources: Mapping[str, float]
    most: int
    name: str = ""


def available_per_node() -> dict[str, dict[str, float]]:
    """Return the resources that are free now, by node id; ray.available_resources() only has their sum.

    Stands on `ray._private.state.available_resources_per_node`.
    """
    found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()  # noqa: SLF001
    return found


def draining_nodes() -> dict[str, float | None]:
    """Return the nodes that are about to be taken away, and until when (Unix time; None if nobody said).

    Stands on `ray._private.state.state.get_draining_nodes`, in milliseconds, 0 for no deadline; Ray Train's own watcher
    reads it, too. A node is in it after `ray drain-node`, after SIGTERM to `ray start --block`, and when an autoscaler
    (KubeRay's too) gives it back.
    """
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()  # noqa: SLF001
    return {node: (deadline / 1000 if deadline else None) for node, deadline in found.items()}


def node_types() -> list[NodeType]:
    """Return what an autoscaler can add to the cluster; [] where it does not say, as Ray's own does not.

    Stands on `ray._private.state.state.get_cluster_config`, which an autoscaler may write into the GCS.
    """
    config: Any = ray._private.state.state.get_cluster_config()  # noqa: SLF001
    groups = config.node_group_configs if config else []
    return [NodeType({name: float(n) for name, n in g.resources.items()}, int(g.max_count), g.name) for g in groups]


@dataclass(frozen=True, slots=True)
class Autoscaler:
    """What an autoscaler says: node types whose launches failed, when last (Unix time), and what it cannot place."""

    failed: Mapping[str, float]
    infeasible: tuple[str, ...]  # each names a placement group


_said: dict[str, Autoscaler | None] = {}  # by the address of the cluster, what its autoscaler said last


def autoscaler() -> Autoscaler | None:
    """Return what the cluster's autoscaler says; None where there is none that could add a node.

    A GCS that does not answer in time leaves what was said before; where nothing was, it is asked again, and after
    SLOW_S that raises ResourceError: nobody knows whether there is an autoscaler.

    Stands on `GcsClient.get_cluster_status`, which holds what autoscaler v2 last reported. Nodes that an autoscaler
    manages say which instance they are; a Ray that was started by hand has an autoscaler that only looks on.
    """
    worker: Any = ray._private.worker.global_worker  # noqa: SLF001
    client, deadline = worker.gcs_client, time.monotonic() + SLOW_S
    while True:
        try:
            _said[client.address] = _autoscaler_in(client.get_cluster_status(timeout_s=STATUS_S))
        except ray.exceptions.RayError as error:
            if client.address not in _said and time.monotonic() > deadline:
                raise ResourceError(
                    f"the head at {client.address} does not say what its cluster holds: {error}"
                ) from error
        if client.address in _said:
            return _said[client.address]
        time.sleep(PAUSE_S)


def _autoscaler_in(status: bytes) -> Autoscaler | None:
    message: Any = autoscaler_pb2.GetClusterStatusReply  # type: ignore[attr-defined] # made at import by protobuf
    reply = message.FromString(status)
    state = reply.autoscaling_state
    managed = any(node.instance_id for node in reply.cluster_resource_state.node_states)
    if not managed or not state.autoscaler_state_version:
        return None
    failed: dict[str, float] = {}
    for launch in state.failed_instance_requests:
        failed[launch.ray_node_type_name] = max(failed.get(launch.ray_node_type_name, 0.0), float(launch.failed_ts))
    return Autoscaler(failed, tuple(str(each.details) for each in state.infeasible_gang_resource_requests))


def actor_id(actor: Any) -> str:
    """Return the id of an actor, in hex, as the actor's own runtime context has it.

    Stands on `ActorHandle._actor_id`.
    """
    return str(actor._actor_id.hex())  # noqa: SLF001


def groups_of(actor: Any) -> list[PlacementGroup]:
    """Return the placement groups that an actor has asked for and that are not removed."""
    return [_group(entry) for entry in _standing_groups() if entry.creator_actor_id.hex() == actor_id(actor)]


def orphaned_groups() -> list[PlacementGroup]:
    """Return those that dead actors of this job have asked for: what one sent last may arrive when it is counted dead.

    Stands on `ray._private.state.actors`, too.
    """
    job = ray.get_runtime_context().get_job_id()
    asked = [entry for entry in _standing_groups() if entry.creator_job_id.hex() == job]
    if not asked:
        return []
    dead = ray._private.state.actors(job_id=ray.JobID(bytes.fromhex(job)), actor_state_name="DEAD")  # noqa: SLF001
    return [_group(entry) for entry in asked if entry.creator_actor_id.hex() in dead]


def _standing_groups() -> list[Any]:
    """Return the GCS's entries of groups that are not removed; it tells their creators, `placement_group_table` not."""
    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()  # noqa: SLF001
    message: Any = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined] # made at import by protobuf
    return [entry for entry in map(message.FromString, table) if entry.state != message.REMOVED]


def _group(entry: Any) -> PlacementGroup:
    return PlacementGroup(ray.PlacementGroupID(entry.placement_group_id))


def enable_token_auth() -> None:
    """Turn on token authentication where a token is found: `ray start` does so, a client of an address does not.

    Stands on `ray._private.authentication`.
    """
    token.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def check_token(address: str) -> None:
    """Raise ConnectionError where the Ray at HOST:PORT does not take this process's token.

    Ray itself would try for long and not say why. Stands on `GcsClient`.
    """
    try:
        GcsClient(address=address).get_all_node_info(timeout=STATUS_S)
    except Exception as error:  # Ray raises bare ones; what else is wrong connecting to it tells
        if "token" in str(error).lower():
            raise ConnectionError(
                "it lets in only who has the cluster's token; put it into ~/.ray/auth_token, or name its file in "
                "RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"
            ) from error


def secure_new_cluster() -> None:
    """Have tokens checked as a Ray that `ray.init` starts does, and make one where the user has none.

    Ray would make a file that every user of the machine can read. Its exporters of numbers, which ask for no token,
    stay off unless the user has set them on. Stands on `ray._private.authentication`.
    """
    for name, value in NO_EXPORTERS.items():
        os.environ.setdefault(name, value)
    logging.getLogger(token.__name__).setLevel(logging.ERROR)
    if token.enable_token_auth_by_default() and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        path = Path.home() / ".ray" / "auth_token"
        with contextlib.suppress(OSError):  # Ray tells what is wrong with it
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # one that is there stays as it is; an empty one is filled by Ray
    token.ensure_token_if_auth_enabled()


@contextlib.contextmanager
def deaths_untold() -> Iterator[None]:
    """Keep Ray from printing on standard output, in many words, that a process died: the run tells what came of it.

    Stands on `ray._private.worker.print_to_stdstream`, which the thread that hears of errors calls by that name.
    """
    worker: Any = ray._private.worker  # noqa: SLF001
    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


@contextlib.contextmanager
def without_monitors() -> Iterator[None]:
    """Have `ray.init` start no autoscaler, reader of logs or server of APIs: a Ray of one node to itself needs none.

    Each is a process that imports Ray while the workers do, and the last one is waited for; without its dashboard all
    that it does is to tell Ray's makers of the use. Stands on `ray._private.parameter.RayParams` and
    `ray._private.services.start_api_server`, which `ray.init` calls by these names.
    """
    parameter: Any = ray._private.parameter  # noqa: SLF001
    services: Any = ray._private.services  # noqa: SLF001
    before = parameter.RayParams, services.start_api_server
    parameter.RayParams = partial(before[0], no_monitor=True, include_log_monitor=False)
    services.start_api_server = lambda *_, **__: ("", None)  # no address, no process
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server = before


@contextlib.contextmanager
def patient_start() -> Iterator[None]:
    """Start nodes that have no dashboard in this process as on a busy machine, where Ray would give up.

    A node waits for its raylet for NODE_S in place of half a minute, as long as that lives, and the raylet not for the
    agent of the dashboard, which may take longer than its 15 s: `no_agent` stands in for that. Stands on
    `ray._private.services.get_node`, which a node asks by this name until it is there, on `start_raylet`, and on
    `_build_python_executable_command_memory_profileable`, of which the agent's command is made.
    """
    services: Any = ray._private.services  # noqa: SLF001
    raylets: list[Any] = []
    start = services.start_raylet

    def started(*arguments: Any, **named: Any) -> Any:
        raylets.append(start(*arguments, **named))
        return raylets[-1]

    build = "_build_python_executable_command_memory_profileable"
    ours = {"get_node": _patient(services.get_node, raylets), "start_raylet": started}
    ours[build] = _without_agent(getattr(services, build))
    before = {name: getattr(services, name) for name in ours}
    vars(services).update(ours)
    try:
        yield
    finally:
        vars(services).update(before)


def _patient(get: Callable[..., Any], raylets: list[Any]) -> Callable[..., Any]:
    def found(*arguments: Any) -> Any:
        deadline = time.monotonic() + NODE_S
        while True:
            try:
                return get(*arguments)
            except RuntimeError:
                if time.monotonic() > deadline or any(raylet.process.poll() is not None for raylet in raylets):
                    raise
                time.sleep(START_LOOK_S)

    return found


def _without_agent(build: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def command(component: str, *rest: Any, **named: Any) -> list[str]:
        if component == ray_constants.PROCESS_TYPE_DASHBOARD_AGENT:
            return [sys.executable, "-S", "-E", no_agent.__file__]
        return build(component, *rest, **named)

    return command
