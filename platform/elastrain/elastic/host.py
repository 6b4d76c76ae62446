"""The actor that outlives the workers: it holds the membership and writes what they report.

Audit and metrics go to Parquet by step, seconds and events to the attempt's ledger; all of it from one thread, every
second, so that no worker waits for storage.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from elastrain import s3, storage
from elastrain.data.columns import Array
from elastrain.elastic.membership import Membership
from elastrain.elastic.protocol import Roster
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

    def __init__(
        self,
        run: str,
        attempt: int,
        roster: Roster,
        resume_step: int,
        *,
        alike: bool,
        timeout_s: float,
        tripped: frozenset[int] = frozenset(),
    ) -> None:
        self._ledger = Ledger(run, attempt)
        self._run = run
        self._step, self._resume_step = resume_step, resume_step
        self._last: dict[str, Any] = {}
        self._ended: float | None = None  # when the step before ended; a step after a start has time_s 0
        self._recorded = float(resume_step - 1)  # the last step whose line is here
        self._last_checkpoint: int | None = None
        self._spent: dict[str, dict[str, float]] = {}
        self._outcome: dict[str, Any] | None = None
        self._handles: dict[str, Any] = {}
        self._tripped = set(tripped)  # steps in which a worker raised an exception
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # while storage is written to, which nobody who reports or asks waits for
        self._arrived: list[tuple[str, int, int, Mapping[str, Array]]] = []  # lines for a log: its name, step, slot
        self._closing = threading.Event()
        self._logs: dict[str, StepLog] = {}
        self._writer = threading.Thread(target=self._write, daemon=True)
        self.membership = Membership(
            roster=roster,
            event=self.note,
            alike=alike,
            timeout_s=timeout_s,
            host=ray.util.get_node_ip_address(),
        )

    @ray.method(concurrency_group=RECORDS)
    def open(self) -> None:
        """Go on with the run's records; raises StorageError.

        What was told of this attempt before is written first: what is cut back here is cut back by an attempt that all
        who come later know of.
        """
        self._ledger.flush()
        for name, schema in (("audit", AUDIT), ("metrics", METRICS)):
            self._logs[name] = StepLog(storage.join(self._run, name), schema, resume_step=self._resume_step)
        self._writer.start()

    def here(self, name: str, handle: Any) -> tuple[tuple[str, int], bytes]:
        """Return the membership's address and the token that opens it; `handle` is for ending who loses its lease."""
        self._handles[name] = handle
        return self.membership.address, self.membership.token

    def ask_stop(self) -> None:
        """See `Membership.ask_stop`."""
        self.membership.ask_stop()

    def drain(self, names: Sequence[str]) -> None:
        """See `Membership.drain`."""
        self.membership.drain(names)

    def resize(self, minimum: int, maximum: int) -> None:
        """See `Membership.resize`."""
        self.membership.resize(minimum, maximum)

    def expect(self, initial: int) -> None:
        """See `Membership.expect`."""
        self.membership.expect(initial)

    def fail(self, worker: str, name: str, message: str) -> None:
        """Take over an error that ends the run, unless it comes from a worker that was given up."""
        if worker not in self.membership.dropped:
            self.membership.fail(name, message)

    def tripped(self, worker: str, step: int, name: str, message: str) -> bool:
        """Take over an exception that ends one worker; say whether it ends the run: it is the second one in a step."""
        self.note("exception", {"worker": worker, "step": step, "message": message[-2000:]})
        again = step in self._tripped
        self._tripped.add(step)
        if again:
            self.fail(worker, name, message)
        return again

    @ray.method(concurrency_group=RECORDS)
    def result(self, found: dict[str, Any]) -> None:
        """Take over what the run came to, after everything that was reported before; who waits for a place may go."""
        self._outcome = self._outcome or found
        self.membership.end()

    @ray.method(concurrency_group=RECORDS)
    def audit(self, lines: Sequence[tuple[int, int, Mapping[str, Array]]]) -> None:
        """Take over (step, slot, columns) lines; when this returns they are out of the worker's hands."""
        with self._lock:
            self._arrived += [("audit", step, slot, columns) for step, slot, columns in lines]

    @ray.method(concurrency_group=RECORDS)
    def report(self, worker: str, status: Mapping[str, Any]) -> None:
        """Take over a worker's position, seconds and, from rank 0, its lines of metrics."""
        with self._lock:
            self._spent[worker] = dict(status["spent"])
            self._ledger.spent(worker, status["spent"])
            if not status["lead"] or not self.membership.accepts(status["generation"]):
                return
            self._step = max(self._step, status["step"])
            for step, epoch, samples, loss, lr, grad_norm, ended in status["lines"]:
                if step <= self._recorded:
                    continue  # whoever leads now sends again what may not have arrived
                self._recorded = step
                taken = ended - (self._ended or ended)
                self._ended = ended
                counts, values = (step, epoch, samples), (loss, lr, grad_norm, taken, ended)
                numbers = [np.array([v], np.int64) for v in counts] + [np.array([v], np.float64) for v in values]
                self._arrived.append(("metrics", int(step), 0, dict(zip(METRICS.names, numbers, strict=True))))
                self._last = {"step": step, "loss": loss}

    def sync(self, worker: str) -> bool:
        """Write what has arrived. Say whether this worker's checkpoint may exist: not if it has been given up.

        Not in the group of what is reported, which would wait for storage behind it.
        """
        self._flush()
        return self.membership.trusts(worker)

    @ray.method(concurrency_group=RECORDS)
    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Take over something for the ledger."""
        self.note(kind, fields)

    def note(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write something into the ledger, without the lock.

        The membership calls this under its own, which a report waits for while it holds ours; and ours is held while
        storage is written to. The ledger takes a line at a time, and writes whole lists of them.
        """
        self._ledger.event(kind, **fields)
        if kind == "checkpoint":
            self._last_checkpoint = fields["step"]

    def nodes(self) -> tuple[str, list[str]]:
        """Return this actor's node, which is the driver's, and those of the members."""
        members = self.membership.view()["members"]
        return ray.get_runtime_context().get_node_id(), [node for _, node, _ in members]

    def poll(self) -> dict[str, Any]:
        """Return what the driver shows and acts on."""
        self._kill_dropped()
        with self._lock:
            spent = {worker: dict(seconds) for worker, seconds in self._spent.items()}
        seen = self.membership.view()
        return {
            **seen,
            "step": max(self._step, seen["step"]),
            "last": dict(self._last),
            "spent": spent,
            "failure": self.membership.failure,
            "lost": self.membership.lost,
            "outcome": self._outcome,
            "tripped": frozenset(self._tripped),
            "checkpoint": self._last_checkpoint,
            "resume_step": self._resume_step,
            "storage_s": s3.waiting_s(),
        }

    def _kill_dropped(self) -> None:
        """End the processes that lost their lease; the run has gone on without them by now."""
        for name in self.membership.dropped:
            if handle := self._handles.pop(name, None):
                with contextlib.suppress(ray.exceptions.RayError, ValueError):
                    ray.kill(handle)

    def close(self, outcome: str, fields: Mapping[str, Any]) -> None:
        """Note the end, write everything and stop; raises StorageError if it cannot be written."""
        with self._lock:
            self._ledger.event("end", outcome=outcome, **fields)
        self._closing.set()
        self.membership.close()
        if self._writer.is_alive():
            self._writer.join()
        self._flush()

    def _write(self) -> None:
        while not self._closing.wait(FLUSH_S):
            try:
                self._flush()
            except ElastrainError as error:
                self.membership.fail(type(error).__name__, str(error))
                return
            except (OSError, ValueError) as error:
                self.membership.fail(StorageError.__name__, f"cannot write the run's records: {error}")
                return

    def _flush(self) -> None:
        with self._writing:
            with self._lock:
                step, arrived, self._arrived = self._step, self._arrived, []
            for name, number, key, columns in arrived:
                self._logs[name].add(number, key, columns)
            for log in self._logs.values():
                log.flush(step)
            self._ledger.flush()
