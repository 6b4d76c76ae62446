"""Checkpoints: written beside the training, whole or not at all, verified when read.

```
<run>/checkpoints/step-00000100/3f0c…-model.safetensors   weights and buffers
                                3f0c…-optimizer.safetensors, 3f0c…-average.safetensors, 3f0c…-state.json
                                manifest.json             names, sizes and hashes of the others; written last
```
A checkpoint exists if and only if its manifest does. The files of each writer have names of their own, so that one that
was given up or taken over and wakes again touches nobody else's; what killed ones leave goes with the step. Nothing in
it is code: safetensors and JSON only. With `checkpoint.encrypt` each of its files but the manifest is encrypted
(`encryption`), which the file itself tells.
"""

import errno
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_bytes
from torch import Tensor

from elastrain import storage
from elastrain.encryption import Encryptor, decrypt, is_encrypted
from elastrain.errors import DivergedError, ElastrainError, StorageError
from elastrain.spec.train import CheckpointSpec
from elastrain.training.manifests import (
    MANIFEST,
    discard,
    file_url,
    folder,
    new_part,
    read_manifest,
    read_verified,
    retain,
    write_manifest,
)

FILES = {"model": "model.safetensors", "optim": "optimizer.safetensors", "ema": "average.safetensors"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint that is whole: every file has the size and hash that its manifest says."""

    url: str
    step: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]
    info: Mapping[str, Any]


Content = str | dict[str, Tensor]
"""What a file of a checkpoint holds: JSON, or tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a commit cost: bytes, seconds that training stood still, seconds of writing beside it."""

    step: int
    size_bytes: int
    stall_s: float
    write_s: float


def load(run: str, step: int) -> Checkpoint:
    """Return the checkpoint of a step after comparing every file with its manifest.

    Raises StorageError, also if it is encrypted and its key is not there or another one.
    """
    url = folder(run, step)
    try:
        manifest = read_manifest(run, step)
    except FileNotFoundError as error:
        raise StorageError(f"{url}: no checkpoint (it has no {MANIFEST})") from error
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name in manifest["files"]:
        data, path = read_verified(run, step, manifest, name), file_url(run, step, manifest.get("part", ""), name)
        if is_encrypted(data):
            data = _decrypted(data, step, name, path)
        if name.endswith(".json"):
            numbers = _numbers(data, path)
        else:
            prefix = next(key for key, file in FILES.items() if file == name)
            tensors |= {f"{prefix}/{key}": tensor for key, tensor in _tensors(data, path).items()}
    return Checkpoint(url=url, step=step, tensors=tensors, numbers=numbers, info=manifest["info"])


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a local safetensors file; raises StorageError if it cannot be read."""
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: not a readable safetensors file ({error})") from error


def write_weights(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, whole or not at all; raises StorageError."""
    with storage.staged(path) as temporary:
        _save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary, path)


class Copies:
    """Copies of a state, in buffers that are kept: fresh memory would cost its page faults each time."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of these tensors on the CPU, over the ones that were returned before."""
        for name, tensor in tensors.items():
            held = self._buffers.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[name] = held
            held.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._buffers[name] for name in tensors}


def contents(tensors: Mapping[str, Tensor], numbers: str) -> Iterator[tuple[str, Content]]:
    """Yield the files of a checkpoint by name, with what they hold."""
    yield "state.json", numbers
    for prefix, name in FILES.items():
        own = {key[len(prefix) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{prefix}/")}
        if own:
            yield name, own


def as_bytes(content: Content) -> bytes:
    """Return a file's bytes: those that a commit writes to a disk if they are not to be encrypted."""
    return content.encode() if isinstance(content, str) else save_bytes(content)


def context_of(step: int, name: str) -> str:
    """Return what an encrypted file is bound to: the file of another step, or of another name, does not open as it."""
    return f"checkpoint {step} {name}"


def check_finite(tensors: Mapping[str, Tensor], step: int, buffers: frozenset[str]) -> None:
    """Raise DivergedError if a state is not finite (`buffers` may be infinite, not NaN)."""
    broken = next((n for n, t in tensors.items() if _is_broken(t, infinite=n in buffers)), None)
    if broken is not None:
        raise DivergedError(f"step {step}: {broken} is not finite any more; the checkpoint before is kept")


class Writer:
    """Commits checkpoints of one run in a thread; one is being written at a time, the next waits for it.

    `settle` is called in that thread before a manifest is written: what else belongs to the steps before must be safe.
    """

    def __init__(self, run: str, spec: CheckpointSpec, *, settle: Callable[[], None] = lambda: None) -> None:
        self._run, self._spec, self._settle = run, spec, settle
        self._copies = Copies()
        self._thread: threading.Thread | None = None
        self._error: ElastrainError | None = None
        self.written: list[Written] = []

    def commit(
        self,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
        info: Mapping[str, Any],
        *,
        buffers: frozenset[str] = frozenset(),
    ) -> None:
        """Copy the state and write it in the background; waits for the commit before. `numbers` holds the step.

        Raises what the commit before raised: StorageError, or DivergedError if its state was not finite (`buffers` may
        be infinite, not NaN).
        """
        start = time.perf_counter()
        self.wait()
        copies = self._copies.of(tensors)
        stall_s = time.perf_counter() - start
        arguments = (copies, json.dumps(numbers), dict(info), int(numbers["step"]), stall_s, buffers)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing is being written, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until nothing is being written; raises what the write raised."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(
        self,
        tensors: dict[str, Tensor],
        numbers: str,
        info: dict[str, Any],
        step: int,
        stall_s: float,
        buffers: frozenset[str],
    ) -> None:
        start = time.perf_counter()
        try:
            check_finite(tensors, step, buffers)
            size = self._put(tensors, numbers, info, step)
            self.written.append(
                Written(step=step, size_bytes=size, stall_s=stall_s, write_s=time.perf_counter() - start)
            )
            retain(self._run, self._spec, newest=step)
        except ElastrainError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 -- a thread's error must reach the training, whatever it is
            self._error = StorageError(f"cannot write the checkpoint of step {step}: {error!r}")

    def _put(self, tensors: dict[str, Tensor], numbers: str, info: dict[str, Any], step: int) -> int:
        part = new_part()
        try:
            files = self._put_files(tensors, numbers, step, part)
            write_manifest(self._run, step, files, info, self._settle, part)
        except BaseException:
            discard(self._run, step, part)  # on a full disk half a checkpoint would be in the way
            raise
        return sum(file["bytes"] for file in files.values())

    def _put_files(self, tensors: dict[str, Tensor], numbers: str, step: int, part: str) -> dict[str, dict[str, Any]]:
        files = {}
        encryptor = None if self._spec.encrypt is None else Encryptor(self._spec.encrypt)
        for name, content in contents(tensors, numbers):
            target = file_url(self._run, step, part, name)
            write = partial(_write_content, content, target)
            if encryptor is not None:  # from memory: nothing that is not encrypted may touch the disk
                pieces = encryptor.pieces(as_bytes(content), context=context_of(step, name))
                write = partial(_write_pieces, pieces)
            files[name] = _placed(target, write)
        return files


def _decrypted(data: bytes, step: int, name: str, where: str) -> bytes:
    try:
        return decrypt(data, context=context_of(step, name), where=where)
    except ValueError as error:
        raise StorageError(f"{where}: {error}") from error


def _is_broken(tensor: Tensor, *, infinite: bool) -> bool:
    """Say whether a tensor holds NaN, or an infinite value where none may be.

    The smallest and largest value tell, since NaN wins in both; looking at each value takes thirty times as long.
    """
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if not values.is_floating_point() or not values.numel():
        return False
    low, high = torch.aminmax(values)
    return bool(low.isnan()) if infinite else not (bool(low.isfinite()) and bool(high.isfinite()))


def _placed(url: str, write: Callable[[Path], None]) -> dict[str, Any]:
    """Write a file through a temporary one; return its size and the hash of what lies on the disk."""
    with storage.staged(url) as temporary, storage.named("write", url):
        write(temporary)
        with temporary.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": temporary.stat().st_size, "sha256": value}


def _write_content(content: Content, target: str, path: Path) -> None:
    if isinstance(content, str):
        _text(path, content)
    else:
        _save(content, path, target)


def _text(path: Path, text: str) -> None:
    _write_pieces([text.encode()], path)


def _write_pieces(pieces: Iterable[bytes], path: Path) -> None:
    with path.open("wb") as file:
        file.writelines(pieces)


def _save(tensors: dict[str, Tensor], path: Path, target: str) -> None:
    try:
        path.touch()
        mode = path.stat().st_mode  # as the umask has it: safetensors makes files that nobody but their owner may read
        save_file(tensors, str(path))
        path.chmod(mode)
    except (OSError, SafetensorError) as error:
        full = "os error 28" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        reason = "the disk is full" if full else str(error)
        raise StorageError(f"cannot write {target}: {reason}; free space or choose another storage") from error


def _numbers(data: bytes, path: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise StorageError(f"{path}: not a readable JSON document ({error})") from error
    return found


def _tensors(data: bytes, path: str) -> dict[str, Tensor]:
    try:
        return load_bytes(data)
    except SafetensorError as error:
        raise StorageError(f"{path}: not a readable safetensors file ({error})") from error
