"""Ports: which ones the processes of a cluster hold open on this machine, and whether one opens to who has no token.

Knows Ray's services by name only. Nothing is asked for that changes anything.
"""

import contextlib
import http.client
import os
import socket
import ssl
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Literal

import grpc

from elastrain.cluster.environment import uses_tls

Answer = Literal["refused", "open", "metrics", "foreign", "away"]
"""Of a port: wants a token or certificate, answers anybody, tells anybody numbers, is not Ray's, is not there."""

KNOCK_S = 5.0
GREETING_S = 1.0  # who greets does so at once; all others wait for us
AT_ONCE = 32
LISTENS = "0A"  # the state of a socket, as the kernel writes it
# One method of each service that only reads. Who serves it and checks tokens says so before it looks at the request.
READS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetSystemConfig",
    "/ray.rpc.CoreWorkerService/NumPendingTasks",
    "/ray.rpc.LogService/ListLogs",
    "/ray.rpc.RayletDriver/ClusterInfo",
)
OBJECTS = "/ray.rpc.ObjectManagerService/Pull"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"  # HTTP/2: preface and empty settings
_RIDDLE = b"#CHALLENGE#"  # of Python's multiprocessing
_PAGE = "/metrics"  # what exporters serve; all others of Ray's HTTP servers ask for a token before they look


@dataclass(frozen=True, order=True, slots=True)
class Door:
    """A port: whose it is, and where."""

    name: str
    host: str
    port: int


@dataclass(frozen=True, order=True, slots=True)
class Listener:
    """A socket that listens on this machine: its process, its address (`0.0.0.0` and `::` are all), its port."""

    process: str
    pid: int
    address: str
    port: int

    @property
    def everywhere(self) -> bool:
        """Whether it takes connections on every address of the machine."""
        return ip_address(self.address).is_unspecified

    @property
    def reachable(self) -> str:
        """An address of this machine at which it can be asked."""
        return "127.0.0.1" if self.everywhere else self.address


def knock_all(doors: Iterable[Door]) -> dict[Door, Answer]:
    """Return what each door answers who has no token."""
    asked = list(doors)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(asked, pool.map(lambda door: knock(door.host, door.port), asked), strict=True))


def knock(host: str, port: int) -> Answer:
    """Return what a port answers to somebody without token and without certificate."""
    try:
        socket.create_connection((host, port), timeout=KNOCK_S).close()
    except OSError:
        return "away"
    if _mutual_tls(host, port):
        return "refused"
    return _by_challenge(host, port) or _by_rpc(host, port) or _by_http(host, port) or "foreign"


def speaks_tls(host: str, port: int) -> bool:
    """Say whether a port begins with TLS."""
    try:
        with _tls(host, port):
            return True
    except ssl.SSLError as error:
        return "ALERT" in str(error).upper() and "WRONG_VERSION" not in str(error).upper()
    except OSError:
        return False


def check_tls(host: str, port: int) -> None:
    """Raise ConnectionError where one side has TLS on and the other has not: Ray itself would wait for minutes."""
    ours = uses_tls()
    theirs = speaks_tls(host, port)
    if theirs and not ours:
        raise ConnectionError("it wants a certificate; set RAY_USE_TLS=1 and RAY_TLS_* as its nodes do")
    if ours and not theirs:
        raise ConnectionError("RAY_USE_TLS is set here, and the cluster has no TLS")
    if ours:
        _recognised(host, port)


def _recognised(host: str, port: int) -> None:
    """Raise ConnectionError unless both sides' certificates are of one authority, and theirs is for this address."""
    try:
        context = ssl.create_default_context(cafile=os.environ["RAY_TLS_CA_CERT"])
        context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection((host, port), timeout=KNOCK_S)
        with plain, context.wrap_socket(plain, server_hostname=host) as connection:
            connection.sendall(_HELLO)
            if connection.recv(1) == b"":
                raise ConnectionError("it refuses our certificate")
    except KeyError as error:
        raise ConnectionError(f"RAY_USE_TLS is set, and {error} is not") from None
    except OSError as error:  # what ssl raises, and files that are not there
        raise ConnectionError(f"the certificates do not fit: {getattr(error, 'reason', None) or error}") from None


