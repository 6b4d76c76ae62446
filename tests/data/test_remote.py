"""Remote shards: ranges that fit what is read, and fetches ahead of their use, as many as the pace asks for."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastrain.data import remote as remote_module
from elastrain.data.dataset import Dataset
from elastrain.data.reader import read_group, sources_of
from elastrain.data.remote import AHEAD_BYTES, MOST_FETCHES, Pace, Pieces, RangeFile, ReadAhead, Verified, ranges_of
from elastrain.errors import DataError

CONTENT = np.random.default_rng(0).bytes(100_000)


@pytest.fixture
def url() -> Iterator[str]:
    """A file in fsspec's memory."""
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/remote/file", CONTENT)
    yield "memory://remote/file"
    filesystem.rm("/remote", recursive=True)


def pace_of(fetches: list[float], *, decode_s: float, size: int = 1 << 20) -> int:
    pace = Pace()
    for seconds in fetches:
        pace.fetched(seconds, size)
        pace.decoded(decode_s)
    return pace.fetches()


def test_as_many_are_under_way_as_are_decoded_while_one_lasts() -> None:
    assert Pace().fetches() == remote_module.FIRST_FETCHES, "before anything is measured"
    assert pace_of([0.029] * 32, decode_s=0.003) == 11
    assert pace_of([0.029] * 32, decode_s=0.1) == 2
    assert pace_of([1.0] * 32, decode_s=0.001) == MOST_FETCHES
    assert pace_of([1.0] * 32, decode_s=0.001, size=16 << 20) == AHEAD_BYTES // (16 << 20)
    paused = Pace()
    for place in range(32):
        paused.fetched(0.029, 1 << 20)
        paused.decoded(60.0 if place % 4 == 0 else 0.003)  # Ray Data had no room
    assert paused.fetches() == 11


@pytest.mark.parametrize("near", [(), (0, 3, 5, 10), range(20)])
@pytest.mark.parametrize("first", [1, 3, 8])
def test_things_come_once_each_in_their_order_and_those_left_out_are_passed(
    monkeypatch: pytest.MonkeyPatch, first: int, near: Sequence[int]
) -> None:
    monkeypatch.setattr(remote_module, "_pace", Pace())
    monkeypatch.setattr(remote_module, "FIRST_FETCHES", first)
    fetched: list[int] = []

    def fetch(thing: int) -> Pieces:
        fetched.append(thing)
        return {thing: bytes([thing])}

    with ReadAhead(range(20), fetch, lambda thing: thing in near) as ahead:
        for thing in (0, 1, 2, 5, 6, 10, 19):
            assert ahead.take(thing) == {thing: bytes([thing])}
    assert len(fetched) == len(set(fetched))
    assert {0, 1, 2, 5, 6, 10, 19} <= set(fetched)


def test_what_is_near_is_read_by_who_asks_for_it_and_the_rest_in_threads_as_far_ahead_as_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_module, "_pace", Pace())
    monkeypatch.setattr(remote_module, "FIRST_FETCHES", 2)
    who: dict[int, threading.Thread] = {}
    come = threading.Event()

    def fetch(thing: int) -> Pieces:
        who[thing] = threading.current_thread()
        if 4 in who and 9 in who:
            come.set()
        return {}

    with ReadAhead(range(10), fetch, lambda thing: thing not in (4, 9)) as ahead:
        ahead.take(0)
        assert come.wait(10), "things that are near stand in nobody's way"
        for thing in range(1, 10):
            ahead.take(thing)
    assert {thing for thing, thread in who.items() if thread is not threading.current_thread()} == {4, 9}


def test_fetches_run_side_by_side_and_what_one_raises_is_raised_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_module, "_pace", Pace())
    inside, most, lock = 0, 0, threading.Lock()

    def fetch(thing: int) -> Pieces:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.02)
        with lock:
            inside -= 1
        if thing == 30:
            raise DataError("thirty")
        return {0: b"1"}

    with ReadAhead(range(60), fetch, lambda _: False) as ahead:
        for thing in range(30):
            ahead.take(thing)
        with pytest.raises(DataError, match="thirty"):
            ahead.take(30)
        ahead.take(31)
    assert 4 <= most <= MOST_FETCHES


