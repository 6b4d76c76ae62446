"""What a worker says of its trial: what training has cost, how far it came, and whose settings it trains with."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch
from tests.sweeps.desk_stage import OBJECTIVE
from tests.training.harness import Classifier, Setup, make_arrays, make_dataset, make_spec

from elastrain.data.dataset import Dataset
from elastrain.errors import DataError, DivergedError, StorageError
from elastrain.observe.ledger import Clock
from elastrain.spec.accelerators import FAKE_GPUS
from elastrain.sweeps import worker as worker_module
from elastrain.sweeps.desk import GO_ON
from elastrain.sweeps.orders import CellConfig, Order, Task
from elastrain.sweeps.worker import CellWorker, Running, _feed_spec
from elastrain.training import checkpoint
from elastrain.training.reduce import Solo


class Hands:
    """A clock that a test moves, and a desk that takes its time."""

    def __init__(self) -> None:
        self.time, self.decides_s, self.told = 0.0, 0.0, list[Any]()

    def now(self) -> float:
        """Return the time."""
        return self.time

    def __getattr__(self, name: str) -> Any:
        """Return a method of the desk's actor."""

        def called(*arguments: Any) -> Any:
            self.told.append((name, arguments))
            self.time += self.decides_s
            return GO_ON

        return SimpleNamespace(remote=called)


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    return Hands()


def order(**changes: Any) -> Order:
    given: dict[str, Any] = {"trial": "a", "point": {}, "spec": make_spec(), "run_url": "trials/a"}
    return Order(**{**given, "objective": OBJECTIVE, **changes})


def running(hands: Hands, **changes: Any) -> Running:
    found = Running(hands, "x", order(**changes), Solo())
    found.clock = Clock(hands.now)
    return found


def passes(trial: Running, hands: Hands, **seconds: float) -> None:
    for category, spent in seconds.items():
        trial.clock.switch(category)
        hands.time += spent


def state_at(step: int, *, due: bool) -> Any:
    metrics: dict[str, float] = {} if due else {"val_loss": 0.5}
    there = {"step": step, "samples": step, "device": "cpu", "metrics": metrics}
    return SimpleNamespace(**there, due=due, evaluated=-1 if due else step)


@pytest.mark.parametrize("step", [20, 30], ids=["decided on", "only noted"])
def test_device_seconds_hold_neither_evaluations_nor_what_the_desk_takes(hands: Hands, step: int) -> None:
    trial = running(hands, spent_s=100.0)
    passes(trial, hands, start=50, data=1, compute=2, reduce=4)
    assert trial.device_s() == 107.0, "also between two boundaries"
    trial.group(state_at(step, due=True))
    passes(trial, hands, data=8, evaluate=16)
    passes(trial, hands, data=8, reduce=32)
    assert trial.device_s() == 107.0
    hands.decides_s = 64
    trial.group(state_at(step, due=False))
    (told,) = hands.told
    assert told[1][2]["device_s"] == 107.0
    hands.decides_s = 0
    passes(trial, hands, data=1, compute=2, reduce=4)
    trial.group(state_at(step + 1, due=False))
    assert trial.device_s() == 114.0
    assert sum(trial.clock.spent().values()) == hands.time, "each second is booked once"


def worker_of(hands: Hands) -> Any:
    found: Any = object.__new__(CellWorker)
    found._desk, found._cell, found._rank, found._group, found._running = hands, "x", 0, Solo(), None
    found._lost = threading.Event()
    return found


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (DivergedError("the loss is nan"), "diverged"),
        (KeyError("what is missing"), "failed"),
        (DataError("block 3 is damaged"), "failed"),
        (StorageError("No space left on device"), "hopeless"),
    ],
)
def test_whatever_ends_a_trial_its_steps_and_device_seconds_are_told(
    hands: Hands, error: Exception, outcome: str
) -> None:
    worker = worker_of(hands)

    def runs(_: Order) -> None:
        worker._running = trial = running(hands, spent_s=100.0)
        passes(trial, hands, compute=2)
        trial.group(state_at(7, due=False))
        passes(trial, hands, compute=3)
        raise error

    worker._run = runs
    task = Task(order=order(resume=("trials/a", 5), spent_s=100.0), generation=1, members=())
    found, fields = worker._outcome(task)
    assert (found, fields["step"], fields["device_s"]) == (outcome, 7, 105.0)
    worker._enter = worker._run = lambda _: (_ for _ in ()).throw(error)  # before there is anything to run
    found, fields = worker._outcome(task)
    assert (found, fields["step"], fields["device_s"]) == (outcome, 5, 100.0)


