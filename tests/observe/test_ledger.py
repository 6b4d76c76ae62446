"""The clock books every second once; a ledger survives kills; step logs are a function of their lines."""

import contextlib
import itertools
import json
import tempfile
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastrain import storage
from elastrain.errors import StorageError
from elastrain.observe import ledger
from elastrain.observe.ledger import CATEGORIES, Clock, Ledger, StepLog, read_ledger, read_steps

AUDIT = pa.schema([(name, pa.int64()) for name in ("epoch", "step", "slot", "row")])
METRICS = pa.schema(
    [(name, pa.int64()) for name in ("step", "epoch", "samples")]
    + [(name, pa.float64()) for name in ("loss", "lr", "grad_norm", "time_s")]
)

# --- clock


@given(st.floats(0, 1e9), st.lists(st.tuples(st.floats(0, 1e4), st.sampled_from(CATEGORIES)), max_size=50))
def test_categories_sum_to_the_elapsed_time_exactly(begin: float, stretches: list[tuple[float, str]]) -> None:
    moments = list(itertools.accumulate((seconds for seconds, _ in stretches), initial=begin))
    reads = iter([*moments, moments[-1]])
    clock = Clock(now=lambda: next(reads))
    for _, category in stretches:
        clock.switch(category)
    ticks = int(moments[-1] * 2**30) - int(begin * 2**30)
    spent = clock.spent()
    assert sum(spent.values()) == ticks / 2**30
    assert sum(spent.values()) == pytest.approx(moments[-1] - begin, abs=1e-6)
    assert set(spent) == set(CATEGORIES)


def test_a_clock_starts_with_start_and_counts_the_running_category() -> None:
    reads = iter([10.0, 12.0, 15.0, 15.5])
    clock = Clock(now=lambda: next(reads))
    clock.switch("compute")
    assert clock.spent()["compute"] == 3.0
    assert clock.spent() == {**dict.fromkeys(CATEGORIES, 0.0), "start": 2.0, "compute": 3.5}


def test_an_unknown_category_is_refused_at_once() -> None:
    with pytest.raises(AssertionError, match="computing"):
        Clock().switch("computing")


def test_a_switch_costs_less_than_a_microsecond() -> None:
    clock = Clock()
    best = min(timeit.repeat(lambda: clock.switch("data"), number=20_000, repeat=7)) / 20_000
    assert best < 1e-6


