"""Ray Train's trainer as a cell uses it: workers are replaced in place, whatever dies beside them, and not in a hurry.

This is the only module that stands on Ray Train's inner interfaces; `tests/elastic/test_ray_inner.py` checks them all.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import RayTrainCallback  # type: ignore[attr-defined]
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.api.result import Result

from elastrain.elastic.ray_inner import NODE_ID_LABEL

SILENT_S = 60.0  # who does not answer for so long while another is replaced counts as dead
CALM_S = 10.0  # a failure after so long a peace is the first one again
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 15.0
HELPERS = (DatasetsCallback, PlacementGroupCleanerCallback)  # each would start a process that does nothing here
TRIES, TRIES_S = 2, 60.0  # of a cell none of whose workers stays: in a row, each not longer after the one before


class InPlace(Backend):
    """No process group of Ray's: the workers form their own, so one of them can be replaced while the others go on."""

    has_replica_groups = True


class InPlaceConfig(BackendConfig):
    """What a trainer is given to use `InPlace`."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend."""
        return InPlace


class ReplacementFailed(WorkerGroupStartupFailedError):  # noqa: N818 -- an event: it is tried again
    """A replacement died before it worked, or another worker did meanwhile; the others go on."""


class NoBarrier:
    """In the place of the actor at which Ray Train's workers wait for each other: a process that ours never ask."""

    reset = SimpleNamespace(remote=lambda: ray.put(None))  # called before a worker is replaced: nobody waits

    def options(self, **_: Any) -> "NoBarrier":
        """Return what is to be started."""
        return self

    def remote(self, **_: Any) -> "NoBarrier":
        """Start nothing."""
        return self


def without_barrier() -> None:
    """Have the worker groups of this process, a cell's, start no such actor and end none."""
    made, ended = (sys.modules[owner.__module__] for owner in (WorkerGroup, WorkerGroupState))
    vars(made)["SynchronizationActor"], vars(ended)["_shutdown_sync_actor"] = NoBarrier(), lambda _: None


class CellGroup(WorkerGroup):
    """A worker group in which any number of workers may die at any moment without a healthy one being harmed.

    Ray, before it replaces a worker, calls each of the others. One that is dead as well, seen or not, makes that call
    fail, which ends the whole group. So the dead are taken out first; the next look finds them, and replaces them.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._replaced: dict[int, Any] = {}  # which look at the group each replacement answered

    def _init_train_context(self, workers: Any, sync_actor: Any) -> None:
        del sync_actor
        nobody: Any = None
        super()._init_train_context(workers, nobody)

    def replace_replica_group(self, replica_group_index: int) -> None:
        """Replace one worker; what goes wrong is tried again, less what has been replaced since the last look."""
        look = self.get_latest_poll_status()
        if self._replaced.get(replica_group_index) is look:
            return
        self._take_out_dead(besides=replica_group_index)
        try:
            super().replace_replica_group(replica_group_index)
        except (RayActorError, WorkerGroupStartupFailedError) as error:
            raise ReplacementFailed(str(error)) from error
        self._replaced[replica_group_index] = look

    def _take_out_dead(self, *, besides: int) -> None:
        groups = [
            group for i, group in enumerate(self.get_replica_groups() or []) if i != besides and group.is_active()
        ]
        asked: dict[Any, Any] = {
            worker.actor.clear_result_queue.remote(): group for group in groups for worker in group.get_workers()
        }
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=SILENT_S) if asked else ([], [])
        for answer in answered:
            try:
                ray.get(answer)
            except RayActorError:
                silent.append(answer)
        for answer in silent:
            asked[answer].shutdown()


class Patience(FailurePolicy):
    """Try again, each time in a row a little later; give up a cell that comes to nothing, not one that loses workers.

    It waits in the controller, which meanwhile sees no other death; the workers that live need it for nothing.
    """

    def __init__(self, *, size: int) -> None:
        super().__init__(FailureConfig(max_failures=-1))
        self._size = size
        self._row, self._whole, self._last = 0, 0, float("-inf")  # failures in a row; of those, of the whole cell

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Wait, then have it tried again; or say at once that it is of no use."""
        error = training_failed_error
        peace = time.monotonic() - self._last
        self._row = 0 if peace > CALM_S else self._row
        self._whole = (1 if peace > TRIES_S else self._whole + 1) if self._is_whole(error) else 0
        if self._whole > TRIES or not self._may_help(error):
            return FailureDecision.RAISE
        if self._row:
            time.sleep(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (self._row - 1)))
        self._row, self._last = self._row + 1, time.monotonic()
        return FailureDecision.RETRY

    def _is_whole(self, error: TrainingFailedError) -> bool:
        if isinstance(error, WorkerGroupError):
            return len(error.worker_failures) >= self._size
        cause = _cause(error)
        return isinstance(cause, WorkerGroupStartupFailedError) and not isinstance(cause, ReplacementFailed)

    def _may_help(self, error: TrainingFailedError) -> bool:
        if isinstance(_cause(error), WorkerGroupStartupTimeoutError):
            return False  # the room on this node is gone; elsewhere there may be some
        return isinstance(error, WorkerGroupError) or isinstance(_cause(error), WorkerGroupStartupFailedError)


def _cause(error: TrainingFailedError) -> Exception:
    return error.controller_failure if isinstance(error, ControllerError) else error


class CellScaling(FixedScalingPolicy):
    """A fixed size, of which Ray's coordinator of demand hears nothing: the cell's placement group is its demand.

    Ray Train would also ask the coordinator for the same, every 20 s. That request outlives a controller that is killed
    by three minutes, in which the autoscaler ends no node that it could be met with.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Register nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Send nothing."""


class CellController(TrainController):
    """A controller of a `CellGroup`."""

    worker_group_cls = CellGroup


class CellTrainer(DataParallelTrainer):
    """A DataParallelTrainer whose controller runs in this process, which must be an actor.

    A controller of its own would cost the start a process and its imports; so would the one that shares out Ray's
    datasets, of which there are none, and `NoBarrier`'s. Another helper, the detached process that frees the placement
    group after a controller's death, without Ray's dashboard also holds up the end of every run for 12 s (it asks the
    dashboard's state API whether the controller is alive). Ray itself frees the group only when the whole job ends, so
    whoever ends the actor frees it: `cells.end_cell`. It also takes back what the run has asked of the autoscaler,
    under the actor's id.
    """

    def __init__(self, work: Callable[[dict[str, Any]], None], config: Any, *, run: Any, scaling: Any) -> None:
        super().__init__(
            work, train_loop_config=config, backend_config=InPlaceConfig(), scaling_config=scaling, run_config=run
        )
        self._patience = Patience(size=scaling.num_workers)
        self._scaling = CellScaling(scaling)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        made: list[RayTrainCallback] = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, HELPERS)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        ours = {"failure_policy": self._patience, "scaling_policy": self._scaling}
        without_barrier()
        controller: Any = CellController(**(parts | ours))
        asyncio.run(controller.run())
        result: Result = controller.get_result()
        return result


def on_one_node(node: str, *, size: int, resources: dict[str, float], gpu: bool) -> ScalingConfig:
    """Return how the workers of a cell are placed: all on the node with this id."""
    return ScalingConfig(
        num_workers=size,
        resources_per_worker=resources,
        use_gpu=gpu,
        placement_strategy="STRICT_PACK",
        label_selector={NODE_ID_LABEL: node},
    )