def test_who_takes_over_weights_keeps_the_share_of_its_own_learning_rate(hands: Hands, tmp_path: Path) -> None:
    """With `adamw_lr` each part of Muon has a learning rate of its own, and a PBT recipient's `lr` is another one."""

    def setup(lr: float) -> Setup:
        optimizer = {"name": "muon", "lr": lr, "weight_decay": lr, "args": {"adamw_lr": 0.01}}
        return Setup(spec=make_spec(optimizer=optimizer), kind=Classifier)

    run = str(tmp_path / "donor")
    donor, own = setup(0.1).state(), setup(0.02).state()
    writer = checkpoint.Writer(run, donor.spec.checkpoint)
    writer.commit(donor.tensors(), donor.numbers(), {})
    writer.wait()
    worker_of(hands)._load(order(resume=(run, 0)), own)
    groups = {group["rule"]: group for group in own.phases[0].optimizer.param_groups}
    assert groups["adamw"]["lr_ratio"] * 0.02 == pytest.approx(0.01)
    assert groups["muon"]["lr_ratio"] == 1.0
    assert groups["muon"]["weight_decay"] == 0.02


@pytest.mark.parametrize("untold", [True, False])
def test_an_evaluation_that_only_the_checkpoint_has_is_told_before_anything_else(
    hands: Hands, tmp_path: Path, untold: object
) -> None:
    """The worker was lost between its commit and its report."""
    run, setup = str(tmp_path / "a"), Setup(spec=make_spec(), kind=Classifier)
    saved, state = setup.state(), setup.state()
    saved.step = 20
    writer = checkpoint.Writer(run, saved.spec.checkpoint)
    writer.commit(saved.tensors(), saved.numbers(), {"metrics": {"val_loss": 0.25}})
    writer.wait()
    given = order(run_url=run, resume=(run, 20), untold=untold)
    worker_of(hands)._load(given, state)
    Running(hands, "x", given, Solo()).group(state)
    told = [(fields["step"], fields["value"]) for name, (_, _, fields) in hands.told if name == "decide"]
    assert told == ([(20, 0.25)] if untold else [])


def test_gpus_that_are_names_have_no_memory_to_share(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAKE_GPUS, "1")
    context = SimpleNamespace(get_world_rank=lambda: 0, get_node_id=lambda: "n")
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(worker_module, "fix_threads", lambda _: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda _: pytest.fail("no GPU"))
    config = CellConfig(desk=hands, cell="x", size=1, cpus=1.0, gpus=0.5, timeout_s=60.0, info={})
    assert CellWorker(config)._device.type == "cpu"


def test_a_worker_reads_through_the_nodes_cache(tmp_path: Path) -> None:
    setup = Setup(spec=make_spec(**{"data.cache": {"folder": str(tmp_path), "max_bytes": 1000}}), kind=Classifier)
    near = make_dataset(make_arrays(10))
    shards = tuple(SimpleNamespace(sha256="0") for _ in near.shards)
    far: Any = Dataset(url="s3://bucket/data", columns=near.columns, shards=shards, fingerprint="f", packed=True)  # type: ignore[arg-type]
    assert _feed_spec(setup.spec, setup.plan(), (far, far), (0, 8)).cache is not None
    assert _feed_spec(setup.spec, setup.plan(), (near, near), (0, 8)).cache is None
