"""In many random histories of cells and trials each trial ends once, and nobody waits in vain."""

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from tests.sweeps.desk_stage import Stage, settle

from elastrain.sweeps.desk import LEAVE, STOP
from elastrain.sweeps.orders import Task


class Hand:
    """A worker as the play moves it: it waits for an order, or runs one and has yet to come back."""

    def __init__(self, waits: "asyncio.Task[Task | None]") -> None:
        self.waits, self.task, self.held = waits, None, None
        self.says: str | None = None  # what it says before it waits again: "lost", or "" for nothing

    task: Task | None
    held: int | None


class Play:
    """Cells and Tune moved by a seeded fate, event by event; what the desk promises is looked at after each."""

    def __init__(self, folder: str, seed: int) -> None:
        self.on, self.chance = Stage(folder), random.Random(seed)  # noqa: S311 -- no secret
        self.size = self.chance.choice((1, 2, 3))
        self.cells: dict[str, list[Hand]] = {}
        self.told: dict[str, asyncio.Task[Any]] = {}  # what Tune waits for
        self.paused: dict[str, int] = {}
        self.begun: list[str] = []
        self.over: set[str] = set()
        self.words: dict[str, tuple[str, asyncio.Task[str]]] = {}  # cell → trial and the word its rank 0 waits for
        self.newest: dict[str, int] = {}  # the newest generation that was handed out in each cell
        self.steps: Counter[str] = Counter()
        self.made = 0

    # what may happen

    async def trial_begins(self) -> None:
        """Tune begins another trial."""
        if len(self.begun) < 6:
            self.begun.append(f"t{len(self.begun)}")
            self.told[self.begun[-1]] = self.on.begin(self.begun[-1])

    async def tune_decides(self, *, calm: bool = False) -> None:
        """Tune takes what it was told, and lets trials go on, prunes or pauses them."""
        for trial in [trial for trial, told in self.told.items() if told.done()]:
            message = self.told.pop(trial).result()
            if message["outcome"]:
                self.over.add(trial)
                continue
            fate = self.chance.random()
            if calm or fate < 0.7:
                self.told[trial] = self.on.goes_on(trial)
            elif fate < 0.85:
                await self.on.desk.leave(trial, "pruned")
                self.over.add(trial)
            else:
                await self.on.desk.leave(trial, "")
                self.paused[trial] = message["step"]

    async def paused_goes_on(self, *, calm: bool = False) -> None:
        """Tune goes on with a paused trial, or gives it up."""
        if self.paused:
            trial, step = self.paused.popitem()
            if calm or self.chance.random() < 0.7:
                self.told[trial] = self.on.begin(trial, resume=(f"trials/{trial}", step), spent_s=step / 10)
            else:
                await self.on.desk.leave(trial, "pruned")
                self.over.add(trial)

    async def cell_comes(self) -> None:
        """Another cell is there."""
        if len(self.cells) < 3:
            self.made += 1
            self.cells[f"c{self.made}"] = [Hand(task) for task in await self.on.cell(f"c{self.made}", self.size)]

    async def worker_is_replaced(self) -> None:
        """A worker has died, and another one stands in for it."""
        if self.cells:
            name = self.chance.choice(list(self.cells))
            rank = self.chance.randrange(self.size)
            await self.on.joins(name, rank, self.size)
            if rank == 0:
                self.words.pop(name, None)
            self.cells[name][rank] = Hand(self.on.takes(name, rank))

    async def cell_is_dropped(self) -> None:
        """A node is gone; a process of it may still say something."""
        if self.cells:
            name = self.chance.choice(list(self.cells))
            await self.on.desk.drop(name, "its node is gone")
            task = self.cells.pop(name)[0].task
            self.words.pop(name, None)
            if task is not None:  # a process that is not dead yet
                await self.on.desk.over(name, task.order.trial, "finished", {"step": 60, "device_s": 1.0})

    async def cell_drains(self) -> None:
        """A node is to go."""
        if self.cells:
            await self.on.desk.drain(self.chance.choice(list(self.cells)))

    async def worker_comes_back(self) -> None:
        """A worker that has nothing more to do in its trial waits for the next order."""
        for name, hands in self.cells.items():
            for rank, hand in enumerate(hands):
                if hand.task is not None and hand.says is not None:
                    if hand.says == "lost":
                        hand.held = None
                        await self.on.desk.lost(name, hand.task.order.trial, "its group broke")
                    hand.task, hand.says = None, None
                    hand.waits = self.on.takes(name, rank, hand.held)
                    return

    async def trial_moves(self, *, calm: bool = False) -> None:
        """Trials come to an evaluation or to their end, whichever it is."""
        running = [name for name, hands in self.cells.items() if all(h.task and h.says is None for h in hands)]
        for name in [name for name in running if name not in self.words]:
            hands = self.cells[name]
            task = hands[0].task
            assert task is not None
            trial, fate = task.order.trial, self.chance.random()
            if await self.is_broken(name, task):
                continue
            self.steps[trial] += 10
            self.on.saved[trial] = self.steps[trial]
            if fate < 0.5:
                self.words[name] = (trial, self.on.decides(name, trial, self.steps[trial]))
                continue
            outcome = "finished" if calm or fate < 0.8 else "diverged" if fate < 0.9 else "failed"
            await self.on.desk.over(name, trial, outcome, {})
            for hand in hands:
                hand.says = ""
            if outcome == "failed":
                hands[-1].held = None
                for hand in hands[:-1]:
                    hand.says = "lost"

    async def word_arrives(self) -> None:
        """Workers hear what was decided."""
        for name, (trial, word) in list(self.words.items()):
            if word.done():
                del self.words[name]
                if word.result() == STOP:
                    await self.on.desk.over(name, trial, "", {})
                    for hand in self.cells[name]:
                        hand.says = (hand.says or "") if hand.task else None

    # what holds

    async def is_broken(self, name: str, task: Task) -> bool:
        """Say whether a trial is not to go on in a cell."""
        place = self.on.desk._cells[name]
        return task.generation <= place.broken or place.trial != task.order.trial or place.stopping

    async def look_around(self) -> None:
        """Hand out orders, have workers hear of broken groups, and check the promises."""
        await settle()
        for name in list(self.cells):
            await self.take_orders(name)
        for name, hands in self.cells.items():
            for hand in hands:
                await self.hear(name, hand)
        await settle()
        self.check(await self.on.outcomes())

    async def take_orders(self, name: str) -> None:
        """Give the workers of a cell what the desk has handed out; a cell that was sent home ends."""
        desk, hands = self.on.desk, self.cells[name]
        if all(hand.waits.done() and hand.waits.result() is None for hand in hands):
            await desk.drop(name, "its cell ended")
            del self.cells[name]
            return
        given = [hand for hand in hands if hand.task is None and hand.waits.done()]
        for hand in given:
            hand.task = hand.waits.result()
            assert hand.task is not None or desk._cells[name].drains
        tasks = {hand.task.generation: [h.held for h in given] for hand in given if hand.task}
        for generation, held in tasks.items():
            whole = set(held) == {generation} and len(held) == self.size
            assert whole or generation > self.newest.get(name, 0), "a generation is used again"
            self.newest[name] = generation
        for hand in given:
            hand.held = hand.task.generation if hand.task else None

    async def hear(self, name: str, hand: Hand) -> None:
        """Have a worker hear that its trial is not to go on here."""
        if hand.task and hand.says is None and await self.is_broken(name, hand.task):
            word = await self.on.soon(self.on.desk.look(name, hand.task.order.trial, hand.task.generation))
            if word in (LEAVE, STOP) and name not in self.words:
                hand.says = "lost"

    def check(self, outcomes: dict[str, list[str]]) -> None:
        """Fail if a trial is nowhere or twice, ends twice, or waits while a cell waits."""
        desk = self.on.desk
        for trial in self.begun:
            entry = desk._entries.get(trial)
            if entry is not None and not entry.ended and trial not in self.over:
                mine = [cell for cell in desk._cells.values() if cell.trial == trial and entry.cell == cell.name]
                assert len(mine) + desk._queue.count(trial) == 1, f"{trial} is nowhere, or twice"
        idle = [cell for cell in desk._cells.values() if cell.is_ready() and not cell.drains]
        assert not (idle and desk._queue), "a cell waits, and so does a trial"
        assert all(not cell.trial for cell in idle)
        assert all(len(ends) == 1 for ends in outcomes.values()), "an end twice"

    async def run(self) -> None:
        """Let fate play, then nothing more happen until all has ended."""
        events = [self.trial_begins, self.tune_decides, self.paused_goes_on, self.cell_comes, self.word_arrives]
        events += [self.worker_comes_back, self.trial_moves] * 3
        events += [self.worker_is_replaced, self.cell_is_dropped, self.cell_drains]
        for _ in range(60):
            await self.chance.choice(events)()
            await self.look_around()
        for _ in range(80):  # from now on nothing breaks: all that was begun comes to its end
            await self.cell_comes()
            await self.tune_decides(calm=True)
            await self.paused_goes_on(calm=True)
            await self.trial_moves(calm=True)
            await self.word_arrives()
            for _ in range(3 * self.size):
                await self.worker_comes_back()
            await self.look_around()
            if set(self.begun) <= self.over:
                break
        assert {trial: len(ends) for trial, ends in (await self.on.outcomes()).items()} == dict.fromkeys(self.begun, 1)


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_in_all_histories_each_trial_ends_once_and_nobody_waits_in_vain(tmp_path: Any, first: int) -> None:
    for seed in range(first, first + 10):
        asyncio.run(Play(str(tmp_path), seed).run())
