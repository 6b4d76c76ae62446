"""Which checkpoints a run has, from their manifests alone: no torch here, so that a driver need not load it."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from elastrain import storage
from elastrain.errors import StorageError
from elastrain.spec.train import CheckpointSpec

MANIFEST = "manifest.json"


def folder(run: str, step: int) -> str:
    """Return where the checkpoint of a step lies."""
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def read_manifests(run: str) -> dict[int, dict[str, Any]]:
    """Return the manifests of all checkpoints of a run by step, oldest first."""
    found = {}
    for name in storage.list_folders(storage.join(run, "checkpoints")):
        try:
            manifest = storage.read_json(storage.join(run, "checkpoints", name, MANIFEST))
            found[int(manifest["step"])] = manifest
        except (FileNotFoundError, StorageError, KeyError, TypeError, ValueError):
            continue  # no manifest that can be read: no checkpoint
    return dict(sorted(found.items()))


def newest_whole(run: str, *, warn: Callable[[str], None]) -> int | None:
    """Return the step of the newest checkpoint that is whole, None if there is none; broken ones go to `warn`."""
    for step, manifest in sorted(read_manifests(run).items(), reverse=True):
        try:
            for name in manifest["files"]:
                read_verified(folder(run, step), manifest, name)
        except StorageError as error:
            warn(f"{error}; going back to the checkpoint before it")
        else:
            return step
    return None


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


def retain(run: str, spec: CheckpointSpec) -> None:
    """Remove all but the newest `keep` checkpoints and the best one by `best`; the manifest goes first."""
    held = read_manifests(run)
    kept = set(sorted(held)[-spec.keep :])
    scored = {step: m["info"].get("metrics", {}).get(spec.best) for step, m in held.items()}
    known = {step: value for step, value in scored.items() if value is not None}
    if known:
        sign = 1.0 if spec.goal == "min" else -1.0
        kept.add(min(known, key=lambda step: (sign * known[step], -step)))
    for step in held:
        if step not in kept:
            storage.remove(storage.join(folder(run, step), MANIFEST))
            storage.remove(folder(run, step))
