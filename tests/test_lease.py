"""One writer a folder on a real S3 server: who wins, who is refused, who takes over, and who finds out too late."""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from tests.bad_gateway import bad_gateway
from tests.s3_server import SECRET_KEY

from elastrain import conditional, lease, s3, storage
from elastrain.errors import ConflictError, StorageError
from elastrain.lease import Hold
from elastrain.lock import locked
from elastrain.training import manifests
from elastrain.training.manifests import newest_whole, revoke, write_manifest

pytestmark = pytest.mark.slow

# A process that holds a folder, on another machine as far as anybody can see, and does what it is told.
OWNER = """
import sys
from elastrain import lease, storage
from elastrain.errors import ElastrainError
from elastrain.lock import locked
from elastrain.training.manifests import described, folder, write_manifest
lease.LEASE_S, lease.RENEW_S = 3.0, 0.3
machine = lease._machine
if sys.argv[2] == "elsewhere":
    lease._machine = lambda: "elsewhere"
try:
    with locked(sys.argv[1], remedy="give it up") as hold:
        print("held", flush=True)
        for line in sys.stdin:
            if line == "end\\n":
                break
            step = int(line)
            storage.put(storage.join(folder(hold.folder, step), "x"), b"x")
            def settle():
                hold.check()
                print("settled", flush=True)
                if step == 9:
                    sys.stdin.readline()
            write_manifest(hold.folder, step, {"x": described(b"x")}, {}, settle)
            print("written", flush=True)
except ElastrainError as error:
    print(type(error).__name__, error.exit_code, error, flush=True)
"""


@pytest.fixture
def root(s3_bucket: str) -> str:
    """An empty folder on the server."""
    return f"{s3_bucket}/{secrets.token_hex(4)}"


