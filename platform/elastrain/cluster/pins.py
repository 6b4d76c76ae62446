"""What keeps nodes of a running Ray alive, as Ray knows it: its nodes, and who holds something of them.

Stands on `GcsClient.get_cluster_status`, Ray's inner interface, and on the state API, which a dashboard serves.
"""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray._private.authentication import authentication_token_setup as token
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # type: ignore[attr-defined] # compiled
from ray.core.generated import autoscaler_pb2, common_pb2
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
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def stored(self) -> int:
        """Bytes of the object store that cannot be given up."""
        name = "object_store_memory"
        return int(self.total.get(name, 0.0) - self.free.get(name, 0.0))


@dataclass(frozen=True, slots=True)
class Where:
    """What a node's label has to be: one of `values`, or `among` them not."""

    label: str
    among: bool
    values: frozenset[str]

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Say whether a node with these labels will do."""
        return (labels.get(self.label) in self.values) == self.among


@dataclass(frozen=True, slots=True)
class Bundle:
    """Resources of one node that somebody wants; `where` holds selectors, of which one has to hold."""

    resources: dict[str, float]
    where: tuple[tuple[Where, ...], ...] = ()
    apart: bool = False  # not on a node with another bundle of the same pin

    def may_be_on(self, node: Node) -> bool:
        """Say whether the labels of a node are such as are wanted."""
        return not self.where or any(all(each.holds(node.labels) for each in option) for option in self.where)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """Something that keeps a node: `actor`, `task`, `placement group`, `object`, `request` or `pending`, in words.

    `node` is None where Ray does not tell: of an object, of which it tells the size in bytes; of a request for
    resources, and of what is pending (a task, an actor or a placement group that waits), whose bundles any node may
    meet that has so much: in all, or free. `whole`: all bundles at once or none, as of a placement group.
    """

    kind: str
    what: str
    node: str | None = None
    size: int = 0
    bundles: tuple[Bundle, ...] = ()
    whole: bool = False


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
        wanted = [*_requests(resources), *_pending(resources)]
        return list(_nodes(resources)), [*wanted, *_holders(client), *_groups(client), *_objects(client)]
    except RayStateApiException as error:
        raise ResourceError(f"{found}: its dashboard does not answer: {str(error)[:300]}") from error
    except Exception as error:  # Ray's and its transports' own, which have no root in common
        said = str(error).strip().partition("\n")[0].partition(". ")[0][:200] or type(error).__name__
        raise ResourceError(
            f"{found} does not let us in ({said}); put the cluster's token into ~/.ray/auth_token, or name its file in "
            "RAY_AUTH_TOKEN_PATH; with TLS, set RAY_USE_TLS and RAY_TLS_* as its nodes do"
        ) from error


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
        raise ResourceError(f"no Ray answers at {found}: {error}; start it there, or check --address") from error
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
                labels=dict(node.labels),
            )


def _requests(state: Any) -> Iterator[Pin]:
    for constraint in state.cluster_resource_constraints:
        for each in constraint.resource_requests:
            bundle = _bundle(each.request)
            yield Pin(kind="request", what=_in_words(bundle, each.count), bundles=(bundle,) * each.count)


def _pending(state: Any) -> Iterator[Pin]:
    """What waits for room keeps a node that has room for it, though nothing is there yet."""
    for each in state.pending_resource_requests:
        bundle = _bundle(each.request)
        what = f"tasks or actors, {_in_words(bundle, each.count)}"
        yield Pin(kind="pending", what=what, bundles=(bundle,) * each.count)
    for gang in state.pending_gang_resource_requests:
        # The first one is what is asked for, as Ray's autoscaler reads it; others are what would do as well.
        wanted = gang.bundle_selectors[0].resource_requests if gang.bundle_selectors else gang.requests
        bundles = [_bundle(request) for request in wanted]
        if any(place.HasField("affinity") for request in wanted for place in request.placement_constraints):
            bundles = [_together(bundles)]
        counts = [(bundle, bundles.count(bundle)) for i, bundle in enumerate(bundles) if bundle not in bundles[:i]]
        words = " and ".join(_in_words(bundle, count) for bundle, count in counts)
        name = gang.details.partition(":")[0][:12]
        what = f"placement group {name}, {words}"
        yield Pin(kind="pending", what=what, bundles=tuple(bundles), whole=True)


def _bundle(request: Any) -> Bundle:
    within = common_pb2.LabelSelectorOperator.LABEL_OPERATOR_IN  # type: ignore[attr-defined] # made at import
    where = tuple(
        tuple(
            Where(each.label_key, each.operator == within, frozenset(each.label_values))
            for each in selector.label_constraints
        )
        for selector in request.label_selectors
    )
    apart = any(place.HasField("anti_affinity") for place in request.placement_constraints)
    return Bundle(dict(request.resources_bundle), where, apart)


def _together(bundles: list[Bundle]) -> Bundle:
    """Return bundles that have to be on one node as one."""
    sums: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.resources.items():
            sums[name] = sums.get(name, 0.0) + amount
    return Bundle(sums, bundles[0].where)


def _in_words(bundle: Bundle, count: int) -> str:
    resources = ", ".join(f"{name} {amount:g}" for name, amount in bundle.resources.items())
    return f"{count} x {resources}"


def _rows(client: StateApiClient, kind: StateResource, *filters: tuple[str, str, str]) -> list[dict[str, Any]]:
    options = ListApiOptions(limit=MOST, timeout=int(ANSWER_S), detail=True, filters=list(filters))
    rows: Any = client.list(kind, options=options, raise_on_missing_output=False)
    return [row if isinstance(row, dict) else vars(row) for row in rows]


def _holders(client: StateApiClient) -> Iterator[Pin]:
    for row in _rows(client, StateResource.ACTORS, ("state", "!=", "DEAD")):
        name = f" {row['name']}" if row.get("name") else ""
        detached = ", detached" if row.get("is_detached") else ""
        kind = row["class_name"].rpartition(".")[2]
        what = f"{kind}{name} (process {row.get('pid')}, job {row.get('job_id')}{detached})"
        yield Pin(kind="actor", what=what, node=row.get("node_id"))
    for row in _rows(client, StateResource.TASKS, ("state", "=", "RUNNING"), ("type", "=", "NORMAL_TASK")):
        what = f"{row['name']} (process {row.get('worker_pid')}, job {row.get('job_id')})"
        yield Pin(kind="task", what=what, node=row.get("node_id"))


def _groups(client: StateApiClient) -> Iterator[Pin]:
    for row in _rows(client, StateResource.PLACEMENT_GROUPS, ("state", "!=", "REMOVED")):
        name = f" {row['name']}" if row.get("name") else ""
        what = f"{row['placement_group_id'][:12]}{name} (job {row.get('creator_job_id')})"
        for node in sorted({bundle["node_id"] for bundle in row.get("bundles") or () if bundle["node_id"]}):
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
