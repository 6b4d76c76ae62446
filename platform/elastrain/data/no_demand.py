"""Ray Data on the cluster as it is: an execution of ours asks Ray's autoscaler for nothing.

Ray Data would register with Ray's coordinator of demand: a detached actor, which keeps the node on which it was made
for as long as the cluster lives, and every 20 s puts what it was told in the place of what users have asked for by
`ray.autoscaler.sdk.request_resources`. What it is told outlives a killed process by three minutes. Reading is no reason
for a node anyway: it takes the CPUs that are free beside the workers, or none. A task that no node can run is a demand
as it is, which ends with the process that sent it.

Stands on `create_cluster_autoscaler`, which Ray Data's executor calls by that name, and on what it makes.
"""

from typing import Any

import ray
from ray.data import DataContext, ExecutionResources
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor

ASKS_NOTHING = "elastrain.asks_nothing"
_executor: Any = streaming_executor


class AsItIs(ClusterAutoscaler):
    """The whole cluster, and nothing beside it."""

    def try_trigger_scaling(self) -> None:
        """Ask for nothing."""

    def on_executor_shutdown(self) -> None:
        """Take back nothing."""

    def get_total_resources(self) -> ExecutionResources:
        """Return what the nodes that are there have."""
        total: ExecutionResources = ExecutionResources.from_resource_dict(ray.cluster_resources())
        return total


def ask_nothing(context: DataContext) -> None:
    """Have executions that are made with this context ask for nothing; those of others in the process do as ever."""
    context.set_config(ASKS_NOTHING, "yes")
    _executor.create_cluster_autoscaler = _create


_creates = _executor.create_cluster_autoscaler


def _create(topology: Any, resource_manager: Any, data_context: DataContext, **named: Any) -> ClusterAutoscaler:
    if data_context.get_config(ASKS_NOTHING):
        return AsItIs()
    made: ClusterAutoscaler = _creates(topology, resource_manager, data_context, **named)
    return made
