"""Groups of workers between GPUs: torch's NCCL backend outside torch's global state, which a living process can leave.

torch's default group cannot be re-formed while a process lives; these can: each generation is a new object. What NCCL
has to know before its members are connected goes through the door of rank 0, as `DoorStore`; the ports that it opens
itself know no token of ours. Not a line of this runs where torch has no CUDA, but for the tests'.
"""

import atexit
import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined] # made in C++

from elastrain.training.reduce import GroupLost

LOOK_S = 0.02  # how often who is to destroy a group looks whether anybody else holds it
NCCL_LOOK_S = 2e-5  # how often a wait looks whether its operation has ended or its group was abandoned
EXIT_S = 2.0  # a process that exits waits no longer for a group that is being destroyed
ALONE = 2  # references to what is in a list only: the list's, and the one that counting takes
FOREVER = datetime.timedelta(days=1)  # hangs are the membership's business: torch's own time-out would kill a process

_exiting, _destroying = threading.Event(), threading.Lock()


class DoorStore(Store):
    """A store for torch whose keys and values are at a door: `connection` leads to its `serve_store`."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection, self._lock = connection, threading.Lock()

    def set(self, key: str, value: str | bytes) -> None:
        """Keep a value."""
        self._asked("set", key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        """Return a value, once there is one."""
        value: bytes = self._asked("get", key)
        return value

    def multi_get(self, keys: Sequence[str]) -> list[list[int]]:  # type: ignore[override] # as torch takes it
        """Return several, each as a list of numbers: bytes in a list are none to torch."""
        return [list(self.get(key)) for key in keys]

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        """Wait until there are values; as long as it takes: who is not to wait any more is not asked for it."""
        del timeout
        for key in keys:
            self.get(key)

    def _asked(self, *question: Any) -> Any:
        with self._lock:
            self._connection.send(question)
            return self._connection.recv()


def nccl_group(
    store: DoorStore, place: tuple[int, int, int], device: torch.device, lost: threading.Event
) -> "NcclGroup":
    """Return the group of a GPU; `place` is (rank, size, generation). Raises RuntimeError if it does not form."""
    from torch.distributed.distributed_c10d import ProcessGroupNCCL  # noqa: PLC0415 -- absent in CPU builds

    # Else torch ends a process whose peer is gone, or whose threads it takes for stuck.
    os.environ |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    options = ProcessGroupNCCL.Options()
    options._timeout = FOREVER  # noqa: SLF001 -- its only way in
    group = ProcessGroupNCCL(store, place[0], place[1], options)
    group.eager_connect_single_device(device)  # here, where who waits can be woken: NCCL waits for all members
    return NcclGroup(group, place, lost, store)


class NcclGroup:
    """A group over NCCL; `place` is (rank, size, generation). To abort it ends what waits in it.

    `store` is kept as long as torch may ask it.

    `waits` is since when an operation has been under way, by `time.perf_counter`, for other threads to see.
    """

    def __init__(self, group: Any, place: tuple[int, int, int], lost: threading.Event, store: Any = None) -> None:
        self.rank, self.size, self.generation = place
        self._group, self._lost, self._store = group, lost, store
        self.waits: float | None = None
        self._leaving = threading.Lock()

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all members; raises GroupLost if one is gone."""
        self._wait("allreduce", [tensor])

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace `tensor` by the one of rank `source`; raises GroupLost if a member is gone."""
        self._wait("broadcast", tensor, source)

    def all_to_all(self, output: Tensor, tensor: Tensor, received: list[int], sent: list[int]) -> None:
        """Send `sent[r]` elements to each rank r, and receive `received[r]` from it; raises GroupLost."""
        self._wait("alltoall_base", output, tensor, received, sent)

    def all_gather(self, output: Tensor, tensor: Tensor) -> None:
        """Put the equally long tensors of all members into `output`; raises GroupLost if one is gone."""
        self._wait("_allgather_base", output, tensor)  # what torch's own function calls

    def abandon(self) -> None:
        """Leave the group for good, from any thread. An operation that is under way may go on to touch its tensors."""
        with self._leaving:
            group, self._group = self._group, None
        if group is None:
            return
        # An abort takes up to seconds, in which whoever called this has to go on: it may be the thread that beats.
        drop = partial(_drop, [group, self._store])
        del group
        threading.Thread(target=drop, daemon=True, name="drop").start()

    def _wait(self, name: str, *arguments: Any) -> None:
        group = self._group
        if group is None or self._lost.is_set():
            raise GroupLost("a member is gone")
        self.waits = time.perf_counter()
        try:
            self._finish(getattr(group, name)(*arguments))
        except RuntimeError as error:
            raise GroupLost(str(error)) from error
        finally:
            self.waits = None
            del group  # an error keeps this frame, which would keep the group

    def _is_left(self) -> bool:
        return self._group is None or self._lost.is_set()

    def _finish(self, work: Any) -> None:
        """Wait for an operation of NCCL, whose own wait only orders streams: what an abort leaves is no sum."""
        while not self._has_ended(work):
            time.sleep(NCCL_LOOK_S)
        work.wait()  # orders the streams; raises RuntimeError if the operation failed
        if self._is_left():
            raise GroupLost("a member is gone")

    def _has_ended(self, work: Any) -> bool:
        """Say whether an operation of NCCL has ended. Raises GroupLost if the group was left.

        While a group is being aborted this question waits for that and lets no other thread run: it is not asked then.
        """
        with self._leaving:
            if self._is_left():
                raise GroupLost("a member is gone")
            return bool(work.is_completed())


def _drop(held: list[Any]) -> None:
    """Abort the group in `held`; destroy it once nobody else holds it.

    Whoever comes out of its destruction while Python exits would abort the process.
    """
    with contextlib.suppress(RuntimeError):
        held[0].abort()
    while sys.getrefcount(held[0]) > ALONE:
        if _exiting.wait(LOOK_S):
            threading.Event().wait()  # the process ends, and these threads with it
    with _destroying:
        held.clear()


@atexit.register
def _let_finish() -> None:
    """Wait until no group is being destroyed, and let no other begin."""
    _exiting.set()
    _destroying.acquire(timeout=EXIT_S)
