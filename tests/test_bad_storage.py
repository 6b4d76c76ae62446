"""What users get wrong with S3, by the commands that they type: one sentence, the exit code, and no secret in it.

What only a store can say is said by a proxy in front of a real one. Then names of all kinds, and folders with very many
files beside and below.
"""

import asyncio
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
from tests.fault_proxy import Proxy
from tests.s3_server import SECRET_KEY
from tests.test_integrity import commit, pack_small, rows_of
from typer.testing import CliRunner

from elastrain import conditional, storage
from elastrain.__main__ import app
from elastrain.data.dataset import Dataset
from elastrain.errors import ElastrainError, SpecError, StorageError
from elastrain.lock import locked
from elastrain.training.checkpoint import load
from elastrain.training.manifests import newest_whole, revoke
from elastrain.uploads import abort

pytestmark = pytest.mark.slow

SPEC = str(Path(__file__).parents[1] / "pipelines" / "digits_mlp" / "train.yaml")
MANY, AT_ONCE, MILLION = 10_000, 64, 1_000_000


@pytest.fixture(scope="module")
def root(s3_server: Mapping[str, str]) -> Iterator[str]:
    """A folder on the server with a packed dataset, and a run with a checkpoint."""
    url = f"s3://{s3_server['BUCKET']}/{secrets.token_hex(4)}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        pack_small(f"{url}/data")
        commit(f"{url}/run", 1)
        yield url


