"""What the workers of a sweep's cell do: one trial after the other, in the same processes and the same process group.

Model, optimizer, seeds and position are new for each trial; imports, connections and blocks that were read stay. A
trial comes out as in fresh processes, to the bit.
"""

import faulthandler
import math
import os
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import torch

from elastrain.data.blocks import FeedSpec, eval_block_rows
from elastrain.data.cache import cache_of
from elastrain.data.columns import Array
from elastrain.data.dataset import Dataset
from elastrain.data.direct import DirectFeed, KeptBlocks
from elastrain.data.plan import Plan
from elastrain.elastic.door import Door
from elastrain.elastic.protocol import Generation, Member, Worker
from elastrain.errors import DivergedError, ElastrainError, StorageError, ours
from elastrain.observe.ledger import Clock
from elastrain.spec.train import TrainSpec
from elastrain.sweeps.desk import LEAVE, STOP
from elastrain.sweeps.orders import CellConfig, Order, Task
from elastrain.training import checkpoint
from elastrain.training.late_dynamo import defer_dynamo
from elastrain.training.loop import Decision, Loop, choose_device, fix_threads
from elastrain.training.manifests import UnknownMetricError, check_metric, read_manifest
from elastrain.training.precision import arithmetic, fix_arithmetic
from elastrain.training.reduce import Group, GroupLost
from elastrain.training.state import Position, TrainState, broadcast_object, digest
from elastrain.training.task import make_task

TRAINING = ("data", "compute", "reduce")  # what device-seconds are made of
LIMITS = {"compute": 1.0, "evaluate": 1.0, "start": 10.0}  # how long a worker may be at it, in workers.timeout_s
SETTINGS = ("weight_decay", "momentum", "betas", "eps", "lr_ratio")  # of a group; the schedule sets lr at each step
LOOK_S = 0.002
COMMIT_S = 600.0


class Stopped(Exception):  # noqa: N818 -- an event: the trial was told to stop here
    """The trial ends here, for now or for good."""


class Broken(Exception):  # noqa: N818 -- an event: the desk decides what follows
    """Another worker of the cell is gone, or has given the trial up."""


def work(config: CellConfig) -> None:
    """Run trials until there are none."""
    defer_dynamo()
    CellWorker(config).run()