@pytest.fixture
def owner(root: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that want the folder; they are gone afterwards."""
    started = []

    def start(where: str = "elsewhere") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OWNER, root, where]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{words}\n")
    process.stdin.flush()


def lock_of(root: str) -> dict[str, object]:
    found: dict[str, object] = storage.read_json(f"{root}/.lock")
    return found


def taken_over(root: str, *, within_s: float) -> float:
    """Try until the folder is ours, and give it back; return how long that took."""
    start = time.monotonic()
    while True:
        try:
            with locked(root, remedy="wait"):
                return time.monotonic() - start
        except ConflictError:
            assert time.monotonic() - start < within_s
            time.sleep(0.1)


# --- conditional writes


def test_conditional_writes_are_won_by_one_and_lost_by_all_others(root: str) -> None:
    first = conditional.create(f"{root}/a b/ü#?%20", b"1")
    assert first is not None
    assert conditional.create(f"{root}/a b/ü#?%20", b"2") is None
    second = conditional.replace(f"{root}/a b/ü#?%20", b"3", first)
    assert second is not None
    assert conditional.replace(f"{root}/a b/ü#?%20", b"4", first) is None
    assert conditional.replace(f"{root}/gone", b"4", first) is None
    found = conditional.read(f"{root}/a b/ü#?%20")
    assert (found.data, found.etag) == (b"3", second)
    assert abs(found.written - time.time()) < 5
    assert storage.read_bytes(f"{root}/a b/ü#?%20") == b"3"
    assert abs(conditional.probe(root) - time.time()) < 5
    assert [file.path for file in storage.list_files(f"{root}/a b")] == ["ü#?%20"]
    with pytest.raises(FileNotFoundError):
        conditional.read(f"{root}/gone")


def test_who_lost_against_itself_has_won(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that gets lost after the write was done: the write is tried again, and meets itself."""
    put, calls = conditional.store_of(root).put, []

    class Shaky:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def put(self, *arguments: object, **named: object) -> object:
            calls.append(put(*arguments, **named))
            if len(calls) == 1:
                raise ConnectionResetError("the answer got lost")
            return calls[-1]

    store = conditional.store_of(root)
    monkeypatch.setattr(conditional, "store_of", lambda _: Shaky())
    etag = conditional.create(f"{root}/x", b"mine")
    assert etag is not None
    calls.clear()
    assert conditional.replace(f"{root}/x", b"mine, too", etag) is not None


@pytest.mark.usefixtures("root")
def test_what_cannot_work_is_the_same_sentence_as_everywhere(monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot write s3://no-such-bucket/\S+: there is no such bucket"):
        lease.taken("s3://no-such-bucket/x", remedy="")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-and-wrong")
    with pytest.raises(StorageError, match="the credentials are wrong or have expired") as caught:
        lease.taken(root, remedy="")
    assert "hidden" not in str(caught.value)
    assert time.monotonic() - start < 5
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"no proper answer from http://127.0.0.1:9 in \d s"):
        lease.taken(root, remedy="")
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (301, "the bucket is in another region: set AWS_REGION"),
        (501, "the store has no conditional writes"),
        (403, "access denied"),
        (409, r"no proper answer from .* in \d s"),
    ],
)
def test_answers_that_the_server_here_does_not_give_are_told_too(
    status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_PUT = do_GET  # noqa: N815 -- http.server's name

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(s3, "OUTAGE_S", 1.0)
        monkeypatch.setattr(s3, "FIRST_S", 1.0)
        for name, value in (("AWS_ALLOW_HTTP", "true"), ("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")):
            monkeypatch.setenv(name, value)
        with pytest.raises(StorageError, match=rf"cannot (read|write) s3://bucket/x: .*{words}"):
            conditional.create("s3://bucket/x", b"1")
        server.shutdown()


def test_credentials_come_from_a_profile_too(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = f"aws_access_key_id = testaccess\naws_secret_access_key = {SECRET_KEY}\n"
    (tmp_path / "credentials").write_text(f"[work]\n{keys}")
    (tmp_path / "config").write_text("[profile sso]\nsso_session = x\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    with locked(root, remedy=""):
        pass
    monkeypatch.setenv("AWS_PROFILE", "sso")
    monkeypatch.setenv("PATH", str(tmp_path))  # where no `aws` is
    with pytest.raises(StorageError, match=r"AWS_PROFILE is sso, which holds no keys .* export-credentials"):
        lease.taken(root, remedy="")


# --- who holds


def test_of_sixteen_racers_one_wins(root: str) -> None:
    """Fresh, and then from an owner that gave it back."""
    for _ in range(2):
        ready, go_on = threading.Barrier(16), threading.Event()
        won: list[Hold] = []
        refused: list[str] = []

        def race(ready: threading.Barrier, won: list[Hold], refused: list[str], go_on: threading.Event) -> None:
            ready.wait()
            try:
                with locked(root, remedy="wait") as hold:
                    won.append(hold)
                    go_on.wait(60)
            except ConflictError as error:
                refused.append(str(error))

        racers = [threading.Thread(target=race, args=(ready, won, refused, go_on)) for _ in range(16)]
        for racer in racers:
            racer.start()
        deadline = time.monotonic() + 60
        while len(refused) < 15 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (len(won), len(refused)) == (1, 15)
        won[0].check()
        go_on.set()
        for racer in racers:
            racer.join()
        with pytest.raises(ConflictError, match="was given back or removed"):
            won[0].check()


def test_two_processes_race_and_the_one_that_loses_says_who_has_won(
    owner: Callable[..., subprocess.Popen[str]], root: str
) -> None:
    racers = [owner(), owner()]
    words = [said(racer) for racer in racers]
    loser, winner = sorted(zip(words, racers, strict=True), key=lambda pair: pair[0] == "held")
    assert winner[0] == "held"
    assert loser[0].startswith(f"ConflictError 3 {root}: in use by process {winner[1].pid} of ")
    assert loser[0].endswith("if it is dead, the same command takes over 3 s after its last sign")
    assert "wait for it, stop it, or give it up" in loser[0]


def test_a_lease_is_renewed_for_as_long_as_its_owner_lives(
    owner: Callable[..., subprocess.Popen[str]], root: str
) -> None:
    held = owner()
    assert said(held) == "held"
    counter = lock_of(root)["counter"]
    end = time.monotonic() + 4.5  # more than its lease
    while time.monotonic() < end:
        with pytest.raises(ConflictError):
            lease.taken(root, remedy="")
        time.sleep(0.3)
    assert isinstance(counter, int)
    assert lock_of(root)["counter"] >= counter + 8  # type: ignore[operator] # a number, too
    tell(held, "end")
    held.wait(30)
    assert lock_of(root)["free"]
    assert taken_over(root, within_s=1.0) < 1.0
    assert [file.path for file in storage._remote_files(root)] == [".lock"]


def test_a_killed_owner_elsewhere_is_taken_over_after_its_lease(
    owner: Callable[..., subprocess.Popen[str]], root: str
) -> None:
    held = owner()
    assert said(held) == "held"
    held.kill()
    with pytest.raises(ConflictError, match=rf"{root}: in use by process {held.pid} of .* its last sign \d s ago"):
        lease.taken(root, remedy="")
    assert 1.5 < taken_over(root, within_s=10) < 6  # the store's clock counts whole seconds
    assert taken_over(root, within_s=1) < 1


def test_a_killed_owner_on_this_machine_is_taken_over_at_once(
    owner: Callable[..., subprocess.Popen[str]], root: str
) -> None:
    held = owner("here")
    assert said(held) == "held"
    with pytest.raises(ConflictError):
        lease.taken(root, remedy="")
    held.kill()
    held.wait()
    taken_over(root, within_s=1)


def test_a_lock_that_nobody_can_read_is_free_after_a_lease(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put(f"{root}/.lock", b"[1]")
    monkeypatch.setattr(lease, "LEASE_S", 2.0)
    with pytest.raises(ConflictError, match="in use by another process, for 0 s"):
        lease.taken(root, remedy="")
    taken_over(root, within_s=6)


# --- fences


def test_an_owner_that_was_stopped_for_too_long_cannot_commit(
    owner: Callable[..., subprocess.Popen[str]], root: str
) -> None:
    held = owner()
    assert said(held) == "held"
    tell(held, "1")
    assert (said(held), said(held)) == ("settled", "written")
    held.send_signal(signal.SIGSTOP)
    assert taken_over(root, within_s=10) > 1
    with locked(root, remedy="") as hold:
        held.send_signal(signal.SIGCONT)
        tell(held, "2")
        words = said(held)
        assert words.startswith(f"ConflictError 3 {root}: was taken over by process {os.getpid()} of ")
        assert held.wait(30) == 0
        assert newest_whole(root, warn=pytest.fail) == 1
        hold.check()  # who was stopped has not touched the lock on its way out


def test_an_owner_that_was_stopped_between_its_check_and_its_write_cannot_commit(
    owner: Callable[..., subprocess.Popen[str]], root: str
) -> None:
    held = owner()
    assert said(held) == "held"
    tell(held, "1")
    assert (said(held), said(held)) == ("settled", "written")
    tell(held, "9")
    assert said(held) == "settled"
    held.send_signal(signal.SIGSTOP)
    taken_over(root, within_s=10)
    with locked(root, remedy=""):
        revoke(root)
        revoke(root)
        held.send_signal(signal.SIGCONT)
        tell(held, "go on")
        assert "was taken over" in said(held)
        assert newest_whole(root, warn=pytest.fail) == 1
        write_manifest(root, 9, {}, {}, lambda: None)  # who holds the run may write that step
        assert newest_whole(root, warn=pytest.fail) == 9


def test_a_manifest_that_is_in_the_way_is_replaced_only_as_it_was_seen(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(root, 1, {}, {"of": "a worker that was given up"})
    write_manifest(root, 1, {}, {"of": "who leads now"})
    assert manifests.read_manifest(root, 1)["info"] == {"of": "who leads now"}
    read = conditional.read

    def late(url: str) -> conditional.Version:
        found = read(url)
        storage.put(url, secrets.token_bytes(8))
        return found

    monkeypatch.setattr(conditional, "read", lambda url, **_: late(url) if url.endswith("manifest.json") else read(url))
    with pytest.raises(ConflictError, match="another process writes this checkpoint"):
        write_manifest(root, 1, {}, {"of": "too late"})


def test_an_answer_that_got_lost_does_not_cost_the_lease(root: str) -> None:
    """A renewal arrives, and its answer does not: the version that we know is no more, but the lock is ours."""
    held = lease.taken(root, remedy="")
    try:
        there = json.loads(conditional.read(f"{root}/.lock").data)
        storage.put(f"{root}/.lock", json.dumps({**there, "counter": 1000}).encode())
        assert held._write(free=False)
        held.hold.check()
    finally:
        held.release()
    assert lock_of(root)["free"]


# --- stores that let everybody win


@pytest.mark.parametrize("dropped", ["If-None-Match", "If-Match"])
def test_a_store_that_ignores_a_condition_is_found_out(
    dropped: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bad_gateway(os.environ["AWS_ENDPOINT_URL"], dropped=(dropped.lower(),)) as gateway:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", gateway)
            words = rf"^{root}: the store does not honour conditional writes \({dropped}\), so it cannot keep two"
            with pytest.raises(StorageError, match=words) as caught:
                lease.taken(root, remedy="")
        assert caught.value.exit_code == 5
    assert not storage.exists(f"{root}/.lock")
