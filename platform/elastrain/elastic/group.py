"""Process groups of one generation: gloo between CPUs, NCCL between GPUs, outside torch's global state.

torch's default group cannot be re-formed while a process lives; these can: each generation is a new object over a new
prefix of rank 0's store, and the one before is dropped.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined] # made in C++

from elastrain.training.reduce import Group, GroupLost, Solo

TIMEOUT = datetime.timedelta(minutes=30)  # a death is seen at once; this is for a worker that hangs


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """Who trains together: the members' names in rank order, and the address of rank 0's store."""

    number: int
    members: tuple[str, ...]
    store: tuple[str, int]


class Door:
    """A worker's own store, open from the start, so that any worker can be rank 0 of the next generation."""

    def __init__(self, host: str) -> None:
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        self.address: tuple[str, int] = (host, self._store.port)

    def join(self, generation: Generation, name: str, device: torch.device) -> Group:
        """Return the group of a generation as seen by member `name`; raises GroupLost if it cannot form."""
        rank, size = generation.members.index(name), len(generation.members)
        if size == 1:
            return Solo(generation.number)
        host, port = generation.store
        mine = generation.store == self.address
        try:
            store = self._store if mine else TCPStore(host, port, is_master=False, timeout=TIMEOUT)
            return TorchGroup(
                PrefixStore(f"generation-{generation.number}", store), rank, size, generation.number, device
            )
        except RuntimeError as error:
            raise GroupLost(f"generation {generation.number} did not form: {error}") from error


class TorchGroup:
    """A group over torch's gloo or NCCL backend."""

    def __init__(self, store: Any, rank: int, size: int, generation: int, device: torch.device) -> None:
        self.rank, self.size, self.generation = rank, size, generation
        if device.type == "cuda":
            from torch.distributed.distributed_c10d import ProcessGroupNCCL  # noqa: PLC0415 -- absent in CPU builds

            options = ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT  # noqa: SLF001 -- its only way in
            self._group: Any = ProcessGroupNCCL(store, rank, size, options)
        else:
            from torch.distributed.distributed_c10d import ProcessGroupGloo  # noqa: PLC0415

            self._group = ProcessGroupGloo(store, rank, size, TIMEOUT)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all members; raises GroupLost if one is gone."""
        self._wait(self._group.allreduce, [tensor])

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace `tensor` by the one of rank `source`; raises GroupLost if a member is gone."""
        self._wait(self._group.broadcast, tensor, source)

    def all_to_all(self, output: Tensor, tensor: Tensor, received: list[int], sent: list[int]) -> None:
        """Send `sent[r]` elements to each rank r, and receive `received[r]` from it; raises GroupLost."""
        self._wait(self._group.alltoall_base, output, tensor, received, sent)

    def all_gather(self, output: Tensor, tensor: Tensor) -> None:
        """Put the equally long tensors of all members into `output`; raises GroupLost if one is gone."""
        self._wait(self._group._allgather_base, output, tensor)  # noqa: SLF001 -- what torch's own function calls

    def _wait(self, operation: Callable[..., Any], *arguments: Any) -> None:
        try:
            operation(*arguments).wait()
        except RuntimeError as error:
            raise GroupLost(str(error)) from error


def ranked(workers: Sequence[tuple[str, str, int]]) -> tuple[str, ...]:
    """Return worker names in rank order: workers of a node side by side, in the order of their places in the cell.

    `workers` holds (name, node, place in the cell).

    >>> ranked([("c", "n2", 1), ("a", "n1", 0), ("b", "n1", 2)])
    ('a', 'b', 'c')
    """
    first_place: dict[str, int] = {}
    for _, node, place in workers:
        first_place[node] = min(place, first_place.get(node, place))
    return tuple(name for name, _, _ in sorted(workers, key=lambda w: (first_place[w[1]], w[1], w[2])))
