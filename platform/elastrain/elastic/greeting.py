"""How two processes of a run prove to each other that they know its token, before anything else is said.

By the challenges of Python's `multiprocessing`, both ways: the token itself is never sent. Where Ray's gRPC goes over
TLS, so does all of this and what follows. No Ray, no torch.
"""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from elastrain.elastic.tls import Credentials, TlsConnection, credentials, misfits_named

GREETING_S = 60.0  # within which the other side has to prove that it knows the token, on a busy machine, too


def listen(host: str) -> socket.socket:
    """Return a socket that listens on this address of the machine alone, on a port of the kernel's choice.

    Raises ResourceError where TLS is on and this machine's certificate cannot be used.
    """
    credentials()
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256)


def admit(sock: socket.socket, token: bytes, *, send_s: float | None = None) -> Connection:
    """Return the connection of somebody who came in and knows the token; sending over it waits at most `send_s`.

    Raises AuthenticationError, OSError or EOFError if that one does not, or is silent; then it is closed.
    """
    connection, proof = _opened(sock, token, credentials(), listens=True, send_s=send_s)
    with _greeting(connection):
        deliver_challenge(connection, proof)
        answer_challenge(connection, proof)
    return connection


def call(address: tuple[str, int], token: bytes) -> Connection:
    """Return a connection to who listens at `address` and knows the token; raises as `admit`.

    Raises ResourceError where TLS is on and one side's certificate is not good for the other.
    """
    held = credentials()
    sock = socket.create_connection(address, timeout=GREETING_S)
    with misfits_named(address):
        connection, proof = _opened(sock, token, held, listens=False)
        with _greeting(connection):
            answer_challenge(connection, proof)
            deliver_challenge(connection, proof)
    return connection


def hang_up(connection: Connection) -> None:
    """End a connection that another thread reads from: that one sees its end, and closes it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


def bare(connection: Connection) -> socket.socket:
    """Return the socket of a connection, which is not to be used any more."""
    if isinstance(connection, TlsConnection):
        return connection.release()
    with connection:
        return socket.socket(fileno=os.dup(connection.fileno()))


def _opened(
    sock: socket.socket, token: bytes, held: Credentials | None, *, listens: bool, send_s: float | None = None
) -> tuple[Connection, bytes]:
    """Return the connection over a socket, and what its sides are to prove that they know."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if held is not None:
        sock.settimeout(GREETING_S)
        secured = held.secured(sock, listens=listens)
        return TlsConnection(secured, send_s), held.bound(token, secured)
    sock.settimeout(None)
    if send_s is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, int(send_s * 1e6)))
    return Connection(sock.detach()), token


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
