"""Process groups of one generation: gloo between CPUs, NCCL between GPUs, outside torch's global state.

torch's default group cannot be re-formed while a process lives; these can: each generation is a new object over a new
prefix of rank 0's store. A group can be abandoned from another thread: whoever waits in it gets GroupLost at once.
"""

import atexit
import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined] # made in C++

from elastrain.elastic.protocol import Generation
from elastrain.training.reduce import Group, GroupLost, Solo

CONNECT_S = 60.0  # for what nobody waits for any more: who waits is woken by the membership
LOOK_S = 0.02  # how often a wait looks whether its group was abandoned
NCCL_LOOK_S = 2e-5  # the same, where a wait cannot be cut into slices
EXIT_S = 2.0  # a process that exits waits no longer for a group that is being destroyed
ALONE = 2  # references to what is in a list only: the list's, and the one that counting takes
FOREVER = datetime.timedelta(days=1)  # hangs are the membership's business: torch's own time-out would kill a process

_exiting, _destroying = threading.Event(), threading.Lock()


class Door:
    """A worker's own store, open from the start, so that any worker can be rank 0 of the next generation."""

    def __init__(self, host: str) -> None:
        timeout = datetime.timedelta(seconds=CONNECT_S)
        # The store asks for no token, and by itself it would listen on all addresses of the machine.
        door = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.address: tuple[str, int] = (host, door.getsockname()[1])
        self._store = TCPStore(
            *self.address, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=door.detach()
        )

    def join(self, generation: Generation, name: str, device: torch.device, lost: threading.Event) -> Group:
        """Return the group of a generation as seen by member `name`.

        Raises GroupLost if it cannot form, or once `lost` is set; so do the group's operations.
        """
        rank, size = generation.rank(name), len(generation.members)
        assert rank is not None, "whoever joins is a member"
        if size == 1:
            return Solo(generation.number)

        def connect() -> TorchGroup:
            host, port = generation.members[0].worker.store
            timeout = datetime.timedelta(seconds=CONNECT_S)
            # A client of its own also at home: one that waits for a member of a generation that is over stays locked.
            store = TCPStore(host, port, is_master=False, timeout=timeout)
            prefixed = PrefixStore(f"generation-{generation.number}", store)
            made = _made(prefixed, rank, size, device, self.address[0])
            return TorchGroup(made, (rank, size, generation.number), lost, wakes=device.type == "cuda")

        return _unless(lost, connect, f"generation {generation.number} did not form")


def _made(store: Any, rank: int, size: int, device: torch.device, host: str) -> Any:
    if device.type == "cuda":
        from torch.distributed.distributed_c10d import ProcessGroupNCCL  # noqa: PLC0415 -- absent in CPU builds

        # Else torch ends a process whose peer is gone, or whose threads it takes for stuck.
        os.environ |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
        options = ProcessGroupNCCL.Options()
        options._timeout = FOREVER  # noqa: SLF001 -- its only way in
        group = ProcessGroupNCCL(store, rank, size, options)
        group.eager_connect_single_device(device)  # here, where who waits can be woken: NCCL waits for all members
        return group
    from torch.distributed.distributed_c10d import ProcessGroupGloo  # noqa: PLC0415

    if "GLOO_SOCKET_IFNAME" in os.environ:  # else it would listen where this machine's name leads, another way perhaps
        return ProcessGroupGloo(store, rank, size, FOREVER)
    kind: Any = ProcessGroupGloo
    options = kind._Options()  # noqa: SLF001 -- the only way in
    options._timeout, options._devices = FOREVER, [kind.create_device(hostname=host)]  # noqa: SLF001
    return kind(store, rank, size, options)


def _unless(lost: threading.Event, make: Callable[[], "TorchGroup"], what: str) -> "TorchGroup":
    """Return what `make` returns, in a thread of its own: to connect with somebody who is gone blocks for long."""
    made: list[TorchGroup | BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            made.append(make())
        except BaseException as error:  # noqa: BLE001 -- whoever waits must hear of it
            made.append(error)
        if lost.is_set() and isinstance(made[0], TorchGroup):
            made[0].abandon()
        done.set()

    threading.Thread(target=work, daemon=True, name="connect").start()
    while not done.wait(LOOK_S / 4):
        if lost.is_set():
            raise GroupLost(f"{what}: a member is gone")
    if isinstance(made[0], BaseException):
        raise GroupLost(f"{what}: {made[0]}") from made[0]
    return made[0]


class TorchGroup:
    """A group over torch's gloo or NCCL backend; `place` is (rank, size, generation).

    `wakes`: to abort the group ends what waits in it, as NCCL does. gloo's waits can only be cut into slices.
    `waits` is since when an operation has been under way, by `time.perf_counter`, for other threads to see.
    """

    def __init__(self, group: Any, place: tuple[int, int, int], lost: threading.Event, *, wakes: bool) -> None:
        self.rank, self.size, self.generation = place
        self._group, self._lost, self._wakes = group, lost, wakes
        self._work: Any = None
        self.waits: float | None = None
        self._leaving = threading.Lock()
        self._slice = datetime.timedelta(seconds=LOOK_S)

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
            work = None if self._wakes else self._work
        if group is None:
            return
        # An abort takes up to seconds, in which whoever called this has to go on: it may be the thread that beats.
        drop = partial(_drop, [group], work, aborts=self._wakes)
        del group
        threading.Thread(target=drop, daemon=True, name="drop").start()

    def _wait(self, name: str, *arguments: Any) -> None:
        group = self._group
        if group is None or self._lost.is_set():
            raise GroupLost("a member is gone")
        self.waits = time.perf_counter()
        try:
            if self._wakes:
                self._finish(getattr(group, name)(*arguments))
                return
            with self._leaving:  # so that who abandons the group knows what is under way in it
                if self._group is None:
                    raise GroupLost("a member is gone")
                self._work = work = getattr(group, name)(*arguments)
            while not self._is_over(work):
                if self._is_left():
                    raise GroupLost("a member is gone")
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

    def _is_over(self, work: Any) -> bool:
        """Wait for a slice of time; say whether the operation is over. Raises RuntimeError if it failed."""
        try:
            work.wait(self._slice)
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait(self._slice)  # it ended just now; or it failed, and then it raises again
        return True


def _drop(held: list[Any], work: Any, *, aborts: bool) -> None:
    """Abort the group in `held` if it can be; destroy it once nobody else holds it and `work`, its last one, is over.

    To destroy it earlier would wait for that, and whoever comes out of such a wait while Python exits aborts the
    process. It is over when the other members let go of the group, too, or their connections end.
    """
    if aborts:
        with contextlib.suppress(RuntimeError):
            held[0].abort()
    while (work is not None and not work.is_completed()) or sys.getrefcount(held[0]) > ALONE:
        if _exiting.wait(LOOK_S):
            threading.Event().wait()  # the process ends, and these threads with it
    with _destroying:
        held.clear()


@atexit.register
def _let_finish() -> None:
    """Wait until no group is being destroyed, and let no other begin."""
    _exiting.set()
    _destroying.acquire(timeout=EXIT_S)
