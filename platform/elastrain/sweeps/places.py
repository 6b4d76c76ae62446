"""What a sweep's desk keeps in mind: of each cell who is in it and what it runs, of each trial where it is.

Plain state without waiting of its own; the desk alone changes it.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from elastrain.elastic.protocol import Worker
from elastrain.sweeps.orders import Order, Task

Message = dict[str, Any]


@dataclass(slots=True, eq=False)
class Cell:
    """A cell's workers by rank, those of them that wait for an order, and the trial that it runs.

    `held` is the generation of the group that each of those who wait is in, None: it is in none. Groups of generations
    up to `broken` lack a member.
    """

    name: str
    size: int
    members: dict[int, Worker] = field(default_factory=dict)
    waiting: dict[int, asyncio.Future[Task | None]] = field(default_factory=dict)
    held: dict[int, int | None] = field(default_factory=dict)
    generation: int = 0
    broken: int = 0
    trial: str = ""
    beat: float = field(default_factory=time.monotonic)
    step: int = 0
    device_s: float = 0.0
    stopping: bool = False  # at the next boundary, after a commit
    drains: bool = False  # it gets no other trial

    def is_ready(self) -> bool:
        """Say whether all workers wait for an order."""
        return len(self.members) == self.size == len(self.waiting)

    def renew(self) -> int:
        """Return the generation of the coming group: a new one unless all workers are in the same, whole one."""
        if self.generation <= self.broken or set(self.held.values()) != {self.generation}:
            self.generation += 1
        return self.generation

    def answer(self, task: Task | None) -> None:
        """Give those who wait their order."""
        for waiting in self.waiting.values():
            if not waiting.done():
                waiting.set_result(task)
        self.waiting, self.held = {}, {}


@dataclass(slots=True, eq=False)
class Entry:
    """A trial that is under way: its order, what Tune's side has not taken yet, and the worker that waits for a word.

    `step`, `value` and `device_s` are those of its last evaluation.
    """

    order: Order
    cell: str = ""
    inbox: deque[Message] = field(default_factory=deque)
    reader: asyncio.Future[None] | None = None
    decision: asyncio.Future[str] | None = None
    decided: int = 0
    step: int = 0
    value: float | None = None
    device_s: float = 0.0
    losses: int = 0
    ended: bool = False

    def told(self, outcome: str, error: str = "") -> Message:
        """Return what Tune's side is told: an evaluation to decide on, or with an outcome the end."""
        where = {"run": self.order.run_url, "step": self.step, "device_s": self.device_s}
        return {**where, "value": self.value, "outcome": outcome, "error": error}
