"""Ray Train's trainer as a cell uses it: the same, less two helper processes."""

import asyncio
from typing import Any

from ray.train import Result
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback  # type: ignore[attr-defined]
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class CellTrainer(DataParallelTrainer):
    """A DataParallelTrainer whose controller runs in this process, which must be an actor.

    A controller of its own would cost the start a process and its imports. Its helper, the detached process that frees
    the placement group after a controller's death, costs another one and without Ray's dashboard holds up the end of
    every run for 12 s (it asks the dashboard's state API whether the controller is alive). Ray itself frees the group
    only when the whole job ends, so whoever ends the actor frees it: `cells.end_cell`.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        made: list[RayTrainCallback] = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        controller = TrainController(**parts)
        asyncio.run(controller.run())
        return controller.get_result()
