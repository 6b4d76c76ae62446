"""Snapshots: checkpoints in memory elsewhere, made beside the training every few seconds and never waited for.

The training stands still for a copy of its state and for nothing else. A snapshot has the files and the manifest of a
checkpoint, and like one it counts only once the manifest is there, which comes last: after the audit and the metrics of
its steps are in storage. With `checkpoint.encrypt` its files are encrypted before they leave the worker: memory where
they lie may be spilled to a disk, and they may become a checkpoint.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from elastrain.encryption import Encryptor
from elastrain.training.checkpoint import Copies, as_bytes, check_finite, contents, context_of
from elastrain.training.manifests import described, seal

SNAPSHOT_S = 5.0
STALLS = 50.0  # so many times as long as it stood still for a snapshot the training goes on before the next one


class Vault(Protocol):
    """Where snapshots go."""

    def ready(self) -> bool:
        """Say at once whether a snapshot could be taken in now; where not, something is done about it meanwhile."""

    def put(self, step: int, files: Iterable[tuple[str, bytes]], manifest: Callable[[], bytes]) -> None:
        """Take in files by name and then the manifest, from when on the snapshot counts; called beside the training.

        May raise whatever it meets; the snapshot before it is still there then, if anything is.
        """


class Snapshots:
    """The snapshots that one worker makes; one is under way at a time, and none is due meanwhile.

    `settle` is called before the manifest is made: what else belongs to the steps before must be safe. `encrypt` is the
    name of a key. `events` is for the ledger: (kind, fields) of what has happened, for the thread that trains to take.
    """

    def __init__(self, vault: Vault | None, *, settle: Callable[[], None], encrypt: str | None = None) -> None:
        self._vault, self._settle, self._encrypt = vault, settle, encrypt
        self._copies = Copies()
        self._thread: threading.Thread | None = None
        self._next = time.monotonic() + SNAPSHOT_S
        self._failing = False
        self.events: list[tuple[str, dict[str, Any]]] = []

    def due(self) -> bool:
        """Say whether it is time for one, and there is a place for it."""
        if self._vault is None or time.monotonic() < self._next:
            return False
        return not (self._thread is not None and self._thread.is_alive()) and self._vault.ready()

    def postpone(self) -> None:
        """Make none for a while: a checkpoint is being committed, which is worth more."""
        self._next = max(self._next, time.monotonic() + SNAPSHOT_S)

    def take(
        self,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
        info: Mapping[str, Any],
        *,
        buffers: frozenset[str] = frozenset(),
    ) -> None:
        """Copy the state and send it away in the background; `numbers` holds the step. Raises nothing later."""
        start = time.monotonic()
        copies = self._copies.of(tensors)
        stall_s = time.monotonic() - start
        self._next = start + max(SNAPSHOT_S, STALLS * stall_s)
        arguments = (copies, json.dumps(numbers), dict(info), int(numbers["step"]), stall_s, buffers)
        self._thread = threading.Thread(target=self._send, args=arguments, name="snapshot", daemon=True)
        self._thread.start()

    def _send(
        self,
        tensors: dict[str, Tensor],
        numbers: str,
        info: dict[str, Any],
        step: int,
        stall_s: float,
        buffers: frozenset[str],
    ) -> None:
        assert self._vault is not None, "none is due without a vault"
        start = time.monotonic()
        files: dict[str, dict[str, Any]] = {}

        def made() -> Iterator[tuple[str, bytes]]:
            encryptor = None if self._encrypt is None else Encryptor(self._encrypt)
            for name, content in contents(tensors, numbers):
                data = as_bytes(content)
                if encryptor is not None:
                    data = encryptor.encrypt(data, context=context_of(step, name))
                files[name] = described(data)
                yield name, data

        def manifest() -> bytes:
            self._settle()
            return seal(step, files, info)

        try:
            check_finite(tensors, step, buffers)
            self._vault.put(step, made(), manifest)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the training has no need of this snapshot
            if not self._failing:  # told once, until one succeeds again
                reason = (str(error) or repr(error)).splitlines()[0]  # Ray's errors go on for pages
                self.events.append(("snapshot_lost", {"step": step, "reason": reason[:300]}))
            self._failing = True
            return
        self._failing = False
        size = sum(file["bytes"] for file in files.values())
        cost = {"bytes": size, "stall_s": stall_s, "write_s": time.monotonic() - start}
        self.events.append(("snapshot", {"step": step, **cost}))
