"""The cache of remote data: bounded, filled once, whole whatever happens to who fills it, and never a wrong byte."""

import errno
import os
import random
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fault_proxy import Proxy

from elastrain import storage
from elastrain.data import cache as cache_module
from elastrain.data import reader
from elastrain.data.blocks import FeedSpec, arrays_of, read_blocks, train_tasks
from elastrain.data.cache import Cache, cache_of, key_of
from elastrain.data.chunks import PackOptions
from elastrain.data.columns import Column
from elastrain.data.dataset import MANIFEST, Dataset, fingerprint
from elastrain.data.plan import Plan
from elastrain.data.shards import ShardWriter
from elastrain.errors import DataError
from elastrain.spec.train import CacheSpec

ROOT = Path(__file__).parents[2]
COLUMNS = (Column(name="image", dtype="uint8", shape=(16, 16)), Column(name="label", dtype="uint8", shape=()))
ROWS = 600


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """A process that has opened no file yet."""
    reader._remote.clear()
    for known in (cache_module._swept, cache_module._say_once):
        known.cache_clear()


def pack(url: str, seed: int = 0, rows: int = ROWS) -> Dataset:
    """A packed dataset of 3 shards of some row groups of 16 KiB, as `pack` writes it."""
    generator = np.random.default_rng(seed)
    options = PackOptions(codec="none", row_group_bytes=16 << 10, shard_bytes=rows // 3 * 257)
    with ShardWriter(url, COLUMNS, options) as writer:
        images = generator.integers(0, 256, (rows, 16, 16), dtype=np.uint8)
        writer.write({"image": images, "label": (np.arange(rows) % 10).astype(np.uint8)})
        shards, columns = writer.finish()
    found = Dataset(url=url, columns=columns, shards=shards, fingerprint=fingerprint(columns, shards), packed=True)
    storage.put_json(storage.join(url, MANIFEST), found.manifest())
    return found


def epoch(data: Dataset, cache: Cache | None = None) -> dict[int, bytes]:
    """The image of each row, as the blocks of an epoch bring it."""
    plan = replace(Plan.of(data, seed=0, global_batch=64, slots=2), block_steps=3)
    spec = FeedSpec(
        plan=plan, train=data, evaluation=None, transforms=(), begin=0, end=plan.steps_per_epoch, reading=(1.0, 1)
    )
    blocks = [make() for _, make in train_tasks(replace(spec, cache=cache))]
    found: dict[int, bytes] = {}
    for table in read_blocks(blocks):
        arrays = arrays_of(table, where="here")
        found |= dict(zip(arrays["elastrain.row"].tolist(), map(bytes, arrays["image"]), strict=True))
    return found


def held(folder: str | Path, part: str = "entries") -> dict[str, int]:
    return {path.name: path.stat().st_size for path in Path(folder, part).glob("*")}


# --- the bound


@settings(max_examples=60, deadline=None)
@given(
    bound=st.integers(1, 4000),
    reads=st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=40),
)
def test_it_never_holds_more_than_its_bound_and_the_newest_stays(bound: int, reads: list[tuple[int, bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(folder=folder, max_bytes=bound)
        for number, dropped in reads:
            size = 1 + 97 * number
            if dropped:
                cache.drop(str(number))
            content = bytes([number]) * size
            assert bytes(cache.read(str(number), size, partial(bytes, content))) == content
            assert sum(held(folder).values()) <= bound
            assert cache.has(str(number)) == (size <= bound)
            assert not held(folder, "parts")
            if cache.has(str(number)):
                assert int(Path(folder, "usage").read_text()) >= sum(held(folder).values())


def test_what_was_used_last_is_kept(tmp_path: Path) -> None:
    cache = Cache(folder=str(tmp_path), max_bytes=1000)
    for number in range(9):
        cache.read(str(number), 100, lambda: bytes(100))
        time.sleep(0.002)
    cache.read("0", 100, lambda: bytes(100))
    for number in range(9, 13):
        cache.read(str(number), 100, lambda: bytes(100))
    assert cache.has("0")
    assert not cache.has("1")


def test_a_smaller_bound_shrinks_what_a_larger_one_left(tmp_path: Path) -> None:
    for bound in (10_000, 500):
        for number in range(50):
            Cache(folder=str(tmp_path), max_bytes=bound).read(f"{bound}-{number}", 100, lambda: bytes(100))
    assert sum(held(tmp_path).values()) <= 500


# --- who fills, and what kills it


def run(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """A Python process with `Cache` and a line of its own."""
    script = "import os, sys, time\nfrom elastrain.data.cache import Cache\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_a_kill_in_the_middle_of_a_fill_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    code = """
    whole = os.pwrite
    def half(descriptor, data, offset):
        whole(descriptor, bytes(data)[: len(data) // 2], offset)
        print("half", flush=True)
        time.sleep(60)
    os.pwrite = half
    Cache(folder=sys.argv[1], max_bytes=1 << 20).read("x", 1000, lambda: b"x" * 1000)
    """
    process = run(code, tmp_path)
    assert process.stdout
    assert process.stdout.readline() == "half\n"
    assert held(tmp_path, "parts") == {"x": 1000}
    process.kill()
    process.wait()
    process.stdout.close()
    cache = Cache(folder=str(tmp_path), max_bytes=1 << 20)
    assert not cache.has("x")
    cache.read("y", 10, lambda: bytes(10))
    assert not held(tmp_path, "parts"), "what it left is collected by the next process"
    assert bytes(cache.read("x", 1000, lambda: b"x" * 1000)) == b"x" * 1000
    assert held(tmp_path) == {"x": 1000, "y": 10}


@pytest.mark.slow
def test_kills_at_any_moment_leave_whole_entries_within_the_bound(tmp_path: Path) -> None:
    code = """
    cache = Cache(folder=sys.argv[1], max_bytes=300_000)
    print("ready", flush=True)
    for number in range(10**9):
        cache.read(f"{number % 50}", 10_000, lambda: bytes([number % 50]) * 10_000)
    """
    draw = random.Random(0)  # noqa: S311 -- repeatable, not secret
    for _ in range(6):
        processes = [run(code, tmp_path) for _ in range(2)]
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.0, 0.05))
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr] # it was read from
        for name, size in held(tmp_path).items():
            assert Path(tmp_path, "entries", name).read_bytes() == bytes([int(name)]) * 10_000, size
        assert sum(held(tmp_path).values()) + sum(held(tmp_path, "parts").values()) <= 300_000
    Cache(folder=str(tmp_path), max_bytes=300_000).read("new", 1, lambda: b"1")
    assert not held(tmp_path, "parts")


def test_who_waits_for_a_filler_that_stands_still_fetches_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "WAIT_S", 0.2)
    code = """
    def slow():
        print("filling", flush=True)
        time.sleep(60)
    Cache(folder=sys.argv[1], max_bytes=1 << 20).read("x", 4, slow)
    """
    process = run(code, tmp_path)
    assert process.stdout
    assert process.stdout.readline() == "filling\n"
    cache = Cache(folder=str(tmp_path), max_bytes=1 << 20)
    assert cache.read("x", 4, lambda: b"1234") == b"1234"
    assert not cache.has("x")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert cache.read("x", 4, lambda: b"1234") == b"1234"
    assert cache.has("x")


def test_an_error_of_the_fetch_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(folder=str(tmp_path), max_bytes=1 << 20)

    def broken() -> bytes:
        raise DataError("gone")

    with pytest.raises(DataError, match="gone"):
        cache.read("x", 4, broken)
    assert not held(tmp_path)
    assert not held(tmp_path, "parts")


# --- a disk that refuses


def test_a_full_disk_costs_a_fetch_and_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(folder=str(tmp_path), max_bytes=1 << 20)
    cache.read("small", 100, lambda: bytes(100))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for _ in range(3):
            assert bytes(cache.read("large", 5000, lambda: b"1" * 5000)) == b"1" * 5000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert held(tmp_path) == {"small": 100}
    assert not held(tmp_path, "parts")
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: nothing is cached there ({os.strerror(errno.EFBIG)}); data are read from storage"
    ]
    assert bytes(cache.read("large", 5000, lambda: b"1" * 5000)) == b"1" * 5000
    assert cache.has("large")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted by root only")
def test_a_file_system_without_room_costs_a_fetch(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", "size=64k", "none", place], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        cache = Cache(folder=str(place), max_bytes=1 << 20)
        for number in range(5):
            assert bytes(cache.read(str(number), 20_000, lambda: b"1" * 20_000)) == b"1" * 20_000
        assert set(held(place).values()) == {20_000}
        assert not held(place, "parts")
    finally:
        subprocess.run(["/bin/umount", place], check=True)


def test_a_folder_that_cannot_be_made_costs_a_fetch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = Cache(folder=str(tmp_path / "file" / "cache"), max_bytes=1 << 20)
    assert cache.read("x", 1, lambda: b"1") == b"1"
    assert "nothing is cached there" in caplog.text


def test_what_stands_against_it_is_said_beforehand(tmp_path: Path) -> None:
    assert Cache(folder=str(tmp_path / "new"), max_bytes=1000).doubt() is None
    found = Cache(folder=str(tmp_path), max_bytes=10**18).doubt()
    assert found
    assert "less than data.cache.max_bytes, 1000000000.0 GB; what has no room is read from storage" in found
    (tmp_path / "file").touch()
    found = Cache(folder=str(tmp_path / "file" / "cache"), max_bytes=1).doubt()
    assert found
    assert "Not a directory; nothing is cached" in found


# --- what is in it


@pytest.mark.slow
def test_an_epoch_from_the_cache_asks_the_server_for_nothing(proxied: tuple[str, Proxy], tmp_path: Path) -> None:
    url, proxy = proxied
    data, cache = pack(url), Cache(folder=str(tmp_path), max_bytes=10 << 20)
    whole = epoch(data)
    assert len(whole) == ROWS
    assert requests(proxy, lambda: epoch(data, cache))["GET"] >= len(data.group_rows) + len(data.shards)
    reader._remote.clear()
    again: dict[int, bytes] = {}
    assert set(requests(proxy, lambda: again.update(epoch(data, cache))).values()) == {0}
    assert again == whole


@pytest.mark.slow
def test_a_row_group_is_one_request_and_columns_that_are_not_wanted_are_none(proxied: tuple[str, Proxy]) -> None:
    url, proxy = proxied
    data = pack(url)
    source = reader.sources_of(data, np.arange(1))[0]
    reader.read_group(data.columns, source)
    assert requests(proxy, lambda: reader.read_group(data.columns, source)) == {"GET": 1, "HEAD": 0}
    label = data.select(["label"])
    (((_, length),), _) = reader._opened(source).wanted(0, tuple(column.name for column in label.columns))
    assert length < 1000


@pytest.mark.slow
def test_two_processes_that_want_the_same_shards_get_each_range_once(
    proxied: tuple[str, Proxy], tmp_path: Path
) -> None:
    url, proxy = proxied
    data = pack(url)
    alone = requests(proxy, lambda: epoch(data, Cache(folder=str(tmp_path / "alone"), max_bytes=10 << 20)))
    proxy.throttle(first_byte_ms=30)
    code = f"""
    sys.path.insert(0, {str(ROOT)!r})
    from tests.data.test_cache import Dataset, epoch
    data, cache = Dataset.open(sys.argv[1]), Cache(folder=sys.argv[2], max_bytes=10 << 20)
    print("ready", flush=True)
    sys.stdin.readline()
    epoch(data, cache)
    """

    def both() -> None:
        for process in processes:
            assert process.stdin
            print(file=process.stdin, flush=True)
        assert [process.wait(60) for process in processes] == [0, 0]

    script = "import os, sys, time\nfrom elastrain.data.cache import Cache\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", script, url, str(tmp_path / "both")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    assert requests(proxy, both)["GET"] == alone["GET"]
    for process in processes:
        process.communicate()


@pytest.mark.slow
def test_bits_that_flip_on_the_disk_never_reach_a_model(
    proxied: tuple[str, Proxy], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, proxy = proxied
    data, cache = pack(url), Cache(folder=str(tmp_path), max_bytes=10 << 20)
    whole, draw = epoch(data, cache), random.Random(0)  # noqa: S311 -- repeatable, not secret
    for round_ in range(6):
        for path in sorted(Path(tmp_path, "entries").iterdir()):
            content = bytearray(path.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content[: len(content) // 2] if round_ == 5 else content)
        reader._remote.clear()
        assert epoch(data, cache) == whole
    assert "this was the cached copy" in caplog.text
    reader._remote.clear()
    epoch(data, cache)
    assert set(requests(proxy, lambda: epoch(data, cache)).values()) == {0}, "the good bytes are cached again"


@pytest.mark.slow
def test_what_is_corrupted_in_storage_is_an_error_and_not_kept(proxied: tuple[str, Proxy], tmp_path: Path) -> None:
    url, _ = proxied
    data, cache = pack(url), Cache(folder=str(tmp_path), max_bytes=10 << 20)
    source = reader.sources_of(data, np.arange(1), cache)[0]
    content = bytearray(storage.read_bytes(source.url))
    content[1000] ^= 1
    storage.put(source.url, bytes(content))
    with pytest.raises(DataError, match=f"{source.url}: row group 0 cannot be read .hash mismatch"):
        reader.read_group(data.columns, source)
    with pytest.raises(DataError, match="hash mismatch"):
        reader.read_group(data.columns, source)
    assert len(held(tmp_path)) == 1, "the footer, which is good"


@pytest.mark.slow
def test_a_dataset_that_is_written_anew_never_hits_what_it_was(proxied: tuple[str, Proxy], tmp_path: Path) -> None:
    url, _ = proxied
    cache = Cache(folder=str(tmp_path), max_bytes=10 << 20)
    old = epoch(pack(url, seed=1), cache)
    storage.remove(url)
    new = epoch(pack(url, seed=2), cache)
    assert new == epoch(Dataset.open(url))
    assert not set(old.values()) & set(new.values())


def test_keys_tell_content_place_and_range_apart() -> None:
    keys = {key_of(*parts) for parts in (("u", "h", 0, 12), ("u", "h", 1, 12), ("u", "i", 0, 12), ("v", "h", 0, 12))}
    assert len(keys) == 4


# --- when it is used


def test_local_data_are_not_cached_and_plain_remote_files_are_refused(tmp_path: Path) -> None:
    spec = CacheSpec(folder=str(tmp_path / "cache"), max_bytes=1000)
    data = pack(str(tmp_path / "data"))
    assert cache_of(spec, data, None) is None
    assert cache_of(None, replace(data, url="s3://bucket/x")) is None
    assert cache_of(spec, replace(data, url="s3://bucket/x"), data) == Cache(folder=spec.folder, max_bytes=1000)
    plain = replace(data, url="s3://bucket/x", shards=tuple(replace(shard, sha256=None) for shard in data.shards))
    with pytest.raises(DataError, match=r"s3://bucket/x: not packed, .* pack it, or leave data\.cache out"):
        cache_of(spec, data, plain)


@pytest.fixture
def proxied(fault_proxy: Proxy) -> tuple[str, Proxy]:
    """An empty folder on the server, reached through a proxy that counts."""
    return f"s3://{fault_proxy.environment['BUCKET']}/{secrets.token_hex(4)}", fault_proxy


def requests(proxy: Proxy, action: Callable[[], Any]) -> dict[str, int]:
    """How many requests an action makes that ask for data."""
    before = proxy.counts()
    action()
    return {method: proxy.counts().get(method, 0) - before.get(method, 0) for method in ("GET", "HEAD")}
