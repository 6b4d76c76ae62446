"""What the driver does while a run runs: look at host and cells, act on what it sees, and show it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from elastrain import s3, storage
from elastrain.data.dataset import Dataset
from elastrain.data.plan import Plan
from elastrain.elastic.fleet import Event, Fleet, Seated, Seen
from elastrain.elastic.script import Member, Script
from elastrain.elastic.script import Seen as Sight
from elastrain.errors import ElastrainError, ResourceError, error_named
from elastrain.observe.progress import LiveLine, Status
from elastrain.spec.train import WorkersSpec

POLL_S = 0.1
ASK_S = 2.0  # between two looks whether the store of the data answers
OUTAGE_S = 2.0  # storage that fails for longer is waited for, and the line says so
ENOUGH_S = 2.0  # steps of so long tell how fast the run is
COMPLETE_S = 60.0  # after this a run begins without those who have not come, if there are enough


class WorkerLost(ResourceError):  # noqa: N818 -- an event: the run starts again from its last checkpoint
    """No worker is left that has the run's state; `tripped` are the steps in which one raised an exception."""

    def __init__(self, message: str, *, step: int = 0, tripped: frozenset[int] = frozenset()) -> None:
        super().__init__(message)
        self.step, self.tripped = step, tripped


@dataclass(kw_only=True)
class Watch:
    """One attempt as its driver sees it; `run` returns the result."""

    plan: Plan
    num_steps: int
    workers: WorkersSpec
    line: LiveLine
    host: Any
    fleet: Fleet
    data: Sequence[Dataset]
    stops: Callable[[], bool]
    stepped: Callable[[dict[str, Any]], None]  # is told of each look
    script: Script | None = None
    _speed: "Speed" = field(init=False)
    _asked: bool = False
    _reached: int = 0
    _since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._speed = Speed()

    def run(self) -> dict[str, Any]:
        """Watch to the end; raises what ended the run, WorkerLost if nobody is left to go on."""
        with asking(self.data):
            return self._run()

    def _run(self) -> dict[str, Any]:
        while True:
            now = ray.get(self.host.poll.remote())
            now["step"] = self._reached = max(self._reached, now["step"])
            self.stepped(now)
            if now["outcome"]:
                found: dict[str, Any] = now["outcome"]
                return found
            if now["failure"]:
                raise error_named(*now["failure"])
            if now["lost"]:
                raise WorkerLost(now["lost"], step=now["step"], tripped=now["tripped"])
            self._act(now)
            time.sleep(POLL_S)

    def _act(self, now: dict[str, Any]) -> None:
        members = tuple(Seated(name=name, node=node, cell=cell) for name, node, cell in now["members"])
        self._speed.look(now["step"], now["generation"])
        if self.stops() and not self._asked:
            self._asked = True
            self.host.ask_stop.remote()
        remaining = self._speed.remaining_s(self.num_steps - now["step"])
        target = self.workers.max if self.script is None else self.script.wanted
        seen = Seen(members=members, waiting=len(now["waiting"]), remaining_s=remaining, target=target)
        for event in self.fleet.tend(seen):
            self._note(event)
        if self.script is not None and not self._asked:
            self._follow(self.script, now)
        if not now["generation"] and time.monotonic() - self._since > COMPLETE_S:
            self.host.expect.remote(max(self.workers.min, len(now["waiting"])))
        self.line.show(self._status(now))

    def _note(self, event: Event) -> None:
        if event.drain:
            self.host.drain.remote(list(event.drain))
        kind = "drain" if event.kind == "preemption" else event.kind  # the membership tells what came of it
        self.host.event.remote(kind, {"step": self._reached, **event.fields})

    def _follow(self, script: Script, now: dict[str, Any]) -> None:
        members = [Member(name=name, node=node, pid=int(name.rsplit("-", 1)[1])) for name, node, _ in now["members"]]
        for size in script.act(Sight(step=now["step"], members=members)):
            self.host.resize.remote(size.minimum, size.maximum)

    def _status(self, now: dict[str, Any]) -> Status:
        plan, step, last = self.plan, now["step"], now["last"]
        running = list(now["spent"].values())
        waited = sum(s["data"] for s in running)
        worked = sum(sum(s.values()) - s["start"] for s in running)
        waits = ", waiting for storage" if max(now["storage_s"], s3.waiting_s()) > OUTAGE_S else ""
        short = now["missing"] if now["generation"] else 0
        return Status(
            phase=("training" if last else "starting workers") + waits,
            epoch=step / plan.steps_per_epoch,
            epochs=self.num_steps / plan.steps_per_epoch,
            step=step,
            steps=self.num_steps,
            loss=last.get("loss"),
            samples_per_s=(self._speed.steps_per_s or 0.0) * plan.global_batch if last else None,
            data_share=waited / worked if worked else None,
            workers=len(now["members"]),
            last_checkpoint=now["checkpoint"],
            message=f"waiting for {short} more worker" + "s" * (short > 1) if short else "",
        )


@contextlib.contextmanager
def asking(data: Sequence[Dataset]) -> Iterator[None]:
    """Look meanwhile whether the stores of the data answer; since when one does not, `s3.waiting_s` tells.

    Read tasks wait for it in processes of their own, in which nobody looks.
    """
    buckets = {s3.place(each.url).split("/")[0]: each for each in data if s3.is_s3(each.url)}
    ended = threading.Event()

    def ask(url: str) -> None:
        while not ended.wait(ASK_S):
            with contextlib.suppress(ElastrainError):  # what is wrong is said by who reads the data
                storage.exists(url)

    for each in buckets.values():
        url = storage.join(each.url, each.shards[0].path)
        threading.Thread(target=ask, args=(url,), daemon=True, name="asking").start()
    try:
        yield
    finally:
        ended.set()


class Speed:
    """Steps a second of the members that train now."""

    def __init__(self) -> None:
        self.steps_per_s: float | None = None
        self._generation, self._first = -1, (0.0, 0)

    def look(self, step: int, generation: int) -> None:
        """Take note of where the run is."""
        now = time.monotonic()
        if generation != self._generation:
            self._generation, self._first = generation, (now, step)
        since, before = self._first
        if now - since >= ENOUGH_S and step > before:
            self.steps_per_s = (step - before) / (now - since)

    def remaining_s(self, steps: int) -> float:
        """Return how long these steps will take; 0 as long as nobody knows: nothing is started on a guess."""
        return steps / self.steps_per_s if self.steps_per_s else 0.0
