"""The membership of a run: who trains together, what the run came to, and who wants it to stop. No Ray, no torch.

A worker offers its name, node, place and store address and waits; when all that are expected have entered, they form
the next generation. State is data under one lock; the actor around it is in `elastic.host`.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

from elastrain.errors import ResourceError

JOIN_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """What a worker says of itself when it enters."""

    name: str
    node: str
    place: int
    store: tuple[str, int]
    arithmetic: str = ""


@dataclass(slots=True)
class Membership:
    """Generations of `expected` workers, `alike` in their arithmetic if asked.

    `failure` is (error class name, message) of what ended the run.
    """

    expected: int
    alike: bool = False
    generation: int = 0
    members: list[Worker] = field(default_factory=list)
    entered: dict[str, Worker] = field(default_factory=dict)
    stop: bool = False
    failure: tuple[str, str] | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def enter(self, worker: Worker) -> tuple[int, list[Worker]] | None:
        """Wait for the next generation; return its number and workers, None if the run ended or nobody came in time."""
        with self._changed:
            before = self.generation
            self.entered[worker.name] = worker
            if len(self.entered) == self.expected and not self._unlike():
                self.generation += 1
                self.members, self.entered = list(self.entered.values()), {}
                self._changed.notify_all()
            self._changed.wait_for(lambda: self.generation != before or self.failure is not None, timeout=JOIN_S)
            formed = self.generation != before and self.failure is None
            return (self.generation, list(self.members)) if formed else None

    def _unlike(self) -> bool:
        """Say whether the workers would compute other bits than each other, which ends the run."""
        kinds = {worker.arithmetic: worker.node for worker in self.entered.values()}
        if not self.alike or len(kinds) == 1:
            return False
        named = "; ".join(f"node {node[:12]}: {kind}" for kind, node in sorted(kinds.items()))
        self.failure = self.failure or (
            ResourceError.__name__,
            f"consistency: bitwise needs workers that compute alike ({named}); use nodes of one kind, or sample",
        )
        self._changed.notify_all()
        return True

    def ask_stop(self) -> None:
        """Ask the workers to stop at the next step boundary, after a commit."""
        self.stop = True

    def fail(self, name: str, message: str) -> None:
        """End the run with an error; the first one counts, since the others follow from it."""
        with self._changed:
            self.failure = self.failure or (name, message)
            self._changed.notify_all()

    def finish(self, worker: str, result: dict[str, Any]) -> None:
        """Note that a worker is through; rank 0's result is the run's."""
        with self._changed:
            self.results[worker] = result

    def outcome(self) -> dict[str, Any] | None:
        """Return rank 0's result once every member is through, None before."""
        with self._changed:
            done = [r for r in self.results.values() if r["weights_sha256"]]
            return done[0] if done and len(self.results) >= len(self.members) else None
