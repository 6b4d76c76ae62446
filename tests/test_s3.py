"""Files on a real S3 server: what is put is whole, what is missing is missing, and how every failure reads."""

import contextlib
import json
import os
import secrets
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.s3_server import SECRET_KEY, free_ports, serving

from elastrain import s3, storage
from elastrain.cluster.certificates import make_certificates
from elastrain.errors import StorageError
from elastrain.urls import holds_credentials, redacted

pytestmark = pytest.mark.slow


@pytest.fixture
def root(s3_bucket: str) -> str:
    """An empty folder on the server."""
    return f"{s3_bucket}/{secrets.token_hex(4)}"


def listed(url: str, **options: str) -> list[str]:
    return [file.path for file in storage.list_files(url, **options)]


def refused(caught: pytest.ExceptionInfo[StorageError]) -> str:
    """The sentence of an error, after a look that it is one and holds no secret."""
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    assert SECRET_KEY not in text
    assert "hidden" not in text
    return text


# --- files


def test_what_is_put_is_read_and_put_again_replaces_it(root: str) -> None:
    for data in (b"one", b"", b"another and longer one"):
        storage.put(f"{root}/deep/er/file", data)
        assert storage.read_bytes(f"{root}/deep/er/file") == data
    storage.put_json(f"{root}/one.json", {"a": 1})
    assert storage.read_json(f"{root}/one.json") == {"a": 1}
    assert storage.exists(f"{root}/deep/er/file")
    assert storage.exists(f"{root}/deep")
    assert storage.exists(root)
    assert not storage.exists(f"{root}/deep/er/fil")
    assert storage.absolute(root) == root


def test_a_large_file_goes_in_parts_and_comes_back_whole(root: str) -> None:
    data = np.random.default_rng(0).bytes(24 << 20)
    with storage.staged(f"{root}/large") as temporary:
        temporary.write_bytes(data)
    assert not temporary.exists()
    assert storage.read_bytes(f"{root}/large") == data
    with storage.staged(f"{root}/empty") as temporary:
        temporary.write_bytes(b"")
    assert [(file.path, file.size_bytes) for file in storage.list_files(root)] == [("empty", 0), ("large", len(data))]


def test_after_an_error_nothing_is_put(root: str) -> None:
    def broken() -> None:
        with storage.staged(f"{root}/half") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert not storage.exists(f"{root}/half")


def test_a_reader_sees_one_version_however_sizes_change_while_it_reads(root: str) -> None:
    stop, url = threading.Event(), f"{root}/ledger"

    def content(length: int) -> bytes:
        return bytes([length % 251]) * (1000 + 997 * length)

    storage.put(url, content(0))

    def write() -> None:
        number = 0
        while not stop.wait(0.003):
            number += 1
            storage.put(url, content(number % 7))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [storage.read_bytes(url) for _ in range(100)]
    finally:
        stop.set()
        writer.join()
    assert {bytes(data) for data in seen} <= {content(number) for number in range(7)}
    assert len({len(data) for data in seen}) > 1


def test_what_is_missing_is_a_missing_file(root: str) -> None:
    for missing in (storage.read_bytes, storage.read_json, storage.open_arrow, storage.list_files):
        with pytest.raises(FileNotFoundError):
            missing(f"{root}/nowhere")
    with pytest.raises(FileNotFoundError):
        storage.move(f"{root}/nowhere", f"{root}/there")
    assert storage.list_folders(f"{root}/nowhere") == []
    storage.remove(f"{root}/nowhere")


def test_moving_replaces_and_removing_leaves_nothing(root: str) -> None:
    storage.put(f"{root}/one", b"1")
    storage.put(f"{root}/two", b"2")
    storage.move(f"{root}/one", f"{root}/two")
    storage.move(f"{root}/two", f"{root}/deep/three")
    assert storage.read_bytes(f"{root}/deep/three") == b"1"
    assert listed(root) == ["deep/three"]
    storage.put(f"{root}/deeper", b"")
    storage.remove(f"{root}/deep")
    assert listed(root) == ["deeper"]
    storage.remove(root)
    assert not storage.exists(root)


