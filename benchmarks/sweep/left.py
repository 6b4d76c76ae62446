"""What is left on a Ray after something has ended: placement groups, actors, and CPUs that are held."""

import time

import ray
from ray.util import placement_group_table

SETTLES_S = 30.0
ITS_OWN = {"_AutoscalingCoordinatorActor"}  # Ray starts it with the first cell; there is one for good


def left_behind() -> int:
    """Count placement groups, living actors but Ray's own, and held CPUs, once that is 0 or it is late.

    Ray takes a moment to take note of what has gone. Stands on `ray._private.state.actors`.
    """
    deadline = time.monotonic() + SETTLES_S
    while (left := _count()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _count() -> int:
    groups = sum(group["state"] != "REMOVED" for group in placement_group_table().values())
    living = [actor for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]  # noqa: SLF001
    actors = sum(actor["ActorClassName"] not in ITS_OWN for actor in living)
    held = ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0)
    return int(groups + actors + round(held))
