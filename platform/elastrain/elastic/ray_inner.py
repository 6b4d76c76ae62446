"""What the project uses of Ray's inner interfaces, apart from Ray Train's, each in one small function.

Ray Train's are in `trainer.py`: importing them takes two seconds, and only a cell's own process needs them. Nothing
else in the package reaches into Ray. Both are made for one minor version of Ray; `tests/elastic/test_ray_inner.py`
says what has changed when the next one differs.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray._private.parameter
import ray._private.state
import ray._private.worker
from ray._private.authentication import authentication_token_setup as token
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup

from elastrain.cluster.environment import NO_EXPORTERS

COORDINATOR = "AutoscalingCoordinator"  # the name and the namespace of Ray's detached actor
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
    """Return what an autoscaler can add to the cluster; [] where there is none.

    Stands on `ray._private.state.state.get_cluster_config`, which an autoscaler writes into the GCS.
    """
    config: Any = ray._private.state.state.get_cluster_config()  # noqa: SLF001
    groups = config.node_group_configs if config else []
    return [NodeType({name: float(n) for name, n in g.resources.items()}, int(g.max_count), g.name) for g in groups]


def actor_id(actor: Any) -> str:
    """Return the id of an actor, in hex, as the actor's own runtime context has it.

    Stands on `ActorHandle._actor_id`.
    """
    return str(actor._actor_id.hex())  # noqa: SLF001


def groups_of(actor: Any) -> list[PlacementGroup]:
    """Return the placement groups that an actor has asked for and that are not removed.

    Stands on the GCS's table of them and its `creator_actor_id`, which the public `placement_group_table` leaves out.
    """
    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()  # noqa: SLF001
    message: Any = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined] # made at import by protobuf
    groups = [message.FromString(entry) for entry in table]
    return [
        PlacementGroup(ray.PlacementGroupID(group.placement_group_id))
        for group in groups
        if group.creator_actor_id.hex() == actor_id(actor) and group.state != message.REMOVED
    ]


def cancel_demand(run_id: str) -> None:
    """Take back what a Ray Train run has asked of the autoscaler; it would hold its nodes for three minutes more.

    Stands on the detached actor AutoscalingCoordinator, its `cancel_request`, and the name `train-<run id>` under which
    `ScalingPolicy` registers. Nothing is waited for; without a coordinator there is nothing to cancel.
    """
    try:
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
    except ValueError:
        return
    coordinator.cancel_request.remote(requester_id=f"train-{run_id}")


def enable_token_auth() -> None:
    """Turn on token authentication where a token is found: `ray start` does so, a client of an address does not.

    Stands on `ray._private.authentication`.
    """
    token.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


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
    """Have `ray.init` start no autoscaler and no reader of logs: a Ray of one node to itself needs neither.

    Each is a process that imports Ray while the workers do. Stands on `ray._private.parameter.RayParams`, which
    `ray.init` calls by that name.
    """
    parameter: Any = ray._private.parameter  # noqa: SLF001
    before = parameter.RayParams
    parameter.RayParams = partial(before, no_monitor=True, include_log_monitor=False)
    try:
        yield
    finally:
        parameter.RayParams = before
