"""A desk in this process, with fake cells and a fake Tune that a test moves step by step."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from elastrain.elastic.protocol import Worker
from elastrain.errors import SpecError
from elastrain.lease import Hold
from elastrain.sweeps.desk import Desk
from elastrain.sweeps.orders import Blueprint, Objective, Order, Task

OBJECTIVE = Objective(metric="val_loss", goal="min", decisions=frozenset({20, 40}), saves=False)
BEGIN = {"arm": "search", "phase": "tune", "point": {}, "seed": 0, "resume": None, "spent_s": 0.0}


class Plain(Blueprint):
    """Orders without a spec: the desk does not look into it."""

    def order(self, trial: str, begin: Any) -> Order:
        """Return the order; an arm called `refused` is."""
        if begin["arm"] == "refused":
            raise SpecError("lr is negative")
        resume = begin["resume"]
        return Order(
            trial=trial,
            point={},
            spec=None,  # type: ignore[arg-type]
            run_url=f"trials/{trial}",
            objective=OBJECTIVE,
            resume=resume,
            decided=resume[1] if resume else 0,
            spent_s=begin["spent_s"],
        )


class Stage:
    """A desk, the newest checkpoint of each trial, and what to say in a line."""

    def __init__(self, folder: str, hold: Hold | None = None) -> None:
        self.saved: dict[str, int] = {}
        self.newest: Callable[[str], int | None] = lambda run: self.saved.get(run.rsplit("/", 1)[-1])
        blueprint = Plain(arms={}, objective=OBJECTIVE, folder="trials")
        self.desk = Desk(hold or Hold(folder), 0, blueprint, self._newest)

    def _newest(self, run: str) -> int | None:
        return self.newest(run)

    async def soon(self, waiting: "asyncio.Future[Any] | Coroutine[Any, Any, Any]") -> Any:
        """Return what comes, long before the test would hang."""
        return await asyncio.wait_for(waiting, 30)

    def begin(self, trial: str, **begin: Any) -> "asyncio.Task[Any]":
        """Begin a trial as Tune does, and wait for what it is told."""
        return asyncio.create_task(self.desk.next(trial, BEGIN | begin))

    def goes_on(self, trial: str) -> "asyncio.Task[Any]":
        """Have Tune let a trial go on, and wait for what it is told."""
        return asyncio.create_task(self.desk.next(trial, None))

    async def joins(self, cell: str, rank: int = 0, size: int = 1) -> None:
        """A worker comes, or stands in for another one."""
        await self.desk.join(cell, rank, size, Worker(name=f"{cell}-{rank}", node="n", place=rank, door=("", 0)))

    def takes(self, cell: str, rank: int = 0, held: int | None = None) -> "asyncio.Task[Task | None]":
        """A worker waits for an order."""
        return asyncio.create_task(self.desk.take(cell, rank, held))

    async def cell(self, name: str, size: int = 1) -> "list[asyncio.Task[Task | None]]":
        """A cell all of whose workers wait."""
        for rank in range(size):
            await self.joins(name, rank, size)
        tasks = [self.takes(name, rank) for rank in range(size)]
        await settle()
        return tasks

    def decides(self, cell: str, trial: str, step: int, value: float = 0.5) -> "asyncio.Task[str]":
        """A trial's rank 0 waits for a decision."""
        return asyncio.create_task(self.desk.decide(cell, trial, evaluation(step, value)))

    async def events(self, kind: str) -> list[Any]:
        """Return what was noted of a kind."""
        return [event for event in await self.desk.events(0) if event["kind"] == kind]

    async def outcomes(self) -> dict[str, list[str]]:
        """Return how trials ended: once each, one hopes."""
        found: dict[str, list[str]] = {}
        for event in await self.events("ended"):
            found.setdefault(event["trial"], []).append(event["outcome"])
        return found


def evaluation(step: int, value: float = 0.5) -> dict[str, Any]:
    return {"step": step, "samples": step, "value": value, "metrics": {}, "device_s": step / 10}


async def settle() -> None:
    """Let all that can go on do so, what looks for checkpoints in threads among it."""
    for _ in range(10):
        await asyncio.sleep(0)
    if looking := [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__name__", "") == "_requeue"]:
        await asyncio.wait(looking)
    for _ in range(10):
        await asyncio.sleep(0)
