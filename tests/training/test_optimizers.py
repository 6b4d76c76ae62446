"""Runs with each named optimizer: they learn, go on to the bit, and do not depend on the number of workers."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.harness import (
    ANYWHERE,
    Adversarial,
    Classifier,
    Setup,
    lockstep,
    losses_of,
    make_spec,
    train_alone,
    train_together,
)
from torch import Tensor, nn

from elastrain.errors import SpecError
from elastrain.spec.train import OPTIMIZERS, PUBLISHED, OptimizerSpec
from elastrain.training.checkpoint import load, read_weights
from elastrain.training.export import export_weights
from elastrain.training.optim import make_optimizer, pack
from elastrain.training.reduce import Group
from elastrain.training.state import TrainState, digest

FREE = ("schedule_free_sgd", "schedule_free_adamw")
RATES = {"sgd": 0.3, "full_batch": 1.0, "momentum": 0.1, "nesterov": 0.1, "adagrad": 0.1, "radam": 0.1} | {
    "lion": 0.01, "adafactor": 0.2, "schedule_free_sgd": 1.0, "shampoo": 0.05, "soap": 0.05
}  # fmt: skip
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make_setup(name: str, kind: Any = Classifier, url: Any = ANYWHERE, **changes: Any) -> Setup:
    """A run of eight steps; bases and roots are renewed within them."""
    args = {"precondition_frequency": 2} if name in ("shampoo", "soap") else {}
    optimizer = {"name": name, "lr": RATES.get(name, 0.02), "weight_decay": 0.01, "no_decay": ["biases"], "args": args}
    batch = {"data.global_batch": "all"} if name == "full_batch" else {}
    spec = make_spec(optimizer=optimizer | changes.pop("optimizer", {}), **batch, **changes)
    return Setup(spec=spec, kind=kind, eval_rows=20, run_url=url)


def kept(state: TrainState) -> tuple[dict[str, Tensor], Any]:
    """What a checkpoint would hold of a state: copies of its tensors, and its numbers out of JSON."""
    return {n: t.detach().clone() for n, t in state.tensors().items()}, json.loads(json.dumps(state.numbers()))


def bits(state: TrainState) -> tuple[dict[str, str], str]:
    """A digest of each tensor of a state, and the rest."""
    return {name: digest({name: tensor}) for name, tensor in state.tensors().items()}, json.dumps(state.numbers())


@every_optimizer
def test_an_optimizer_learns(name: str) -> None:
    loop, result = train_alone(make_setup(name, **{"budget.steps": 40}))
    losses = losses_of(loop)
    assert losses[-1] < 0.6 * losses[0]
    assert result["metrics"]["val_loss"] < 0.75 * losses[0]


@every_optimizer
@pytest.mark.parametrize("kind", [Classifier, Adversarial])
def test_a_run_that_goes_on_is_the_run_that_was_not_cut(name: str, kind: type[Any]) -> None:
    """The state of any step holds all; evaluations between, which a schedule-free one does elsewhere, move nothing."""
    phases = {"phases": {"generator": {"lr": 0.01}}} if kind is Adversarial else {}
    changes: dict[str, Any] = {"budget.steps": 5, "optimizer": phases, "schedule": {"name": "cosine"}}
    whole, result = train_alone(make_setup(name, kind, **changes))
    state, stored = make_setup(name, kind, **changes).state(), []
    for stop in range(1, 5):
        train_alone(make_setup(name, kind, **changes, **{"eval.every_steps": 1}), state, stop_at=stop - 1)
        assert state.step == stop
        state.stopping = False
        stored.append(kept(state))
    for tensors, numbers in stored:
        later = make_setup(name, kind, **changes).state()
        later.load(tensors, numbers)
        assert bits(later) == ({n: digest({n: t}) for n, t in tensors.items()}, json.dumps(numbers))
        loop, found = train_alone(make_setup(name, kind, **changes), later)
        assert (found["weights_sha256"], found["metrics"]) == (result["weights_sha256"], result["metrics"])
        assert bits(loop.state) == bits(whole.state)


@every_optimizer
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_do_not_depend_on_the_number_of_workers(name: str, precision: str) -> None:
    changes: dict[str, Any] = {"budget.steps": 4, "consistency": "bitwise", "precision": precision, "data.slots": 3}
    setup = make_setup(name, **changes)
    alone, result = train_alone(setup)
    sizes = (2, 3) if precision == "fp32" else (3,)
    loops = [loop for size in sizes for loop in train_together(setup, size)]
    assert {json.dumps(bits(loop.state)) for loop in loops} == {json.dumps(bits(alone.state))}
    assert {json.dumps(loop.state.metrics) for loop in loops} == {json.dumps(result["metrics"])}


@every_optimizer
def test_a_newcomer_receives_all_that_an_optimizer_keeps(name: str) -> None:
    setup, half = make_setup(name, **{"budget.steps": 6}), make_setup(name, **{"budget.steps": 3})
    whole, _ = train_alone(setup)

    def work(group: Group) -> Any:
        state = setup.state()
        if group.rank == 1:
            train_alone(half, state)
        state.share(group, 1)
        return bits(train_alone(setup, state)[0].state)

    assert lockstep(2, work) == [bits(whole.state)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@every_optimizer
def test_a_run_on_a_gpu_goes_on_to_the_bit(name: str) -> None:
    setups = [replace(make_setup(name, **{"budget.steps": n}), device=torch.device("cuda", 0)) for n in (6, 3)]
    whole, result = train_alone(setups[0])
    half, state = train_alone(setups[1])[0].state, setups[0].state()
    state.load(*kept(half))
    later, found = train_alone(setups[0], state)
    assert found["weights_sha256"] == result["weights_sha256"]
    assert bits(later.state) == bits(whole.state)


# --- what the page says


ROWS, COLUMNS = 32, 16
BASES = 2 + 2 * (ROWS**2 + COLUMNS**2) / (ROWS * COLUMNS)
STATE = dict.fromkeys(("momentum", "nesterov", "adagrad", "rmsprop", "lion", "muon", "schedule_free_sgd"), 1.0) | {
    **dict.fromkeys(("sgd", "full_batch"), 0.0), "shampoo": BASES, "soap": BASES,
    "adafactor": (ROWS + COLUMNS) / (ROWS * COLUMNS),
}  # fmt: skip


@every_optimizer
def test_what_is_kept_for_a_weight_is_what_the_page_says(name: str) -> None:
    parameter = nn.Parameter(torch.randn(ROWS, COLUMNS))
    args = {"precondition_frequency": 1} if name in ("shampoo", "soap") else {}
    spec = OptimizerSpec(name=name, lr=0.01, args=args)
    optimizer = make_optimizer(spec, {"weight": parameter}, {"weight": "matrices"})
    for _ in range(2):
        parameter.grad = torch.randn(ROWS, COLUMNS)
        optimizer.step()
    held = sum(tensor.numel() for tensor in pack(optimizer, "optim")[1].values() if tensor.numel() > 1)
    assert held / parameter.numel() == STATE.get(name, 2.0)


def test_the_page_knows_every_optimizer_and_where_to_search() -> None:
    page = Path(__file__).parents[2] / "docs" / "optimizers.md"
    formulas, spaces = page.read_text(encoding="utf-8").split("## Where to search")
    for text in (formulas, spaces):
        cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
        assert named & set(OPTIMIZERS) == set(OPTIMIZERS)
    for name, values in PUBLISHED.items():
        (row,) = (line for line in formulas.splitlines() if re.match(rf"\| [^|]*`{name}`", line))
        told = {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", row)}
        assert told.issuperset(np.hstack([[], *values.values()]).tolist()), name


# --- schedule-free: other weights in evaluation than in training


@pytest.mark.parametrize("name", FREE)
def test_evaluation_is_done_at_the_average(name: str, tmp_path: Path) -> None:
    """It is what `ema` exports; `model` is where training goes on."""
    setup = make_setup(name, url=str(tmp_path / "run"))
    loop, result = train_alone(setup)
    state, out = loop.state, str(tmp_path / "weights.safetensors")
    averages = state.averages()
    assert export_weights(setup.run_url, out, step=8, weights="model")["weights_sha256"] == result["weights_sha256"]
    assert all(torch.equal(t, state.model.state_dict()[n]) for n, t in read_weights(out).items())
    export_weights(setup.run_url, out, step=8, weights="ema")
    exported = read_weights(out)
    assert exported.keys() == averages.keys()
    assert all(torch.equal(tensor, averages[n]) for n, tensor in exported.items())
    assert not torch.equal(exported["0.weight"], state.model.get_parameter("0.weight"))
    at_average = make_setup("sgd", url=str(tmp_path / "other"), **{"budget.steps": 8}).state()
    at_average.model.load_state_dict(exported)
    at_average.step, at_average.due = 8, True
    assert train_alone(make_setup("sgd", url=str(tmp_path / "other")), at_average)[1]["metrics"] == result["metrics"]


@pytest.mark.parametrize("name", FREE)
def test_a_checkpoint_of_a_schedule_free_run_goes_on_from_where_training_was(name: str, tmp_path: Path) -> None:
    setup = make_setup(name, url=str(tmp_path / "run"))
    loop, _ = train_alone(setup)
    saved, state = load(setup.run_url, 8), setup.state()
    state.load(saved.tensors, saved.numbers)
    assert bits(state) == bits(loop.state)
    assert state.phases[0].optimizer.param_groups[0]["train_mode"]


def test_one_phase_may_average_and_another_not() -> None:
    phases = {"phases": {"generator": {"name": "sgd", "lr": 0.01}}}
    loop, _ = train_alone(make_setup("schedule_free_sgd", Adversarial, optimizer=phases, **{"budget.steps": 3}))
    averages = loop.state.averages()
    same = {n.partition(".")[0]: torch.equal(averages[n], p) for n, p in loop.state.model.named_parameters()}
    assert same == {"discriminator": False, "generator": True}


def test_weights_are_not_averaged_twice() -> None:
    with pytest.raises(SpecError, match=r"^ema: the optimizer of phase loss averages the weights itself; remove ema"):
        make_setup("schedule_free_sgd", ema=0.9).state()
