"""Which nodes Ray's autoscaler would start: its own scheduler, asked without a cluster. Ray's inner interface.

`tests/cluster/test_forecast.py` says what has changed when a new Ray breaks it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated import autoscaler_pb2, common_pb2

from elastrain.spec.accelerators import ACCELERATORS
from elastrain.spec.cluster import KIND_LABEL, Pool


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """So many workers of so much each, all on one node; `plain` if none with an accelerator will do."""

    size: int
    resources: Mapping[str, float]
    plain: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Launches:
    """How many nodes of each pool are started, and how many cells find no place."""

    nodes: dict[str, int]
    num_infeasible: int


def launches(pools: Sequence[Pool], cells: Sequence[Cell]) -> Launches:
    """Return what Ray would start from nothing for `cells`, those always up included."""
    kinds = {
        pool.name: NodeTypeConfig(
            name=pool.name,
            min_worker_nodes=pool.least,
            max_worker_nodes=pool.most,
            idle_timeout_s=pool.idle_timeout_s,
            priority=pool.priority,
            resources=dict(pool.resources()),
            labels=pool.node_labels(),
        )
        for pool in pools
    }
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=kinds,
        max_num_nodes=sum(pool.most for pool in pools),
        gang_resource_requests=[_gang(cell, f"cell-{at}") for at, cell in enumerate(cells)],
    )
    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)  # what it decides is told in words of ours
    reply = ResourceDemandScheduler(None).schedule(request)
    return Launches(
        nodes={each.instance_type: each.count for each in reply.to_launch},
        num_infeasible=len(reply.infeasible_gang_resource_requests),
    )


def _gang(cell: Cell, name: str) -> Any:
    """Return a placement group that is packed on one node, as Ray describes it to its autoscaler."""
    messages: Any = autoscaler_pb2  # made at run time, so unknown to types
    together = (ResourceRequestUtil.PlacementConstraintType.AFFINITY, "_PG", name)
    operators: Any = common_pb2
    without = [(KIND_LABEL, operators.LABEL_OPERATOR_NOT_IN, list(ACCELERATORS))]
    worker = ResourceRequestUtil.make(dict(cell.resources), [together], [without] if cell.plain else None)
    return messages.GangResourceRequest(requests=[worker] * cell.size)
