"""Tasks of each kind train alike on any number of workers, and what would break that does break it."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.harness import (
    Adversarial,
    Classifier,
    Convolution,
    Processes,
    Seat,
    Setup,
    Tokens,
    Variational,
    lockstep,
    losses_of,
    losses_together,
    make_spec,
    train_alone,
    train_together,
)
from torch import Tensor

from elastrain.data.plan import hash64
from elastrain.training import step
from elastrain.training.buffers import MovingBuffers
from elastrain.training.loop import Loop
from elastrain.training.norm import BatchNorms
from elastrain.training.reduce import Group
from elastrain.training.state import TrainState, digest, seed_all
from elastrain.training.task import Task

KINDS: dict[str, tuple[type[Task], dict[str, Any]]] = {
    "classifier": (Classifier, {"task_args": {"dropout": 0.3}}),
    "convolution": (Convolution, {}),
    "tokens": (Tokens, {}),
    "variational": (Variational, {"clip_norm": 5.0}),
    "adversarial": (
        Adversarial,
        {
            "optimizer.betas": (0.5, 0.99),
            "optimizer.phases": {"generator": {"lr": 0.005}, "discriminator": {"name": "sgd"}},
        },
    ),
}
TOLERANCE = {"fp32": 1e-4, "fp64": 1e-10}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_setup(kind: str, slots: int = 4, **changes: Any) -> Setup:
    """A run of a kind; 100 rows in batches of 24 make a short last batch, and 3 or 5 slots do not divide them."""
    cls, own = KINDS[kind]
    return Setup(spec=make_spec(**{"data.slots": slots, **own, **changes}), kind=cls)


def differs(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two runs' losses."""
    assert len(one) == len(other)
    return float(np.max(np.abs(np.array(one) - np.array(other)) / np.abs(np.array(one))))


@pytest.mark.parametrize("slots", [4, 5])
@pytest.mark.parametrize("precision", TOLERANCE)
@every_kind
def test_losses_are_the_same_on_any_number_of_workers(kind: str, precision: str, slots: int) -> None:
    setup = make_setup(kind, slots=slots, precision=precision)
    loop, _ = train_alone(setup)
    for size in (2, 3, 4):
        together = train_together(setup, size)
        assert differs(losses_of(loop), losses_of(together[0])) < TOLERANCE[precision]
        assert len({digest(one.state.model.state_dict()) for one in together}) == 1, "the workers hold other weights"
        for name, tensor in together[0].state.model.state_dict().items():
            expected = loop.state.model.state_dict()[name]
            assert torch.allclose(tensor, expected, rtol=100 * TOLERANCE[precision], atol=1e-5), name


@every_kind
def test_the_loss_falls(kind: str) -> None:
    setup = make_setup(kind, 4, **{"budget.steps": 60})
    losses = losses_of(train_alone(setup)[0])
    if kind == "adversarial":
        assert all(np.isfinite(losses))  # two that pull at each other
    else:
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_processes_agree_with_one_worker(tmp_path: Path) -> None:
    setup = make_setup("adversarial", precision="fp64")
    with Processes() as processes:
        for rank in range(3):
            processes.start(losses_together, setup, tmp_path, rank, 3)
        found = processes.results()
    assert found[0] == found[1] == found[2]
    assert differs(losses_of(train_alone(setup)[0]), found[0]) < 1e-10


# --- what would break it, does


def test_a_mean_of_means_over_workers_breaks_it() -> None:
    """DistributedDataParallel's way: every worker divides by its own tokens, then workers are averaged."""
    setup = make_setup("tokens", precision="fp64")

    def work(group: Group) -> Loop:
        state = setup.state()
        loop = setup.loop(Seat(lambda _: MeanOfMeans(group, state)), state)
        loop.run()
        return loop

    assert differs(losses_of(train_alone(setup)[0]), losses_of(lockstep(3, work)[0])) > 1e-3


class MeanOfMeans:
    """A group that weights all workers alike."""

    generation = 1

    def __init__(self, group: Group, state: TrainState) -> None:
        self.rank, self.size, self._group, self._gradients = group.rank, group.size, group, state.phases[0].gradients

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum, with the gradients weighted wrongly."""
        if tensor is self._gradients.buffer:
            own = self._gradients.slot_rows[:, 1].sum()
            total = own.clone()
            self._group.all_reduce(total)
            self._gradients.values.mul_(total / self.size / own)
        self._group.all_reduce(tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


@pytest.mark.parametrize("kind", ["classifier", "variational", "adversarial"])
def test_seeds_of_workers_instead_of_slots_break_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()

    def seed_once(seed: int, device: torch.device) -> None:
        key = (threading.get_ident(), seed)
        if key not in seen:
            seed_all(seed, device)
        seen.add(key)

    monkeypatch.setattr(step, "hash64", lambda *address: hash64(*address[:3], *address[4:]))
    monkeypatch.setattr(step, "seed_all", seed_once)
    setup = make_setup(kind, precision="fp64")
    assert differs(losses_of(train_alone(setup)[0]), losses_of(train_together(setup, 2)[0])) > 1e-3


def test_statistics_of_workers_instead_of_slots_break_it(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make_setup("convolution", precision="fp64")
    for name in ("begin", "end", "_collect"):
        monkeypatch.setattr(BatchNorms, name, lambda *_: None)
    alone, together = train_alone(setup)[0], train_together(setup, 2)
    means = [loop.state.model.get_buffer("2.running_mean") for loop in (alone, *together)]
    assert not torch.allclose(means[1], means[2], rtol=1e-3), "each worker keeps statistics of its own slots"
    assert not torch.allclose(means[0], means[1], rtol=1e-3)


def test_other_buffers_of_workers_instead_of_slots_break_it(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make_setup("adversarial", precision="fp64")
    monkeypatch.setattr(MovingBuffers, "end_slot", lambda *_: None)
    together = train_together(setup, 3)
    assert differs(losses_of(train_alone(setup)[0]), losses_of(together[0])) > 1e-9  # it is almost settled at the start
    assert len({digest(loop.state.model.state_dict()) for loop in together}) > 1
