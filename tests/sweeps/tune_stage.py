"""Ray Tune's controller, its schedulers, our agenda, desk and ledger in this process, moved by a seeded fate.

Actors are objects whose calls come back in any order, and cells coroutines that compute nothing.
"""

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.train._internal import storage
from ray.tune.execution import tune_controller
from tests.sweeps.desk_stage import evaluation

from elastrain.elastic.protocol import Worker
from elastrain.lease import Hold
from elastrain.observe.ledger import Ledger, read_ledger
from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps import run
from elastrain.sweeps.agenda import Agenda
from elastrain.sweeps.desk import GO_ON, STOP, Desk
from elastrain.sweeps.document import base_of
from elastrain.sweeps.orders import Blueprint, Objective, Order
from elastrain.sweeps.rungs import decisions
from elastrain.sweeps.schedulers import scheduler_of
from elastrain.sweeps.space import arms_of
from elastrain.sweeps.trials import Trial, trials_of
from elastrain.sweeps.tuning import PerStudy, TrialActor, tune_trials

MOST_TURNS = 20_000


class NotYetError(Exception):
    """An actor's call waits for the desk."""


class Call:
    """A call of an actor: asked, then done, then told of."""

    def __init__(self, tracked: TrackedActor, method: str, told: Mapping[str, Any], args: Any, kwargs: Any) -> None:
        self.tracked, self.method, self.args, self.kwargs = tracked, method, args or (), kwargs or {}
        self.on_result: Callable[..., Any] | None = told.get("on_result")
        self.done, self.result = False, None


