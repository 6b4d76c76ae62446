"""Groups of workers: who holds which slots, gradients as one buffer, and groups that lose or change their members."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.harness import (
    CPU,
    Adversarial,
    Classifier,
    Convolution,
    LockstepMember,
    Processes,
    Seat,
    Setup,
    die_in_a_sum,
    lockstep,
    losses_of,
    losses_together,
    make_spec,
    share_state,
    train_alone,
    train_through_changes,
)
from torch import nn

from elastrain.errors import SpecError
from elastrain.training.reduce import FlatGradients, Group, slots_of, sum_in_order
from elastrain.training.state import broadcast_object


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_slots_tile(slots: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, slots))
    held = [slots_of(rank, size, slots) for rank in range(size)]
    assert [slot for part in held for slot in part] == list(range(slots))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert min(map(len, held)) >= 1


def test_gradients_are_views_of_one_buffer() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, 3)
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(12, 2))
    parameters = list(model.parameters())
    flat = FlatGradients(parameters, slots=3, width=2)
    assert flat.slot_rows.shape == (3, 2)
    expected = torch.autograd.grad(model(torch.ones(2, 2, 4, 4)).square().sum(), parameters)
    for _ in range(2):
        flat.buffer.zero_()
        flat.attach()
        flat.slot_rows.fill_(1.0)
        model(torch.ones(2, 2, 4, 4)).square().sum().backward()
        flat.check_attached()
        for parameter, gradient in zip(parameters, expected, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.untyped_storage().data_ptr() == flat.buffer.untyped_storage().data_ptr()
            assert parameter.grad.stride() == parameter.stride(), "fused optimizers walk both side by side"
            assert torch.equal(parameter.grad, gradient)
        assert torch.allclose(flat.values.norm(), torch.cat([g.flatten() for g in expected]).norm())
        assert bool((flat.slot_rows == 1.0).all())
    model.zero_grad()
    with pytest.raises(SpecError, match="zero_grad"):
        flat.check_attached()


def test_sparse_embeddings_add_to_the_buffer() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    flat = FlatGradients(list(embedding.parameters()), slots=1, width=2)
    flat.attach()
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    flat.check_attached()
    assert flat.values.view(5, 3).sum(1).tolist() == [0.0, 6.0, 0.0, 0.0, 3.0]


def test_a_sum_in_order_is_the_one_of_a_loop() -> None:
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 9)[:, None]
    total = torch.zeros(4)
    for row in rows:
        total = total + row
    assert torch.equal(sum_in_order(rows), total)
    assert torch.equal(sum_in_order(rows[:1]), rows[0])


def test_channels_last_weights_are_updated_alike() -> None:
    """A fused optimizer would mix up elements if gradient or moments had another layout than the weight."""
    plain = Setup(spec=make_spec(), kind=Convolution)
    last = Setup(spec=make_spec(task_args={"channels_last": True}), kind=Convolution)
    one, other = train_alone(plain)[0], train_alone(last)[0]
    weight = dict(other.state.model.named_parameters())["1.weight"]
    assert np.allclose(losses_of(one), losses_of(other), rtol=1e-4)
    assert weight.shape == (4, 1, 3, 3)
    assert not dict(other.state.model.named_parameters())["4.weight"].is_contiguous()


def test_an_object_reaches_every_member() -> None:
    value = {"numbers": [1, 2.5, None, True], "text": "Größe"}
    found = lockstep(3, lambda group: broadcast_object(group, value if group.rank == 1 else None, 1, CPU))
    assert found == [value] * 3


def test_a_state_is_shared_whatever_its_memory_layout(tmp_path: Path) -> None:
    setup = Setup(spec=make_spec(ema=0.9, task_args={"channels_last": True}), kind=Convolution)
    with Processes() as processes:
        for rank in range(2):
            processes.start(share_state, setup, tmp_path, rank)
        one, other = processes.results()
    assert one == other
    assert one[1]["step"] == 8


# --- members that die


def test_a_dead_member_is_noticed_at_once(tmp_path: Path) -> None:
    with Processes() as processes:
        processes.start(die_in_a_sum, tmp_path, 0)
        processes.start(die_in_a_sum, tmp_path, 1)
        number, seconds = processes.result()
        assert number == 0
        assert seconds < 5.0


# --- members that change


def test_losses_do_not_notice_a_group_that_changes(tmp_path: Path) -> None:
    changes = {"data.slots": 5, "budget.steps": 12, "ema": 0.9}
    setup = Setup(spec=make_spec(precision="fp64", **changes), kind=Adversarial)
    undisturbed = losses_of(train_alone(setup)[0])
    with Processes() as processes:
        for name in "abcde":
            processes.start(train_through_changes, setup, tmp_path, name)
        found = dict(zip("abcde", processes.results(), strict=True))
    losses, sizes = found["a"]
    assert {size: sizes.count(size) >= 4 for size in (4, 2, 3)} == {4: True, 2: True, 3: True}
    assert np.allclose(losses, undisturbed, rtol=1e-10)
    assert np.allclose(found["c"][0], undisturbed, rtol=1e-10)
    assert np.allclose(found["e"][0], undisturbed, rtol=1e-10), "the lines before its own came with the state"
    assert np.allclose(found["b"][0], undisturbed[:4], rtol=1e-10)


def test_the_turns_of_threads_change_nothing(tmp_path: Path) -> None:
    """What most tests here rest on: workers in turn give what processes give."""
    setup = Setup(spec=make_spec(precision="fp64", task_args={"dropout": 0.3}), kind=Classifier)

    def work(group: Group) -> list[float]:
        assert isinstance(group, LockstepMember)
        loop = setup.loop(Seat(lambda _: group))
        loop.run()
        return losses_of(loop)

    with Processes() as processes:
        for rank in range(2):
            processes.start(losses_together, setup, tmp_path, rank, 2)
        found = processes.results()
    assert np.allclose(lockstep(2, work), found, rtol=1e-13)
