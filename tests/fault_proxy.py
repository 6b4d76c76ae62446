"""A proxy in front of a real S3 server that does what networks and busy servers do, when a test tells it to.

It is a process of its own and passes requests on as they are, so that their signatures, made for its address, hold.
"""

import asyncio
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

FAULTS = ("503", "500", "403", "301", "400", "reset", "truncate", "lost", "hang", "trickle")
PIECE = 256 << 10  # bytes that are passed on at once
TRICKLE_BYTES_PER_S = 2000.0
CODES = {"503": "SlowDown", "500": "InternalError", "403": "AccessDenied"}


class Proxy:
    """What a test says to its proxy. `environment` leads to it as the server's own leads to the server."""

    def __init__(self, process: "subprocess.Popen[str]", environment: Mapping[str, str]) -> None:
        self._process = process
        self.environment = {**environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._said()['port']}"}

    def fault(
        self, kind: str, *, share: float = 1.0, times: int | None = None, method: str = "", key: str = "", seed: int = 0
    ) -> None:
        """Do `kind` to requests from now on, as `fault_each` does, whose path and query hold one key."""
        self.fault_each(kind, [key], share=share, times=times, method=method, seed=seed)

    def fault_each(
        self,
        kind: str,
        keys: Sequence[str],
        *,
        share: float = 1.0,
        times: int | None = None,
        method: str = "",
        seed: int = 0,
    ) -> None:
        """From now on do `kind` to requests, instead of what was done before.

        Answer "503", "500" or "403", or "400 ExpiredToken" and the like; "reset" the connection on the request;
        "truncate": end the connection in the midst of a body, the client's if it sends one; "lost": the request is
        carried out and its answer never comes; "hang": say nothing more; "trickle": answer 2 kB/s. Of the requests
        whose method begins with `method` and whose path and query hold one of the keys, a `share` is hit, drawn from
        `seed`, and no more than `times` of them for each key.
        """
        assert kind.split(" ")[0] in FAULTS, kind
        left = dict.fromkeys(keys, times)
        self._tell(fault={"kind": kind, "share": share, "left": left, "method": method, "seed": seed})

    def throttle(self, *, first_byte_ms: float = 0.0, bytes_per_s: float | None = None) -> None:
        """Delay each answer, and pass on its body, and what is sent, at a rate for each connection."""
        self._tell(throttle={"first_byte_ms": first_byte_ms, "bytes_per_s": bytes_per_s})

    def unplug(self) -> None:
        """End all connections and refuse new ones, until `clear`."""
        self._tell(unplug=True)

    def clear(self) -> None:
        """Only pass on, from now on; a throttle stays."""
        self._tell(clear=True)

    def counts(self) -> dict[str, int]:
        """Return how many requests came by method ("GET"), and how many were hit by kind of fault ("503")."""
        found: dict[str, int] = self._tell()["counts"]
        return found

    def _tell(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._said()

    def _said(self) -> dict[str, Any]:
        assert self._process.stdout
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said


@contextlib.contextmanager
def proxying(environment: Mapping[str, str]) -> Iterator[Proxy]:
    """Run a proxy in front of the server that `environment` leads to; it ends with the context or with its parent."""
    port = environment["AWS_ENDPOINT_URL"].rpartition(":")[2]
    command = [sys.executable, __file__, port]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Proxy(process, environment)
        finally:
            process.kill()


class _Server:
    """The other side of `Proxy`: listens on a port, and on standard input for what to do."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._counts: Counter[str] = Counter()
        self._fault: dict[str, Any] | None = None
        self._random = random.Random(0)  # noqa: S311 -- repeatable, not secret
        self._first_byte_s = 0.0
        self._bytes_per_s: float | None = None
        self._cleared = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None
        self._port = 0

    async def run(self) -> None:
        """Serve until standard input ends."""
        await self._listen()
        self._say(port=self._port)
        while line := await asyncio.to_thread(sys.stdin.readline):
            await self._obey(json.loads(line))
            self._say(counts=self._counts)

    def _say(self, **what: Any) -> None:
        print(json.dumps(what), flush=True)  # noqa: T201 -- to whom has started it

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=PIECE)
        self._port = self._listener.sockets[0].getsockname()[1]

    async def _obey(self, what: dict[str, Any]) -> None:
        if "fault" in what:
            self._fault = what["fault"]
            self._random.seed(what["fault"]["seed"])
        if "throttle" in what:
            self._first_byte_s = what["throttle"]["first_byte_ms"] / 1000
            self._bytes_per_s = what["throttle"]["bytes_per_s"]
        if "unplug" in what and self._listener:
            self._listener.close()
            self._listener = None
            for writer in list(self._open):
                _reset(writer)
        if "clear" in what:
            self._fault = None
            self._cleared.set()  # who hangs is let go
            self._cleared = asyncio.Event()
            if self._listener is None:
                await self._listen()

    def _hit(self, method: str, path: str) -> str:
        """Return the fault of a request, "" for none."""
        self._counts[method] += 1
        fault = self._fault
        if not fault or not method.startswith(fault["method"]):
            return ""
        left: dict[str, int | None] = fault["left"]
        key = next((key for key in left if key in unquote(path)), None)
        if key is None or left[key] == 0 or self._random.random() >= fault["share"]:
            return ""
        if (times := left[key]) is not None:
            left[key] = times - 1
        self._counts[fault["kind"]] += 1
        return str(fault["kind"])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of a client, over one to the server."""
        self._open.add(writer)
        behind: asyncio.StreamWriter | None = None
        try:
            source, behind = await asyncio.open_connection("127.0.0.1", self._upstream, limit=PIECE)
            while head := await _head(reader):
                method, path, _ = head.line.split(" ", 2)
                kind = self._hit(method, path)
                if not await self._exchange(head, kind, (reader, writer), (source, behind)):
                    break
        except (OSError, EOFError, ValueError):
            _reset(writer)
        finally:
            self._open.discard(writer)
            for end in filter(None, (writer, behind)):
                end.close()

    async def _exchange(self, head: "_Head", kind: str, client: "_Ends", server: "_Ends") -> bool:
        """Pass on one request and its answer; return whether the connection may be used again."""
        reader, writer = client
        source, behind = server
        await self._unless_cut_off(kind)
        if head.fields.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if kind[:1].isdigit():
            async for _ in _body(reader, head):
                pass
            writer.write(_refusal(kind, head))
            await writer.drain()
            return True
        behind.write(head.raw)
        cut = head.length // 2 if kind == "truncate" and head.length > 0 else None
        await self._pass_on(_body(reader, head), behind, self._bytes_per_s, cut)
        answer = await _head(source)
        while answer and answer.status == "100":
            answer = await _head(source)
        if not answer or kind == "lost":
            raise ConnectionResetError
        await asyncio.sleep(self._first_byte_s)
        writer.write(answer.raw)
        if not head.line.startswith("HEAD ") and answer.status not in ("204", "304"):
            rate = TRICKLE_BYTES_PER_S if kind == "trickle" else self._bytes_per_s
            cut = answer.length // 2 if kind == "truncate" else None
            await self._pass_on(_body(source, answer, ends=True), writer, rate, cut)
        await writer.drain()
        return answer.fields.get("connection") != "close"

    async def _unless_cut_off(self, kind: str) -> None:
        if kind == "hang":
            await self._cleared.wait()
        if kind in ("hang", "reset"):
            raise ConnectionResetError

    async def _pass_on(
        self, pieces: AsyncIterator[bytes], writer: asyncio.StreamWriter, rate: float | None, cut: int | None
    ) -> None:
        """Write pieces at `rate` bytes a second; after `cut` bytes the connection ends."""
        clock = asyncio.get_running_loop().time
        start, sent = clock(), 0
        async for piece in pieces:
            step = len(piece) if rate is None else max(1, min(len(piece), int(rate / 50)))
            for at in range(0, len(piece), step):
                part = piece[at : at + step] if cut is None else piece[at : at + min(step, cut - sent)]
                writer.write(part)
                sent += len(part)
                if cut is not None and sent >= cut:
                    await writer.drain()
                    writer.close()
                    raise ConnectionResetError
                if rate is not None:
                    await asyncio.sleep(start + sent / rate - clock())
            await writer.drain()


@dataclass(frozen=True)
class _Head:
    """First line and fields of a request or an answer."""

    raw: bytes
    line: str
    fields: dict[str, str]

    @property
    def status(self) -> str:
        """The status of an answer."""
        return self.line.split(" ")[1]

    @property
    def length(self) -> int:
        """Bytes of the body, -1 where nobody says; without what marks the chunks of one that is sent in chunks."""
        return int(self.fields.get("x-amz-decoded-content-length") or self.fields.get("content-length") or -1)


_Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _head(reader: asyncio.StreamReader) -> _Head | None:
    """Read a head; None where the connection has ended."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    line, *fields = raw.decode("latin-1").strip().split("\r\n")
    pairs = (field.partition(":") for field in fields)
    return _Head(raw, line, {name.strip().lower(): value.strip() for name, _, value in pairs})


async def _body(reader: asyncio.StreamReader, head: _Head, *, ends: bool = False) -> AsyncIterator[bytes]:
    """Yield a body as it is sent, chunk sizes and all; `ends`: one of no length ends with the connection."""
    if head.fields.get("transfer-encoding", "").lower() == "chunked":
        async for piece in _chunks(reader):
            yield piece
        return
    left = head.length
    while left > 0 or (ends and left < 0):
        piece = await reader.read(min(PIECE, left) if left > 0 else PIECE)
        if not piece:
            if left > 0:
                raise EOFError
            return
        left -= len(piece) if left > 0 else 0
        yield piece


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    size = b""
    while size.strip() != b"0":
        size = await reader.readuntil(b"\r\n")
        yield size
        if length := int(size.partition(b";")[0], 16):
            yield await reader.readexactly(length + 2)
    line = b""
    while line != b"\r\n":
        line = await reader.readuntil(b"\r\n")
        yield line


def _refusal(kind: str, head: _Head) -> bytes:
    status, _, code = kind.partition(" ")
    code = code or CODES[status]
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
    start = f"HTTP/1.1 {status} {code}\r\nContent-Length: {len(text)}\r\n\r\n"
    return start.encode() + (b"" if head.line.startswith("HEAD ") else text)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a dead peer would: with a reset, whatever is still to be sent."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


if __name__ == "__main__":
    asyncio.run(_Server(int(sys.argv[1])).run())
