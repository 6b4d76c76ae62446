"""Flipped bits and killed writers, by chance, on a local folder and on a real S3 server: nothing wrong is ever silent.

FLIPS (40) are bits in shards, half as many in checkpoints; KILLS (4) are moments, half of them for each size of a
checkpoint, half for each kind of a pack. `make soak` asks for ten times that, and more.
"""

import contextlib
import json
import os
import random
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastrain import storage
from elastrain.data.cache import Cache
from elastrain.data.columns import Array, Column
from elastrain.data.dataset import MANIFEST as DATASET
from elastrain.data.dataset import Dataset
from elastrain.data.reader import forget_files, read_group, sources_of
from elastrain.data.shards import ShardWriter
from elastrain.data.sources import PackOptions
from elastrain.errors import DataError, StorageError
from elastrain.spec.train import CheckpointSpec
from elastrain.training.checkpoint import Writer, load
from elastrain.training.manifests import MANIFEST, folder, newest_whole, read_manifests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FLIPS, KILLS, SEED = (int(os.environ.get(name, value)) for name, value in (("FLIPS", 40), ("KILLS", 4), ("SEED", 0)))
PACK = """
import sys
import ray
from elastrain.data.pack import pack_dataset
from elastrain.data.preparation import Preparation
from elastrain.data.sources import PackOptions
prepare = Preparation(duplicates="drop")
options = PackOptions(row_group_bytes=20_000, shard_bytes=100_000, test_fraction=0.2, prepare=prepare)
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
print("begun", flush=True)
pack_dataset(sys.argv[1], sys.argv[2], options)
print("packed", flush=True)
"""
# What follows forks from a process that has imported everything: a kill then costs what was done, and no imports. It is
# told of each in a line of JSON, and answers with one.
PACKER = """
import json, os, pickle, signal, sys, time
import pyarrow as pa
from elastrain.data import pack
from elastrain.data.chunks import PackOptions
from elastrain.data.preparation import Preparation

def here(split):
    for place, chunk in enumerate(split.chunks):
        yield from pack._Read(split.reader)(pa.table({"place": [place], "chunk": [pickle.dumps(chunk)]}))

pack._batches = here  # its tasks and all in this process
print("ready", flush=True)
for line in sys.stdin:
    source, outs, after_s = json.loads(line)
    of_text = {"documents": "line", "near": 0.8} if source.startswith("text:") else {}
    prepare = Preparation(duplicates="drop", **of_text)
    options = PackOptions(row_group_bytes=20_000, shard_bytes=100_000, test_fraction=0.2, prepare=prepare)
    child = os.fork()
    if not child:
        for out in outs:
            pack.pack_dataset(source, out, options)
        os._exit(0)
    begin = time.monotonic()
    ended = 0
    while not ended and (after_s is None or time.monotonic() < begin + after_s):
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    print(json.dumps([status, time.monotonic() - begin]), flush=True)
"""
COMMITTER = """
import json, os, signal, sys, time, torch
from elastrain.spec.train import CheckpointSpec
from elastrain.training.checkpoint import Writer
torch.set_num_threads(1)

def commit(place, step, size, said):
    writer = Writer(place, CheckpointSpec(keep=3))
    while True:
        tensors = {f"{part}/weight": torch.full((size,), float(step)) for part in ("model", "optim")}
        writer.commit(tensors, {"step": step}, {})
        writer.wait()
        os.write(said, b"%d\\n" % step)
        step += 1

print("ready", flush=True)
for line in sys.stdin:
    place, step, size, after_s = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            commit(place, step, size, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as said:
        steps = [said.readline()]
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        steps += said.readlines()
    os.waitpid(child, 0)
    print(json.dumps([int(step) for step in steps]), flush=True)
"""
Ask = Callable[..., Any]


