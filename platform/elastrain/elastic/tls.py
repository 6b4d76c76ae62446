"""TLS for what the processes of a run say to each other, wherever Ray's own gRPC has it: by Ray's variables.

Both sides show a certificate of the same authority. Not by which name or address: who can be called is known by the
run's token, which is proved inside, together with both certificates, so that nobody else's stands in between. No Ray,
no torch.
"""

import contextlib
import functools
import hmac
import io
import os
import re
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from elastrain.cluster.environment import uses_tls
from elastrain.errors import ResourceError

CERTIFICATE, KEY, AUTHORITY = VARIABLES = "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"
REMEDY = "`elastrain cluster certificates` makes them and prints the variables"
RECORD = 1 << 14  # the most bytes that TLS encrypts at a time
_WANTS = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
_ENDED = (ssl.SSLEOFError, ssl.SSLSyscallError, ssl.SSLZeroReturnError)  # of a process, perhaps: no misfit
_FIRST = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class TlsSocket(ssl.SSLSocket):
    """A socket that encrypts, to be used like a plain one that does not block; by one thread at a time."""

    def sendmsg(self, buffers: Sequence[Any], *_: Any) -> int:  # type: ignore[override] # without ancillary data
        """Send the first of the buffers, and what of the second has room beside it in a record.

        Raises BlockingIOError until all of that is sent: it then is to be called with the same again.
        """
        first, *others = buffers
        if others and len(first) < RECORD:
            first = b"".join((first, others[0][: RECORD - len(first)]))
        try:
            return self.send(first)
        except _WANTS:
            raise BlockingIOError from None

    def recvmsg_into(self, buffers: Sequence[Any], *_: Any) -> tuple[int, list[Any], int, None]:  # type: ignore[override]
        """Receive into the first of the buffers; only when this raises BlockingIOError is nothing there any more."""
        try:
            return self.recv_into(buffers[0]), [], 0, None
        except _WANTS:
            raise BlockingIOError from None

    def shutdown(self, how: int) -> None:
        """End the connection, from any thread: that of `ssl` would let another one send what is not encrypted."""
        socket.socket.shutdown(self, how)


class TlsConnection(Connection):
    """A connection over TLS, whose sending waits for at most `send_s`.

    As over a plain one, one thread may receive while another one sends. OpenSSL wants one at a time: none waits in it.
    To wait for the next message is to wait for the kernel: each begins a record of its own, none is decrypted before.
    """

    def __init__(self, sock: TlsSocket, send_s: float | None) -> None:
        super().__init__(sock.fileno())
        sock.settimeout(0.0)
        self._socket, self._send_s, self._using = sock, send_s, threading.Lock()

    def release(self) -> TlsSocket:
        """Return the socket; the connection is not to be used any more."""
        self._handle = None
        return self._socket

    def _send(self, buf: Any, write: Any = None) -> None:
        del write
        left = memoryview(buf)
        while left:
            left = left[self._when_ready(functools.partial(self._socket.send, left), self._send_s) :]

    def _recv(self, size: int, read: Any = None) -> io.BytesIO:
        del read
        found = io.BytesIO()
        while (left := size - found.tell()) > 0:
            piece = self._when_ready(functools.partial(self._socket.recv, left), None)
            if not piece:
                raise OSError("got end of file during message") if found.tell() else EOFError
            found.write(piece)
        return found

    def _close(self) -> None:
        with self._using:
            self._socket.close()

    def _when_ready(self, work: Callable[[], Any], limit_s: float | None) -> Any:
        """Return what `work` returns; wait for the other side as often as it wants that."""
        while True:
            with self._using:
                try:
                    return work()
                except ssl.SSLWantReadError:
                    event = select.POLLIN
                except ssl.SSLWantWriteError:
                    event = select.POLLOUT
            poller = select.poll()
            poller.register(self.fileno(), event)
            if not poller.poll(None if limit_s is None else limit_s * 1000):
                raise TimeoutError("the other side reads nothing")


@dataclass(frozen=True)
class Credentials:
    """This machine's certificate, and how to use it: as who listens, and as who calls."""

    listens: ssl.SSLContext
    calls: ssl.SSLContext
    certificate: bytes

    def secured(self, sock: socket.socket, *, listens: bool) -> TlsSocket:
        """Return a socket over which the other side has shown its certificate, within the time limit of `sock`."""
        made = (self.listens if listens else self.calls).wrap_socket(sock, listens, do_handshake_on_connect=False)
        assert isinstance(made, TlsSocket)
        try:
            made.do_handshake()
        except BaseException:
            made.close()
            raise
        return made

    def bound(self, token: bytes, to: TlsSocket) -> bytes:
        """Return what both sides make of the token and the certificates they see, the listener's first."""
        other = to.getpeercert(binary_form=True) or b""
        both = self.certificate + other if to.server_side else other + self.certificate
        return hmac.digest(token, both, "sha256")


def credentials() -> Credentials | None:
    """Return what this process shows and whom it believes, None where TLS is off; read once, as Ray does.

    Raises ResourceError if a certificate is missing or cannot be used.
    """
    if not uses_tls():
        return None
    missing = next((name for name in VARIABLES if not os.environ.get(name)), None)
    if missing:
        raise ResourceError(
            f"RAY_USE_TLS is set, and {missing} is not, on {socket.gethostname()}; set it where Ray starts: {REMEDY}"
        )
    return _read(*(os.environ[name] for name in VARIABLES))


@contextlib.contextmanager
def misfits_named(address: tuple[str, int]) -> Iterator[None]:
    """Say as ResourceError, which nobody tries again, why there is no TLS with who listens at an address."""
    try:
        yield
    except _ENDED:
        raise
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", None) or error.reason or str(error)
        raise ResourceError(
            f"no TLS between {socket.gethostname()} and {address[0]}:{address[1]} ({why}); both need RAY_USE_TLS=1 and "
            f"in {CERTIFICATE} a certificate, still valid, of the authority in {AUTHORITY}: {REMEDY}"
        ) from error


@functools.cache
def _read(certificate: str, key: str, authority: str) -> Credentials:
    for name, path in zip(VARIABLES, (certificate, key, authority), strict=True):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ResourceError(
                f"{name}: {path} cannot be read on {socket.gethostname()} ({error.strerror}); {REMEDY}"
            ) from error
    try:
        calls, listens = (
            _context(side, certificate, key, authority) for side in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)
        )
        first = _FIRST.search(Path(certificate).read_text())
        assert first is not None, "it was loaded"
    except (ssl.SSLError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise ResourceError(
            f"{CERTIFICATE}, {KEY} and {AUTHORITY} ({certificate}, {key}, {authority}) on {socket.gethostname()} "
            f"cannot be used together ({why}); {REMEDY}"
        ) from error
    return Credentials(listens, calls, ssl.PEM_cert_to_DER_cert(first[0]))


def _context(side: int, certificate: str, key: str, authority: str) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.sslsocket_class = TlsSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # both sides are of one version of ours
    context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(authority)
    return context
