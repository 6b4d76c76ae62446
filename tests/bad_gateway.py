"""A bad gateway: a real HTTP proxy in front of the server, which drops headers, spoils answers, or has a wrong clock.

Signatures cover the headers that it drops, so it signs what it has changed anew.
"""

import contextlib
import hashlib
import hmac
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.s3_server import ACCESS_KEY, SECRET_KEY


class Handler(BaseHTTPRequestHandler):
    """Passes on a request to `behind` and the answer back; see `bad_gateway`."""

    protocol_version = "HTTP/1.1"
    behind = ""
    dropped: tuple[str, ...] = ()
    spoiled = ""
    date = ""

    def do_GET(self) -> None:
        """Pass it on."""
        body = self._body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        if any(headers.pop(name, None) for name in self.dropped):
            headers["authorization"] = signature(self.command, self.path, headers)
        connection = http.client.HTTPConnection(self.behind, timeout=30)
        chunked = "transfer-encoding" in headers
        pieces = [body] if chunked else body
        connection.request(self.command, self.path, body=pieces, headers=headers, encode_chunked=chunked)
        answer = connection.getresponse()
        data = answer.read()
        if self.spoiled and self.command == "GET" and self.path.endswith(self.spoiled):
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, self.date if self.date and name == "Date" else value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        connection.close()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815 -- http.server's names

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def bad_gateway(server: str, *, dropped: tuple[str, ...] = (), spoiled: str = "", date: str = "") -> Iterator[str]:
    """Run the proxy in front of `http://host:port`; yield its own URL.

    `dropped` names headers of requests in lower case; of what is read from paths that end in `spoiled` the last bit is
    flipped; `date` stands in each answer.
    """
    how = {"behind": server.removeprefix("http://"), "dropped": dropped, "spoiled": spoiled, "date": date}
    handler = type("Handler", (Handler,), how)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.daemon_threads = True
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}"
        finally:
            proxy.shutdown()
            thread.join()


def signature(method: str, path: str, headers: dict[str, str]) -> str:
    """Return the header `Authorization` of a request whose path has no query, by AWS's signature, version 4."""
    when, payload = headers["x-amz-date"], headers["x-amz-content-sha256"]
    signed = sorted(name for name in headers if name == "host" or name.startswith("x-amz-"))
    lines = "".join(f"{name}:{headers[name]}\n" for name in signed)
    request = f"{method}\n{path}\n\n{lines}\n{';'.join(signed)}\n{payload}"
    scope = f"{when[:8]}/us-east-1/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{when}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{SECRET_KEY}".encode()
    for part in (*scope.split("/"), text):
        key = hmac.digest(key, part.encode(), "sha256")
    return f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/{scope}, SignedHeaders={';'.join(signed)}, Signature={key.hex()}"