def wrong_secret(_: Proxy, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-and-wrong")


def answering(kind: str, **where: Any) -> Callable[[Proxy, pytest.MonkeyPatch], None]:
    return lambda proxy, _: proxy.fault(kind, **where)


def nothing(*_: object) -> None:
    pass


IN_URL = "a URL is no place for credentials|the URL holds credentials"
CASES = {
    "wrong secret": (wrong_secret, "{root}/data", "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY|access denied"),
    "expired": (answering("400 ExpiredToken"), "{root}/data", "the credentials are wrong or have expired"),
    "no bucket": (nothing, "s3://no-such-bucket/data", "there is no such bucket: create it, or check its name"),
    "no listing": (answering("403", key="list-type="), "{root}", "cannot l[a-z ]+ .*: access denied"),
    "other region": (answering("301 PermanentRedirect"), "{root}/data", "another region: set AWS_REGION"),
    "clock": (answering("403 RequestTimeTooSkewed"), "{root}/data", "this machine's clock"),
    "secret": (nothing, "s3://key:hidden@bucket/data", IN_URL),
    "query": (nothing, "s3://bucket/data?secret_key=hidden", IN_URL),
    "dots": (nothing, "{root}/../data", r"is empty, `\.` or `\.\.`"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("verb", ["plan", "report"])
def test_what_is_wrong_with_a_storage_is_one_sentence_with_its_exit_code(
    verb: str, case: str, root: str, fault_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm, url, words = CASES[case]
    harm(fault_proxy, monkeypatch)
    where = url.format(root=root)
    command = ["plan", SPEC, "--set", f"data.train={where}"] if verb == "plan" else ["report", where]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, ElastrainError), done.output
    in_spec = words == IN_URL and verb == "plan"
    assert done.exception.exit_code == (SpecError if in_spec else StorageError).exit_code
    said = str(done.exception)
    assert re.search(words, said), said
    assert "\n" not in said
    for secret in ("hidden", SECRET_KEY):
        assert secret not in said + done.output


# --- names

NAMES = ("with space/ü ñ/日本", "plus+and=eq,q?x=1&y#z%20", "/".join(["n" * 99] * 8), "a'b\"c(d)*[e]{f}~g@h;i:j")


@pytest.mark.parametrize("name", NAMES)
def test_data_and_runs_may_lie_below_any_name(name: str, s3_bucket: str) -> None:
    root = f"{s3_bucket}/{secrets.token_hex(4)}/{name}"
    pack_small(f"{root}/data")
    assert rows_of(f"{root}/data")["x"].shape == (1000, 8, 8)
    with locked(f"{root}/run", remedy="") as hold:
        revoke(f"{root}/run")
        assert abort([f"{root}/run/checkpoints"]) == 0
        for step in range(1, 5):
            commit(f"{root}/run", step)
        hold.check()
    assert newest_whole(f"{root}/run", warn=pytest.fail) == 4
    assert load(f"{root}/run", 4).numbers["step"] == 4
    assert storage.list_folders(f"{root}/run/checkpoints") == [f"step-{step:08d}" for step in (2, 3, 4)]


# --- very many files


def requests(proxy: Proxy, action: Callable[[], object]) -> int:
    """Return how many requests an action takes."""
    before = proxy.counts()
    action()
    after = proxy.counts()
    return sum(after.get(method, 0) - before.get(method, 0) for method in ("GET", "HEAD", "POST", "PUT", "DELETE"))


def use(root: str) -> None:
    """Open a dataset and a run, and take the run's lock."""
    Dataset.open(f"{root}/data")
    assert newest_whole(f"{root}/run", warn=pytest.fail) == 1
    with locked(f"{root}/run", remedy=""):
        revoke(f"{root}/run")


def test_ten_thousand_files_are_listed_in_pages_and_cost_nothing_where_they_only_lie_beside(
    root: str, fault_proxy: Proxy, s3_server: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(root)  # what a process asks once
    alone = requests(fault_proxy, lambda: use(root))
    through = fault_proxy.environment["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server["AWS_ENDPOINT_URL"])
    folder = root.partition("://")[2].partition("/")[2]

    async def fill() -> None:
        import obstore

        store, turn = conditional.store_of(root), asyncio.Semaphore(AT_ONCE)

        async def put(number: int) -> None:
            async with turn:
                await obstore.put_async(store, f"{folder}/{number:05d}", b"1")

        await asyncio.gather(*(put(number) for number in range(MANY)))

    asyncio.run(fill())
    monkeypatch.setenv("AWS_ENDPOINT_URL", through)
    use(root)
    assert requests(fault_proxy, lambda: use(root)) == alone, "a folder beside a million files is opened as any"
    found: list[str] = []
    pages = requests(fault_proxy, lambda: found.extend(file.path for file in storage.list_files(root)))
    assert [name for name in found if "/" not in name] == [f"{number:05d}" for number in range(MANY)]
    assert pages <= MANY // 1000 + 3
    assert np.array_equal(sorted(found), found)
    assert storage.list_folders(root) == ["data", "run"]


class Million(BaseHTTPRequestHandler):
    """Names as a store gives them, a page of a thousand at a time; the pages that are `lame` are refused once."""

    protocol_version = "HTTP/1.1"
    pages = 0
    lame = (3, 700)

    def do_GET(self) -> None:
        """Answer a listing."""
        kind, query = type(self), dict(parse_qsl(urlsplit(self.path).query))
        after = query.get("start-after", "").rpartition("/")[2].partition(".")[0]
        first = int(query.get("continuation-token") or (int(after) + 1 if after else 0))
        last = min(MILLION, first + 1000)
        kind.pages += 1
        code = 503 if kind.pages in kind.lame else 200
        names = (
            f"{query['prefix']}{number:07d}.{'parquet' if number % 1000 else 'txt'}" for number in range(first, last)
        )
        listed = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>7</Size></Contents>"
            for name in names
        )
        more = f"<NextContinuationToken>{last}</NextContinuationToken>" if last < MILLION else ""
        head = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated><KeyCount>{last - first}</KeyCount>"
        body = f"<ListBucketResult><Name>b</Name>{head}{listed}{more}</ListBucketResult>".encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


LIST = """
import re
import obstore, pyarrow.fs
from elastrain import storage

def most_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = most_kib()
found = storage.list_files("s3://bucket/many", suffix=".txt")
print(len(found), found[1].path, found[-1].path, found[0].size_bytes, (most_kib() - before) // 1024)
"""


def test_of_a_million_files_only_those_are_held_that_are_asked_for() -> None:
    """So many cannot be put here: a server gives the names that a store would, and is busy now and then."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Million) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        where = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ALLOW_HTTP": "true"}
        keys = {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "PYTHONPATH": str(Path(storage.__file__).parents[1]),
        }
        done = subprocess.run(
            [sys.executable, "-c", LIST],
            check=False,
            env={**os.environ, **where, **keys},
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    count, second, last, size, mib = done.stdout.split()
    assert (count, second, last, size) == ("1000", "0001000.txt", "0999000.txt", "7")
    assert int(mib) < 60, "a few pages, where a million names are hundreds"
    assert Million.pages == MILLION // 1000 + len(Million.lame)
