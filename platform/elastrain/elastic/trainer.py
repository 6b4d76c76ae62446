"""Ray Train's trainer as a cell uses it: the same, less one helper process."""

from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback  # type: ignore[attr-defined]
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class CellTrainer(DataParallelTrainer):
    """A DataParallelTrainer without the detached process that frees placement groups after a controller's death.

    Ray frees them by itself when their creator dies; the helper costs the start a process, and without Ray's dashboard
    it holds up the end of every run for 12 s (it asks the dashboard's state API whether the controller is alive).
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        made: list[RayTrainCallback] = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]
