"""What parameters are told to be, and that those which shall not decay do not."""

from typing import Any

import pytest
import torch
from tests.training.harness import Adversarial, Convolution, Setup, Tokens, make_spec, train_alone
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from elastrain.errors import SpecError
from elastrain.training.groups import hidden_matrices, kinds_of
from elastrain.training.task import Batch, Loss, Losses, Task


class RootNorm(nn.Module):
    """A normalisation layer of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root of the mean square."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


def kinds(model: nn.Module) -> dict[str, str]:
    """What each parameter is."""
    return dict(kinds_of(model, dict(model.named_parameters())))


def test_parameters_are_told_by_their_modules() -> None:
    layers = {
        "tokens": nn.Embedding(5, 4),
        "places": nn.EmbeddingBag(5, 4),
        "first": nn.Linear(4, 4),
        "plane": nn.LayerNorm((2, 4)),
        "own": RootNorm(),
        "memory": nn.LSTM(4, 4),
        "image": nn.Conv2d(1, 2, 3),
        "channels": nn.GroupNorm(1, 2),
        "turned": spectral_norm(nn.Linear(4, 4)),
        "head": nn.Linear(4, 3),
    }
    assert kinds(nn.ModuleDict(layers)) == {
        "tokens.weight": "embeddings",
        "places.weight": "embeddings",
        "first.weight": "matrices",
        "first.bias": "biases",
        "plane.weight": "norms",
        "plane.bias": "norms",
        "own.gain": "norms",
        "memory.weight_ih_l0": "matrices",
        "memory.weight_hh_l0": "matrices",
        "memory.bias_ih_l0": "biases",
        "memory.bias_hh_l0": "biases",
        "image.weight": "others",
        "image.bias": "biases",
        "channels.weight": "norms",
        "channels.bias": "norms",
        "turned.bias": "biases",
        "turned.parametrizations.weight.original": "matrices",
        "head.weight": "output",
        "head.bias": "biases",
    }


def test_a_tied_output_is_an_embedding_and_leaves_the_matrices_alone() -> None:
    model = Setup(spec=make_spec(), kind=Tokens).state().model
    assert kinds(model) == {"tokens.weight": "embeddings", "mix.weight": "matrices", "mix.bias": "biases"}


def test_each_phase_has_an_output_of_its_own() -> None:
    model = Setup(spec=make_spec(), kind=Adversarial).state().model
    for phase, head in (("discriminator", "2"), ("generator", "3")):
        named = {name: p for name, p in model.named_parameters() if name.startswith(phase)}
        assert [name for name, kind in kinds_of(model, named).items() if kind == "output"] == [f"{phase}.{head}.weight"]


def test_what_a_pattern_names_is_no_hidden_matrix() -> None:
    found = kinds_of(model := nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]), dict(model.named_parameters()))
    assert hidden_matrices(found, ()) == ["0.weight", "1.weight", "2.weight"]
    assert hidden_matrices(found, ["0.*", "*2.weight"]) == ["1.weight"]
    with pytest.raises(SpecError, match=r"not_hidden: 'wte\.\*' matches none of 0\.weight, 0\.bias"):
        hidden_matrices(found, ["wte.*"])


class Still(Task):
    """A loss without any gradient: only decay moves the weights."""

    def build(self) -> nn.Module:
        """An embedding, a norm and a linear layer, all ones."""
        model = nn.ModuleDict(
            {"a": nn.Embedding(2, 4), "b": nn.LayerNorm(4), "c": nn.Linear(4, 4), "d": nn.Linear(4, 2)}
        )
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Nothing that depends on the weights."""
        rows = len(batch["x"])
        return {"loss": Loss(sum((0.0 * p.sum() for p in model.parameters()), torch.zeros(())), rows)}


DECOUPLED = ("adamw", "lion", "muon", "shampoo", "soap", "adafactor")


@pytest.mark.parametrize("name", DECOUPLED)
@pytest.mark.parametrize("spared", [(), ("norms", "biases"), ("norms", "biases", "embeddings")])
def test_what_shall_not_decay_does_not(name: str, spared: tuple[str, ...]) -> None:
    changes = {"name": name, "lr": 0.1, "weight_decay": 0.5, "no_decay": spared}
    loop, _ = train_alone(Setup(spec=make_spec(optimizer=changes, **{"budget.steps": 3}), kind=Still))
    model = loop.state.model
    found = kinds_of(model, dict(model.named_parameters()))
    stayed = {name for name, parameter in model.named_parameters() if bool((parameter == 1.0).all())}
    assert stayed == {name for name, kind in found.items() if kind in spared}


def test_without_decay_there_is_nothing_to_spare() -> None:
    changes: dict[str, Any] = {"no_decay": ("norms", "biases")}
    plain = {"name": "adamw", "lr": 0.02, "weight_decay": 0.0}
    one, other = (
        train_alone(Setup(spec=make_spec(optimizer=optimizer), kind=Convolution))[1]["weights_sha256"]
        for optimizer in (plain, plain | changes)
    )
    assert one == other


def test_a_class_without_decay_cannot_spare_anything() -> None:
    changes = {"name": "tests.training.test_optim:Plain", "lr": 0.1, "no_decay": ("biases",)}
    with pytest.raises(SpecError, match=r"takes no weight_decay; remove optimizer\.no_decay"):
        Setup(spec=make_spec(optimizer=changes), kind=Convolution).state()


def test_a_class_of_ones_own_gets_its_groups() -> None:
    changes = {"name": "torch.optim:RMSprop", "lr": 0.1, "weight_decay": 0.5, "no_decay": ("biases", "norms")}
    state = Setup(spec=make_spec(optimizer=changes), kind=Convolution).state()
    assert [group["weight_decay"] for group in state.phases[0].optimizer.param_groups] == [0.5, 0.0]
