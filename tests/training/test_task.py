"""What a task returns is checked: a mistake is one sentence that names the loss or the metric."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.harness import Classifier, Setup, make_arrays, make_spec, train_alone
from torch import nn

from elastrain.errors import SpecError
from elastrain.training.task import Batch, Loss, Losses, Ratio, metric_ratios, phase_loss

BATCH = Batch({name: torch.from_numpy(array) for name, array in make_arrays(6).items()})


def weighted(weight: Callable[[nn.Module], Any]) -> type[Classifier]:
    """A classifier whose loss has a weight of the test's."""

    class Weighted(Classifier):
        def losses(self, model: nn.Module, batch: Batch) -> Losses:
            loss = super().losses(model, batch)["loss"]
            assert isinstance(loss, Loss)
            return {"loss": Loss(loss.sum, weight(model))}

    return Weighted


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (lambda _: torch.ones(6), r"got a tensor of shape \(6,\)"),
        (lambda _: torch.ones(1), r"got a tensor of shape \(1,\)"),
        (lambda model: model(torch.ones(1, 6)).sum(), r"got a tensor of shape \(\) with a gradient"),
        (lambda _: np.ones(6), "got a ndarray"),
        (lambda _: "6", "got a str"),
        (lambda _: None, "got a NoneType"),
    ],
)
def test_a_weight_that_is_no_number_is_refused(weight: Callable[[nn.Module], Any], words: str) -> None:
    with pytest.raises(SpecError, match=rf"^losses\(\): the weight of 'loss' must be a number .*{words}$"):
        train_alone(Setup(spec=make_spec(), kind=weighted(weight)))


@pytest.mark.parametrize("weight", [6, 6.0, np.int64(6), np.float32(6), torch.tensor(6), torch.tensor(6.0)])
def test_a_weight_may_be_any_number(weight: Any) -> None:
    setup = Setup(spec=make_spec(), kind=weighted(lambda _: weight))
    state = setup.state()
    assert phase_loss(state.task, state.model, BATCH, "loss").weight is weight
    train_alone(setup, state)


@pytest.mark.parametrize("loss", [Loss(torch.ones(2), 1), Loss(1.0, 1), torch.ones(()), None])  # type: ignore[arg-type]
def test_a_loss_that_is_no_scalar_is_refused(loss: Any) -> None:
    class Wrong(Classifier):
        def losses(self, model: nn.Module, batch: Batch) -> Losses:
            del model, batch
            return {"loss": loss}

    with pytest.raises(SpecError, match=r"^losses\(\): 'loss' must be a Loss\(sum, weight\) whose sum is a scalar"):
        train_alone(Setup(spec=make_spec(), kind=Wrong))


def ratios_of(metrics: Any) -> Any:
    """What comes of a task's metrics."""

    class Measured(Classifier):
        def metrics(self, model: nn.Module, batch: Batch) -> Any:
            del model, batch
            return metrics

    state = Setup(spec=make_spec(), kind=Measured).state()
    return metric_ratios(state.task, state.model, BATCH)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"accuracy": 0.5}, r"'accuracy' must be text that names a Ratio\(numerator, denominator\), not a float"),
        ({"accuracy": torch.ones(3)}, r"'accuracy' .* not a tensor of shape \(3,\)"),
        ({"good": Ratio(1, 2), "bad": Ratio(torch.ones(6), 6)}, r"'bad' .* got a tensor of shape \(6,\)"),
        ({"bad": Ratio(1, torch.ones(1))}, r"'bad' .* got a tensor of shape \(1,\)"),
        ({"bad": Ratio(None, 1)}, "'bad' .* got a NoneType"),  # type: ignore[arg-type]
        ({1: Ratio(1, 1)}, "1 must be text"),
    ],
)
def test_a_metric_that_is_no_ratio_is_refused(metrics: Any, words: str) -> None:
    with pytest.raises(SpecError, match=rf"^metrics\(\): {words}"):
        ratios_of(metrics)


def test_metrics_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(SpecError, match=r"^metrics\(\) must return a dict of Ratio.* not a NoneType$"):
        ratios_of(None)


def test_ratios_of_numbers_pass() -> None:
    number: Any = np.float32(0.5)
    metrics = {"accuracy": Ratio(torch.tensor(3), 6), "error": Ratio(number, torch.tensor(2.0))}
    assert ratios_of(metrics) is metrics
    assert ratios_of({}) == {}
