"""Which checkpoints a run has, from their manifests alone: no torch here, so that a driver need not load it."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from elastrain import storage
from elastrain.errors import SpecError, StorageError
from elastrain.spec.problems import nearest
from elastrain.spec.train import CheckpointSpec

MANIFEST = "manifest.json"
FOLDER = re.compile(r"step-(\d{8,})")
SEAL = ',\n "sha256": "'


def folder(run: str, step: int) -> str:
    """Return where the checkpoint of a step lies."""
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def write_manifest(run: str, step: int, files: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint: from now on it exists. The last entry is the hash of all before it."""
    text = json.dumps({"step": step, "files": files, "info": info}, indent=1).removesuffix("\n}")
    storage.put(storage.join(folder(run, step), MANIFEST), f'{text}{SEAL}{_hash(text)}"\n}}\n'.encode())


def read_manifest(run: str, step: int) -> dict[str, Any]:
    """Return the manifest of a checkpoint; raises FileNotFoundError if it has none, StorageError if it is broken."""
    url = storage.join(folder(run, step), MANIFEST)
    data = storage.read_bytes(url)
    text, seal, _ = data.decode(errors="replace").rpartition(SEAL)
    if not seal or data != f'{text}{SEAL}{_hash(text)}"\n}}\n'.encode():
        raise StorageError(f"{url}: corrupted (not the bytes that were written)")
    manifest: dict[str, Any] = json.loads(data)
    if manifest["step"] != step:
        raise StorageError(f"{url}: the manifest of step {manifest['step']}; checkpoints are not to be renamed")
    return manifest


def read_manifests(run: str) -> dict[int, dict[str, Any]]:
    """Return the manifests of all checkpoints of a run by step, oldest first; a broken one is left out."""
    found = {}
    for step in _steps(run):
        with contextlib.suppress(FileNotFoundError, StorageError):  # no manifest that can be read: no checkpoint
            found[step] = read_manifest(run, step)
    return found


def newest_whole(run: str, *, warn: Callable[[str], None]) -> int | None:
    """Return the step of the newest checkpoint that is whole, None if there is none; broken ones go to `warn`."""
    for step in reversed(_steps(run)):
        try:
            verify(run, step, read_manifest(run, step))
        except FileNotFoundError:
            continue  # cut off while it was written
        except StorageError as error:
            warn(f"{error}; going back to the checkpoint before it")
        else:
            return step
    return None


def verify(run: str, step: int, manifest: Mapping[str, Any]) -> None:
    """Compare every file of a checkpoint with its manifest; raises StorageError, naming the first that differs."""
    for name in manifest["files"]:
        read_verified(folder(run, step), manifest, name)


def is_whole(run: str, step: int, manifest: Mapping[str, Any]) -> bool:
    """Say whether every file of a checkpoint is what its manifest says."""
    try:
        verify(run, step, manifest)
    except StorageError:
        return False
    return True


def read_verified(url: str, manifest: Mapping[str, Any], name: str) -> bytes:
    """Return the bytes of a checkpoint's file; raises StorageError, naming it, if they are not the manifest's."""
    path, expected = storage.join(url, name), manifest["files"][name]
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise StorageError(f"{path}: missing, though the checkpoint's manifest names it") from error
    if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise StorageError(f"{path}: corrupted (not the bytes that the checkpoint's manifest names)")
    return data


def check_best(spec: CheckpointSpec, metrics: Mapping[str, float]) -> None:
    """Raise SpecError if an evaluation gave `metrics` and `best` is none of them: it would never be applied."""
    if metrics and spec.best is not None and spec.best not in metrics:
        there = ", ".join(metrics)
        raise SpecError(f"checkpoint.best: the metrics are {there}, not {spec.best!r}{nearest(spec.best, metrics)}")


def retain(run: str, spec: CheckpointSpec, *, newest: int) -> None:
    """Remove all but the newest `keep` checkpoints up to step `newest` and the best one by `best`; manifests go first.

    What lies past `newest` is broken, or the run would have gone on from there. If it is not, another worker has led
    since this one began to write, and cares for them all. Folders without a manifest go once they are older than
    everything kept: until then they may be in the making.
    """
    found = read_manifests(run)
    if any(step > newest and is_whole(run, step, found[step]) for step in found):
        return
    held = {step: manifest for step, manifest in found.items() if step <= newest}
    kept = set(sorted(held)[-spec.keep :])
    oldest = min(kept, default=0)
    scored = {step: m["info"].get("metrics", {}).get(spec.best) for step, m in held.items()}
    known = {step: value for step, value in scored.items() if value is not None and math.isfinite(value)}
    if known:
        sign = 1.0 if spec.goal == "min" else -1.0
        kept.add(min(known, key=lambda step: (sign * known[step], -step)))
    for step in _steps(run):
        if step not in kept and (step in found or step < oldest):
            storage.remove(storage.join(folder(run, step), MANIFEST))
            storage.remove(folder(run, step))


def _steps(run: str) -> list[int]:
    """Return the steps of a run's checkpoint folders in order, whole or not."""
    names = storage.list_folders(storage.join(run, "checkpoints"))
    return sorted(int(match[1]) for match in map(FOLDER.fullmatch, names) if match)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
