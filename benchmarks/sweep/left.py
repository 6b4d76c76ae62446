"""What is left on a Ray after something has ended: placement groups, actors, and CPUs that are held."""

import time

import ray
from ray.util import placement_group_table

SETTLES_S = 30.0


def left_behind() -> int:
    """Return how many placement groups, living actors and held CPUs there are, once they are 0 or time is up.

    Ray takes a moment to take note of what has gone. Stands on `ray._private.state.actors`.
    """
    deadline = time.monotonic() + SETTLES_S
    while (left := _count()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _count() -> int:
    groups = sum(group["state"] != "REMOVED" for group in placement_group_table().values())
    actors = sum(actor["State"] != "DEAD" for actor in ray._private.state.actors().values())  # noqa: SLF001
    held = ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0)
    return groups + actors + round(held)