# --- listing


def test_names_of_all_kinds_are_kept(root: str) -> None:
    long = "/".join(["n" * 99] * 9)
    names = ["with space/ü ñ.txt", "x..y/..z/..w", "plus+and=eq", "q?x=1&y#z%20", "日本/語.bin", long, "a'b\"c/d*[e]"]
    for name in names:
        storage.put(f"{root}/{name}", name.encode())
        assert storage.read_bytes(f"{root}/{name}") == name.encode()
    storage.put(f"{root}/.hidden/x", b"")
    storage.put(f"{root}/_hidden", b"")
    visible = [name for name in names if "/.." not in name]
    assert listed(root) == sorted(visible)
    assert listed(root, suffix=".txt") == ["with space/ü ñ.txt"]
    assert storage.list_folders(root) == sorted({n.split("/")[0] for n in (*names, ".hidden/x") if "/" in n})
    for name in names:
        storage.move(f"{root}/{name}", f"{root}/moved/{name}")
    assert listed(f"{root}/moved") == sorted(visible)


def test_a_key_longer_than_any_is_refused_before_it_is_sent() -> None:
    storage_url = "s3://bucket/" + "/".join(["ü" * 63] * 8)
    assert s3.place(storage_url).endswith("ü")
    with pytest.raises(StorageError, match=r"longer than the 1024 bytes that a key on S3 may have"):
        storage.put(f"{storage_url}/{'x' * 9}", b"")


