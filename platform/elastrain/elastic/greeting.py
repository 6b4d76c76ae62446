"""How two processes of a run prove to each other that they know its token, before anything else is said.

By the challenges of Python's `multiprocessing`, both ways: the token itself is never sent. No Ray, no torch.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

GREETING_S = 60.0  # within which the other side has to prove that it knows the token, on a busy machine, too


def listen(host: str) -> socket.socket:
    """Return a socket that listens on this address of the machine alone, on a port of the kernel's choice."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256)


def admit(sock: socket.socket, token: bytes) -> Connection:
    """Return the connection of somebody who came in and knows the token.

    Raises AuthenticationError, OSError or EOFError if that one does not, or is silent; then it is closed.
    """
    connection = _connection(sock)
    with _greeting(connection):
        deliver_challenge(connection, token)
        answer_challenge(connection, token)
    return connection


def call(address: tuple[str, int], token: bytes) -> Connection:
    """Return a connection to who listens at `address` and knows the token; raises as `admit`."""
    connection = _connection(socket.create_connection(address, timeout=GREETING_S))
    with _greeting(connection):
        answer_challenge(connection, token)
        deliver_challenge(connection, token)
    return connection


def hang_up(connection: Connection) -> None:
    """End a connection that another thread reads from: that one sees its end, and closes it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


def bare(connection: Connection) -> socket.socket:
    """Return the socket of a connection, which is not to be used any more."""
    with connection:
        return socket.socket(fileno=os.dup(connection.fileno()))


def _connection(sock: socket.socket) -> Connection:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(sock.detach())


@contextlib.contextmanager
def _greeting(connection: Connection) -> Iterator[None]:
    """Close a connection on which a greeting fails or takes too long."""
    late = threading.Timer(GREETING_S, hang_up, (connection,))
    late.daemon = True
    late.start()
    try:
        yield
    except BaseException:
        connection.close()
        raise
    finally:
        late.cancel()
