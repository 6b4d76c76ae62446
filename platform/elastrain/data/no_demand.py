"""Ray Data on the cluster as it is: an execution of ours asks Ray's autoscaler for nothing, and reports to nobody.

Ray Data would register with Ray's coordinator of demand: a detached actor, which keeps the node on which it was made
for as long as the cluster lives, and every 20 s puts what it was told in the place of what users have asked for by
`ray.autoscaler.sdk.request_resources`. What it is told outlives a killed process by three minutes. Reading is no reason
for a node anyway: it takes the CPUs that are free beside the workers, or none. A task that no node can run is a demand
as it is, which ends with the process that sent it.

Its numbers would go to another detached actor, which keeps them for Ray's dashboard: 1.2 s of a core at each start.

Stands on `create_cluster_autoscaler` and `_StatsManager`, which Ray Data's executor uses by these names.
"""

from typing import Any, ClassVar

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
    _executor._StatsManager = _Untold  # noqa: SLF001


_creates = _executor.create_cluster_autoscaler


def _create(topology: Any, resource_manager: Any, data_context: DataContext, **named: Any) -> ClusterAutoscaler:
    if data_context.get_config(ASKS_NOTHING):
        return AsItIs()
    made: ClusterAutoscaler = _creates(topology, resource_manager, data_context, **named)
    return made


class _Untold(_executor._StatsManager):  # type: ignore[misc] # noqa: SLF001 -- of inner types
    """Tells what Ray Data tells, less what is ours."""

    _ours: ClassVar[set[str]] = set()

    @classmethod
    def register_dataset_to_stats_actor(
        cls, dataset_tag: str, operator_tags: Any, topology: Any, data_context: DataContext
    ) -> None:
        """Tell of an execution that is not ours."""
        if data_context.get_config(ASKS_NOTHING):
            cls._ours.add(dataset_tag)
        else:
            super().register_dataset_to_stats_actor(dataset_tag, operator_tags, topology, data_context)

    @classmethod
    def update_execution_metrics(cls, dataset_tag: str, *numbers: Any) -> None:
        """Tell how one goes that is not ours."""
        if dataset_tag not in cls._ours:
            super().update_execution_metrics(dataset_tag, *numbers)
