"""A cell: one Ray Train worker group of fixed size on one node, run from an actor of its own.

The actor is Ray Train's controller too: what it asks for, workers and their placement group, goes when it is ended. A
worker that dies or raises is replaced in place while the others go on. One whose function returns has left, and its
CPUs stay idle until the last one has: only whole cells give room back.
"""

import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastrain.elastic.ray_inner import actor_id, groups_of

KILLED_S = 15.0
PENDING_S = 30.0  # how long a cell's placement group may pend: what was free is held by others

Work = Callable[[dict[str, Any]], None]

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon a dead or finished worker is seen; 2 s by default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that would only tell a train function of ours nothing
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # tasks find their files where the user left them
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train's controller does it, and sets this for its own process
}


def work_of_cell(config: dict[str, Any]) -> None:
    """What each worker does unless a cell is given something else; that it cannot be loaded at all ends the run."""
    try:
        from elastrain.elastic.worker import work  # noqa: PLC0415 -- torch, in workers only
    except Exception:  # noqa: BLE001 -- another process would meet the same
        ray.get(config["config"].host.fail.remote("", "ElastrainError", traceback.format_exc()))
        return
    work(config["config"])


class Cell:
    """Runs one `fit()`; returns when its workers have returned."""

    def __init__(self) -> None:
        os.environ.update(SETTINGS)
        import elastrain.elastic.trainer  # noqa: F401, PLC0415 -- 2 s that pass while the other actors start

        logging.getLogger("ray.train").setLevel(logging.ERROR)

    def run(
        self,
        config: Any,
        *,
        name: str,
        size: int,
        resources: dict[str, float],
        node: str,
        work: Work = work_of_cell,
    ) -> str:
        """Start `size` workers of `resources` each and wait for them; return "" or, if it broke, what Ray said.

        They all are on the node with the id `node`.
        """
        from ray.train import RunConfig  # noqa: PLC0415 -- 2 s, in this process only

        from elastrain.elastic.trainer import CellTrainer, on_one_node  # noqa: PLC0415

        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(PENDING_S)
        scratch = _scratch(ray.get_runtime_context().get_actor_id() or "")
        scaling = on_one_node(node, size=size, resources=resources, gpu="GPU" in resources)
        trainer = CellTrainer(work, {"config": config}, run=RunConfig(name=name, storage_path=scratch), scaling=scaling)
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 -- Ray's own errors: the run decides what to do about them
            return str(error)[:2000] or type(error).__name__
        return ""


def start_cell() -> Any:
    """Start a cell's actor beside the driver; its `run` starts the workers."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote  # its types lack this strategy
    return remote(num_cpus=0, scheduling_strategy=here)(Cell).remote()


def end_cell(cell: Any, ended: Any) -> None:
    """Kill a cell's actor and its workers and free what they held; `ended` is what its `run` will return."""
    ray.kill(cell)
    ray.wait([ended], timeout=KILLED_S)  # once this has failed, the actor asks for nothing more
    free_cell(cell)


def free_cell(cell: Any) -> None:
    """Free what a killed cell held: its placement group, which is also its demand, and its folder on this node.

    Ray frees the placement group of a dead actor only when the whole job ends, and a Python driver may do many runs.
    """
    for group in groups_of(cell):
        remove_placement_group(group)
    shutil.rmtree(_scratch(actor_id(cell)), ignore_errors=True)


def _scratch(cell: str) -> str:
    """Return the folder that Ray Train wants to have; nothing of ours is in it."""
    return str(Path(tempfile.gettempdir()) / f"elastrain-cell-{cell}")
