"""Evaluation: every sample once, the same bits on any number of workers."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.training.harness import (
    Adversarial,
    Classifier,
    MemoryFeed,
    Setup,
    Variational,
    lockstep,
    make_arrays,
    make_dataset,
    make_spec,
    train_alone,
    train_together,
)
from torch import Tensor, nn

from elastrain.data import blocks
from elastrain.errors import SpecError
from elastrain.observe.ledger import Clock
from elastrain.training import evaluation
from elastrain.training.evaluation import batch_size, evaluate
from elastrain.training.reduce import Group, Solo
from elastrain.training.state import TrainState, digest
from elastrain.training.task import Batch, Losses, Ratio, Task

SETUP = Setup(spec=make_spec(), kind=Classifier)


def evaluated(
    group: Group, rows: int, *, block_rows: int = 7, setup: Setup = SETUP, state: TrainState | None = None
) -> tuple[dict[str, float], list[int]]:
    """The metrics over `rows` rows as one worker of a group, and the rows that it was given."""
    arrays, plan, state = make_arrays(rows, seed=1), setup.plan(), state or setup.state()
    feed = MemoryFeed(plan, setup.data(), arrays, end=setup.steps, block_rows=block_rows)
    found = evaluate(state, feed, plan, make_dataset(arrays), group, block_rows=block_rows, clock=Clock())
    return found, feed.evaluated


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SMALL_BATCH_BYTES", 1)


class Counting(Classifier):
    """Counts rows, and adds up who they are."""

    def metrics(self, model: nn.Module, batch: Batch) -> dict[str, Ratio]:
        """Numbers that tell whether a row was left out or came twice."""
        rows = len(batch["x"])
        ones = torch.ones(rows, dtype=torch.float64)
        return {
            **super().metrics(model, batch),
            "rows": Ratio(rows, 1.0 / 1024),
            "sum": Ratio(batch["x"].double().sum(), ones.sum()),
        }


@pytest.mark.parametrize("rows", [1, 6, 7, 20, 50])
@pytest.mark.parametrize("kind", [Counting, Variational])
def test_every_sample_counts_once_and_the_bits_are_the_same(rows: int, kind: type[Task]) -> None:
    setup = Setup(spec=make_spec(micro_batch=3), kind=kind)
    alone, given = evaluated(Solo(), rows, setup=setup)
    assert given == list(range(rows))
    for size in (2, 3, 5):
        for metrics, _ in lockstep(size, lambda group: evaluated(group, rows, setup=setup)):
            assert metrics == alone
    if kind is Counting:
        batches = -(-rows // 7) * 3 if rows % 7 == 0 else rows // 7 * 3 + -(-(rows % 7) // 3)
        assert alone["rows"] == pytest.approx(rows * 1024 / batches)
        assert alone["sum"] == pytest.approx(make_arrays(rows, seed=1)["x"].astype(np.float64).sum() / rows)


@pytest.mark.parametrize("size", [2, 3])
def test_blocks_are_dealt_to_workers(size: int) -> None:
    given = [rows for _, rows in lockstep(size, lambda group: evaluated(group, 50))]
    assert sorted(row for rows in given for row in rows) == list(range(50))


def test_data_that_are_not_kept_are_read_by_one_worker_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks for five workers, two of which have nothing to do."""
    alone, _ = evaluated(Solo(), 20)
    shared = [rows for _, rows in lockstep(5, lambda group: evaluated(group, 20))]
    assert shared == [list(range(20))] * 5, "small data are kept: all read them, and deal out batches"
    monkeypatch.setattr(blocks, "KEPT_EVAL_BYTES", 0)
    found = lockstep(5, lambda group: evaluated(group, 20))
    assert [metrics for metrics, _ in found] == [alone] * 5
    assert [rows for _, rows in found] == [list(range(7)), list(range(7, 14)), list(range(14, 20)), [], []]


def test_who_waits_for_the_others_evaluates_no_longer() -> None:
    """Else it would be taken for one that stands still, where another one has more to evaluate."""
    clock, found = Clock(), set()

    class Watched(Solo):
        def all_reduce(self, tensor: Tensor) -> None:
            del tensor
            found.add(clock.running()[0])

    arrays, plan = make_arrays(20, seed=1), SETUP.plan()
    feed = MemoryFeed(plan, SETUP.data(), arrays, end=SETUP.steps, block_rows=7)
    evaluate(SETUP.state(), feed, plan, make_dataset(arrays), Watched(), block_rows=7, clock=clock)
    assert found == {"reduce"}


