"""Where the time of a run went and what happened in it: a clock a worker, a file an attempt, lines for each step.

```
<run>/ledger/00000.jsonl        one attempt: its events in order, then the seconds of each worker
<run>/metrics/00000000.parquet  a line for each step 0..999 (loss, learning rate, …)
<run>/audit/00001000.parquet    a line for each sample of steps 1000..1999
```
Files appear whole (`storage`); nothing here knows what a step is made of.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from elastrain import storage
from elastrain.errors import StorageError

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

CATEGORIES = ("start", "data", "compute", "reduce", "checkpoint", "evaluate", "wait", "other")
"""What a second of a worker may be booked under."""

RANGE = 1000
"""Steps in one file of a `StepLog`."""

Record = dict[str, Any]
"""One line of a ledger: `t` (seconds since 1970), `kind`, `attempt`, and the fields of that kind."""

TICKS_PER_S = 2**30
SECRET = re.compile(r"(://)[^/@\s\"']+@")


class Clock:
    """Books each second of one worker once; made at the worker's first moment, it runs under "start".

    `before_s` are the seconds that the worker was paid for before it could make one; they go to "start", too.
    Time is counted in whole ticks of 2**-30 s, which floats hold and add without rounding (up to 97 days): so the
    categories sum to the elapsed time exactly. For one thread.
    """

    __slots__ = ("_now", "_running", "_since", "_ticks")

    def __init__(self, now: Callable[[], float] = time.perf_counter, *, before_s: float = 0.0) -> None:
        self._now = now
        self._ticks = dict.fromkeys(CATEGORIES, 0)
        self._ticks["start"] = int(before_s * TICKS_PER_S)
        self._running = "start"
        self._since = int(now() * TICKS_PER_S)

    def switch(self, category: str) -> None:
        """Close the running category and book from now on under `category`, one of CATEGORIES."""
        ticks = self._ticks
        assert category in ticks, category
        moment = int(self._now() * TICKS_PER_S)
        ticks[self._running] += moment - self._since
        self._since = moment
        self._running = category

    def running(self) -> tuple[str, float]:
        """Return the running category and since when, in seconds of the clock; for any thread."""
        return self._running, self._since / TICKS_PER_S

    def spent(self) -> dict[str, float]:
        """Return the seconds booked so far under each category, those of the running one included."""
        self.switch(self._running)
        return {category: ticks / TICKS_PER_S for category, ticks in self._ticks.items()}


class Ledger:
    """The record of one attempt at a run, kept in memory and written whole by `flush`.

    It replaces a file of the same attempt: take the number from `next_attempt`, under the run's lock.
    """

    def __init__(self, run: str, attempt: int, *, now: Callable[[], float] = time.time) -> None:
        self.attempt = attempt
        self._url = storage.join(run, "ledger", f"{attempt:05d}.jsonl")
        self._now = now
        self._events: list[str] = []
        self._seconds: dict[str, str] = {}
        self._written: bytes | None = None

    @staticmethod
    def next_attempt(run: str) -> int:
        """Return the number of the attempt after the last one; 0 where there is none. Raises StorageError."""
        return max((number for number, _ in _attempts(run)), default=-1) + 1

    def event(self, kind: str, **fields: Any) -> None:
        """Note that something happened now.

        Args:
            kind: start, checkpoint, eval, worker_lost, node_lost, resize, preemption, restart, end, or another word.
            fields: numbers, text, lists and mappings; numbers that are not finite become null, as JSON has none,
                and user and password in a URL become `***`.
        """
        self._events.append(_line({"t": self._now(), "kind": kind, **fields}))

    def spent(self, worker: str, seconds: Mapping[str, float]) -> None:
        """Note what `worker` has spent since its start (`Clock.spent`); replaces what was noted of it before.

        Each process needs a name of its own: one that stands in for a dead worker would replace the dead one's seconds.
        """
        record = {"t": self._now(), "kind": "seconds", "worker": worker, "seconds": dict(seconds)}
        self._seconds[worker] = _line(record)

    def flush(self) -> None:
        """Write the file whole if something is new; raises StorageError."""
        data = "".join([*self._events, *self._seconds.values()]).encode()
        if data and data != self._written:
            storage.put(self._url, data)
            self._written = data


def read_ledger(run: str) -> list[Record]:
    """Return the lines of all attempts in order, each with its `attempt`; empty where there is no ledger.

    An attempt that was killed has no `end`. Raises StorageError if a file cannot be read or is no ledger.
    """
    records: list[Record] = []
    for attempt, url in _attempts(run):
        for number, line in enumerate(storage.read_bytes(url).decode(errors="replace").splitlines(), start=1):
            try:
                records.append({**json.loads(line), "attempt": attempt})
            except (ValueError, TypeError) as error:
                raise StorageError(f"{url}, line {number}: not a line of a ledger ({error}); remove it") from error
    return records


class StepLog:
    """Lines keyed by (step, key), kept as Parquet files of 1000 steps each; the same lines give the same bytes.

    Neither the order of adding nor flushes, kills and resumes in between can be seen in the files. A line is final
    once its range is finished and written; until then a step that is done again replaces its lines.
    """

    def __init__(self, folder: str, schema: "pa.Schema", *, resume_step: int) -> None:
        """Open a folder to go on at `resume_step`: lines at and after it are removed from the files.

        Args:
            folder: path or URL; made where there is none.
            schema: int64 and float64 columns, `step` among them.
            resume_step: the first step that will be added; 0 for a new run.

        Raises:
            StorageError: if the files cannot be read or written.
        """
        self._folder = folder
        self._schema = schema
        self._committed = self._first = resume_step
        self._lines: dict[int, dict[tuple[int, int], dict[str, npt.NDArray[Any]]]] = {}
        self._changed: set[int] = set()
        self._kept: pa.Table | None = None
        self._cut(resume_step)

    def add(self, step: int, key: int, columns: "Mapping[str, npt.NDArray[Any]]") -> None:
        """Add the lines of (step, key), or replace them where the step is done again.

        Args:
            step: the step they belong to.
            key: tells the parts of a step apart and orders them (the slot; 0 where there is one part).
            columns: an array of equal length for each column of the schema, copied; lines keep their order.

        Raises:
            ValueError: if the columns are not the schema's, or the step's lines are final already.
            TypeError: if a column holds another kind of numbers.
        """
        if step < self._first:
            raise ValueError(f"{self._folder}: step {step} is final; open the log again with resume_step={step}")
        shapes = {name: column.shape for name, column in columns.items()}
        if set(shapes) != set(self._schema.names) or [len(shape) for shape in set(shapes.values())] != [1]:
            raise ValueError(f"{self._folder}: columns {self._schema.names} of one length expected, given {shapes}")
        if (columns["step"] != step).any():
            raise ValueError(f"{self._folder}: the lines of step {step} name another one in their column `step`")
        lines = self._lines.setdefault(_range_of(step), {})
        lines[step, key] = {
            field.name: columns[field.name].astype(field.type.to_pandas_dtype(), casting="same_kind")
            for field in self._schema
        }
        self._changed.add(step)

    def flush(self, below: int) -> None:
        """Write each range that changed, with its lines of steps < `below` (committed). Raises StorageError."""
        self._committed = max(self._committed, below)
        due = {step for step in self._changed if step < self._committed}
        for start in sorted({_range_of(step) for step in due}):
            self._write(start)
        self._changed -= due
        # Only whole ranges are final: lines of the last one may still be replaced, and are needed to write it again.
        finished = _range_of(self._committed)
        if finished > _range_of(self._first):
            self._kept = None
        self._first = max(self._first, finished)
        self._lines = {start: lines for start, lines in self._lines.items() if start >= finished}

    def _write(self, start: int) -> None:
        import numpy as np  # noqa: PLC0415 -- with pyarrow 0.3 s, which a report without curves need not pay
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415

        lines = self._lines.get(start, {})
        parts = [lines[address] for address in sorted(lines) if address[0] < self._committed]
        if self._kept is not None and start == _range_of(self._first):
            parts.insert(0, {name: self._kept[name].to_numpy() for name in self._schema.names})
        if not sum(len(part["step"]) for part in parts):
            storage.remove(self._url(start))
            return
        # Arrays joined to one chunk: the pages of the file then depend on the lines alone.
        columns = [np.concatenate([part[name] for part in parts]) for name in self._schema.names]
        table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=self._schema)
        try:
            with storage.staged(self._url(start)) as path:
                pq.write_table(table, path, compression="zstd", write_page_checksum=True, row_group_size=len(table))
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(f"{self._url(start)}: cannot be written ({reason}); see to its disk") from error

    def _url(self, start: int) -> str:
        return storage.join(self._folder, f"{start:08d}.parquet")

    def _cut(self, resume_step: int) -> None:
        """Remove the lines of steps >= `resume_step`, the latest file first: a kill in between leaves no gap."""
        import pyarrow.compute as pc  # noqa: PLC0415

        storage.remove_staged(self._folder)
        for start in reversed(_ranges(self._folder)):
            if start >= resume_step:
                storage.remove(self._url(start))
            elif start == _range_of(resume_step):
                table = _read(self._url(start))
                if not table.schema.equals(self._schema):
                    raise StorageError(
                        f"{self._url(start)}: holds {table.schema.names}, and {self._schema.names} would be added; "
                        "another version of Elastrain wrote it: go on with that one, or start a new run"
                    )
                self._kept = table.filter(pc.less(table["step"], resume_step))
                if len(self._kept) < len(table):
                    self._write(start)


def read_steps(folder: str) -> "pa.Table":
    """Return the lines of all files of a `StepLog`'s folder in order of (step, key).

    Raises:
        FileNotFoundError: if there is no file.
        StorageError: if a file is damaged or cannot be read.
    """
    import pyarrow as pa  # noqa: PLC0415

    starts = _ranges(folder)
    if not starts:
        raise FileNotFoundError(folder)
    return pa.concat_tables([_read(storage.join(folder, f"{start:08d}.parquet")) for start in starts])


def _read(url: str) -> "pa.Table":
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    with storage.open_arrow(url) as source:
        try:
            return pq.ParquetFile(source, page_checksum_verification=True).read()
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{url}: damaged ({error}); restore it, or remove its folder") from error


def _range_of(step: int) -> int:
    return step - step % RANGE


def _ranges(folder: str) -> list[int]:
    return sorted(number for number, _ in _numbered(folder, ".parquet"))


def _attempts(run: str) -> list[tuple[int, str]]:
    return sorted(_numbered(storage.join(run, "ledger"), ".jsonl"))


def _numbered(folder: str, suffix: str) -> Iterable[tuple[int, str]]:
    """The files directly in a folder that are named by a number, with it; none where the folder is missing."""
    try:
        files = storage.list_files(folder, suffix=suffix)
    except FileNotFoundError:
        return
    for file in files:
        stem = file.path.removesuffix(suffix)
        if stem.isdecimal():
            yield int(stem), storage.join(folder, file.path)


def _line(record: Record) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Bring a value to what JSON holds."""
    if isinstance(value, str):
        return SECRET.sub(r"\1***@", value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, int | float):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    # NumPy's and torch's scalars know their plain value; of anything else the text is what a reader can use.
    return _plain(value.item() if hasattr(value, "item") else str(value))
