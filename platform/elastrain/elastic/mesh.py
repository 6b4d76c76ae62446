"""Groups of workers between CPUs: what is summed, sent and gathered, over a connection between each two members.

gloo would do the same, and asks whoever connects for nothing. These connections come from a `Door`, which asks for a
token. Whoever waits is woken at once when a member is gone, since the kernel ends its connections, or when the group is
abandoned; nothing touches a tensor after that.
"""

import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from elastrain.training.reduce import GroupLost

LOOK_S = 0.02  # how often a wait looks whether the generation is over
HEAD = struct.Struct("!QQ")  # before what is sent: which exchange of the group it belongs to, and how many bytes follow
SMALL = 1 << 17
"""Bytes up to which it takes longer to meet twice than to send everything to everybody."""
CHUNK = 1 << 22
"""Bytes a member of a sum that are under way at a time: what it takes besides the tensor has a bound."""


class Flow:
    """One exchange with one other member: what is still to be sent to it, and to be received from it."""

    def __init__(self, sock: socket.socket, number: int, sent: memoryview, received: memoryview) -> None:
        self._socket, self._number, self._length = sock, number, len(received)
        self._out = [memoryview(HEAD.pack(number, len(sent))), sent] if sent else []
        self._head = bytearray(HEAD.size)
        self._into = [memoryview(self._head), received] if received else []

    def events(self) -> int:
        """Return what to wait for on the socket; 0 once all is done."""
        return (select.POLLOUT if self._out else 0) | (select.POLLIN if self._into else 0)

    def go(self) -> None:
        """Send and receive what can be without waiting; raises OSError, EOFError, ValueError."""
        try:
            while self._out:
                _advance(self._out, self._socket.sendmsg(self._out))
        except BlockingIOError:
            pass
        try:
            while self._into:
                count = self._socket.recvmsg_into(self._into)[0]
                if not count:
                    raise EOFError
                _advance(self._into, count)
                if len(self._into) < 2:
                    self._check()
        except BlockingIOError:
            pass

    def _check(self) -> None:
        """See, once the head is there, that the other member does what this one does."""
        number, length = HEAD.unpack(self._head)
        if (number, length) != (self._number, self._length):
            raise ValueError(f"exchange {number} of {length} bytes came in place of {self._number} of {self._length}")


