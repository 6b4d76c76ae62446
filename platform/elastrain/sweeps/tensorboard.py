"""Trials for TensorBoard: a run each, with its curve and its point as hyperparameters.

Written by tensorboardX, which Ray Tune brings along; TensorBoard itself is needed only to look at them.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from elastrain import storage
from elastrain.errors import StorageError
from elastrain.sweeps.stats import plain
from elastrain.sweeps.trials import Evaluation, Trial


def write_tensorboard(trials: Sequence[Trial], folder: str, metric: str = "val_loss") -> None:
    """Write a folder of events for each trial into a local folder, for `tensorboard --logdir <folder>`.

    Of each evaluation the objective (as `metric`) and the other metrics are scalars, over steps; on TensorBoard's
    relative axis over device-seconds. Point, arm, phase, seed and outcome are hyperparameters, compared by the
    objective's last value. Written again, a trial's earlier events are replaced.

    Raises:
        StorageError: if the folder is a URL or cannot be written.
    """
    if not storage.is_local(folder):
        raise StorageError(
            f"{folder} is no local folder: TensorBoard's events are written to one; copy them from there"
        )
    from tensorboardX.event_file_writer import EventsWriter  # noqa: PLC0415 -- a second that only who asks for it pays
    from tensorboardX.proto.event_pb2 import Event  # noqa: PLC0415
    from tensorboardX.summary import hparams, scalar  # noqa: PLC0415

    for trial in trials:
        target = storage.local_path(folder) / re.sub(r"[^\w.=-]", "_", trial.id)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for old in target.glob("events.out.tfevents.*"):
                old.unlink()
            writer = EventsWriter(str(target / "events"))
            for part in hparams(_parameters(trial), {metric: 0.0}):
                writer.write_event(Event(summary=part))
            for told, name, value in _scalars(trial, metric):
                writer.write_event(Event(summary=scalar(name, value), step=told.step, wall_time=told.device_s))
            writer.close()
        except OSError as error:
            raise StorageError(
                f"cannot write TensorBoard's events to {target} ({error}); give another folder"
            ) from error


def _scalars(trial: Trial, metric: str) -> Iterator[tuple[Evaluation, str, float]]:
    for told in trial.evaluations:
        for name, value in {**told.metrics, metric: told.value}.items():
            if value is not None and math.isfinite(value):
                yield told, name, value


def _parameters(trial: Trial) -> dict[str, Any]:
    """What TensorBoard takes: text, truth and numbers."""
    point = {name: _scalar(value) for name, value in trial.point.items()}
    return {**point, "arm": trial.arm, "phase": trial.phase, "seed": trial.seed, "outcome": trial.outcome}


def _scalar(value: Any) -> str | float | bool:
    told = plain(value)
    return json.dumps(None) if told is None else told