class Actors:
    """Tune's manager of actors: they start, and their calls come back, when fate says so."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._count, self.killed = 0, False
        self.peak = 0  # of those there were, or were to be, at a time
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[Any, Any]] = {}
        self._pending: dict[TrackedActor, Any] = {}
        self._objects: dict[TrackedActor, TrialActor] = {}
        self._starting: set[TrackedActor] = set()
        self._calls: dict[TrackedActor, list[Call]] = {}

    def add_actor(self, cls: Any, resource_request: Any, kwargs: Any, **on: Any) -> TrackedActor:
        """Ask for an actor."""
        del cls, resource_request
        self._count += 1
        tracked = TrackedActor(self._count, **on)
        self._pending[tracked], self._calls[tracked] = kwargs, []
        self.peak = max(self.peak, len(self._pending) + self.num_live_actors)
        return tracked

    def schedule_actor_task(
        self, tracked_actor: TrackedActor, method_name: str, args: Any = None, kwargs: Any = None, **told: Any
    ) -> Call:
        """Ask an actor something; it answers one after the other."""
        call = Call(tracked_actor, method_name, told, args, kwargs)
        self._calls[tracked_actor].append(call)
        return call

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        """Forget what an actor was asked; it does it all the same."""
        for call in self._calls.get(tracked_actor, []):
            call.on_result = None

    def remove_actor(self, tracked_actor: TrackedActor, kill: bool = False, stop_future: Any = None) -> bool:  # noqa: FBT001, FBT002 -- Tune's signature
        """End an actor once it has answered, or take back that it was asked for."""
        del kill, stop_future
        if self._pending.pop(tracked_actor, None) is not None:
            return False
        self._starting.discard(tracked_actor)
        stop = self.schedule_actor_task(tracked_actor, "stop")
        stop.on_result = lambda *_: self._ended(tracked_actor)
        return True

    def _ended(self, tracked: TrackedActor) -> None:
        self._live_actors_to_ray_actors_resources.pop(tracked, None)
        self._calls.pop(tracked, None)
        if tracked._on_stop:
            tracked._on_stop(tracked)

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        """Say whether an actor is there; with the driver killed, nobody waits for one that is to end."""
        return not self.killed and tracked_actor in self._live_actors_to_ray_actors_resources

    def is_actor_failed(self, _: TrackedActor) -> bool:
        """None ever fails."""
        return False

    def get_live_actors_resources(self) -> dict[str, float]:
        """Nobody counts."""
        return {}

    def cleanup(self) -> None:
        """End all."""
        self._live_actors_to_ray_actors_resources.clear()
        self._calls.clear()

    num_live_actors = property(lambda self: len(self._live_actors_to_ray_actors_resources))
    num_total_actors = 0
    num_pending_actors = property(lambda self: len(self._pending))
    num_actor_tasks = property(lambda self: sum(map(len, self._calls.values())))

    def answer(self, call: Call) -> Any:
        """Return what a call comes to, once all before it have been done."""
        for each in self._calls[call.tracked]:
            if not each.done:
                each.result = getattr(self._objects[each.tracked], each.method)(*each.args, **each.kwargs)
                each.done = True
            if each is call:
                break
        return call.result

    def next(self, timeout: float) -> bool:
        """Let one thing happen, if anything does."""
        del timeout
        if self._pending and self._chance.random() < 0.7:
            tracked = self._chance.choice(list(self._pending))
            self._objects[tracked] = TrialActor(**self._pending.pop(tracked))
            seen = SimpleNamespace(get_auto_filled_metrics=SimpleNamespace(remote=lambda **_: {}))
            self._live_actors_to_ray_actors_resources[tracked] = (seen, None)
            self._starting.add(tracked)
        for tracked in self._live_actors_to_ray_actors_resources:
            self._does(tracked)
        answered = [calls[0] for calls in self._calls.values() if calls and calls[0].done]
        events: list[Any] = [*answered, *self._starting]
        if not events or self._chance.random() < 0.3:
            return False
        event = self._chance.choice(events)
        if isinstance(event, TrackedActor):
            self._starting.remove(event)
            assert event._on_start is not None
            event._on_start(event)
            return True
        self._calls[event.tracked].remove(event)
        if event.on_result is not None:
            event.on_result(event.tracked, event.result)
        return True

    def _does(self, tracked: TrackedActor) -> None:
        """Have an actor do what it was asked next, if fate lets it, and nothing that waits for the desk."""
        waiting = next((call for call in self._calls[tracked] if not call.done), None)
        if waiting is not None and self._chance.random() < 0.5:
            try:
                self.answer(waiting)
            except NotYetError:
                return


class Handle:
    """A desk as an actor's handle: a call is a task of the loop, and a trial waits for its next word in one alone."""

    def __init__(self, desk: Desk, loop: asyncio.AbstractEventLoop) -> None:
        self._desk, self._loop = desk, loop
        self.waiting: dict[str, asyncio.Task[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        """Return a method whose `remote` begins it."""

        def begins(*told: Any) -> "asyncio.Task[Any]":
            if name == "next" and told[0] in self.waiting:
                return self.waiting[told[0]]
            task = self._loop.create_task(getattr(self._desk, name)(*told))
            if name == "next":
                self.waiting[told[0]] = task
            return task

        return SimpleNamespace(remote=begins)


class Theatre:
    """A sweep in a folder, of which one attempt after the other is played.

    `value(trial, step)` is the objective; a trial diverges after the step that `diverges` has of it. `crashes` is how
    likely a cell breaks off in an evaluation, and `moves` how likely nodes come or go, at each turn of Tune.
    """

    def __init__(self, spec: SweepSpec, folder: Path, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.spec, self.url, self.patch = spec, str(folder), patch
        self.chance = random.Random(seed)  # noqa: S311 -- no secret
        self.value: Callable[[str, int], float] = lambda trial, step: int(trial.rsplit("-", 1)[-1]) + 1 / step
        self.diverges: dict[str, int] = {}
        self.crashes = self.moves = 0.0
        self.later: int | None = None  # how many cells there are after 20 turns
        self.cells = self.chance.choice((1, 2, 3, 4))
        self._made = 0
        self.saved: dict[str, int] = {}
        self.at, self.saves = decisions(spec)

    def play(self, *, until: int = MOST_TURNS) -> bool:
        """Play an attempt; after `until` turns of Tune it is killed. Say whether it came to its end."""
        loop = self._loop = asyncio.new_event_loop()
        try:
            return self._attempt(loop, until)
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

    def trials(self) -> list[Trial]:
        """Return what the ledger has."""
        return trials_of(read_ledger(self.url))

    def _attempt(self, loop: asyncio.AbstractEventLoop, until: int) -> bool:
        arms = {arm.name: arm for arm in arms_of(self.spec, base_of(self.spec))}
        aim = Objective(metric="val_loss", goal=self.spec.objective.goal, decisions=self.at, saves=self.saves)
        before = read_ledger(self.url)
        blueprint = Blueprint(arms=arms, objective=aim, folder=f"{self.url}/trials")
        self._desk = Desk(Hold(self.url), Ledger.next_attempt(self.url), blueprint, self._newest)
        self._handle = handle = Handle(self._desk, loop)
        self.actors = Actors(self.chance)
        self._stub()
        self._places: dict[str, asyncio.Task[None]] = {}
        self.come_to(self.cells)
        nothing: Any = None
        job = run._Job(
            spec=self.spec,
            url=self.url,
            hold=Hold(self.url),
            arms=arms,
            agenda=Agenda(self.spec, list(arms.values()), trials_of(before)),
            workers=nothing,
            size=1,
            view=nothing,
            before=before,
            decisions=self.at,
            pauses=self.saves,
            stop=threading.Event(),
        )
        scheduler = PerStudy(
            lambda: scheduler_of(self.spec, run._explorer(job)),
            lambda trial, outcome: run._leave(job, handle, trial, outcome),
            lambda trial, result: run._went_on(job, handle, trial, result),
        )
        turns = iter(range(MOST_TURNS))
        tune_trials(
            job.agenda,
            scheduler,
            lambda proposal: run._given(job, proposal, "desk", handle),
            capacity=lambda: self.cells,
            pauses=self.saves,
            look=lambda: self._look(next(turns, MOST_TURNS), until),
        )
        if not job.agenda.is_finished() or job.agenda.in_flight:
            return False
        loop.run_until_complete(self._desk.settled())
        return True

    def _look(self, turn: int, until: int) -> bool:
        """Let the loop go on for a while; write down what was noted, now and then; say whether to be killed."""
        assert turn < MOST_TURNS, f"it does not come to an end: {[(t.id, t.outcome) for t in self.trials()]}"
        for _ in range(self.chance.randrange(12)):
            self._loop.run_until_complete(asyncio.sleep(0))
        if self.later and turn == 20:
            self.come_to(self.later)
        if self.chance.random() < self.moves:
            self.come_to(self.chance.choice((1, 2, 3, 4)))
        if self.chance.random() < 0.1:
            self._loop.run_until_complete(self._desk.settled())
        self.actors.killed = turn >= until
        return self.actors.killed

    def _newest(self, run_url: str) -> int | None:
        return self.saved.get(run_url.rsplit("/", 1)[-1])

    def _stub(self) -> None:
        """Put what would be Ray in place."""

        def get(what: Any, **_: Any) -> Any:
            if isinstance(what, list):
                return [get(each) for each in what]
            if isinstance(what, Call):
                return self.actors.answer(what)
            for trial, task in list(self._handle.waiting.items()):
                if task is what:
                    if not task.done():
                        raise NotYetError
                    del self._handle.waiting[trial]
            return self._loop.run_until_complete(what)

        async def here(function: Callable[..., Any], *args: Any) -> Any:
            return function(*args)

        self.patch.setattr(asyncio, "to_thread", here)
        self.patch.setattr(ray, "get", get)
        self.patch.setattr(ray, "get_actor", lambda _: self._handle)
        self.patch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n"))
        self.patch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
        self.patch.setattr(tune_controller, "RayActorManager", lambda **_: self.actors)
        self.patch.setattr(tune_controller, "PlacementGroupResourceManager", lambda: None)
        self.patch.setattr(storage, "_get_ray_train_session_dir", lambda: f"{self.url}/session")
        self.patch.setattr(run, "_newest", self._newest)

    # --- cells

    def come_to(self, cells: int) -> None:
        """Have so many cells from now on; those that go leave what they do."""
        self.cells = cells
        while len(self._places) < cells:
            self._made += 1
            self._places[f"cell-{self._made}"] = self._loop.create_task(self._cell(f"cell-{self._made}"))
        while len(self._places) > cells:
            name, task = self._places.popitem()
            task.cancel()
            self._loop.create_task(self._desk.drop(name, "its node is gone"))

    async def _cell(self, name: str) -> None:
        await self._while()
        held = None
        await self._joins(name)
        while (task := await self._desk.take(name, 0, held)) is not None:
            held = task.generation
            if not await self._runs(name, task.order):
                held = None
                await self._joins(name)

    async def _joins(self, name: str) -> None:
        await self._desk.join(name, 0, 1, Worker(name=name, node="n", place=0, door=("", 0)))

    async def _while(self) -> None:
        for _ in range(self.chance.choice((0, 0, 5, 50))):
            await asyncio.sleep(0)

    async def _runs(self, name: str, order: Order) -> bool:
        """Run a trial as far as it is to go; False if the cell breaks off."""
        trial, every, most = order.trial, self.spec.objective.every, self.spec.objective.max_steps
        step = order.resume[1] if order.resume else 0
        if order.untold:
            step -= every  # its evaluation is in the checkpoint: told at once
        while step < most:
            step += every
            if not await self._commits(trial, step):
                return False
            if step >= self.diverges.get(trial, most + 1):
                await self._desk.over(name, trial, "diverged", {"step": step, "device_s": step / 10})
                return True
            if await self._reports(name, order, step) == STOP:
                await self._desk.over(name, trial, "", {})
                return True
        await self._desk.over(name, trial, "finished", {"step": step, "device_s": step / 10})
        return True

    async def _commits(self, trial: str, step: int) -> bool:
        """Train up to a step, of which there may be a checkpoint; False if the cell breaks off before or after it."""
        await self._while()
        if self.chance.random() < self.crashes:
            return False
        if self.saves or self.chance.random() < 0.5:
            self.saved[trial] = step
            await self._while()
        return self.chance.random() >= self.crashes

    async def _reports(self, name: str, order: Order, step: int) -> str:
        told = evaluation(step, self.value(order.trial, step))
        if step in order.objective.decisions and step > order.decided:
            return await self._desk.decide(name, order.trial, told)
        await self._desk.evaluated(name, order.trial, told)
        return GO_ON


@pytest.fixture
def quiet() -> Iterator[None]:
    """Give Ray's logger back the level that it had."""
    log = logging.getLogger("ray")
    level = log.level
    yield
    log.setLevel(level)