def test_a_file_is_read_from_what_is_at_hand_and_else_from_storage(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RangeFile(url, len(CONTENT), None, None)
    pieces = {0: CONTENT[:100], 100: CONTENT[100:250], 5000: CONTENT[5000:6000]}
    requests: list[tuple[int, int]] = []
    whole = RangeFile.read_at

    def noted(self: RangeFile, length: int, start: int) -> bytes:
        requests.append((start, length))
        return bytes(whole(self, length, start))

    monkeypatch.setattr(RangeFile, "read_at", noted)
    wrapped = pa.PythonFile(file, mode="r")
    assert wrapped.size() == len(CONTENT)
    file.hold(pieces)
    assert wrapped.read_at(200, 20) == CONTENT[20:220]
    assert wrapped.read_at(1000, 5000) == CONTENT[5000:6000]
    assert not requests
    assert wrapped.read_at(300, 99_900) == CONTENT[99_900:]
    assert requests == [(99_900, 100)]
    file.hold({})
    assert wrapped.read_at(10, 0) == CONTENT[:10]
    assert requests == [(99_900, 100), (0, 10)], "nothing is at hand any more"
    wrapped.close()
    assert file.closed


def test_nothing_but_what_was_verified_can_be_read_from_it() -> None:
    file = Verified("x", len(CONTENT))
    wrapped = pa.PythonFile(file, mode="r")
    assert wrapped.size() == len(CONTENT)
    file.hold(100, CONTENT[100:250])
    assert wrapped.read_at(150, 100) == CONTENT[100:250]
    assert wrapped.read_at(10, 130) == CONTENT[130:140]
    for place in (0, 95, 245, 250, 90_000):
        with pytest.raises(DataError, match=f"x: 10 bytes at {place} belong to no row group that was verified"):
            wrapped.read_at(10, place)
    file.hold(0, b"")
    with pytest.raises(DataError, match="x: 10 bytes at 100 belong to no row group"):
        wrapped.read_at(10, 100)


def test_threads_that_decode_from_one_file_see_what_they_hold_themselves(url: str) -> None:
    file, verified, inside = (
        RangeFile(url, len(CONTENT), None, None),
        Verified(url, 0),
        threading.Barrier(2, timeout=60),
    )
    wrapped = [pa.PythonFile(one, mode="r") for one in (file, verified)]
    found: dict[int, list[bytes]] = {}

    def decode(start: int) -> None:
        file.hold({start: b"%4d" % start * 25})
        verified.hold(start, CONTENT[start : start + 100])
        inside.wait()
        found[start] = [one.read_at(100, start) for one in wrapped]
        inside.wait()

    threads = [threading.Thread(target=decode, args=(start,)) for start in (1000, 5000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {start: [b"%4d" % start * 25, CONTENT[start : start + 100]] for start in (1000, 5000)}


def test_a_file_of_another_size_than_the_manifest_says_is_told_apart(url: str) -> None:
    with pytest.raises(DataError, match=f"{url}: 100000 bytes where 99999 are expected: truncated or replaced"):
        RangeFile(url, 99_999, None, None).read_at(10, 0)


def test_ranges_hold_the_columns_that_are_read_and_no_long_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({name: np.random.default_rng(0).integers(0, 2**62, 20_000) for name in "abcd"})
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=["a"])
    group = pq.read_metadata(tmp_path / "x.parquet").row_group(0)
    size = (tmp_path / "x.parquet").stat().st_size
    ((start, length),) = ranges_of(group, list("abcd"))
    assert start == 4
    assert size - length < 2000
    ((start, length),) = ranges_of(group, ["b"])
    assert 160_000 <= length < 161_000
    assert len(ranges_of(group, ["b", "d"])) == 1, "a short hole is read over"
    monkeypatch.setattr(remote_module, "HOLE_BYTES", 1000)
    assert len(ranges_of(group, ["b", "d"])) == 2


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_a_remote_row_group_is_the_local_one(tmp_path: Path, codec: str) -> None:
    table = pa.table({"x": np.arange(9000) % 100, "y": np.random.default_rng(0).random(9000), "z": np.arange(9000)})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=2000, compression=codec, write_page_checksum=True)
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/row-groups/0.parquet", (tmp_path / "0.parquet").read_bytes())
    try:
        for names in (["x", "y", "z"], ["z"], ["x", "z"]):
            near, far = (Dataset.open(place).select(names) for place in (str(tmp_path), "memory://row-groups"))
            for one, other in zip(*(sources_of(data, np.arange(5)) for data in (near, far)), strict=True):
                for most in (None, 7):
                    there = read_group(far.columns, other, most=most)
                    for name, values in read_group(near.columns, one, most=most).items():
                        np.testing.assert_array_equal(there[name], values)
    finally:
        filesystem.rm("/row-groups", recursive=True)