@contextlib.contextmanager
def answering(code: str, environment: Mapping[str, str]) -> Iterator[Ask]:
    """Run one of these; what is yielded tells it of a kill and returns its answer."""
    path = {"PYTHONPATH": str(Path(storage.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, **path},
    ) as process:
        assert process.stdin
        assert process.stdout
        asked, answers = process.stdin, process.stdout
        assert answers.readline() == "ready\n"

        def ask(*what: Any) -> Any:
            asked.write(json.dumps(what) + "\n")
            asked.flush()
            return json.loads(answers.readline())

        yield ask
        asked.close()


@pytest.fixture(scope="module")
def packer(s3_server: dict[str, str]) -> Iterator[Ask]:
    """Packs a source to some places, and is killed after a while; gives its status and how long that took."""
    with answering(PACKER, s3_server) as ask:
        yield ask


@pytest.fixture(scope="module")
def committer(s3_server: dict[str, str]) -> Iterator[Ask]:
    """Commits from a step on, and is killed a while after the first; gives the steps that it has acknowledged."""
    with answering(COMMITTER, s3_server) as ask:
        yield ask


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What nobody killed: the source, its pack, and how long that took."""

    source: str
    good: str
    took_s: float


@pytest.fixture(scope="module")
def whole_packs(packer: Ask, tmp_path_factory: pytest.TempPathFactory) -> list[Packed]:
    """Packs of rows of numbers, and of documents; some of them twice."""
    made, folder = [], tmp_path_factory.mktemp("sources")
    for kind, source in enumerate(sources_in(folder, 15_000)):
        good = f"{folder}/good-{kind}"
        status, took_s = packer(source, [good], None)
        assert status == 0
        made.append(Packed(source=source, good=good, took_s=took_s))
    return made


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder or an empty place in a bucket."""
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3_bucket')}/{secrets.token_hex(4)}"


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def rows_of(url: str, cache: Cache | None = None) -> dict[str, Array]:
    """All rows of a dataset, read as a run reads them that has just begun."""
    forget_files()
    return rows_again(url, cache)


def rows_again(url: str, cache: Cache | None = None) -> dict[str, Array]:
    """The same by a process that has the files open."""
    dataset = Dataset.open(url)
    every = np.arange(len(dataset.group_rows))
    groups = [read_group(dataset.columns, source) for source in sources_of(dataset, every, cache)]
    return {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}


def pack_small(url: str, verified: str = "hashes") -> None:
    """Put a dataset of one shard with a few row groups; without hashes it is as older packs left it."""
    rng = np.random.default_rng(0)
    columns = [Column(name="x", dtype="uint8", shape=(8, 8)), Column(name="y", dtype="uint8", shape=())]
    with ShardWriter(url, columns, PackOptions(row_group_bytes=16 << 10)) as writer:
        writer.write({"x": rng.integers(0, 17, (1000, 8, 8), dtype=np.uint8), "y": rng.integers(0, 9, 1000, np.uint8)})
        shards, _ = writer.finish()
    if verified == "page checksums":
        shards = tuple(replace(shard, xxh3=None) for shard in shards)
    made = Dataset(url=url, columns=tuple(columns), shards=tuple(shards), fingerprint="", packed=True)
    storage.put_json(storage.join(url, DATASET), made.manifest())


def same(found: dict[str, Array], good: dict[str, Array]) -> bool:
    return all(np.array_equal(found[name], good[name]) for name in good)


@pytest.fixture(params=["hashes", "page checksums"])
def packed(request: pytest.FixtureRequest, place: str) -> str:
    """A small dataset there, whose rows are verified in one way or the other."""
    pack_small(place, request.param)
    assert (Dataset.open(place).shards[0].xxh3 is not None) == (request.param == "hashes")
    return place


def test_no_bit_that_flips_in_a_shard_is_silent(packed: str) -> None:
    good, rng = rows_of(packed), random.Random(SEED)  # noqa: S311 -- repeatable
    (shard,) = Dataset.open(packed).shards
    url = storage.join(packed, shard.path)
    data = storage.read_bytes(url)
    told = 0
    for _ in range(FLIPS):
        storage.put(url, flipped(data, rng.randrange(8 * len(data))))
        try:
            found = rows_of(packed)
        except DataError as error:
            assert str(error).startswith(url)  # noqa: PT017 -- some flips are harmless
            told += 1
        else:
            assert same(found, good)
    assert told > FLIPS // 2


def test_no_bit_that_flips_in_a_shard_between_two_reads_of_an_open_file_is_silent(packed: str) -> None:
    """In the same file where it is local; on S3 in an object that takes the place of the one that was read."""
    good, rng = rows_of(packed), random.Random(SEED)  # noqa: S311 -- repeatable
    (shard,) = Dataset.open(packed).shards
    url, told = storage.join(packed, shard.path), 0
    data = storage.read_bytes(url)
    for _ in range(FLIPS):
        assert same(rows_again(packed), good)
        overwrite(url, flipped(data, rng.randrange(8 * len(data))))
        try:
            found = rows_again(packed)
        except (DataError, StorageError) as error:
            assert url in str(error)  # noqa: PT017 -- some flips are harmless, or in the footer, which is not read again
            told += 1
        else:
            assert same(found, good)
        overwrite(url, data)
        forget_files()
    assert told > FLIPS // 4


def overwrite(url: str, data: bytes) -> None:
    if storage.is_local(url):
        with storage.local_path(url).open("r+b") as file:
            file.write(data)
    else:
        storage.put(url, data)


@pytest.mark.parametrize("verified", ["hashes", "page checksums"])
def test_no_bit_that_flips_in_the_cache_is_silent(s3_bucket: str, tmp_path: Path, verified: str) -> None:
    """What was filled well is not believed later: the row group is read from storage again."""
    place = f"{s3_bucket}/{secrets.token_hex(4)}"
    pack_small(place, verified)
    cache, rng = Cache(folder=str(tmp_path), max_bytes=1 << 20), random.Random(SEED)  # noqa: S311 -- repeatable
    good, healed = rows_of(place, cache), 0
    for number in range(FLIPS):
        entries = sorted(Path(tmp_path, "entries").iterdir())
        path = rng.choice(entries)
        data = path.read_bytes()
        path.write_bytes(flipped(data, rng.randrange(8 * len(data))))
        assert same((rows_of if number % 2 else rows_again)(place, cache), good)
        healed += path.read_bytes() == data
        path.write_bytes(data)
    assert healed > FLIPS // 4


def test_no_bit_that_flips_in_a_checkpoint_is_silent(place: str) -> None:
    for step in (1, 2):
        commit(place, step)
    rng = random.Random(SEED)  # noqa: S311 -- repeatable
    files = storage.list_files(folder(place, 2))
    for number in range(FLIPS // 2):
        url = storage.join(folder(place, 2), files[number % len(files)].path)
        data = storage.read_bytes(url)
        storage.put(url, flipped(data, rng.randrange(8 * len(data))))
        warnings: list[str] = []
        assert newest_whole(place, warn=warnings.append) == 1
        assert url in warnings[0]
        with pytest.raises(StorageError, match=url):
            load(place, 2)
        storage.put(url, data)
    assert newest_whole(place, warn=pytest.fail) == 2


def commit(run: str, step: int) -> None:
    writer = Writer(run, CheckpointSpec(keep=3))
    writer.commit({f"{p}/weight": torch.full((999,), float(step)) for p in ("model", "optim")}, {"step": step}, {})
    writer.wait()


def killed_after(code: str, *arguments: str, first: str, after_s: float | None) -> list[str]:
    """Run Python, kill it -9 so long after it has said `first`, None: not at all; return the lines that it said."""
    environment = {**os.environ, "PYTHONPATH": str(Path(storage.__file__).parents[1])}
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout
        said = [process.stdout.readline().strip()]
        assert said[0] == first
        if after_s is not None:
            time.sleep(after_s)
            process.kill()
        return said + process.stdout.read().split()


@pytest.mark.parametrize("size", [1_000, 2_000_000])
def test_a_checkpoint_that_was_acknowledged_outlives_every_kill_of_its_writer(
    place: str, size: int, committer: Ask
) -> None:
    """The larger ones go to S3 in parts."""
    rng, step = random.Random(SEED), 1  # noqa: S311 -- repeatable
    for _ in range(-(-KILLS // 2)):
        said = committer(place, step, size, rng.uniform(0.0, 1.0))
        newest = newest_whole(place, warn=pytest.fail)
        assert newest is not None
        assert newest in (said[-1], said[-1] + 1), "the last may have been killed before it could say so"
        for number in read_manifests(place):
            assert (load(place, number).tensors["model/weight"] == number).all()
        step = newest + 1
    for last in range(step, step + 4):
        commit(place, last)
    names = storage.list_folders(storage.join(place, "checkpoints"))
    assert names == [f"step-{number:08d}" for number in range(step + 1, step + 4)], "what killed writers left is gone"
    if storage.is_local(place):
        assert not list(Path(place).rglob("*.tmp")), "hidden files, too"
    assert all(storage.exists(storage.join(folder(place, number), MANIFEST)) for number in read_manifests(place))


def sources_in(folder: Path, rows: int) -> list[str]:
    """Rows of numbers, and documents; some of them twice."""
    rng = random.Random(SEED)  # noqa: S311 -- repeatable
    numbers = [f"{number * 0.5},{number % 50}\n" for number in range(rows)]
    (folder / "source.csv").write_text("x,n\n" + "".join(numbers + numbers[: rows // 10]))
    lines = [" ".join(rng.choices(["a", "day", "the", "sea", "two", "of"], k=40)) + "\n" for _ in range(rows // 30)]
    (folder / "source.txt").write_text("".join(lines + lines[: rows // 300]))
    return [f"csv:{folder}/source.csv", f"text:{folder}/source.txt"]


def test_packs_that_are_killed_leave_nothing_that_opens_and_is_not_whole(
    place: str, packer: Ask, whole_packs: list[Packed]
) -> None:
    """The same command then finishes every one, with the same bytes."""
    rng, killed, whole = random.Random(SEED), 0, 0  # noqa: S311 -- repeatable
    for kind, pack in enumerate(whole_packs):
        outs = [storage.join(place, f"kill-{number}") for number in range(kind, KILLS, 2)]
        for out in outs:
            status, _ = packer(pack.source, [out], rng.uniform(0.0, pack.took_s))
            seen = [opens_as(storage.join(out, split), storage.join(pack.good, split)) for split in ("train", "test")]
            assert all(seen) or status, "what was acknowledged is there"
            assert all(seen) or not seen[0], "if train opens, the whole pack is there"
            killed, whole = killed + (status != 0), whole + all(seen)
        assert packer(pack.source, outs, None)[0] == 0
        for out in outs:
            assert contents(out) == contents(pack.good), "finished, and what was left is collected"
    print(f"{killed} of {KILLS} packs killed; {whole} were whole")  # noqa: T201 -- with pytest -s
    assert killed or KILLS < 20


@pytest.mark.ray
def test_a_pack_on_s3_that_is_killed_with_its_ray_is_finished_by_the_same_command(
    s3_bucket: str, whole_packs: list[Packed]
) -> None:
    """On a local folder it is in `test_pack.py`."""
    rng, pack = random.Random(SEED), whole_packs[0]  # noqa: S311 -- repeatable
    for number in range(-(-KILLS // 10)):
        out = f"{s3_bucket}/{secrets.token_hex(4)}/out-{number}"
        said = killed_after(PACK, pack.source, out, first="begun", after_s=rng.uniform(0.0, 8.0))
        seen = [opens_as(storage.join(out, split), storage.join(pack.good, split)) for split in ("train", "test")]
        assert all(seen) or said[-1] == "begun", "what was acknowledged is there"
    assert killed_after(PACK, pack.source, out, first="begun", after_s=None)[-1] == "packed"
    assert contents(out) == contents(pack.good), "finished, and what was left is collected"


def opens_as(url: str, good: str) -> bool:
    """Whether a folder opens as a dataset, which then has the rows of another to the bit."""
    try:
        found = rows_of(url)
    except DataError:
        return False
    whole = rows_of(good)
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    return True


def contents(url: str) -> dict[str, bytes]:
    """All files, less what tells the shards of one pack on S3 from those of another."""
    files = storage.list_files(url)
    mark = re.compile(rb"(?<=part-\d{5})-[0-9a-f]{8}(?=\.parquet)")
    return {
        mark.sub(b"", file.path.encode()).decode(): mark.sub(b"", storage.read_bytes(storage.join(url, file.path)))
        for file in files
    }
