"""What stores and networks do wrong, by a proxy in front of a real server: it passes and is right, or is a sentence."""

import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.fault_proxy import Proxy
from tests.s3_server import SECRET_KEY

from elastrain import s3, storage
from elastrain.data.dataset import Dataset
from elastrain.data.reader import _open_local, read_group, sources_of
from elastrain.errors import DataError, StorageError

pytestmark = pytest.mark.slow

SMALL, LARGE = np.random.default_rng(1).bytes(300_000), np.random.default_rng(2).bytes(24 << 20)
PASSING = ("503", "500", "reset", "truncate", "lost", "hang")


@pytest.fixture
def root(fault_proxy: Proxy, s3_server: Mapping[str, str]) -> str:
    """An empty folder on the server, behind the proxy."""
    url = f"s3://{s3_server['BUCKET']}/{secrets.token_hex(4)}"
    storage.put(f"{url}/small", SMALL)
    fault_proxy.clear()
    return url


def of_ranges(url: str) -> bytes:
    with storage.open_arrow(url) as file:
        return bytes(file.read_at(1000, 2000)) + bytes(file.read_at(150_000, 150_000))


def written(url: str, data: bytes) -> bytes:
    storage.put(url, data)
    return storage.read_bytes(url)


def moved(root: str) -> bytes:
    storage.move(f"{root}/small", f"{root}/b")
    return storage.read_bytes(f"{root}/b")


def left_after_removal(root: str) -> bool:
    storage.remove(f"{root}/small")
    return storage.exists(f"{root}/small")


def listed(root: str) -> list[tuple[str, int]]:
    return [(file.path, file.size_bytes) for file in storage.list_files(root)]


OPERATIONS: dict[str, tuple[str, Callable[[str], Any], Any]] = {
    "read": ("read", lambda root: storage.read_bytes(f"{root}/small"), SMALL),
    "ranges": ("open", lambda root: of_ranges(f"{root}/small"), SMALL[2000:3000] + SMALL[150_000:]),
    "write": ("write", lambda root: written(f"{root}/small", SMALL[::-1]), SMALL[::-1]),
    "multipart": ("write", lambda root: written(f"{root}/large", LARGE), LARGE),
    "list": ("list", listed, [("small", 300_000)]),
    "look up": ("look up", lambda root: storage.exists(f"{root}/small"), True),
    "move": ("write", moved, SMALL),
    "remove": ("look up", left_after_removal, False),
}
"""What is said of an operation that fails, the operation on a folder that holds `small`, and what it gives."""


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_waited_for_and_comes_out_right(root: str, fault_proxy: Proxy, kind: str) -> None:
    """All operations side by side, each of which meets it once."""
    folders = [f"{root}/{number}" for number in range(len(OPERATIONS))]
    for folder in folders:
        storage.put(f"{folder}/small", SMALL)
    fault_proxy.fault_each(kind, [f"{folder.rpartition('//')[2].partition('/')[2]}/" for folder in folders], times=1)
    with ThreadPoolExecutor(len(OPERATIONS)) as pool:
        found = list(pool.map(lambda what, folder: what[1](folder), OPERATIONS.values(), folders))
    assert found == [expected for _, _, expected in OPERATIONS.values()]
    assert fault_proxy.counts()[kind] == len(OPERATIONS)


@pytest.mark.parametrize("kind", ["503", "reset"])
def test_what_takes_longer_to_pass_than_arrow_waits_is_waited_for(root: str, fault_proxy: Proxy, kind: str) -> None:
    fault_proxy.fault(kind, times=8)
    assert storage.read_bytes(f"{root}/small") == SMALL
    assert fault_proxy.counts()[kind] == 8


@pytest.mark.parametrize("operation", ["ranges", "multipart", "list"])
def test_what_does_not_pass_ends_at_the_deadline_in_one_sentence(
    root: str, fault_proxy: Proxy, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "OUTAGE_S", 1.0)
    fault_proxy.fault("503")
    name, action, _ = OPERATIONS[operation]
    with pytest.raises(StorageError, match=rf"^cannot {name} {root}.*: no proper answer from http://127") as caught:
        action(root)
    assert "HTTP status 503" in str(caught.value) or "SLOW_DOWN" in str(caught.value)
    assert (caught.value.exit_code, s3.waiting_s()) == (5, 0.0)


FINAL = {
    "403": "access denied: check the credentials .* and this machine's clock",
    "403 RequestTimeTooSkewed": "set the clock",
    "400 ExpiredToken": "have expired",
    "403 InvalidAccessKeyId": "the credentials are wrong",
    "301 PermanentRedirect": "another region: set AWS_REGION",
}


@pytest.mark.parametrize("kind", FINAL)
@pytest.mark.parametrize("operation", ["read", "write", "list"])
def test_what_is_final_is_said_at_once(root: str, fault_proxy: Proxy, operation: str, kind: str) -> None:
    fault_proxy.fault(kind)
    name, action, _ = OPERATIONS[operation]
    start = time.monotonic()
    with pytest.raises(StorageError, match=rf"^cannot {name} {root}") as caught:
        action(root)
    text = str(caught.value)
    assert time.monotonic() - start < 3
    assert "\n" not in text
    assert SECRET_KEY not in text
    said = FINAL["403" if operation == "read" and kind[:3] == "403" else kind]  # the answer to HEAD has no body
    assert re.search(said, text)


