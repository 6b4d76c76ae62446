"""A cell: one Ray Train worker group of fixed size, run from an actor of its own.

The actor is Ray Train's controller too: what it asks for, workers and their placement group, goes when it is ended.
"""

import logging
import os
import tempfile
from typing import Any

import ray
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

KILLED_S = 15.0

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon a dead or finished worker is seen; 2 s by default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that would only tell a train function of ours nothing
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # tasks find their files where the user left them
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train's controller does it, and sets this for its own process
}


class Cell:
    """Runs one `fit()`; returns when its workers have returned."""

    def __init__(self) -> None:
        os.environ.update(SETTINGS)
        import elastrain.elastic.trainer  # noqa: F401, PLC0415 -- 2 s that pass while the other actors start

        logging.getLogger("ray.train").setLevel(logging.ERROR)

    def run(self, config: Any, *, name: str, size: int, cpus: float, gpus: float) -> str:
        """Start `size` workers and wait for them; return "" or, if the group broke, what Ray said."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415 -- 2 s, in this process only
        from ray.train.backend import BackendConfig  # noqa: PLC0415

        from elastrain.elastic.trainer import CellTrainer  # noqa: PLC0415

        resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        with tempfile.TemporaryDirectory(prefix="elastrain-cell-") as scratch:
            trainer = CellTrainer(
                _work,
                train_loop_config={"config": config},
                backend_config=BackendConfig(),
                scaling_config=ScalingConfig(num_workers=size, resources_per_worker=resources, use_gpu=bool(gpus)),
                run_config=RunConfig(name=name, storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
            )
            try:
                trainer.fit()
            except Exception as error:  # noqa: BLE001 -- Ray's own errors: the run decides what to do about them
                return str(error)[:2000] or type(error).__name__
        return ""


def _work(config: dict[str, Any]) -> None:
    from elastrain.elastic.worker import work  # noqa: PLC0415 -- torch, in workers only

    work(config["config"])


def start_cell() -> Any:
    """Start a cell's actor; its `run` starts the workers. It takes the longest of all to start, so it comes first."""
    actor: Any = ray.remote(num_cpus=0)(Cell)
    return actor.remote()


def end_cell(cell: Any, ended: Any) -> None:
    """Kill a cell's actor and its workers and free what they held; `ended` is what its `run` will return.

    Ray frees the placement group of a dead actor only when the whole job ends, and a Python driver may do many runs.
    """
    ray.kill(cell)
    ray.wait([ended], timeout=KILLED_S)  # once this has failed, the actor asks for nothing more
    for group in _groups_of(cell):
        remove_placement_group(group)


def _groups_of(cell: Any) -> list[PlacementGroup]:
    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()  # noqa: SLF001
    message: Any = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined] # made at import by protobuf
    groups = [message.FromString(entry) for entry in table]
    return [
        PlacementGroup(ray.PlacementGroupID(group.placement_group_id))
        for group in groups
        if group.creator_actor_id == cell._actor_id.binary()  # noqa: SLF001
        and group.state != message.REMOVED
    ]