class CellWorker:
    """One worker of a cell, from its start to its end."""

    def __init__(self, config: CellConfig) -> None:
        self._config, self._desk, self._cell = config, config.desk, config.cell
        fix_threads(config.cpus)
        self._device = choose_device(config.gpus)
        if 0.0 < config.gpus < 1.0 and self._device.type == "cuda":  # else its GPUs are names
            torch.cuda.set_per_process_memory_fraction(config.gpus)
        self._rank = ray.train.get_context().get_world_rank()
        self._door = Door(ray.util.get_node_ip_address(), ray.get(self._desk.token.remote()))
        self._me = Worker(
            name=f"{socket.gethostname()}-{secrets.token_hex(3)}-{os.getpid()}",
            node=ray.get_runtime_context().get_node_id(),
            place=self._rank,
            door=self._door.address,
            cell=self._cell,
        )
        self._kept = KeptBlocks()
        self._data: dict[tuple[str, Any], Dataset] = {}
        self._group: Group | None = None
        self._lost = threading.Event()
        self._task: Task | None = None
        self._running: Running | None = None

    def run(self) -> None:
        """Take orders until there are none."""
        ray.get(self._desk.join.remote(self._cell, self._rank, self._config.size, self._me))
        threading.Thread(target=self._watch, daemon=True, name="watch").start()
        while (task := ray.get(self._desk.take.remote(self._cell, self._rank, self._held()))) is not None:
            self._task = task
            outcome, fields = self._outcome(task)
            self._task = None
            if outcome == "lost":
                self._leave_group()
                ray.get(self._desk.lost.remote(self._cell, task.order.trial, fields["error"]))
            elif self._rank == 0 or outcome in ("failed", "hopeless"):
                ray.get(self._desk.over.remote(self._cell, task.order.trial, outcome, fields))
            if outcome in ("failed", "hopeless"):
                self._leave_group()  # only now: the others, who then are lost, would be heard first
        self._leave_group()

    def _held(self) -> int | None:
        """Return the generation of the group that this worker is in."""
        return None if self._group is None else self._group.generation

    def _outcome(self, task: Task) -> tuple[str, dict[str, Any]]:
        """Run a trial and return how it ended: finished, diverged, failed, hopeless, "" (told to stop) or lost.

        `hopeless` is what every other trial would fail of, too.
        """
        try:
            self._enter(task)
            return "finished", self._run(task.order)
        except Stopped:
            return "", {}
        except DivergedError as error:
            return "diverged", {"error": str(error), **self._spent(task.order)}
        except (Broken, GroupLost) as error:
            return "lost", {"error": str(error)}
        except Exception as error:  # noqa: BLE001 -- a trial that fails costs itself, not the sweep
            known = ours(error)
            kind = type(known or ElastrainError()).__name__
            told = {"error": str(known) if known else traceback.format_exc(), "error_kind": kind}
            hopeless = isinstance(error, UnknownMetricError | StorageError)
            return "hopeless" if hopeless else "failed", {**told, **self._spent(task.order)}
        finally:
            self._running = None

    def _spent(self, order: Order) -> dict[str, Any]:
        """Return how far the trial has come, and what it has cost, when something ends it."""
        if self._running is None:
            return {"step": order.resume[1] if order.resume else 0, "device_s": order.spent_s}
        return {"step": self._running.step, "device_s": self._running.device_s()}

    def _enter(self, task: Task) -> None:
        """Form the process group, unless it is there from the trial before."""
        if self._group is not None and self._group.generation == task.generation:
            return
        self._leave_group()
        members = tuple(Member(worker=worker, position=None) for worker in task.members)
        generation = Generation(number=task.generation, members=members, source=None)
        self._lost = threading.Event()
        self._group = self._door.join(generation, self._me.name, self._device, self._lost)

    def _leave_group(self) -> None:
        group, self._group = self._group, None
        self._lost.set()
        if group is not None and hasattr(group, "abandon"):
            group.abandon()

    def _run(self, order: Order) -> dict[str, Any]:
        spec = order.spec
        assert self._group is not None
        fix_arithmetic(spec.consistency, compiles=spec.compile)
        if spec.compile:
            torch._dynamo.reset()  # noqa: SLF001 -- its public name warns; what another model left slows this one
        train, evaluation = self._dataset(spec, spec.data.train), self._dataset(spec, spec.data.eval or "")
        plan = Plan.of(train, seed=spec.data.seed, global_batch=spec.data.global_batch, slots=spec.num_slots)
        steps = spec.budget.steps or (spec.budget.epochs or 0) * plan.steps_per_epoch
        state = TrainState(spec, make_task(spec, train), self._device)
        if order.resume is not None:
            self._load(order, state)
        feed = DirectFeed(_feed_spec(spec, plan, (train, evaluation), (state.step, steps)), self._kept)
        self._running = running = Running(self._desk, self._cell, order, self._group)
        versions = {"plan": plan.identity(), "arithmetic": arithmetic(self._device), **self._config.info}
        loop = Loop(
            spec=spec,
            plan=plan,
            evaluation=evaluation,
            eval_block_rows=eval_block_rows(evaluation),
            num_steps=steps,
            run_url=order.run_url,
            state=state,
            feed=feed,
            seat=running,
            recorder=running,
            clock=running.clock,
            info={**versions, "evaluation": evaluation.fingerprint},
        )
        try:
            result = loop.run()
        except UnknownMetricError as error:
            # First of the field that the user wrote: checkpoint.best follows from it.
            check_metric("objective.metric", order.objective.metric, error.metrics)
            raise
        finally:
            feed.close()
            running.arrived()
        if result["stopped"]:
            raise Broken("it was told to stop, and committed")  # it goes on elsewhere, from there
        return {"step": result["step"], "device_s": running.device_s(), "weights_sha256": result["weights_sha256"]}

    def _load(self, order: Order, state: TrainState) -> None:
        """Go on from the trial's own checkpoint, or take over another one's weights with settings of its own."""
        assert order.resume is not None
        run, step = order.resume
        own = [[_settings(group) for group in phase.optimizer.param_groups] for phase in state.phases]
        saved = checkpoint.load(run, step)
        state.load(saved.tensors, saved.numbers)
        if run == order.run_url:
            if order.untold:  # lost between its commit and its report, which comes first then
                state.metrics, state.evaluated = dict(saved.info["metrics"]), step
            return
        for phase, groups in zip(state.phases, own, strict=True):
            for group, settings in zip(phase.optimizer.param_groups, groups, strict=True):
                group.update(settings)
        if self._rank == 0:
            told = {"donor": run.rsplit("/", 1)[-1], "step": step, "point": dict(order.point)}
            told["weights_sha256"] = digest(state.model.state_dict())
            self._desk.event.remote("exploit", {"trial": order.trial, **told})

    def _dataset(self, spec: TrainSpec, url: str) -> Dataset:
        key = (url, spec.data.columns)
        if key not in self._data:
            self._data[key] = Dataset.open(url).select(spec.data.columns)
        return self._data[key]

    def _watch(self) -> None:
        """Hear what becomes of the trial that runs, and end this process if it stands still."""
        while True:
            task, running = self._task, self._running
            if task is None:
                time.sleep(0.05)
                continue
            category, since = running.clock.running() if running else ("", math.inf)
            limit_s = LIMITS.get(category, math.inf) * self._config.timeout_s
            if time.perf_counter() - since > limit_s:
                faulthandler.dump_traceback()
                os._exit(1)
            word = ray.get(self._desk.look.remote(self._cell, task.order.trial, task.generation))
            if word == LEAVE and self._task is task:
                self._lost.set()  # who waits for a member that is gone, in a connection or a sum, comes out of it
            elif word == STOP and running is not None:
                running.stop = True
            time.sleep(0.2)


