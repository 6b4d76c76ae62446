"""The actor that outlives the workers: it holds the membership and writes what they report.

Audit and metrics go to Parquet by step, seconds and events to the attempt's ledger; all of it from one thread, every
second, so that no worker waits for storage.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from elastrain import storage
from elastrain.data.columns import Array
from elastrain.elastic.membership import Membership, Worker
from elastrain.errors import ElastrainError, StorageError
from elastrain.observe.ledger import Ledger, StepLog

FLUSH_S = 1.0
RECORDS = "records"  # a concurrency group of one thread: what one worker sends arrives in order
AUDIT = pa.schema([(name, pa.int64()) for name in ("epoch", "step", "slot", "row")])
METRICS = pa.schema(
    [(name, pa.int64()) for name in ("step", "epoch", "samples")]
    + [(name, pa.float64()) for name in ("loss", "lr", "grad_norm", "time_s", "ended")]
)


class Host:
    """The run's memory while it runs: `workers` report to it, the driver polls it."""

    def __init__(self, run: str, attempt: int, expected: int, resume_step: int, *, alike: bool) -> None:
        self.membership = Membership(expected=expected, alike=alike)
        self._ledger = Ledger(run, attempt)
        self._run = run
        self._step, self._resume_step = resume_step, resume_step
        self._last: dict[str, Any] = {}
        self._ended: float | None = None  # when the step before ended; a step after a start has time_s 0
        self._last_checkpoint: int | None = None
        self._spent: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._logs: dict[str, StepLog] = {}
        self._writer = threading.Thread(target=self._write, daemon=True)

    def open(self) -> None:
        """Go on with the run's records, before workers report; raises StorageError."""
        for name, schema in (("audit", AUDIT), ("metrics", METRICS)):
            self._logs[name] = StepLog(storage.join(self._run, name), schema, resume_step=self._resume_step)
        self._writer.start()

    def enter(self, worker: Worker) -> tuple[int, list[Worker]] | None:
        """See `Membership.enter`."""
        return self.membership.enter(worker)

    def wishes_stop(self) -> bool:
        """Say whether somebody asked the run to stop."""
        return self.membership.stop

    def ask_stop(self) -> None:
        """See `Membership.ask_stop`."""
        self.membership.ask_stop()

    def fail(self, name: str, message: str) -> None:
        """See `Membership.fail`."""
        self.membership.fail(name, message)

    def finish(self, worker: str, result: dict[str, Any]) -> None:
        """See `Membership.finish`."""
        self.membership.finish(worker, result)

    @ray.method(concurrency_group=RECORDS)
    def audit(self, lines: Sequence[tuple[int, int, Mapping[str, Array]]]) -> None:
        """Take over (step, slot, columns) lines; when this returns they are out of the worker's hands."""
        with self._lock:
            for step, slot, columns in lines:
                self._logs["audit"].add(step, slot, columns)

    @ray.method(concurrency_group=RECORDS)
    def report(self, worker: str, status: Mapping[str, Any]) -> None:
        """Take over a worker's position, seconds and, from rank 0, its lines of metrics."""
        with self._lock:
            self._spent[worker] = dict(status["spent"])
            self._ledger.spent(worker, status["spent"])
            if not status["lead"]:
                return
            self._step = max(self._step, status["step"])
            for step, epoch, samples, loss, lr, grad_norm, ended in status["lines"]:
                taken = ended - (self._ended or ended)
                self._ended = ended
                counts, values = (step, epoch, samples), (loss, lr, grad_norm, taken, ended)
                numbers = [np.array([v], np.int64) for v in counts] + [np.array([v], np.float64) for v in values]
                self._logs["metrics"].add(int(step), 0, dict(zip(METRICS.names, numbers, strict=True)))
                self._last = {"step": step, "loss": loss}

    @ray.method(concurrency_group=RECORDS)
    def sync(self) -> None:
        """Write what has arrived; when this returns, a checkpoint may say that its steps are done."""
        self._flush()

    @ray.method(concurrency_group=RECORDS)
    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Take over something for the ledger."""
        with self._lock:
            self._ledger.event(kind, **fields)
            if kind == "checkpoint":
                self._last_checkpoint = fields["step"]

    def poll(self) -> dict[str, Any]:
        """Return what the driver shows and acts on."""
        with self._lock:
            spent = {worker: dict(seconds) for worker, seconds in self._spent.items()}
        return {
            "step": self._step,
            "last": dict(self._last),
            "spent": spent,
            "members": len(self.membership.members),
            "failure": self.membership.failure,
            "outcome": self.membership.outcome(),
            "checkpoint": self._last_checkpoint,
            "resume_step": self._resume_step,
        }

    def close(self, outcome: str, fields: Mapping[str, Any]) -> None:
        """Note the end, write everything and stop; raises StorageError if it cannot be written."""
        with self._lock:
            self._ledger.event("end", outcome=outcome, **fields)
        self._closing.set()
        if self._writer.is_alive():
            self._writer.join()
        self._flush()

    def _write(self) -> None:
        while not self._closing.wait(FLUSH_S):
            try:
                self._flush()
            except ElastrainError as error:
                self.fail(type(error).__name__, str(error))
                return
            except OSError as error:
                self.fail(StorageError.__name__, f"cannot write the run's records: {error}")
                return

    def _flush(self) -> None:
        with self._lock:
            for log in self._logs.values():
                log.flush(self._step)
            self._ledger.flush()