def _advance(pieces: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes, and pieces that are empty."""
    while pieces and count >= len(pieces[0]):
        count -= len(pieces.pop(0))
    if pieces and count:
        pieces[0] = pieces[0][count:]


class Mesh:
    """A group whose members are connected each with each; `place` is (rank, size, generation).

    `peers` are the connections by rank. `lost`, once set, ends it; so does `abandon`. `waits` is since when an
    operation has been under way, by `time.perf_counter`, for other threads to see.
    """

    def __init__(self, peers: Mapping[int, socket.socket], place: tuple[int, int, int], lost: threading.Event) -> None:
        self.rank, self.size, self.generation = place
        self.waits: float | None = None
        self._peers, self._lost, self._left = dict(peers), lost, False
        self._number = 0
        self._using = threading.Lock()
        self._kept = torch.empty(0)
        self._close = weakref.finalize(self, _close, list(self._peers.values()))  # also where nobody abandons it
        for sock in self._peers.values():
            sock.settimeout(0.0)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all members, added in their order; raises GroupLost if one is gone."""
        if tensor.nbytes <= SMALL:
            rows = self._scratch(tensor, self.size * tensor.numel()).view(self.size, tensor.numel())
            self.all_gather(rows, tensor)
            _add_up(rows, tensor.view(-1))
            return
        for chunk in tensor.view(-1).split(self.size * (CHUNK // tensor.element_size())):
            self._reduce_chunk(chunk)

    def _reduce_chunk(self, chunk: Tensor) -> None:
        """Have each member add up a share, and gather the shares."""
        share = -(-len(chunk) // self.size)
        cuts = [chunk[rank * share : (rank + 1) * share] for rank in range(self.size)]
        mine = cuts[self.rank]
        rows = self._scratch(chunk, self.size * len(mine)).view(self.size, len(mine))
        rows[self.rank] = mine
        self._exchange([_bytes(cut) for cut in cuts], [_bytes(row) for row in rows])
        _add_up(rows, mine)
        self._exchange([_bytes(mine)] * self.size, [_bytes(cut) for cut in cuts])

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace `tensor` by the one of rank `source`; raises GroupLost if a member is gone."""
        data, none, others = _bytes(tensor), _NOTHING, range(self.size)
        if self.size == 2 or len(data) <= SMALL:
            gives = self.rank == source
            self._exchange([data if gives else none for _ in others], [data if r == source else none for r in others])
            return
        # The source sends each member a share, which that one sends on: nobody sends it all many times.
        share = -(-len(data) // self.size)
        cuts = [data[rank * share : (rank + 1) * share] for rank in others]
        mine = cuts[self.rank]
        if self.rank == source:
            self._exchange(cuts, [none] * self.size)
            self._exchange([mine] * self.size, [none] * self.size)
        else:
            self._exchange([none] * self.size, [mine if r == source else none for r in others])
            self._exchange([none if r == source else mine for r in others], cuts)

    def all_to_all(self, output: Tensor, tensor: Tensor, received: list[int], sent: list[int]) -> None:
        """Send `sent[r]` elements to each rank r, and receive `received[r]` from it; raises GroupLost."""
        gives, takes = tensor.split(sent), output.split(received)
        takes[self.rank].copy_(gives[self.rank])
        self._exchange([_bytes(part) for part in gives], [_bytes(part) for part in takes])

    def all_gather(self, output: Tensor, tensor: Tensor) -> None:
        """Put the equally long tensors of all members into `output`; raises GroupLost if one is gone."""
        rows = output.view(self.size, tensor.numel())
        rows[self.rank] = tensor.view(-1)
        self._exchange([_bytes(tensor)] * self.size, [_bytes(row) for row in rows])

    def abandon(self) -> None:
        """Leave the group for good, from any thread; whoever waits in it, here or elsewhere, gets GroupLost."""
        self._left = True
        for sock in self._peers.values():
            _end(sock)
        if not self._using.locked():  # else whoever uses them closes them: numbers of files are given out anew
            self._close()

    def _exchange(self, sent: Sequence[memoryview], received: Sequence[memoryview]) -> None:
        """Send `sent[r]` to each other rank r while `received[r]` is filled by it; this member's own do not count."""
        self._number += 1
        with self._in_use():
            flows = {
                sock.fileno(): Flow(sock, self._number, sent[rank], received[rank])
                for rank, sock in self._peers.items()
            }
            for flow in flows.values():
                flow.go()
            self._finish({number: flow for number, flow in flows.items() if flow.events()})

    def _finish(self, flows: dict[int, Flow]) -> None:
        """Wait for what could not be done at once."""
        poller = select.poll()
        for number, flow in flows.items():
            poller.register(number, flow.events())
        while flows:
            for number, _ in poller.poll(LOOK_S * 1000):
                flows[number].go()
                if events := flows[number].events():
                    poller.modify(number, events)
                else:
                    poller.unregister(number)
                    del flows[number]
            if self._left or self._lost.is_set():
                raise GroupLost("a member is gone")

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Use the connections; whatever goes wrong meanwhile ends the group, whose members are no longer in step."""
        self.waits = time.perf_counter()
        try:
            with self._using:
                if self._left or self._lost.is_set():
                    raise GroupLost("a member is gone")
                yield
        except (OSError, EOFError, ValueError) as error:
            self.abandon()
            raise GroupLost(f"a member is gone ({error})" if str(error) else "a member is gone") from error
        except GroupLost:
            self.abandon()
            raise
        finally:
            self.waits = None
            if self._left:
                self._close()

    def _scratch(self, like: Tensor, length: int) -> Tensor:
        """Return memory that is kept: touching fresh one takes as long as sending what is in it."""
        if self._kept.dtype != like.dtype or len(self._kept) < length:
            self._kept = like.new_empty(length)
        return self._kept[:length]


def _add_up(rows: Tensor, total: Tensor) -> None:
    """Put the sum of rows into `total`, added one after another."""
    total.copy_(rows[0])
    for row in rows[1:]:
        total.add_(row)


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _end(sock: socket.socket) -> None:
    with suppress(OSError):  # it has ended already
        sock.shutdown(socket.SHUT_RDWR)


_NOTHING = memoryview(b"")