# --- ledger


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The folder of a run on either kind of storage."""
    url = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run"
    yield url
    storage.remove(url)


def test_attempts_are_merged_in_order_and_a_killed_one_has_no_end(run: str) -> None:
    moments = itertools.count(100.0)
    assert read_ledger(run) == []
    assert Ledger.next_attempt(run) == 0
    first = Ledger(run, 0, now=lambda: next(moments))
    first.event("start", step=0, workers=2)
    first.spent("a", {"compute": 1.0})
    first.spent("a", {"compute": 2.0})
    first.flush()
    assert Ledger.next_attempt(run) == 1
    second = Ledger(run, 1, now=lambda: next(moments))
    second.event("start", step=7, workers=2)
    second.event("end", outcome="done", step=9)
    second.flush()
    assert read_ledger(run) == [
        {"t": 100.0, "kind": "start", "step": 0, "workers": 2, "attempt": 0},
        {"t": 102.0, "kind": "seconds", "worker": "a", "seconds": {"compute": 2.0}, "attempt": 0},
        {"t": 103.0, "kind": "start", "step": 7, "workers": 2, "attempt": 1},
        {"t": 104.0, "kind": "end", "outcome": "done", "step": 9, "attempt": 1},
    ]


def test_flush_writes_only_what_is_new(tmp_path: Path) -> None:
    book = Ledger(str(tmp_path), 0)
    book.flush()
    assert not list(tmp_path.iterdir())
    book.event("start", step=0)
    with mock.patch.object(storage, "put", wraps=storage.put) as put:
        book.flush()
        book.flush()
        assert put.call_count == 1
        book.event("end", step=1)
        book.flush()
        assert put.call_count == 2


def test_a_failed_flush_is_made_up_for_by_the_next(tmp_path: Path) -> None:
    book = Ledger(str(tmp_path), 0)
    book.event("start", step=0)
    with mock.patch.object(storage, "put", side_effect=StorageError("full")), pytest.raises(StorageError):
        book.flush()
    book.flush()
    assert len(read_ledger(str(tmp_path))) == 1


def test_lines_are_json_that_every_reader_takes_and_hold_no_password(tmp_path: Path) -> None:
    book = Ledger(str(tmp_path), 0)
    book.event(
        "eval",
        step=np.int64(3),
        metrics={"loss": float("nan"), "accuracy": np.float32(0.5)},
        path=Path("x"),
        error="cannot read s3://key:hunter2@bucket/run",
        list=(1, None, True),
    )
    book.flush()
    text = (tmp_path / "ledger" / "00000.jsonl").read_text()
    assert "hunter2" not in text
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    del record["t"]
    assert record == {
        "kind": "eval",
        "step": 3,
        "metrics": {"loss": None, "accuracy": 0.5},
        "path": "x",
        "error": "cannot read s3://***@bucket/run",
        "list": [1, None, True],
    }


def test_a_damaged_ledger_is_named_with_its_line(tmp_path: Path) -> None:
    storage.put(str(tmp_path / "ledger" / "00000.jsonl"), b'{"kind": "start", "t": 1}\n{"kind": \n')
    with pytest.raises(StorageError, match=r"00000\.jsonl, line 2"):
        read_ledger(str(tmp_path))


# --- lines of steps

RANGE, STEPS, KEYS = 4, 14, 3


def lines_of(step: int, key: int) -> dict[str, Any]:
    """What (step, key) holds: a pure function, as in a run; some keys hold no line."""
    rows = np.array([step * 31 + key * 7 + row for row in (2, 0, 1)][: (step + key) % 4], np.int64)
    return {
        "epoch": np.full_like(rows, step // 5),
        "step": np.full_like(rows, step),
        "slot": np.full_like(rows, key),
        "row": rows,
    }


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*"))}


def straight(folder: str, upto: int) -> dict[str, bytes]:
    """The files of a log that nothing ever happened to."""
    log = StepLog(folder, AUDIT, resume_step=0)
    for step in range(upto):
        for key in range(KEYS):
            log.add(step, key, lines_of(step, key))
    log.flush(upto)
    return bytes_of(folder)


def eventful(folder: str, data: st.DataObject) -> int:
    """Add the same lines through flushes, redone steps, failed writes, kills and resumes; how many are committed."""
    log, step, committed = StepLog(folder, AUDIT, resume_step=0), 0, 0
    for _ in range(data.draw(st.integers(0, 30))):
        act = data.draw(st.sampled_from(["step", "step", "step", "redo", "flush", "fail", "kill"]))
        if act == "step" and step < STEPS:
            for key in data.draw(st.permutations(range(KEYS))):
                log.add(step, key, lines_of(step, key))
            step += 1
        elif act == "redo" and step > committed:
            again = data.draw(st.integers(committed, step - 1))
            wrong = {name: np.full(2, again, np.int64) for name in AUDIT.names}
            log.add(again, 1, wrong)
            log.add(again, 1, lines_of(again, 1))
        elif act == "flush":
            committed = data.draw(st.integers(committed, step))
            log.flush(committed)
        elif act == "fail":
            committed = data.draw(st.integers(committed, step))
            full = mock.patch.object(pq, "write_table", side_effect=StorageError("full"))
            with full, contextlib.suppress(StorageError):
                log.flush(committed)
        elif act == "kill":
            log.flush(committed)
            step = committed = data.draw(st.integers(0, committed))
            log = StepLog(folder, AUDIT, resume_step=step)
    log.flush(committed)
    return committed


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_files_depend_on_the_lines_alone(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(ledger, "RANGE", RANGE):
        committed = eventful(f"{folder}/eventful", data)
        assert bytes_of(f"{folder}/eventful") == straight(f"{folder}/straight", committed)


def test_bytes_would_tell_an_order_or_a_flush_that_leaves_a_trace(tmp_path: Path) -> None:
    """The negative control of the property above: the comparison sees what must not be there."""
    whole = straight(str(tmp_path / "straight"), STEPS)
    table = read_steps(str(tmp_path / "straight"))
    for name, changed in {
        "chunks": [table.slice(0, 5), table.slice(5)],
        "order": [table.take([1, 0, *range(2, len(table))])],
        "missing": [table.slice(0, len(table) - 1)],
    }.items():
        with pq.ParquetWriter(tmp_path / name, AUDIT, compression="zstd", write_page_checksum=True) as writer:
            for part in changed:
                writer.write_table(part)
        assert (tmp_path / name).read_bytes() not in whole.values()
    pq.write_table(table, tmp_path / "same", compression="zstd", write_page_checksum=True)
    assert (tmp_path / "same").read_bytes() in whole.values()


def test_lines_come_back_in_order_from_several_files(run: str) -> None:
    log = StepLog(f"{run}/metrics", METRICS, resume_step=0)
    for step in range(2005):
        values = {name: np.array([float(step)]) for name in METRICS.names[3:]}
        log.add(step, 0, {**{name: np.array([step]) for name in METRICS.names[:3]}, **values})
    log.flush(2003)
    names = [file.path for file in storage.list_files(f"{run}/metrics")]
    assert names == ["00000000.parquet", "00001000.parquet", "00002000.parquet"]
    table = read_steps(f"{run}/metrics")
    assert table.schema.equals(METRICS)
    assert table["step"].to_pylist() == list(range(2003))


def test_opening_removes_what_is_superseded(tmp_path: Path) -> None:
    with mock.patch.object(ledger, "RANGE", RANGE):
        straight(str(tmp_path), STEPS)
        StepLog(str(tmp_path), AUDIT, resume_step=6)
        assert max(read_steps(str(tmp_path))["step"].to_pylist()) == 5
        StepLog(str(tmp_path), AUDIT, resume_step=4)
        assert [path.name for path in tmp_path.iterdir()] == ["00000000.parquet"]
        StepLog(str(tmp_path), AUDIT, resume_step=0)
        assert not list(tmp_path.iterdir())


def test_floats_that_are_not_numbers_survive_a_resume(tmp_path: Path) -> None:
    schema = pa.schema([("step", pa.int64()), ("loss", pa.float64())])
    values = [1.0, float("nan"), -0.0, float("inf"), 0.0, float("nan")]
    for folder, stops in (("straight", [6]), ("stopped", [2, 3, 5, 6])):
        first = 0
        for stop in stops:
            log = StepLog(str(tmp_path / folder), schema, resume_step=first)
            for step in range(first, stop):
                log.add(step, 0, {"step": np.array([step]), "loss": np.array([values[step]])})
            log.flush(stop)
            first = stop
    assert bytes_of(tmp_path / "straight") == bytes_of(tmp_path / "stopped")
    back = read_steps(str(tmp_path / "stopped"))["loss"].to_numpy()
    assert back.tobytes() == np.array(values).tobytes()


@pytest.mark.parametrize(
    ("columns", "error", "words"),
    [
        ({"step": [5]}, ValueError, "expected"),
        ({"step": [5], "loss": [1.0, 2.0]}, ValueError, "one length"),
        ({"step": [[5]], "loss": [[1.0]]}, ValueError, "one length"),
        ({"step": [4], "loss": [1.0]}, ValueError, "name another"),
        ({"step": [5.0], "loss": [1.0]}, TypeError, "Cannot cast"),
    ],
)
def test_wrong_lines_are_refused_when_added(
    tmp_path: Path, columns: dict[str, list[Any]], error: type[Exception], words: str
) -> None:
    log = StepLog(str(tmp_path), pa.schema([("step", pa.int64()), ("loss", pa.float64())]), resume_step=0)
    with pytest.raises(error, match=words):
        log.add(5, 0, {name: np.array(values) for name, values in columns.items()})


def test_final_lines_cannot_be_added_to(tmp_path: Path) -> None:
    with mock.patch.object(ledger, "RANGE", RANGE):
        log = StepLog(str(tmp_path), AUDIT, resume_step=2)
        with pytest.raises(ValueError, match="resume_step=1"):
            log.add(1, 0, lines_of(1, 0))
        log.add(5, 0, lines_of(5, 0))
        log.flush(9)
        with pytest.raises(ValueError, match="step 5 is final"):
            log.add(5, 0, lines_of(5, 0))


def test_what_is_committed_stays_when_an_earlier_step_is_flushed_again(tmp_path: Path) -> None:
    log = StepLog(str(tmp_path), AUDIT, resume_step=0)
    for step in range(5):
        log.add(step, 0, lines_of(step, 1))
    log.flush(5)
    before = bytes_of(tmp_path)
    log.add(2, 0, lines_of(2, 1))
    log.flush(3)
    assert bytes_of(tmp_path) == before


def test_damage_and_foreign_columns_are_named(tmp_path: Path) -> None:
    straight(str(tmp_path), 3)
    path = tmp_path / "00000000.parquet"
    with pytest.raises(StorageError, match="another version"):
        StepLog(str(tmp_path), METRICS, resume_step=1)
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"00000000\.parquet"):
        read_steps(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        read_steps(str(tmp_path / "none"))
