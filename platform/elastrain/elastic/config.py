"""What every worker of a run is given; no torch here, since the driver makes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastrain.data.blocks import FeedSpec
from elastrain.spec.train import TrainSpec

LEASE_S = 10.0  # a worker that is silent for so long is given up


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What every worker of a run is given; `resume` is the step of the checkpoint to start from, None for none.

    `cell` names the worker's cell.
    """

    host: Any
    feeder: Any
    spec: TrainSpec
    feed: FeedSpec
    num_steps: int
    run_url: str
    resume: int | None
    info: Mapping[str, Any]
    cell: str = ""
    launched: float  # Unix time at which the workers were asked for: they are paid from then on
