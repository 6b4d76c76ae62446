"""Batch norm's running statistics: those of the slots, merged by count, whoever holds them."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from elastrain.training.norm import BatchNorms
from elastrain.training.reduce import slots_of

ROWS = (5, 2, 1, 0, 7)  # a slot with one row, and one with none
CHANNELS, WIDE = 3, 4


def features(step: int, slot: int) -> Tensor:
    """The input of a slot: (rows, channels, width)."""
    generator = torch.Generator().manual_seed(100 * step + slot)
    return torch.randn(ROWS[slot], CHANNELS, WIDE, generator=generator, dtype=torch.float64) * (slot + 1) + slot


def reference(steps: int, momentum: float | None) -> tuple[Tensor, Tensor]:
    """Means and variances by hand: each slot's own, weighted by its number of values."""
    mean, var = torch.zeros(CHANNELS, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64)
    for step in range(steps):
        inputs = [features(step, slot).transpose(0, 1).flatten(1) for slot in range(len(ROWS)) if ROWS[slot]]
        counts = torch.tensor([x.shape[1] for x in inputs], dtype=torch.float64)
        means, variances = torch.stack([x.mean(1) for x in inputs]), torch.stack([x.var(1) for x in inputs])
        factor = momentum if momentum is not None else 1 / (step + 1)
        mean = (1 - factor) * mean + factor * (counts @ means) / counts.sum()
        var = (1 - factor) * var + factor * (counts @ variances) / counts.sum()
    return mean, var


def train(norm: nn.BatchNorm1d, size: int, steps: int, micro: int = 100) -> None:
    """Steps as `size` workers do them; each holds its own copy of nothing but the rows of its slots."""
    norms = BatchNorms(norm)
    for step in range(steps):
        norms.begin()
        rows = torch.zeros(len(ROWS), norms.width, dtype=torch.float64)
        for rank in range(size):
            for slot in slots_of(rank, size, len(ROWS)):
                if ROWS[slot]:
                    norms.begin_slot()
                    for part in features(step, slot).split(micro):
                        norm(part)
                    norms.end_slot(rows[slot])
        norms.end(rows)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("size", range(1, 6))
def test_statistics_equal_a_reference_for_any_split(size: int, momentum: float | None) -> None:
    norm = nn.BatchNorm1d(CHANNELS, momentum=momentum, dtype=torch.float64)
    train(norm, size, 4)
    mean, var = reference(4, momentum)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, mean, rtol=1e-12)
    assert torch.allclose(norm.running_var, var, rtol=1e-12)
    assert int(norm.num_batches_tracked or 0) == 4
    assert norm.momentum == momentum


def test_several_forwards_of_a_slot_are_merged_by_count() -> None:
    norm = nn.BatchNorm1d(CHANNELS, momentum=1.0, dtype=torch.float64)
    train(norm, 1, 1, micro=2)
    assert norm.running_mean is not None
    mean, _ = reference(1, 1.0)
    assert torch.allclose(norm.running_mean, mean, rtol=1e-12)  # a mean of means by count is the mean
    assert int(norm.num_batches_tracked or 0) == 1


def test_a_forward_sees_its_own_batch_only() -> None:
    norm, plain = (nn.BatchNorm1d(CHANNELS, dtype=torch.float64) for _ in range(2))
    norms = BatchNorms(norm)
    norms.begin()
    norms.begin_slot()
    assert torch.equal(norm(features(0, 0)), plain(features(0, 0)))
    norms.end(None)
    assert norm.running_mean is not None
    assert not norm.running_mean.any(), "a step that was cut off leaves the statistics alone"


@pytest.mark.parametrize("frozen", [False, True])
def test_a_norm_that_is_not_called_or_frozen_stays_as_it_is(*, frozen: bool) -> None:
    norm = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    train(norm, 1, 3)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norms = BatchNorms(norm)
    norms.begin()
    norms.begin_slot()
    row = torch.zeros(norms.width, dtype=torch.float64)
    if frozen:
        norm.eval()
        mean = norm.running_mean
        assert mean is not None
        norm(features(0, 0))
    norms.end_slot(row)
    norms.end(row[None])
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_one_value_a_channel_is_normalised_by_the_running_statistics() -> None:
    norm = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    train(norm, 1, 3)
    alone = features(0, 0)[:1, :, 0]
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm.eval()
    expected = norm(alone)
    norm.train()
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(alone)
    norm.load_state_dict(before)
    norms = BatchNorms(norm)
    norms.begin()
    norms.begin_slot()
    norm(features(1, 1))
    row = torch.zeros(norms.width, dtype=torch.float64)
    assert torch.equal(norm(alone), expected)
    assert norm.training
    norms.end_slot(row)
    assert row[0] == ROWS[1] * WIDE, "it adds nothing to the statistics"
    norms.end(None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_width_counts_only_norms_with_statistics() -> None:
    make = partial(nn.BatchNorm1d, 5)
    model = nn.Sequential(make(), make(track_running_stats=False), nn.LayerNorm(5), nn.Sequential(make()))
    assert BatchNorms(model).width == 2 * (1 + 2 * 5)
