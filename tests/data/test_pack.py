"""Packing as a Ray job: the same bytes whatever happens, proof of what was written, and errors in one sentence."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import ray

from elastrain import storage
from elastrain.data import outcome
from elastrain.data.card import PAGE
from elastrain.data.chunks import Removed, Split
from elastrain.data.columns import Array, Column, from_table
from elastrain.data.dataset import MANIFEST, PACKING, Dataset, read_footer
from elastrain.data.pack import _Order, _pieces, machine_cpus, pack_dataset
from elastrain.data.shards import ShardWriter, read_back
from elastrain.data.sources import PackOptions, open_source
from elastrain.data.statistics import Sums
from elastrain.data.tokens import Windows
from elastrain.errors import ConflictError, DataError, ElastrainError, SpecError, StorageError
from elastrain.lease import Hold
from elastrain.lock import locked
from elastrain.observe.actions import read_actions

WATCHED = """
import json, sys, time
import ray
from elastrain.data.pack import pack_dataset
from elastrain.data.sources import PackOptions
where, jobs, options, hold = json.loads(sys.argv[1])

def progress(name, rows, total):
    if hold is not None and rows > hold:
        print("held", flush=True)
        time.sleep(600)

ray.init(**where, log_to_driver=False)
for source, out in jobs:
    print(json.dumps(pack_dataset(source, out, PackOptions(**options), progress=progress)), flush=True)
"""


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Three CSV files of 20 000 rows."""
    folder = tmp_path / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        columns = {"x": rng.random(20_000), "n": rng.integers(0, 50, 20_000), "kind": rng.choice(["a", "b"], 20_000)}
        pyarrow.csv.write_csv(pa.table(columns), folder / f"{i}.csv")
    return folder


SMALL: dict[str, Any] = {"row_group_bytes": 20_000, "shard_bytes": 200_000, "label": "kind", "test_fraction": 0.2}