class Running:
    """A trial under way, as its loop sees it: a seat whose group never changes, and a recorder."""

    def __init__(self, desk: Any, cell: str, order: Order, group: Group) -> None:
        self.order, self.clock, self.stop = order, Clock(), False
        self._desk, self._cell, self._group = desk, cell, group
        self.step = order.resume[1] if order.resume else 0
        self._told = 0
        self._noted: Any = None
        self._trained = self._since = 0.0  # of the clock's seconds of TRAINING
        self._evaluates = False

    def device_s(self) -> float:
        """Return what training has cost up to now, in seconds of all the trial's workers."""
        now = self._booked()
        trained = self._trained + (0.0 if self._evaluates else now - self._since)
        return self.order.spent_s + self._group.size * trained

    def _booked(self) -> float:
        spent = self.clock.spent()
        return sum(spent[kind] for kind in TRAINING)

    def _count(self, *, evaluates: bool) -> None:
        """Count what was spent since the boundary before, unless on an evaluation, which waits for data, too."""
        now = self._booked()
        self._trained += 0.0 if self._evaluates else now - self._since
        self._since, self._evaluates = now, evaluates

    # --- a seat

    def group(self, state: TrainState) -> Group:
        """Return the group, after what an evaluation calls for. Raises Stopped, DivergedError, SpecError, GroupLost."""
        self.step = state.step
        self._count(evaluates=state.due)
        if state.metrics and state.evaluated == state.step > self._told and not state.due:
            self._told = state.step
            self._judge(state)
        return self._group

    def _judge(self, state: TrainState) -> None:
        """Report an evaluation; where one is due, wait for the decision, which all workers then follow."""
        objective, step = self.order.objective, state.step
        check_metric("objective.metric", objective.metric, state.metrics)
        self.clock.switch("wait")  # for the desk and Ray Tune, of which training costs nothing
        value = state.metrics[objective.metric]
        decides = step in objective.decisions and step > self.order.decided
        stops = False
        if self._group.rank == 0:
            self.arrived()
            told = {"step": step, "samples": state.samples, "value": value if math.isfinite(value) else None}
            fields = {**told, "metrics": dict(state.metrics), "device_s": self.device_s()}
            if decides and math.isfinite(value):
                if objective.saves:
                    self._wait_for_checkpoint(step)
                self.arrived()
                stops = ray.get(self._desk.decide.remote(self._cell, self.order.trial, fields)) == STOP
            else:
                self.arrived()
                self._noted = self._desk.evaluated.remote(self._cell, self.order.trial, fields)
        if not math.isfinite(value):
            raise DivergedError(f"step {step}: {objective.metric} is {value}; lower optimizer.lr or warm up longer")
        if decides and broadcast_object(self._group, stops, 0, state.device):
            raise Stopped

    def arrived(self) -> None:
        """Wait until the desk has what it was told; it takes calls in any order."""
        if self._noted is not None:
            ray.get(self._noted)
            self._noted = None

    def _wait_for_checkpoint(self, step: int) -> None:
        """Wait until the commit of this boundary, which goes on beside, is whole."""
        self.clock.switch("checkpoint")
        deadline = time.monotonic() + COMMIT_S
        while not _is_committed(self.order.run_url, step):
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{self.order.run_url}: the checkpoint of step {step} was not written in {COMMIT_S:g} s"
                )
            time.sleep(LOOK_S)

    def decision(self) -> Decision:
        """Return whether to commit and stop."""
        return Decision(stop=self.stop)

    def change(self) -> None:
        """Never called: the group of a trial stays."""

    def lost(self) -> None:
        """Give the trial up: the desk gives it to whoever is whole."""
        raise Broken("a worker of its cell was lost")

    def noted(self, position: Position) -> None:
        """Nobody asks."""

    # --- a recorder

    def audit(self, step: int, slot: int, columns: Mapping[str, Array]) -> None:
        """Keep nothing: a sweep has no audit."""

    def audited(self) -> None:
        """Wait for nothing."""

    def settled(self) -> None:
        """Wait until what the desk has noted is in storage."""
        ray.get(self._desk.settled.remote())

    def report(self, status: Mapping[str, Any]) -> None:
        """Give a sign of life."""
        if self._group.rank == 0:
            self._desk.beat.remote(self._cell, self.order.trial, int(status["step"]), self.device_s())

    def event(self, kind: str, **fields: Any) -> None:
        """Keep nothing: evaluations are reported in `group`, where all workers have them."""

    def result(self, found: Mapping[str, Any]) -> None:
        """Nothing: whoever runs the loop returns it."""


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the spec has set of an optimizer's group."""
    return {name: group[name] for name in SETTINGS if name in group}


def _is_committed(run: str, step: int) -> bool:
    try:
        read_manifest(run, step)
    except FileNotFoundError:
        return False
    return True


def _feed_spec(spec: TrainSpec, plan: Plan, data: tuple[Dataset, Dataset], steps: tuple[int, int]) -> FeedSpec:
    return FeedSpec(
        plan=plan,
        train=data[0],
        evaluation=data[1],
        transforms=spec.data.transforms,
        begin=steps[0],
        end=steps[1],
        reading=(0.0, 0),
        cache=cache_of(spec.data.cache, *data),
    )
