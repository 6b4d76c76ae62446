"""What keeps nodes of a running Ray alive, as Ray knows it: its nodes, and who holds something of them.

Stands on `GcsClient.get_cluster_status`, Ray's inner interface, and on the state API, which a dashboard serves.
"""

import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ray._private.authentication import authentication_token_setup as token
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # type: ignore[attr-defined] # compiled
from ray.core.generated import autoscaler_pb2
from ray.util.state import StateApiClient
from ray.util.state.common import ListApiOptions, StateResource
from ray.util.state.exception import RayStateApiException

from elastrain.errors import ResourceError

CONNECT_S, ANSWER_S = 5.0, 30.0
MOST = 10_000  # rows of one kind
HEAD = "node:__internal_head__"  # a resource of the head
STORED_BYTES = 100 << 10  # smaller objects live in a process, not in a node's store
QUIET = (token.__name__, "ray.dashboard.modules.dashboard_sdk", "ray.util.state.api")


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node that is alive: its pool ("" if it has none), how long nobody used it, what is free and what it has."""

    id: str
    pool: str
    head: bool
    idle_s: float
    free: dict[str, float]
    total: dict[str, float]

    @property
    def stored(self) -> int:
        """Bytes of the object store that cannot be given up."""
        name = "object_store_memory"
        return int(self.total.get(name, 0.0) - self.free.get(name, 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """Something that keeps a node: `actor`, `task`, `placement group`, `object` or `request`, in words.

    `node` is None where Ray does not tell: of an object, of which it tells the size in bytes; of a request for
    resources, each of whose bundles any node may meet.
    """

    kind: str
    what: str
    node: str | None = None
    size: int = 0
    bundles: tuple[dict[str, float], ...] = ()


def look(address: str | None) -> tuple[list[Node], list[Pin]]:
    """Return nodes and pins of the Ray at `address`, else at `RAY_ADDRESS`, else of the one on this machine.

    Raises ResourceError where none answers, or where it has no dashboard.
    """
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    token.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    found = _found(address)
    try:
        message: Any = autoscaler_pb2.GetClusterStatusReply  # type: ignore[attr-defined] # made at import by protobuf
        state = message.FromString(GcsClient(address=found).get_cluster_status(timeout_s=ANSWER_S))
        client = StateApiClient(address=found)
        resources = state.cluster_resource_state
        return list(_nodes(resources)), [*_requests(resources), *_holders(client), *_groups(client), *_objects(client)]
    except RayStateApiException as error:
        raise ResourceError(f"{found}: its dashboard does not answer: {str(error)[:300]}") from error
    except Exception as error:  # Ray's and its transports' own, which have no root in common
        raise ResourceError(f"{found} does not answer: {str(error)[:300] or type(error).__name__}") from error


def _found(address: str | None) -> str:
    asked = address or os.environ.get("RAY_ADDRESS") or "auto"
    found = canonicalize_bootstrap_address(asked) if asked == "auto" else asked
    if not found:
        raise ResourceError("there is no Ray on this machine; name one: --address HOST:PORT")
    host, _, port = found.rpartition(":")
    if not host or not port.isdigit() or "//" in found:
        raise ResourceError(f"{found}: expected HOST:PORT of the head itself, or auto on one of its nodes")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ResourceError(f"no Ray answers at {found}: {error}") from error
    return found


def _nodes(state: Any) -> Iterator[Node]:
    dead = autoscaler_pb2.NodeStatus.DEAD  # type: ignore[attr-defined] # made at import by protobuf
    for node in state.node_states:
        if node.status != dead:
            total = dict(node.total_resources)
            yield Node(
                id=node.node_id.hex(),
                pool=node.ray_node_type_name,
                head=HEAD in total,
                idle_s=node.idle_duration_ms / 1000,
                free=dict(node.available_resources),
                total=total,
            )


def _requests(state: Any) -> Iterator[Pin]:
    for constraint in state.cluster_resource_constraints:
        for each in constraint.resource_requests:
            bundle = dict(each.request.resources_bundle)
            words = ", ".join(f"{name} {amount:g}" for name, amount in bundle.items())
            yield Pin(kind="request", what=f"{each.count} x {words}", bundles=(bundle,) * each.count)


def _rows(client: StateApiClient, kind: StateResource, *filters: tuple[str, str, str]) -> list[dict[str, Any]]:
    options = ListApiOptions(limit=MOST, timeout=int(ANSWER_S), detail=True, filters=list(filters))
    rows: Any = client.list(kind, options=options, raise_on_missing_output=False)
    return [row if isinstance(row, dict) else vars(row) for row in rows]


def _holders(client: StateApiClient) -> Iterator[Pin]:
    for row in _rows(client, StateResource.ACTORS, ("state", "=", "ALIVE")):
        name = f" {row['name']}" if row.get("name") else ""
        detached = ", detached" if row.get("is_detached") else ""
        kind = row["class_name"].rpartition(".")[2]
        what = f"{kind}{name} (process {row.get('pid')}, job {row.get('job_id')}{detached})"
        yield Pin(kind="actor", what=what, node=row.get("node_id"))
    for row in _rows(client, StateResource.TASKS, ("state", "=", "RUNNING"), ("type", "=", "NORMAL_TASK")):
        what = f"{row['name']} (process {row.get('worker_pid')}, job {row.get('job_id')})"
        yield Pin(kind="task", what=what, node=row.get("node_id"))


def _groups(client: StateApiClient) -> Iterator[Pin]:
    for row in _rows(client, StateResource.PLACEMENT_GROUPS, ("state", "=", "CREATED")):
        name = f" {row['name']}" if row.get("name") else ""
        what = f"{row['placement_group_id'][:12]}{name} (job {row.get('creator_job_id')})"
        for node in sorted({bundle["node_id"] for bundle in row.get("bundles") or ()}):
            yield Pin(kind="placement group", what=what, node=node)


def _objects(client: StateApiClient) -> Iterator[Pin]:
    seen = set()
    for row in _rows(client, StateResource.OBJECTS):
        size = int(row.get("object_size") or 0)
        if size < STORED_BYTES or row["object_id"] in seen:
            continue
        seen.add(row["object_id"])
        place = row.get("call_site") or "disabled"
        where = "" if place == "disabled" else f", made at {place}"
        holder = f"{str(row.get('type')).lower()} {row.get('pid')} at {row.get('ip')}"
        yield Pin(kind="object", what=f"{row['object_id']} held by {holder}{where}", size=size)
