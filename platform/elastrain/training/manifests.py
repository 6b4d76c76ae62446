"""Which checkpoints a run has, from their manifests alone: no torch here, so that a driver need not load it.

Each writer of a checkpoint gives its files names of their own, which the manifest tells: whoever wakes up after others
have gone on can neither remove nor overwrite what they have committed. Manifests are created, and where one is in the
way only who still holds the run replaces it, on S3 that very one: `revoke` can make impossible what has not come into
being yet.
"""

import contextlib
import hashlib
import json
import math
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from elastrain import conditional, storage
from elastrain.errors import ConflictError, SpecError, StorageError
from elastrain.s3 import is_s3
from elastrain.spec.problems import nearest
from elastrain.spec.train import CheckpointSpec

MANIFEST = "manifest.json"
FOLDER = re.compile(r"step-(\d{8,})")
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # the name of a file, and no path
REVOKED = b"revoked "
SEAL = ',\n "sha256": "'


def folder(run: str, step: int) -> str:
    """Return where the checkpoint of a step lies."""
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def file_url(run: str, step: int, part: str, name: str) -> str:
    """Return where a file of a checkpoint lies; `part` is what tells its writer from others, empty in old ones."""
    return storage.join(folder(run, step), f"{part}-{name}" if part else name)


def new_part() -> str:
    """Return what the names of one writer's files begin with, unlike any other's."""
    return secrets.token_hex(8)


def seal(step: int, files: Mapping[str, Any], info: Mapping[str, Any], part: str = "") -> bytes:
    """Return the manifest of a checkpoint; its last entry is the hash of all before it.

    `part` is what the names of its files begin with (`file_url`).
    """
    where = {"part": part} if part else {}
    text = json.dumps({"step": step, **where, "files": files, "info": info}, indent=1).removesuffix("\n}")
    return _sealed(text)


def unseal(data: bytes, step: int) -> dict[str, Any]:
    """Return what a manifest says; raises ValueError if it is broken, or not the one of this step."""
    text, found, _ = data.decode(errors="replace").rpartition(SEAL)
    if not found or data != _sealed(text):
        raise ValueError("corrupted (not the bytes that were written)")
    manifest: dict[str, Any] = json.loads(data)
    if not all(PLAIN.fullmatch(name) for name in (*manifest["files"], manifest.get("part", "0"))):
        raise ValueError("it names a file that would lie elsewhere")
    if manifest["step"] != step:
        raise ValueError(f"the manifest of step {manifest['step']}; checkpoints are not to be renamed")
    return manifest


class Description:
    """What a manifest says of a file, as its pieces come by."""

    def __init__(self) -> None:
        self._size, self._hash = 0, hashlib.sha256()

    def add(self, piece: bytes) -> None:
        """Take the next piece into account."""
        self._size += len(piece)
        self._hash.update(piece)

    def entry(self) -> dict[str, Any]:
        """Return size and hash of what has come by."""
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}


def described(data: bytes) -> dict[str, Any]:
    """Return what a manifest says of a file with these bytes."""
    description = Description()
    description.add(data)
    return description.entry()


def write_manifest(
    run: str,
    step: int,
    files: Mapping[str, Any],
    info: Mapping[str, Any],
    settle: Callable[[], None] = lambda: None,
    part: str = "",
) -> None:
    """Write the manifest of a checkpoint whose files are there, as `part`: from now on it exists.

    `settle` raises if it may not; it is called at least once. Raises ConflictError if another process has taken the
    run over or writes the same checkpoint, StorageError.
    """
    url, manifest = storage.join(folder(run, step), MANIFEST), seal(step, files, info, part)
    settle()
    if not is_s3(url):
        if not storage.is_local(url):
            storage.put(url, manifest)
        elif not storage.create_local(url, manifest):
            settle()
            storage.put(url, manifest)
        return
    if conditional.create(url, manifest) is not None:
        return
    try:  # of a worker that was given up, or of who took the run over: then `settle` raises
        there = conditional.read(url)
    except FileNotFoundError:
        there = None
    settle()
    if there is None or conditional.replace(url, manifest, there.etag) is None:
        raise ConflictError(f"{url}: another process writes this checkpoint at the same time; stop all but one")


def discard(run: str, step: int, part: str) -> None:
    """Remove the files of a writer whose checkpoint came to nothing, and no others; nothing if it exists after all.

    Raises nothing: whatever went wrong before tells more, and what is left goes with the folder of the step.
    """
    url = folder(run, step)
    with contextlib.suppress(StorageError):
        with contextlib.suppress(FileNotFoundError):
            if f'"part": "{part}"'.encode() in storage.read_bytes(storage.join(url, MANIFEST)):
                return  # the answer to its last write got lost
        with contextlib.suppress(FileNotFoundError):
            for file in storage.list_files(url):
                if file.path.startswith(part):
                    storage.remove(storage.join(url, file.path))
        if storage.is_local(url):
            with contextlib.suppress(OSError):  # others write there, too
                storage.local_path(url).rmdir()