def _tls(host: str, port: int) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # who it is does not matter, only what it asks
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection((host, port), timeout=KNOCK_S)
    try:
        return context.wrap_socket(plain)
    except OSError:
        plain.close()
        raise


def _mutual_tls(host: str, port: int) -> bool:
    """Say whether a port wants a certificate: by TLS 1.3 the refusal comes after the handshake."""
    if not speaks_tls(host, port):
        return False
    try:
        with _tls(host, port) as connection:
            connection.sendall(_HELLO)
            return connection.recv(1) == b""
    except OSError:
        return True


def _by_challenge(host: str, port: int) -> Answer | None:
    """Return `refused` where a port greets with a riddle that needs a token, as a run's membership does."""
    try:
        with socket.create_connection((host, port), timeout=KNOCK_S) as connection:
            connection.settimeout(GREETING_S)
            return "refused" if _RIDDLE in connection.recv(64) else None
    except OSError:
        return None


def _by_rpc(host: str, port: int) -> Answer | None:
    """Return what gRPC answers, None where nothing speaks it."""
    known = False
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_retries", 0)]) as channel:
        for method in (*READS, OBJECTS):  # the objects last: by then the raylet's own service has been refused
            try:
                channel.unary_unary(method)(b"", timeout=KNOCK_S)
            except grpc.RpcError as error:
                code = error.code()
                if code == grpc.StatusCode.UNAUTHENTICATED:
                    return "refused"
                if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return None
                known = known or code != grpc.StatusCode.UNIMPLEMENTED
            else:
                known = True
            if known:
                return "open"
    return "foreign"


def _by_http(host: str, port: int) -> Answer | None:
    """Return what HTTP answers, None where nothing speaks it."""
    connection = http.client.HTTPConnection(host, port, timeout=KNOCK_S)
    try:
        connection.request("GET", _PAGE)
        answer = connection.getresponse()
        body = answer.read(200)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    if answer.status in (401, 403):
        return "refused"
    return "metrics" if answer.status == 200 and body.startswith(b"# HELP") else "open"


# --- this machine


def listeners(marks: Iterable[str], pids: Iterable[int] = ()) -> list[Listener]:
    """Return the listening sockets of `pids`, of processes whose arguments name a mark, and of all below them.

    A mark is a folder, or an address that an argument ends in.
    Processes of other users are passed over: the kernel does not show their sockets.
    """
    held = dict(_inodes())
    family = _family(list(marks), set(pids))
    return sorted({Listener(_name(pid), pid, *held[inode]) for pid in family for inode in _sockets(pid) & held.keys()})


def _inodes() -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the listening TCP sockets of this machine: inode, address and port."""
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _lines(path):
            (
                _,
                where,
                _,
                state,
                *_,
            ) = line.split()
            if state == LISTENS:
                address, _, port = where.partition(":")
                yield line.split()[9], (_address(address), int(port, 16))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()[1:]
    except OSError:  # no IPv6
        return []


def _address(text: str) -> str:
    """Return an address as people write it; the kernel writes words of four bytes in the machine's order.

    >>> _address("0100007F"), _address("00000000000000000000000000000000"), _address("0000000000000000FFFF00000100007F")
    ('127.0.0.1', '::', '127.0.0.1')
    """
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    if len(words) == 1:
        return str(IPv4Address(words[0]))
    long = IPv6Address(b"".join(words))
    return str(long.ipv4_mapped or long)


def _family(marks: list[str], found: set[int]) -> set[int]:
    """Return the processes `found` or told by one of the marks, and all that descend from them."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # ended meanwhile
            continue
        if any(each.endswith(mark) or f"{mark}/" in each for mark in marks for each in arguments):
            found.add(int(entry.name))
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found


def _sockets(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # this one alone was closed meanwhile
                target = str(link.readlink())
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found


def _name(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    if command[0].startswith("ray::"):
        return command[0][5:].split()[0]
    program = next((Path(each).name for each in command[1:] if each.endswith(".py")), Path(command[0]).name)
    return program.removesuffix(".py")