def other_process(
    *jobs: tuple[str, Path], options: dict[str, Any], hold: int | None = None, cpus: int | None = None
) -> "subprocess.Popen[str]":
    """Start packs, one after the other, in a process that prints the result of each, or stands still after `hold` rows.

    On the Ray of this process, or on one of its own with so many CPUs.
    """
    if cpus is None:
        where: dict[str, Any] = {"address": ray.get_runtime_context().gcs_address}
    else:
        where = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    arguments = json.dumps([where, [[source, str(out)] for source, out in jobs], options, hold])
    environment = {**os.environ, "PYTHONPATH": str(Path(storage.__file__).parents[1]), "RAY_AUTH_MODE": "token"}
    command = [sys.executable, "-c", WATCHED, arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- without Ray: the writer


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64", "uint64", "float32", "float64"])
def test_statistics_are_exact_whatever_the_groups(dtype: str) -> None:
    rng = np.random.default_rng(0)
    values: Array = (rng.random((300, 7)) * 100 - (0 if dtype.startswith("u") else 50)).astype(dtype)
    if dtype == "int64":
        values[5] = [2**62, -(2**62), 3, 2**61, 5, 2**33, -1]
    column = Column(name="x", dtype=dtype, shape=(7,))
    sums = Sums(column)
    for low in range(0, 300, 17):
        sums.add(values[low : low + 17])
    found = sums.result()
    wide = values.astype(np.float64)
    assert found.mean == pytest.approx(wide.mean(), rel=1e-12, abs=1e-12)
    assert found.std == pytest.approx(wide.std(), rel=1e-9)
    assert found.num_values == (int(values.max()) + 1 if dtype.startswith("u") else None)


def test_values_that_are_no_numbers_have_no_statistics() -> None:
    sums = Sums(Column(name="x", dtype="float32", shape=()))
    sums.add(np.array([1, np.nan], np.float32))
    assert (sums.result().mean, sums.result().std) == (None, None)


def test_row_groups_and_shards_do_not_depend_on_the_pieces(tmp_path: Path) -> None:
    rows = np.arange(1000, dtype=np.int32).reshape(250, 4)
    column = Column(name="x", dtype="int32", shape=(4,))
    found = []
    for size in (1, 7, 250):
        folder = tmp_path / str(size)
        with ShardWriter(str(folder), [column], PackOptions(row_group_bytes=16 * 30, shard_bytes=16 * 100)) as writer:
            for low in range(0, 250, size):
                writer.write({"x": rows[low : low + size]})
            shards, _ = writer.finish()
        found.append(files_of(folder))
        assert [shard.row_groups for shard in shards] == [(30, 30, 30), (30, 30, 30), (30, 30, 10)]
    assert found[0] == found[1] == found[2]
    read = np.concatenate([arrays["x"] for path in sorted(folder.iterdir()) for arrays in read_back(path)])
    assert np.array_equal(read, rows)


def write_numbers(folder: Path, *pieces: Array) -> None:
    """Write a column of int32 in row groups of 10 000 rows."""
    column = Column(name="x", dtype="int32", shape=())
    with ShardWriter(str(folder), [column], PackOptions(row_group_bytes=40_000, codec="none")) as writer:
        for piece in pieces:
            writer.write({"x": piece})
        writer.finish()


def test_a_writer_that_is_left_by_an_error_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'x' gives float64 \[\] where int32"):
        write_numbers(tmp_path, np.arange(15_000, dtype=np.int32), np.zeros(3))
    assert files_of(tmp_path) == {}


def test_a_full_disk_is_named_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(StorageError, match=r"part-00000.parquet: the disk is full"):
        write_numbers(tmp_path, np.arange(100, dtype=np.int32))
    assert files_of(tmp_path) == {}


def test_a_shard_that_cannot_be_read_back_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = pq.ParquetWriter.close

    def damaging(writer: Any) -> None:
        close(writer)
        path = next(tmp_path.glob(".*.tmp"))
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(pq.ParquetWriter, "close", damaging)
    with pytest.raises(StorageError, match=r"part-00000.parquet: what was just written cannot be read back"):
        write_numbers(tmp_path, np.arange(10_000, dtype=np.int32))
    assert files_of(tmp_path) == {}


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = [Column(name="x", dtype="uint8", shape=(8, 8)), Column(name="y", dtype="uint8", shape=())]
    rows = {"x": rng.integers(0, 17, (2000, 8, 8), dtype=np.uint8), "y": rng.integers(0, 10, 2000, dtype=np.uint8)}
    with ShardWriter(str(tmp_path), columns, PackOptions(row_group_bytes=32 << 10)) as writer:
        writer.write(rows)
        (shard,), _ = writer.finish()
    path = tmp_path / shard.path
    good = path.read_bytes()
    silent = unverified = 0
    for place in rng.choice(len(good) * 8, 400, replace=False).tolist():
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        silent += _reads_wrong(path, rows, footer=shard.footer)
        unverified += _reads_wrong(path, rows, footer=None)
    assert silent == 0
    assert unverified > 100, "without verification the same flips give wrong rows: the test can see them"


def _reads_wrong(path: Path, rows: dict[str, Array], *, footer: str | None) -> bool:
    """Say whether reading gives other rows than were written, without any error."""
    try:
        if footer is not None:
            if read_footer(str(path), path.stat().st_size)[1] != footer:
                return False
            read = list(read_back(path))
        else:
            with pq.ParquetFile(path) as file:
                read = [from_table(file.read_row_group(g), where="") for g in range(file.num_row_groups)]
        return not all(np.array_equal(np.concatenate([r[name] for r in read]), rows[name]) for name in rows)
    except (OSError, pa.ArrowException, DataError, KeyError, ValueError, UnicodeDecodeError):
        return False


def test_pieces_out_of_order_are_noticed() -> None:
    order = _Order()
    assert order.expect(0, 0, end=False)
    with pytest.raises(RuntimeError, match="was due"):
        order.expect(1, 0, end=False)
    with pytest.raises(RuntimeError, match="ended before"):
        order.complete(1)


# --- without Ray: what is left in the folder

COLUMN = Column(name="x", dtype="int64", shape=())


def outcome_of(out: str, value: int, names: tuple[str, ...], *, also_files: bool = False) -> None:
    """Pack rows of one value, in splits of these names, with all that `pack_dataset` does around its Ray job."""
    outcome.recover(Hold(out))
    with placed(out, value, names, also_files=also_files) as place:
        outcome.commit(place, {name: written(place, name, value) for name in names})


def placed(
    out: str, value: int, names: tuple[str, ...], *, also_files: bool = False, token: str = ""
) -> contextlib.AbstractContextManager[outcome.Place]:
    files = {outcome.TOKENIZER: b"{}"} if also_files else {}
    splits = {name: Split(columns=(COLUMN,), chunks=(), reader=_Buggy(), files=files) for name in names}
    return outcome.placed(out, outcome.find(out), splits, {"value": value}, Hold(out, token))


def written(place: outcome.Place, name: str, value: int) -> Dataset:
    """Write the shards of a split."""
    options, url = PackOptions(row_group_bytes=8, shard_bytes=16), place.shards(name)
    with ShardWriter(url, [COLUMN], options, mark=place.mark, check=place.hold.check) as writer:
        writer.write({"x": np.full(value, value)})
        shards, columns = writer.finish()
    return Dataset(url=url, columns=columns, shards=shards, fingerprint=str(value), packed=True)


def opened(out: str) -> dict[str, str]:
    """Return the fingerprints of the splits that open, all shards of which are there as they were written."""
    found = {}
    for name in ("train", "test", "val"):
        with contextlib.suppress(DataError):
            dataset = Dataset.open(f"{out}/{name}")
            assert dataset.packed
            for shard in dataset.shards:
                assert read_footer(f"{out}/{name}/{shard.path}", shard.size_bytes)[1] == shard.footer
            found[name] = dataset.fingerprint
    return found


class _Killed(BaseException):
    """No cleaning up: whatever is done afterwards fails, too."""


@pytest.mark.parametrize("store", ["local", "memory"])
def test_a_kill_at_any_moment_of_an_overwrite_leaves_the_old_or_the_new_once_another_pack_has_looked(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, moment, ended = set(), 0, False
    while not ended:
        out = f"memory://killed/{moment}" if store == "memory" else str(tmp_path / str(moment))
        outcome_of(out, 3, ("train", "test"), also_files=True)
        left = moment

        def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
            def operate(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise _Killed
                return operation(*arguments, **options)

            return operate

        with monkeypatch.context() as patched:
            for name in ("staged", "put", "move", "remove"):
                patched.setattr(storage, name, dying(getattr(storage, name)))
            try:
                outcome_of(out, 5, ("train", "val"))
                ended = True
            except _Killed:
                pass
        found = opened(out)
        assert len(set(found.values())) < 2, f"killed before operation {moment}: {found}"
        assert found.get("train") != "5" or found == {"train": "5", "val": "5"}, "train comes last"
        seen.add(tuple(sorted(found.items())))
        outcome.recover(Hold(out))
        assert opened(out) in ({"train": "3", "test": "3"}, {"train": "5", "val": "5"}), f"killed before {moment}"
        assert not outcome.recover(Hold(out))
        outcome_of(out, 5, ("train", "val"))
        assert opened(out) == {"train": "5", "val": "5"}
        if store == "local":
            expected = {f"{split}/{name}" for split in ("train", "val") for name in (MANIFEST, *FIVE)}
            assert set(files_of(Path(out))) == expected
        moment += 1
    assert {(("test", "3"), ("train", "3")), (), (("train", "5"), ("val", "5"))} <= seen
    assert moment > 20


@pytest.mark.parametrize("store", ["local", pytest.param("s3", marks=pytest.mark.slow)])
def test_an_error_in_the_middle_of_a_commit_loses_nothing(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    out = str(tmp_path) if store == "local" else f"{request.getfixturevalue('s3_bucket')}/cut-off"
    monkeypatch.setattr(Hold, "check", lambda _: None)
    outcome_of(out, 3, ("train", "test"))
    move, moved = storage.move, []

    def away(url: str, target: str) -> None:
        moved.append(target)
        if len(moved) == 2:
            raise StorageError("the store is away")
        move(url, target)

    with monkeypatch.context() as patched, placed(out, 5, ("train",), token="ab" * 8) as place:
        patched.setattr(storage, "move", away)
        packed = {"train": written(place, "train", 5)}
        with pytest.raises(StorageError, match="away"):
            outcome.commit(place, packed)
    with pytest.raises(DataError, match=r"cut off; run the same `elastrain pack` again to finish it"):
        Dataset.open(f"{out}/train")
    assert outcome.recover(Hold(out))
    assert opened(out) == {"train": "5"}
    assert not outcome.recover(Hold(out))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "old"), [(m, old) for m in ("writing", "late", "committing") for old in (None, 3)] + [("at last", None)]
)
def test_a_pack_that_stood_still_on_s3_harms_nothing_that_another_one_has_committed(
    moment: str, old: int | None, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late, at last: it looks, stands still while another one comes and goes, and writes what it was about to."""
    out, names = f"{s3_bucket}/stood-still/{moment}/{old}", ("train",) if moment == "at last" else ("train", "test")
    if old is not None:
        outcome_of(out, old, ("train",))

    def other() -> None:
        storage.put_json(f"{out}/.lock", {"token": "another", "pid": 7, "user": "who", "host": "came"})
        blind(lambda: outcome_of(out, 5, ("train",)))

    def blind(action: Callable[[], object]) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Hold, "check", lambda _: None)
            action()

    def stale() -> None:
        with locked(out, remedy="") as hold, placed(out, 6, names, token=hold.token) as place:
            packed: dict[str, Dataset] = {}

            def write() -> None:
                packed.update({name: written(place, name, 6) for name in names})

            steps = {
                "writing": (other, write),
                "late": (other, lambda: blind(write)),
                "committing": (write, other),
                "at last": (write, other, lambda: blind(lambda: outcome.commit(place, packed))),
            }
            for step in steps[moment]:
                step()
            outcome.commit(place, packed)

    with pytest.raises(ConflictError, match="another pack has written it" if moment == "at last" else "taken over"):
        stale()
    assert opened(out) == {"train": "5"}
    dataset = Dataset.open(f"{out}/train")
    assert [file.path for file in storage.list_files(f"{out}/train")] == [shard.path for shard in dataset.shards]


FIVE = [f"part-{shard:05}.parquet" for shard in range(3)]


def test_what_no_pack_wrote_stays(tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    outcome_of(str(out), 1, ("train", "test"))
    outside.mkdir()
    for path in (outside / "part-00000.parquet", out / "train" / "notes.txt", out / "test" / "more.parquet"):
        path.write_text("precious")
    (out / "train" / "linked").symlink_to(outside)
    outcome_of(str(out), 5, ("train",))
    expected = {"train/notes.txt", "test/more.parquet", f"train/{MANIFEST}", *(f"train/{name}" for name in FIVE)}
    assert set(files_of(out)) == expected
    assert (outside / "part-00000.parquet").read_text() == "precious"


# --- with Ray


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_digits_pack_is_what_the_source_gives(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    out = tmp_path / "digits"
    result = pack_dataset("digits", str(out), PackOptions(), progress=lambda *step: seen.append(step))
    assert not result["already"]
    assert result["dataset"] == str(out)
    assert seen == [("train", 1442, 1442), ("test", 355, 355)]
    named = ray.util.list_named_actors(all_namespaces=True)
    assert "AutoscalingCoordinator" not in {each["name"] for each in named}, "it would keep a node for ever"
    for name, split in open_source("digits", PackOptions()).items():
        dataset = Dataset.open(str(out / name))
        expected = next(split.pieces())
        frame = pq.read_table(out / name / "part-00000.parquet").to_pandas()
        assert frame["label"].tolist() == expected["label"].tolist()
        assert frame["image"][7] == expected["image"][7].tobytes()
        assert result["splits"][name] == {
            "rows": len(frame),
            "bytes": dataset.size_bytes,
            "shards": 1,
            "fingerprint": dataset.fingerprint,
        }
        image, label = dataset.columns
        assert (label.num_values, image.shape, image.num_values) == (10, (8, 8), 17)
        assert image.mean == pytest.approx(expected["image"].mean(), rel=1e-12)
        assert image.std == pytest.approx(expected["image"].std(), rel=1e-12)
        plain = out / name
        (plain / MANIFEST).unlink()
        rebuilt = Dataset.open(str(plain))
        assert {(c.name, c.dtype, c.shape) for c in rebuilt.columns} == {
            (c.name, c.dtype, c.shape) for c in dataset.columns
        }


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_packing_again_conflicts_and_overwriting(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "a.txt"
    source.write_text("some text to learn from\n" * 100)
    first = pack_dataset(f"text:{source}", str(out), PackOptions(context=8, tokenizer="bpe:260"))
    before = files_of(out)
    assert set(before) == {"tokenizer.json"} | {
        f"{split}/{name}" for split in ("train", "test") for name in (MANIFEST, PAGE, "part-00000.parquet")
    }
    again = pack_dataset(f"text:{source}", str(out), PackOptions(context=8, tokenizer="bpe:260"))
    assert again["already"]
    assert again["splits"] == first["splits"]
    assert files_of(out) == before
    with pytest.raises(ConflictError, match="was packed with context 8; choose another folder"):
        pack_dataset(f"text:{source}", str(out), PackOptions(context=9, tokenizer="bpe:260"))
    with pytest.raises(ConflictError, match=r"holds a pack of text:"):
        pack_dataset("digits", str(out), PackOptions())
    with pytest.raises(ConflictError, match="one split of a dataset"):
        pack_dataset("digits", str(out / "train"), PackOptions())
    source.write_text("other text to learn from\n" * 100)
    with pytest.raises(ConflictError, match="changed since"):
        pack_dataset(f"text:{source}", str(out), PackOptions(context=8, tokenizer="bpe:260"))
    pack_dataset(f"text:{source}", str(out), PackOptions(context=8, test_fraction=0, overwrite=True))
    assert set(files_of(out)) == {f"train/{MANIFEST}", f"train/{PAGE}", "train/part-00000.parquet"}
    (tmp_path / "theirs" / "train").mkdir(parents=True)
    (tmp_path / "theirs" / "train" / "mine.parquet").write_bytes(b"precious")
    with pytest.raises(ConflictError, match="no pack wrote"):
        pack_dataset("digits", str(tmp_path / "theirs"), PackOptions(overwrite=True))
    assert (tmp_path / "theirs" / "train" / "mine.parquet").read_bytes() == b"precious"


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_source_is_never_overwritten_with_itself(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_dataset("digits", str(out), PackOptions())
    (tmp_path / "link").symlink_to(out)
    before = files_of(out)
    for source in (f"parquet:{out}/train", f"parquet:{tmp_path}/link", f"text:{out}/test/*.parquet"):
        with pytest.raises(ConflictError, match=r"the source is .*/out/(train|test), which this pack would replace"):
            pack_dataset(source, str(out), PackOptions(overwrite=True))
    with pytest.raises(ConflictError, match="which this pack would replace"):
        pack_dataset(f"parquet:{out}/train", str(tmp_path / "link"), PackOptions(overwrite=True))
    assert files_of(out) == before
    pack_dataset(f"parquet:{out}/train", str(tmp_path / "other"), PackOptions(columns=("label",)))
    (out / "train" / "mine.csv").write_text("x\n1\n2\n")
    pack_dataset(f"csv:{out}/train/mine.csv", str(out), PackOptions(overwrite=True))
    assert (out / "train" / "mine.csv").exists(), "what is not replaced may be packed"


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_an_overwrite_that_fails_leaves_the_old_dataset(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_dataset(f"csv:{table}", str(out), PackOptions(**SMALL))
    before = files_of(out)
    bad = tmp_path / "bad.csv"
    bad.write_text("x,y\n" + "3,4\n" * 1_500_000 + "5,\n")
    with pytest.raises(DataError, match="no value in row 1500000, the first of 1 such rows"):
        pack_dataset(f"csv:{bad}", str(out), PackOptions(overwrite=True, row_group_bytes=20_000, shard_bytes=200_000))
    assert files_of(out) == before
    killed = other_process((f"csv:{table}", out), options={**SMALL, "codec": "zstd", "overwrite": True}, hold=30_000)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "held\n"
    with pytest.raises(ConflictError, match=rf"{out}: in use by process {killed.pid} on .*choose another folder"):
        pack_dataset(f"csv:{table}", str(out), PackOptions(**SMALL, overwrite=True))
    assert pack_dataset(f"csv:{table}", str(out), PackOptions(**SMALL))["already"], "to look takes no lock"
    assert list((out / outcome.BESIDE / "train").glob("part-*.parquet")), "shards of the new dataset are there"
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=300)
    killed.stdout.close()
    assert {name: data for name, data in files_of(out).items() if not name.startswith(".")} == before
    assert not read_actions(str(tmp_path)), "nothing was replaced"
    assert not pack_dataset(f"csv:{table}", str(out), PackOptions(**SMALL, overwrite=True))["already"]
    assert files_of(out) == before
    assert [(each["action"], each["run"]) for each in read_actions(str(tmp_path))] == [("delete", str(out))]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_pack_that_lacks_something_is_done_again(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "a.txt"
    source.write_text("some text to learn from\n" * 1000)
    options = PackOptions(context=8, tokenizer="bpe:260")
    pack_dataset(f"text:{source}", str(out), options)
    before = files_of(out)
    shard = out / "test" / "part-00000.parquet"
    for spoil in (shard.unlink, lambda: shard.write_bytes(before["test/part-00000.parquet"][:-1]), _unlink(out)):
        spoil()
        assert not pack_dataset(f"text:{source}", str(out), options)["already"]
        assert files_of(out) == before
    (out / "train" / MANIFEST).write_bytes(before[f"train/{MANIFEST}"][:50])
    with pytest.raises(DataError, match="--overwrite"):
        Dataset.open(str(out / "train"))
    with pytest.raises(ConflictError, match=r"train has a manifest that cannot be read.*--overwrite"):
        pack_dataset(f"text:{source}", str(out), options)
    pack_dataset(f"text:{source}", str(out), PackOptions(context=8, tokenizer="bpe:260", overwrite=True))
    assert files_of(out) == before


def _unlink(out: Path) -> Callable[[], None]:
    return (out / outcome.TOKENIZER).unlink


def test_credentials_are_refused_and_not_told(tmp_path: Path) -> None:
    secret = "s3://key:hidden@bucket/x"  # noqa: S105 -- nobody's
    for name, source, out in (("SOURCE", f"text:{secret}", str(tmp_path)), ("OUT", "digits", secret)):
        with pytest.raises(SpecError, match=f"^{name}: the URL holds credentials") as caught:
            pack_dataset(source, out, PackOptions())
        assert "hidden" not in str(caught.value)


def test_a_local_pack_has_the_cpus_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, expected in ((1, 2), (2, 2), (64, 64)):
        monkeypatch.setattr("elastrain.data.pack.get_num_cpus", lambda cpus=cpus, **_: cpus)
        assert machine_cpus() == expected


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_any_store_gets_the_same_files(tmp_path: Path) -> None:
    local = pack_dataset("digits", str(tmp_path / "out"), PackOptions())
    remote = pack_dataset("digits", "memory://packed/out", PackOptions())
    assert remote["splits"] == local["splits"]
    assert (
        storage.read_bytes("memory://packed/out/train/part-00000.parquet")
        == (tmp_path / "out" / "train" / "part-00000.parquet").read_bytes()
    )
    assert pack_dataset("digits", "memory://packed/out", PackOptions())["already"]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_errors_of_tasks_are_our_sentences(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,2\n" * 1 + "3,4\n" * 100_000 + "5,\n")
    with pytest.raises(DataError) as caught:
        pack_dataset(f"csv:{path}", str(tmp_path / "out"), PackOptions())
    assert str(caught.value) == (
        f"{path}: column 'y' has no value in row 100001, the first of 1 such rows; correct them, or leave such rows "
        f"out with --nulls drop"
    )
    assert caught.value.__cause__ is None
    with pytest.raises(DataError, match="cut off"):
        Dataset.open(str(tmp_path / "out" / "train"))
    assert set(files_of(tmp_path / "out")) == {f"train/{PACKING}"}
    path.write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match="test split has no rows"):
        pack_dataset(f"csv:{path}", str(tmp_path / "few"), PackOptions(test_fraction=0.01))


class _Buggy:
    def read(self, chunk: Any) -> Iterator[dict[str, Array]]:
        """Fail as only a bug of ours does."""
        raise ZeroDivisionError(chunk)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_bug_in_a_reader_comes_back_as_it_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    split = Split(columns=(Column(name="x", dtype="int64", shape=()),), chunks=(1,), reader=_by_value(_Buggy))
    with pytest.raises(ZeroDivisionError):
        list(_pieces(split))


def _by_value(kind: type) -> Any:
    """Return an instance whose class travels with it: the tasks cannot import this test."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return kind()


class _Backwards:
    """Chunks (number, folder): an even one ends only when the one after it has ended."""

    def read(self, chunk: Any) -> Iterator[dict[str, Array]]:
        """Yield one row, the chunk's number, once its time has come."""
        number, folder = chunk
        deadline = time.monotonic() + 120
        while number % 2 == 0 and not Path(folder, str(number + 1)).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield {"x": np.array([number])}
        Path(folder, str(number)).touch()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_tasks_that_end_in_another_order_give_the_rows_in_order(tmp_path: Path) -> None:
    chunks = tuple((number, str(tmp_path)) for number in range(8))
    split = Split(columns=(Column(name="x", dtype="int64", shape=()),), chunks=chunks, reader=_by_value(_Backwards))
    found = [piece["x"].tolist() for piece in _pieces(split) if not isinstance(piece, Removed)]
    assert found == [[number] for number in range(8)]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_killed_pack_does_not_open_and_a_second_one_finishes_it(table: Path, tmp_path: Path) -> None:
    pack_dataset(f"csv:{table}", str(tmp_path / "good"), PackOptions(**SMALL))
    out = tmp_path / "out"
    killed = other_process((f"csv:{table}", out), options=SMALL, hold=30_000)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "held\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=300)
    killed.stdout.close()
    assert list((out / "train").glob("part-*.parquet")), "shards are there"
    assert list((out / "train").glob(".part-*.tmp")), "and one is half written"
    for name in ("train", "test"):
        with pytest.raises(DataError, match="cut off"):
            Dataset.open(str(out / name))
    with pytest.raises(ConflictError, match=r"test_fraction 0\.2"):
        pack_dataset(f"csv:{table}", str(out), PackOptions(**{**SMALL, "test_fraction": 0.3}))
    again = other_process((f"csv:{table}", out), options=SMALL, cpus=1)
    result = json.loads(again.communicate(timeout=300)[0].splitlines()[-1])
    assert not result["already"]
    assert result["splits"]["train"]["rows"] + result["splits"]["test"]["rows"] == 60_000
    assert result["splits"]["train"]["shards"] > 3
    assert files_of(out) == files_of(tmp_path / "good"), "1 CPU after a kill writes what 4 CPUs write undisturbed"


@pytest.mark.ray
@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    block = np.random.default_rng(0).integers(32, 127, 4 << 20, dtype=np.uint8).tobytes()
    jobs = []
    for size in (64 << 20, 256 << 20):
        source = tmp_path / f"{size}.txt"
        with source.open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
        jobs.append((f"text:{source}", tmp_path / f"out{size}"))
    process = other_process(*jobs, options={}, cpus=2)
    peaks = [_peak(process) for _ in jobs]
    process.communicate(timeout=300)
    assert process.returncode == 0
    for text, out in jobs:
        size = Path(text.removeprefix("text:")).stat().st_size
        assert Dataset.open(str(out / "train")).num_rows > size * 0.9 // 65
    assert peaks[1] < peaks[0] + (80 << 20), f"the largest process's own memory: {peaks}"


def _peak(process: "subprocess.Popen[str]") -> int:
    """Return the most memory that any one process of a pack held until it ended: how many there are is up to Ray."""
    assert process.stdout
    most = 0
    while not select.select([process.stdout], [], [], 0.25)[0]:
        most = max(most, *(_anonymous(pid) for pid in [process.pid, *_descendants(process.pid)]))
    process.stdout.readline()
    return most


def _descendants(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
    found, queue = [], [pid]
    while queue:
        children = [child for child, parent in parents.items() if parent == queue[0]]
        queue = queue[1:] + children
        found += children
    return found


def _anonymous(pid: int) -> int:
    """Return the bytes of a process's own memory, without pages of the object store that it maps."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_pack_on_s3_that_is_taken_over_commits_nothing(s3_bucket: str) -> None:
    out = f"{s3_bucket}/packed-by-two"

    def overtaken(*_: object) -> None:
        storage.put_json(f"{out}/.lock", {"token": "another", "pid": 7, "user": "who", "host": "came"})

    with pytest.raises(ConflictError, match="was taken over by process 7 of who on came"):
        pack_dataset("digits", out, PackOptions(), progress=overtaken)
    assert not storage.exists(f"{out}/train/{MANIFEST}")
    assert storage.exists(f"{out}/train/{PACKING}")


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_packed_text_is_the_text(tmp_path: Path) -> None:
    text = bytes(np.random.default_rng(0).integers(32, 127, 50_000, dtype=np.uint8))
    (tmp_path / "a.txt").write_bytes(text)
    pack_dataset(f"text:{tmp_path}/a.txt", str(tmp_path / "out"), PackOptions(context=16))
    train = Dataset.open(str(tmp_path / "out" / "train"))
    rows = next(read_back(tmp_path / "out" / "train" / "part-00000.parquet"))["tokens"]
    assert bytes(rows[:, :-1].ravel()) == text[: rows[:, :-1].size]
    windows = Windows(16)
    assert np.array_equal(windows.push(np.frombuffer(text[:45_000], np.uint8)), rows)
    assert train.info["dropped_tokens"] == windows.dropped
    assert train.info["tokenizer"] == "bytes"
    with pytest.raises(ElastrainError):
        pack_dataset(f"text:{tmp_path}/a.txt", f"{tmp_path}/a.txt/out", PackOptions())