def revoke(run: str) -> None:
    """See to it that no checkpoint which was begun before comes into being; for who has just come to hold the run.

    Raises StorageError.
    """
    for step in _steps(run) if is_s3(run) or storage.is_local(run) else ():
        url, mark = storage.join(folder(run, step), MANIFEST), REVOKED + secrets.token_hex(8).encode()
        if storage.is_local(url):
            storage.create_local(url, mark)
        elif conditional.create(url, mark) is None:
            with contextlib.suppress(FileNotFoundError):
                there = conditional.read(url)
                if there.data.startswith(REVOKED):
                    conditional.replace(url, mark, there.etag)


def read_manifest(run: str, step: int) -> dict[str, Any]:
    """Return the manifest of a checkpoint; raises FileNotFoundError if it has none, StorageError if it is broken."""
    url = storage.join(folder(run, step), MANIFEST)
    data = storage.read_bytes(_within(run, url))
    if data.startswith(REVOKED):
        raise FileNotFoundError(url)
    try:
        return unseal(data, step)
    except ValueError as error:
        raise StorageError(f"{url}: {error}") from error


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
        read_verified(run, step, manifest, name)


def is_whole(run: str, step: int, manifest: Mapping[str, Any]) -> bool:
    """Say whether every file of a checkpoint is what its manifest says."""
    try:
        verify(run, step, manifest)
    except StorageError:
        return False
    return True


def read_verified(run: str, step: int, manifest: Mapping[str, Any], name: str) -> bytes:
    """Return the bytes of a checkpoint's file; raises StorageError, naming it, if they are not the manifest's."""
    path, expected = file_url(run, step, manifest.get("part", ""), name), manifest["files"][name]
    try:
        data = storage.read_bytes(_within(run, path))
    except FileNotFoundError as error:
        raise StorageError(f"{path}: missing, though the checkpoint's manifest names it") from error
    if described(data) != expected:
        raise StorageError(f"{path}: corrupted (not the bytes that the checkpoint's manifest names)")
    return data


def _within(run: str, url: str) -> str:
    """Return the URL of a file; raises StorageError if links lead out of the folder of the run's checkpoints."""
    if storage.is_local(url):
        root = storage.local_path(storage.join(run, "checkpoints")).resolve()
        if not storage.local_path(url).resolve().is_relative_to(root):
            raise StorageError(f"{url}: a link that leads out of {root}; put the file itself there")
    return url


def clear(run: str, step: int) -> None:
    """Remove what there is of the checkpoint of a step, its manifest first."""
    url = folder(run, step)
    storage.remove(storage.join(url, MANIFEST))
    storage.remove(url)


def adopt(
    run: str,
    step: int,
    manifest: bytes,
    read: Callable[[str], Iterable[bytes]],
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Make a checkpoint of files that are elsewhere, its manifest last; `read` returns the pieces of a file.

    Raises ValueError if they are not the bytes that the manifest names, StorageError if they cannot be written; nothing
    is left then. `settle` and ConflictError are as in `write_manifest`.
    """
    made, part = unseal(manifest, step), new_part()
    try:
        for name, expected in made["files"].items():
            if _written(file_url(run, step, part, name), read(name)) != expected:
                raise ValueError(f"{name}: corrupted (not the bytes that the manifest names)")
        write_manifest(run, step, made["files"], made["info"], settle, part)
    except BaseException:
        discard(run, step, part)
        raise


class UnknownMetricError(SpecError):
    """A field of the spec names a metric that an evaluation, which gave `metrics`, lacks; so will the next one."""

    metrics: Mapping[str, float] = {}


def check_best(spec: CheckpointSpec, metrics: Mapping[str, float]) -> None:
    """Raise UnknownMetricError if an evaluation gave `metrics` without `best`, which would never be applied."""
    if spec.best is not None:
        check_metric("checkpoint.best", spec.best, metrics)


def check_metric(field: str, name: str, metrics: Mapping[str, float]) -> None:
    """Raise UnknownMetricError if an evaluation gave `metrics` and `name`, which stands at `field`, is none of them."""
    if metrics and name not in metrics:
        there = ", ".join(metrics)
        error = UnknownMetricError(f"{field}: the metrics are {there}, not {name!r}{nearest(name, metrics)}")
        error.metrics = dict(metrics)
        raise error


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
            clear(run, step)


def _steps(run: str) -> list[int]:
    """Return the steps of a run's checkpoint folders in order, whole or not."""
    names = storage.list_folders(storage.join(run, "checkpoints"))
    return sorted(int(match[1]) for match in map(FOLDER.fullmatch, names) if match)


def _sealed(text: str) -> bytes:
    return f'{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'.encode()


def _written(url: str, pieces: Iterable[bytes]) -> dict[str, Any]:
    """Write a file piece by piece, so that it need not fit into memory; return what a manifest says of it."""
    description = Description()
    with storage.staged(url) as temporary, storage.named("write", url), temporary.open("wb") as file:
        for piece in pieces:
            description.add(piece)
            file.write(piece)
    return description.entry()
