"""Nodes that seem to be machines: what Ray's autoscaler starts and ends on this machine, for `local_autoscaling`.

The autoscaler's own process loads this. Its launches fail for pools that are said to have no capacity, as a cloud's do.
"""

from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

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