class Empty(BaseHTTPRequestHandler):
    """Lists one key with an empty part, which SeaweedFS would not take."""

    def do_GET(self) -> None:
        """List it."""
        entry = (
            "<Contents><Key>d/x//y</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>3</Size></Contents>"
        )
        said = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entry}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_key_with_an_empty_part_is_named_at_once(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    del root  # only its environment is needed
    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        try:
            with pytest.raises(StorageError, match="d/x//y") as caught:
                listed("s3://bucket/d")
        finally:
            server.shutdown()
    assert "rename that object" in refused(caught)


def test_more_files_than_one_answer_holds_are_listed_and_removed(root: str) -> None:
    for number in range(1005):
        storage.put(f"{root}/many/{number:05d}", b"1")
    assert listed(f"{root}/many") == [f"{number:05d}" for number in range(1005)]
    storage.remove(f"{root}/many")
    assert not storage.exists(f"{root}/many")


def test_a_single_file_is_listed_as_itself(root: str) -> None:
    storage.put(f"{root}/one.txt", b"12")
    assert storage.list_files(f"{root}/one.txt") == [storage.FileInfo(path="", size_bytes=2)]


def test_parts_that_no_store_treats_alike_are_refused(root: str) -> None:
    for path in ("a/../b", "a/./b", "a//b"):
        with pytest.raises(StorageError, match=r"is empty, `\.` or `\.\.`"):
            storage.put(f"{root}/{path}", b"")
    with pytest.raises(StorageError, match="no bucket; write s3://bucket/path"):
        storage.exists("s3://")


# --- ranges


def test_ranges_are_read_and_parquet_is_read_by_columns(root: str) -> None:
    storage.put(f"{root}/digits", b"0123456789")
    with storage.open_arrow(f"{root}/digits") as file:
        assert file.size() == 10
        assert file.read_at(3, 4) == b"456"
        assert file.read_at(30, 8) == b"89"
        file.seek(2)
        assert (file.read(2), file.tell(), file.read()) == (b"23", 4, b"456789")
    table = pa.table({"x": np.arange(10000), "y": np.arange(10000) * 0.5})
    with storage.staged(f"{root}/table.parquet") as temporary:
        pq.write_table(table, temporary, row_group_size=1000, write_page_checksum=True)
    with storage.open_arrow(f"{root}/table.parquet") as source:
        found = pq.ParquetFile(source, page_checksum_verification=True).read_row_group(3, columns=["y"])
    assert found["y"].to_pylist() == [n * 0.5 for n in range(3000, 4000)]


def test_a_range_that_cannot_be_read_is_our_sentence_through_parquet_too(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with storage.staged(f"{root}/table.parquet") as temporary:
        pq.write_table(pa.table({"x": np.arange(100000)}), temporary)
    file = pq.ParquetFile(storage.open_arrow(f"{root}/table.parquet"))

    class Denied:
        closed = False

        def read_at(self, *_: int) -> bytes:
            raise OSError("AWS Error ACCESS_DENIED during GetObject operation")

    with monkeypatch.context() as patch:
        patch.setattr(s3._Ranges, "read", lambda self, _: s3.tried("read", self._url, Denied().read_at))
        with pytest.raises(StorageError, match=rf"cannot read {root}/table.parquet: access denied"):
            file.read_row_group(0)


# --- failures


def test_a_wrong_secret_is_one_sentence_at_once(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put(f"{root}/x", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-and-wrong")
    start = time.monotonic()
    for operation, call in (
        ("read", lambda: storage.read_bytes(f"{root}/x")),
        ("write", lambda: storage.put(f"{root}/x", b"2")),
        ("list", lambda: storage.list_files(root)),
        ("look up", lambda: storage.exists(f"{root}/x")),
        ("open", lambda: storage.open_arrow(f"{root}/x")),
    ):
        with pytest.raises(StorageError, match=rf"^cannot {operation} {root}.*AWS_SECRET_ACCESS_KEY") as caught:
            call()
        refused(caught)
        assert caught.value.exit_code == 5
    assert time.monotonic() - start < 4


@pytest.mark.usefixtures("root")
def test_a_bucket_that_is_not_there_is_one_sentence_at_once() -> None:
    start, url = time.monotonic(), "s3://no-such-bucket/x"
    for call in (
        lambda: storage.read_bytes(url),
        lambda: storage.put(url, b""),
        lambda: storage.list_files(url),
        lambda: storage.exists(url),
        lambda: storage.open_arrow(url),
    ):
        with pytest.raises(StorageError, match=rf"{url}: there is no such bucket: create it") as caught:
            call()
        refused(caught)
    assert time.monotonic() - start < 4


def test_an_address_where_nobody_listens_is_one_sentence_within_seconds(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    start = time.monotonic()
    with pytest.raises(
        StorageError, match=rf"^cannot read {root}/x: no proper answer from {address} in \d s"
    ) as caught:
        storage.read_bytes(f"{root}/x")
    assert "could not connect" in refused(caught).lower()
    assert "check AWS_ENDPOINT_URL" in str(caught.value)
    assert time.monotonic() - start < 12


def test_what_may_pass_is_tried_again_until_it_does(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation",
        "AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate.",
        "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 18, Transferred a partial file",
        "AWS Error INTERNAL_FAILURE during PutObject operation",
    ]
    storage.put(f"{root}/x", b"1")  # this endpoint has answered, so it is waited for
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def shaky() -> int:
        if left:
            raise OSError(left.pop())
        return 7

    assert s3.tried("read", f"{root}/x", shaky) == 7


def test_a_server_that_is_started_again_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = free_ports()
    with serving(tmp_path, ports) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{environment['BUCKET']}/x"
        storage.put(url, b"before")
    with monkeypatch.context() as patch:
        patch.setattr(s3, "OUTAGE_S", 0.0)
        with pytest.raises(StorageError, match="no proper answer"):
            storage.read_bytes(url)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(storage.read_bytes(url)))
    reader.start()
    time.sleep(1)
    with serving(tmp_path, ports, environment["BUCKET"]):
        reader.join(60)
        assert found == [b"before"]


def test_an_outage_ends_at_the_deadline(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "OUTAGE_S", 1.0)
    calls = []

    def down() -> None:
        calls.append(1)
        raise OSError(f"AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: {SECRET_KEY}")

    with pytest.raises(StorageError, match=r"no proper answer from http\S+ in \d s \(HTTP status 503\)") as caught:
        s3.tried("read", f"{root}/x", down)
    refused(caught)
    assert 2 < len(calls) < 10


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Looks like the configured region is 'a' while the bucket is located in 'b'. HTTP status 301", "AWS_REGION"),
        ("AWS Error UNKNOWN (HTTP status 400) during GetObject: ExpiredToken", "have expired"),
        ("AWS Error UNKNOWN (HTTP status 411) during UploadPart", "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
        ("AWS Error UNKNOWN (HTTP status 405) during UploadPart: no", "HTTP status 405"),
    ],
)
def test_what_cannot_pass_is_said_at_once_with_what_to_do(root: str, said: str, remedy: str) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise OSError(said)

    with pytest.raises(StorageError, match=remedy) as caught:
        s3.tried("write", f"{root}/x", call)
    refused(caught)
    assert len(calls) == 1


# --- secrets and addresses

WITH_SECRETS = (
    "s3://key:hidden@bucket/x",
    "s3://key:hid/hidden@bucket/x",
    "s3://hidden@bucket/x",
    "s3://key:hidden/x",
    "s3://bucket/x?secret=hidden",
    "s3://bucket/x?access_key=hidden&secret_key=hidden",
    "https://me:hidden@host/x",
)


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_a_secret_in_a_url_is_refused_and_not_told(url: str, tmp_path: Path) -> None:
    assert holds_credentials(url)
    assert "hidden" not in redacted(url)
    for call in (
        storage.read_bytes,
        storage.exists,
        storage.list_files,
        storage.list_folders,
        storage.open_arrow,
        storage.remove,
        storage.absolute,
        lambda url: storage.put(url, b""),
        lambda url: storage.move(url, str(tmp_path / "x")),
    ):
        with pytest.raises(StorageError, match="a URL is no place for credentials") as caught:
            call(url)
        refused(caught)


def test_an_address_in_the_clear_wants_to_be_allowed(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StorageError, match="unencrypted; use https, or set AWS_ALLOW_HTTP=true"):
        storage.exists(root)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://key:hidden@host")
    with pytest.raises(StorageError, match="no place for credentials") as caught:
        storage.exists(root)
    refused(caught)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "host:80")
    with pytest.raises(StorageError, match="write https://host or http://host:port"):
        storage.exists(root)


def test_credentials_come_from_a_profile_too(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put(f"{root}/x", b"1")
    (tmp_path / "credentials").write_text(
        f"[work]\naws_access_key_id = testaccess\naws_secret_access_key = {SECRET_KEY}\n"
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert storage.read_bytes(f"{root}/x") == b"1"
    assert json.dumps(storage.list_folders(root)) == "[]"


# --- an authority of one's own


@contextlib.contextmanager
def encrypted(server: str, certificates: Path) -> Iterator[str]:
    """Run what ends TLS before `http://host:port`, with a machine's certificate; yield the URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "node.crt", certificates / "node.key")
    behind = server.removeprefix("http://").split(":")

    class Ending(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                contextlib.suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as near,
                socket.create_connection((behind[0], int(behind[1]))) as far,
            ):
                answers = threading.Thread(target=pump, args=(far, near))
                answers.start()
                pump(near, far)
                answers.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Ending) as ending:
        ending.daemon_threads = True
        thread = threading.Thread(target=ending.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"https://localhost:{ending.server_address[1]}"
        finally:
            ending.shutdown()
            thread.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


TRY = """
import sys
from elastrain import conditional, storage
storage.put(f"{sys.argv[1]}/one", b"1")
assert storage.read_bytes(f"{sys.argv[1]}/one") == b"1"
assert conditional.create(f"{sys.argv[1]}/two", b"2")
"""


def test_a_certificate_of_ones_own_authority_is_trusted_where_it_is_named(root: str, tmp_path: Path) -> None:
    make_certificates(str(tmp_path))
    with encrypted(os.environ["AWS_ENDPOINT_URL"], tmp_path) as url:

        def said(**own: str) -> str:
            environment = {**os.environ, "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "", **own}
            command = [sys.executable, "-c", TRY, root]
            done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
            return done.stderr

        assert not said(SSL_CERT_FILE=str(tmp_path / "ca.crt"))
        assert "or name the file of its authority in SSL_CERT_FILE" in said()
