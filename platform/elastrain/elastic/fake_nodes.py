"""Nodes that seem to be machines: what Ray's autoscaler starts and ends on this machine, for `local_autoscaling`.

The autoscaler's own process loads this. Its launches fail for pools that are said to have no capacity, as a cloud's do.
"""

from functools import partial
from pathlib import Path
from typing import Any

import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

from elastrain.elastic.ray_inner import patient_start

NO_CAPACITY = "no-capacity"  # a file: the names of the pools that cannot launch now, one a line
ADDRESS = "ray_current_cluster"  # a file of Ray's: where the head is


class FakeNodes(FakeMultiNodeProvider):
    """A provider of nodes that are raylets of this machine; `folder` in its configuration is the head's."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any
    ) -> None:
        """Start so many nodes; raises NodeLaunchException for a pool without capacity."""
        folder, pool = Path(self.provider_config["folder"]), tags[TAG_RAY_USER_NODE_TYPE]
        without = folder / NO_CAPACITY
        if without.exists() and pool in without.read_text().split():
            raise NodeLaunchException("InsufficientInstanceCapacity", f"no capacity for {pool} now", None)
        self._gcs_address = (folder / ADDRESS).read_text().strip()
        start: Any = super().create_node_with_resources_and_labels
        start(node_config, tags, count, resources, labels)

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        """Start one node with a folder of its own, as machines have: nodes that share one unpack code over each other.

        Ray's provider calls `ray._private.parameter.RayParams` by that name.
        """
        parameter: Any = ray._private.parameter  # noqa: SLF001
        with self.lock, patient_start():
            before = parameter.RayParams
            folder = Path(self.provider_config["folder"]) / f"n{self._next_node_id + 1}"
            parameter.RayParams = partial(before, temp_dir=str(folder), include_log_monitor=False)
            try:
                start: Any = super()._create_node_with_resources_and_labels
                start(*arguments)
            finally:
                parameter.RayParams = before