def test_who_may_not_list_is_told_so_and_may_read(root: str, fault_proxy: Proxy) -> None:
    fault_proxy.fault("403", key="list-type=")
    with pytest.raises(StorageError, match=rf"^cannot list {root}: access denied"):
        storage.list_files(root)
    assert storage.read_bytes(f"{root}/small") == SMALL


def test_a_store_that_is_gone_for_a_while_is_waited_for_and_says_since_when(root: str, fault_proxy: Proxy) -> None:
    found: list[bytes] = []
    reading = threading.Thread(target=lambda: found.append(storage.read_bytes(f"{root}/small")))
    fault_proxy.unplug()
    reading.start()
    time.sleep(6)
    assert 2 < s3.waiting_s() < 6
    fault_proxy.clear()
    reading.join(20)
    assert (found, s3.waiting_s()) == ([SMALL], 0.0)


def test_a_read_that_trickles_is_given_up_and_tried_again(
    root: str, fault_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "STALL_S", 1.0)
    fault_proxy.fault("trickle", times=1, method="GET")
    start = time.monotonic()
    assert storage.read_bytes(f"{root}/small") == SMALL
    assert 3 < time.monotonic() - start < 10
    storage.put(f"{root}/tiny", SMALL[:5000])
    fault_proxy.fault("trickle", method="GET")
    monkeypatch.setattr(s3, "STALL_S", 30.0)
    assert storage.read_bytes(f"{root}/tiny") == SMALL[:5000], "what is slow and comes is not given up"


def test_a_mix_of_all_faults_loses_and_invents_nothing(root: str, fault_proxy: Proxy) -> None:
    for seed, kind in enumerate(("503", "500", "reset", "truncate", "lost")):
        fault_proxy.fault(kind, share=0.3, seed=seed)
        now = {f"mix/{number}": f"{kind} {number}".encode() * 1000 for number in range(4)}
        with ThreadPoolExecutor(len(now)) as pool:
            found = pool.map(lambda name, data: written(f"{root}/{name}", data), now, now.values())
            assert list(found) == list(now.values())
        held = now
    assert [file.path for file in storage.list_files(root)] == [*held, "small"]
    fault_proxy.clear()
    assert {name: storage.read_bytes(f"{root}/{name}") for name in held} == held


# --- data that change under a run


@pytest.fixture
def dataset(root: str) -> Dataset:
    """Ten row groups of numbers in one shard."""
    write_numbers(f"{root}/data/part.parquet", np.arange(50_000))
    return Dataset.open(f"{root}/data")


def write_numbers(url: str, values: "np.ndarray[Any, Any]") -> None:
    with storage.staged(url) as temporary:
        pq.write_table(pa.table({"x": values}), temporary, row_group_size=5000, write_page_checksum=True)


def group(dataset: Dataset, number: int) -> Any:
    return read_group(dataset.columns, sources_of(dataset, np.array([number]))[0])["x"]


@pytest.mark.parametrize("opened", ["opened before", "not yet opened"])
def test_data_that_are_removed_or_rewritten_while_they_are_read_are_an_error_that_names_them(
    dataset: Dataset, opened: str
) -> None:
    _open_local.cache_clear()
    url = storage.join(dataset.url, "part.parquet")
    if opened == "opened before":
        assert group(dataset, 0)[-1] == 4999
    write_numbers(url, np.arange(50_000) * 3)
    with pytest.raises(DataError, match=rf"^{url}: ") as caught:
        group(dataset, 5)
    assert caught.value.exit_code == 4
    write_numbers(url, np.zeros(50_000, np.int64))
    with pytest.raises((DataError, StorageError), match=url):
        group(dataset, 9)
    _open_local.cache_clear()
    write_numbers(url, np.arange(50_000))
    if opened == "opened before":
        assert group(dataset, 0)[-1] == 4999
    storage.remove(url)
    with pytest.raises(DataError, match=rf"^{url}: "):
        group(dataset, 5)


def test_only_where_a_command_begins_is_an_address_that_never_answered_given_up_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that Ray starts while storage is away waits as long as the others."""
    nobody = "curlCode: 7, Could not connect to server"
    assert s3._patience_s(nobody, "http://never.heard.of") == s3.FIRST_S
    monkeypatch.setenv(s3.RAY_WORKER, "1")
    assert s3._patience_s(nobody, "http://never.heard.of") == s3.OUTAGE_S


def test_an_outage_of_the_store_of_the_data_alone_is_seen_and_shown(
    dataset: Dataset, fault_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read tasks wait in processes of their own: the driver looks by itself."""
    from elastrain.elastic import watch  # Ray, which the other tests here do without

    monkeypatch.setattr(watch, "ASK_S", 0.1)
    plan: Any = SimpleNamespace(steps_per_epoch=2, global_batch=8)
    nobody: Any = None
    seen = watch.Watch(
        plan=plan,
        num_steps=4,
        workers=nobody,
        line=nobody,
        host=nobody,
        fleet=nobody,
        data=[dataset],
        stops=lambda: False,
        stepped=lambda _: None,
    )
    now = {"step": 1, "last": {"loss": 0.5}, "spent": {}, "storage_s": 0.0, "missing": 0, "generation": 1}
    now |= {"members": [], "checkpoint": None}
    with watch.asking([dataset]):
        assert seen._status(now).phase == "training"
        fault_proxy.unplug()
        until(lambda: seen._status(now).phase == "training, waiting for storage")
        fault_proxy.clear()
        until(lambda: seen._status(now).phase == "training")
    assert seen._status({**now, "storage_s": 9.0}).phase == "training, waiting for storage", "the run's own store"


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
