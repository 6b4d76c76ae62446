"""Weights out of a run, as one safetensors file."""

from typing import Any

from elastrain import storage
from elastrain.errors import SpecError
from elastrain.training.checkpoint import load, write_weights
from elastrain.training.manifests import newest_whole
from elastrain.training.state import digest


def export_weights(run: str, out: str, *, step: int | None, weights: str) -> dict[str, Any]:
    """Write the weights of a checkpoint (the newest whole one if `step` is None) to `out`.

    `weights` is `model`, or `ema` for the averaged parameters (those of the run's `ema`, or a schedule-free
    optimizer's) with the model's buffers. Returns file, step and digest.
    Raises SpecError if the run has no such checkpoint or keeps no averages, StorageError if files cannot be used.
    """
    if weights not in ("model", "ema"):
        raise SpecError(f"--weights {weights}: choose model or ema")
    chosen = step if step is not None else newest_whole(run, warn=lambda _: None)
    if chosen is None:
        raise SpecError(f"{run}: no run with a whole checkpoint; give the folder that holds checkpoints/")
    saved = load(run, chosen)
    tensors = {name.removeprefix("model/"): t for name, t in saved.tensors.items() if name.startswith("model/")}
    if weights == "ema":
        averages = {name.removeprefix("ema/"): t for name, t in saved.tensors.items() if name.startswith("ema/")}
        if not averages:
            raise SpecError(f"{run}: the run keeps no averaged weights; set ema in its spec, or train schedule-free")
        tensors |= averages
    write_weights(storage.absolute(out), tensors)
    return {"file": storage.absolute(out), "step": chosen, "weights_sha256": digest(tensors)}
