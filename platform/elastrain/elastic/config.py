"""What every worker of a run is given; no torch here, since the driver makes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastrain.data.blocks import FeedSpec
from elastrain.spec.train import TrainSpec

WORKER_LOST = "WorkerLost"


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What every worker of a run is given; `resume` is the step of the checkpoint to start from, None for none."""

    host: Any
    feeder: Any
    spec: TrainSpec
    feed: FeedSpec
    num_steps: int
    run_url: str
    resume: int | None
    info: Mapping[str, Any]
    cell: str = ""  # the id of the cell that the worker is of
    launched: float  # Unix time at which the workers were asked for: they are paid from then on
