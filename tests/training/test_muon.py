"""Muon beside AdamW: what each of them moves, and how far."""

from typing import Any

import pytest
import torch
from tests.training.harness import Adversarial, Classifier, Convolution, Setup, make_spec, train_alone
from torch import nn

from elastrain.errors import SpecError
from elastrain.training.muon import MuonAdamW
from elastrain.training.state import TrainState


def make_setup(kind: Any = Classifier, **changes: Any) -> Setup:
    """A run of Muon."""
    optimizer = {"name": "muon", "lr": 0.02, **changes.pop("optimizer", {})}
    return Setup(spec=make_spec(optimizer=optimizer, **changes), kind=kind)


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4)])
def test_the_update_of_a_matrix_has_no_long_and_no_short_sides(shape: tuple[int, int]) -> None:
    """A gradient of any condition becomes a matrix whose singular values lie around one."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(*shape))
    optimizer = MuonAdamW([{"params": [parameter]}], [], lr=1.0, adjust_lr_fn="original", weight_decay=0.0)
    small = min(shape)
    left, _, right = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    parameter.grad = left * torch.logspace(0, -2, small) @ right
    assert torch.linalg.cond(parameter.grad) > 90
    optimizer.step()
    values = torch.linalg.svdvals(parameter.detach()) / max(1.0, shape[0] / shape[1]) ** 0.5
    assert 0.3 < float(values[-1]) <= float(values[0]) < 1.6
    turned = left.T @ -parameter.detach() @ right.T
    assert float((turned - torch.diag(torch.diagonal(turned))).abs().max()) < 0.05, "the singular vectors are kept"


def moved(setup: Setup) -> dict[str, float]:
    """The root mean square of what one step moves each parameter by, over the learning rate."""
    state = setup.state()
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    train_alone(setup, state)
    lr = setup.spec.optimizer.lr
    return {n: float((p.detach() - before[n]).square().mean().sqrt()) / lr for n, p in state.model.named_parameters()}


def test_hidden_matrices_are_muons_and_the_rest_is_adamws() -> None:
    """Adam's first update is the sign of the gradient; Muon's is as large at full rank as Adam's usually is, 0.2."""
    found = moved(make_setup(**{"budget.steps": 1}))
    assert found.pop("0.weight") == pytest.approx(0.2 * (16 * 6 / (16 * 6)) ** 0.5, rel=0.4)
    assert {name: round(value, 3) for name, value in found.items()} == {"0.bias": 1.0, "3.weight": 1.0, "3.bias": 1.0}


def test_the_rest_may_have_a_learning_rate_of_its_own() -> None:
    one, other = (
        moved(make_setup(optimizer={"args": args}, **{"budget.steps": 1})) for args in ({}, {"adamw_lr": 0.002})
    )
    assert one["0.weight"] == other["0.weight"]
    for name in ("0.bias", "3.weight", "3.bias"):
        assert other[name] == pytest.approx(0.1 * one[name], rel=1e-3)


def test_the_schedule_moves_both_learning_rates() -> None:
    state = make_setup(
        optimizer={"args": {"adamw_lr": 0.002}}, **{"budget.steps": 3, "schedule": {"warmup_steps": 4}}
    ).state()
    loop, _ = train_alone(
        make_setup(optimizer={"args": {"adamw_lr": 0.002}}, **{"budget.steps": 3, "schedule": {"warmup_steps": 4}}),
        state,
    )
    assert [g["lr"] for g in state.phases[0].optimizer.param_groups] == pytest.approx([0.02 * 0.75, 0.002 * 0.75])
    assert loop.state.lines[-1][4] == pytest.approx(0.02 * 0.75), "what is shown is Muon's"


def rules(state: TrainState, phase: int = 0) -> dict[str, set[str]]:
    """The names of the parameters under each rule."""
    names = {id(p): name for name, p in state.model.named_parameters()}
    return {
        rule: {
            names[id(p)] for g in state.phases[phase].optimizer.param_groups if g["rule"] == rule for p in g["params"]
        }
        for rule in ("muon", "adamw")
    }


def test_a_pattern_takes_a_matrix_from_muon() -> None:
    assert rules(make_setup(Adversarial).state(), 1)["muon"] == {"generator.0.weight"}
    with pytest.raises(SpecError, match="no hidden matrix for it to train; choose adamw"):
        make_setup(optimizer={"args": {"not_hidden": ["0.*"]}}).state()


def test_a_model_without_hidden_matrices_is_refused() -> None:
    with pytest.raises(SpecError, match="no hidden matrix for it to train; choose adamw"):
        make_setup(Convolution).state()


def test_decay_spares_what_it_shall_under_both_rules() -> None:
    changes = {"weight_decay": 0.5, "no_decay": ("biases",)}
    groups = make_setup(optimizer=changes).state().phases[0].optimizer.param_groups
    assert [(g["rule"], g["weight_decay"]) for g in groups] == [("muon", 0.5), ("adamw", 0.5), ("adamw", 0.0)]
