"""A worker's door: where the others of its generation come in, whoever of them knows the token.

It is open from the start, so that any worker can be rank 0 of the next generation. Each two members have a connection
of their own, which the one of the higher rank makes; over them a `Mesh` sums on CPUs. Between GPUs NCCL does, which
first asks a store at the door of rank 0.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection

import torch

from elastrain.elastic.greeting import admit, bare, call, listen
from elastrain.elastic.mesh import Mesh
from elastrain.elastic.protocol import Generation
from elastrain.training.reduce import Group, GroupLost, Solo

CONNECT_S = 60.0  # for what nobody waits for any more: who waits is woken by the membership
LOOK_S = 0.02  # how often a wait looks whether its generation is over
MEMBER, STORE = "member", "store"


class Door:
    """Listens on this address of the machine alone, at `address`, and forms the groups of this worker."""

    def __init__(self, host: str, token: bytes) -> None:
        self._token, self._listener = token, listen(host)
        self.address: tuple[str, int] = (host, self._listener.getsockname()[1])
        self._came: dict[tuple[int, int], socket.socket] = {}  # those who wait to be joined, by generation and rank
        self._values: dict[tuple[int, str], bytes] = {}  # of a generation's store
        self._newest = 0  # generation that was joined
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True, name="door").start()

    def join(self, generation: Generation, name: str, device: torch.device, lost: threading.Event) -> Group:
        """Return the group of a generation as seen by member `name`.

        Raises GroupLost if it cannot form, or once `lost` is set; so do the group's operations.
        """
        rank, size = generation.rank(name), len(generation.members)
        assert rank is not None, "whoever joins is a member"
        if size == 1:
            return Solo(generation.number)
        place = (rank, size, generation.number)
        self._forget(generation.number)

        def connect() -> Group:
            if device.type == "cuda":
                from elastrain.elastic.nccl import DoorStore, nccl_group  # noqa: PLC0415 -- GPUs alone need it

                first = self._call(generation, 0, (STORE, generation.number, rank), lost)
                return nccl_group(DoorStore(first), place, device, lost)
            return Mesh(self._meet(generation, rank, lost), place, lost)

        return _unless(lost, connect, f"generation {generation.number} did not form")

    def serve_store(self, connection: Connection, generation: int) -> None:
        """Answer one member's questions for the values of a generation until it hangs up."""
        while True:
            kind, key, *value = connection.recv()
            with self._changed:
                if kind == "set":
                    self._values[generation, key] = value[0]
                    self._changed.notify_all()
                while (generation, key) not in self._values:
                    if generation < self._newest:
                        return
                    self._changed.wait()
                answer = self._values[generation, key]
            connection.send(answer)

    # --- who comes in

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # no room for one more file, perhaps: who came tries again
                time.sleep(LOOK_S)
                continue
            threading.Thread(target=self._serve, args=(sock,), daemon=True, name="door-guest").start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError, AuthenticationError):
            connection = admit(sock, self._token)
            kind, generation, rank = connection.recv()
            if kind == STORE:
                with connection:
                    self.serve_store(connection, generation)
                return
            with self._changed:
                before = self._came.pop((generation, rank), None)  # whose greeting failed at its end
                if generation < self._newest:
                    connection.close()
                else:
                    self._came[generation, rank] = bare(connection)
                    self._changed.notify_all()
            if before is not None:
                before.close()

    # --- where this one goes

    def _meet(self, generation: Generation, rank: int, lost: threading.Event) -> dict[int, socket.socket]:
        """Return the connections to all other members, by rank."""
        number, found = generation.number, dict[int, socket.socket]()
        try:
            for other in range(rank):
                found[other] = bare(self._call(generation, other, (MEMBER, number, rank), lost))
            for other in range(rank + 1, len(generation.members)):
                found[other] = self._awaited(number, other, lost)
        except BaseException:
            for sock in found.values():
                sock.close()
            raise
        return found

    def _call(
        self, generation: Generation, rank: int, hello: tuple[str, int, int], lost: threading.Event
    ) -> Connection:
        """Return a connection to a member, which may have died: then the membership says so, and we try until then."""
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                connection = call(generation.members[rank].worker.door, self._token)
                connection.send(hello)
            except (OSError, EOFError):
                if lost.wait(LOOK_S) or time.monotonic() > deadline:
                    raise
            else:
                return connection

    def _awaited(self, generation: int, rank: int, lost: threading.Event) -> socket.socket:
        deadline = time.monotonic() + CONNECT_S
        with self._changed:
            while (generation, rank) not in self._came:
                if lost.is_set() or time.monotonic() > deadline:
                    raise EOFError(f"rank {rank} did not come")
                self._changed.wait(LOOK_S)
            return self._came.pop((generation, rank))

    def _forget(self, generation: int) -> None:
        """Drop what is left of generations before this one."""
        with self._changed:
            self._newest = generation
            self._changed.notify_all()
            for key in [key for key in self._came if key[0] < generation]:
                self._came.pop(key).close()
            for name in [name for name in self._values if name[0] < generation]:
                del self._values[name]


def _unless(lost: threading.Event, make: Callable[[], Group], what: str) -> Group:
    """Return what `make` returns, in a thread of its own: to connect with somebody who is gone blocks for long."""
    made: list[Group | BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            made.append(make())
        except BaseException as error:  # noqa: BLE001 -- whoever waits must hear of it
            made.append(error)
        if lost.is_set() and hasattr(made[0], "abandon"):
            made[0].abandon()
        done.set()

    threading.Thread(target=work, daemon=True, name="connect").start()
    while not done.wait(LOOK_S / 4):
        if lost.is_set():
            raise GroupLost(f"{what}: a member is gone")
    if isinstance(made[0], BaseException):
        raise GroupLost(f"{what}: {made[0]}") from made[0]
    return made[0]