def test_metrics_equal_a_pass_over_all_rows() -> None:
    state = SETUP.state()
    found, _ = evaluated(Solo(), 50, state=state)
    data = make_arrays(50, seed=1)
    state.model.eval()
    with torch.no_grad():
        logits = state.model(torch.from_numpy(data["x"]))
    label = torch.from_numpy(data["label"])
    assert found["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, label)), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == label).float().mean()), rel=1e-6)


def test_averaged_weights_are_used_and_put_back() -> None:
    setup = Setup(spec=make_spec(ema=0.9, task_args={"dropout": 0.5}), kind=Classifier)
    state = setup.state()
    for average in state.ema.values():
        average.mul_(3.0)
    before = digest(state.model.state_dict())
    found, _ = evaluated(Solo(), 50, setup=setup, state=state)
    assert digest(state.model.state_dict()) == before
    assert state.model.training
    plain = Setup(spec=make_spec(), kind=Classifier)
    tripled = plain.state()
    with torch.no_grad():
        for parameter in tripled.model.parameters():
            parameter.mul_(3.0)
    assert evaluated(Solo(), 50, setup=plain, state=tripled)[0] == found
    assert evaluated(Solo(), 50, setup=plain)[0] != found


def test_weights_are_put_back_when_the_task_fails() -> None:
    class Failing(Classifier):
        def metrics(self, model: nn.Module, batch: Batch) -> dict[str, Ratio]:
            raise ValueError("no", model, batch)

    setup = Setup(spec=make_spec(ema=0.9), kind=Failing)
    state = setup.state()
    for average in state.ema.values():
        average.mul_(3.0)
    before = digest(state.model.state_dict())
    with pytest.raises(SpecError, match=r"metrics\(\) raised ValueError"):
        evaluated(Solo(), 5, setup=setup, state=state)
    assert digest(state.model.state_dict()) == before
    assert state.model.training


def test_each_phase_has_a_loss() -> None:
    found, _ = evaluated(Solo(), 20, setup=Setup(spec=make_spec(), kind=Adversarial))
    assert set(found) == {"val_loss", "val_loss_discriminator", "val_loss_generator"}
    assert found["val_loss"] == found["val_loss_discriminator"] + found["val_loss_generator"]


def test_evaluation_leaves_training_alone() -> None:
    """Neither generators nor buffers nor gradients of training notice it."""
    changes: dict[str, Any] = {"task_args": {"dropout": 0.3}}
    specs = [make_spec(**{"eval.every_steps": every, **changes}) for every in (100, 1)]
    one, other = (train_alone(Setup(spec=spec, kind=Classifier, eval_rows=20)) for spec in specs)
    assert one[1]["weights_sha256"] == other[1]["weights_sha256"]
    assert one[1]["metrics"] == other[1]["metrics"]


def test_buffers_that_forwards_change_are_left_alone() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 3)
            self.count: Tensor
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1.0)
            return super().forward(x)

    class Counted(Classifier):
        def build(self) -> nn.Module:
            return Counting()

    def counts(size: int, every: int) -> set[float]:
        setup = Setup(spec=make_spec(**{"eval.every_steps": every}), kind=Counted, eval_rows=20)
        return {float(loop.state.model.state_dict()["count"]) for loop in train_together(setup, size)}

    assert len({count for size in (1, 2, 3) for every in (2, 100) for count in counts(size, every)}) == 1


def test_metrics_that_only_some_batches_have_are_named() -> None:
    class Sometimes(Classifier):
        def metrics(self, model: nn.Module, batch: Batch) -> dict[str, Ratio]:
            del model
            return {f"rows_{len(batch['x'])}": Ratio(1, 1)}

    with pytest.raises(SpecError, match=r"rows_1.*on one batch and.*on another"):
        evaluated(Solo(), 20, setup=Setup(spec=make_spec(), kind=Sometimes))


def test_a_metric_may_not_be_called_as_the_loss() -> None:
    class Twice(Classifier):
        def metrics(self, model: nn.Module, batch: Batch) -> dict[str, Ratio]:
            del model, batch
            return {"val_loss": Ratio(1, 1)}

    with pytest.raises(SpecError, match="val_loss"):
        evaluated(Solo(), 5, setup=Setup(spec=make_spec(), kind=Twice))


def test_a_metric_that_is_no_ratio_is_named() -> None:
    class Plain(Classifier):
        def metrics(self, model: nn.Module, batch: Batch) -> Any:
            del model
            return {"accuracy": len(batch["x"])}

    with pytest.raises(SpecError, match=r"metrics\(\): 'accuracy' must be text that names a Ratio"):
        evaluated(Solo(), 5, setup=Setup(spec=make_spec(), kind=Plain))


def test_losses_may_change_the_batch_before_metrics_see_it() -> None:
    class InPlace(Classifier):
        def losses(self, model: nn.Module, batch: Batch) -> Losses:
            batch["x"].zero_()
            return super().losses(model, batch)

    changed, _ = evaluated(Solo(), 50, setup=Setup(spec=make_spec(), kind=InPlace))
    plain, _ = evaluated(Solo(), 50)
    assert changed["accuracy"] == plain["accuracy"]
    assert changed["val_loss"] != plain["val_loss"]


def test_the_rows_of_a_forward_follow_from_the_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SETUP.plan()
    assert batch_size(plan, 100, None) == 6  # as in training: 24 rows over 4 slots
    assert batch_size(plan, 100, 2) == 2
    assert batch_size(plan, 1, 2) == 2, "also where rows are small: a model may need it"
    monkeypatch.setattr(evaluation, "SMALL_BATCH_BYTES", 1000)
    assert batch_size(plan, 100, None) == 10
    assert batch_size(plan, 0, None) == 1000


def test_a_weight_may_be_a_tensor() -> None:
    class Weighted(Classifier):
        def metrics(self, model: nn.Module, batch: Batch) -> dict[str, Ratio]:
            del model
            total: Tensor = batch["label"].sum()
            return {"mean_label": Ratio(total, torch.tensor(len(batch["label"]))), "nothing": Ratio(0, 0)}

    found, _ = evaluated(Solo(), 50, setup=Setup(spec=make_spec(), kind=Weighted))
    assert found["mean_label"] == pytest.approx(make_arrays(50, seed=1)["label"].mean())
    assert found["nothing"] == 0.0
