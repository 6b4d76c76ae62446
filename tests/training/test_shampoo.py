"""Shampoo against its formula by hand."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from elastrain.training.shampoo import Shampoo

Floats = npt.NDArray[np.float64]
LR, BETAS = 0.1, (0.8, 0.9)


def power(matrix: Floats, exponent: float) -> Floats:
    """A symmetric matrix to a power, after a ridge of a thousandth of its largest eigenvalue."""
    values, vectors = np.linalg.eigh(matrix)
    found: Floats = (vectors * (values + 1e-3 * values[-1]) ** exponent) @ vectors.T
    return found


def gradients(steps: int, *shape: int) -> list[Floats]:
    """Some that are not alike in size."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) * 10.0 ** rng.normal() for _ in range(steps)]


def moved(shape: tuple[int, ...], given: list[Floats], **settings: float) -> Floats:
    """What updates with these gradients make of zeros."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Shampoo([parameter], LR, betas=BETAS, eps=1e-3, **settings)  # type: ignore[arg-type]
    for gradient in given:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter.detach().numpy()


def test_a_matrix_is_turned_on_both_sides_and_as_long_as_adams() -> None:
    given, weight = gradients(5, 3, 4), np.zeros((3, 4))
    mean, square, left, right = np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 3)), np.zeros((4, 4))
    roots = None
    for step, g in enumerate(given, start=1):
        mean, square = BETAS[0] * mean + (1 - BETAS[0]) * g, BETAS[1] * square + (1 - BETAS[1]) * g**2
        left, right = (BETAS[1] * f + (1 - BETAS[1]) * o for f, o in ((left, g @ g.T), (right, g.T @ g)))
        fresh, m = 1 - BETAS[1] ** step, mean / (1 - BETAS[0] ** step)
        if step % 2 == 0:
            roots = power(left / fresh, -0.25), power(right / fresh, -0.25)
        adam = m / (np.sqrt(square / fresh) + 1e-8)
        update = adam if roots is None else roots[0] @ m @ roots[1]
        weight = weight - LR * update * np.linalg.norm(adam) / np.linalg.norm(update)
    assert np.allclose(moved((3, 4), given, precondition_frequency=2), weight, rtol=1e-8)


def test_a_single_gradient_loses_its_size_in_every_direction() -> None:
    """With roots of one gradient alone the update is its orthogonal factor: Shampoo's tie to Muon."""
    (gradient,) = gradients(1, 3, 4)
    update = -moved((3, 4), [gradient], precondition_frequency=1)
    values = np.linalg.svd(update, compute_uv=False)
    assert values == pytest.approx(np.full(3, values[0]), rel=0.05)
    assert np.linalg.norm(update) == pytest.approx(LR * np.sqrt(12), rel=1e-3), "as long as Adam's first, all signs"


@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4), (2, 1, 3, 3)])
def test_any_number_of_dimensions_is_turned_in_each(shape: tuple[int, ...]) -> None:
    """Turning a gradient in each dimension turns the update; its length is Adam's, which no turn keeps."""
    given = gradients(1, *shape)
    rng = np.random.default_rng(1)
    turns = [np.linalg.qr(rng.normal(size=(size, size)))[0] for size in shape]

    def turned(array: Floats) -> Floats:
        for dim, turn in enumerate(turns):
            array = np.moveaxis(np.tensordot(turn, array, axes=([1], [dim])), 0, dim)
        return array

    one = moved(shape, given, precondition_frequency=1)
    other = moved(shape, [turned(gradient) for gradient in given], precondition_frequency=1)
    assert np.allclose(turned(one) / np.linalg.norm(one), other / np.linalg.norm(other), atol=1e-8)


def test_a_dimension_that_is_too_long_is_left_as_it_is() -> None:
    given = gradients(3, 3, 8)
    short = moved((3, 8), given, precondition_frequency=1, max_precondition_dim=4)
    both = moved((3, 8), given, precondition_frequency=1)
    adam = moved((3, 8), given, precondition_frequency=100)
    assert not np.allclose(short, both)
    assert not np.allclose(short, adam)
    assert np.allclose(moved((3, 8), given, precondition_frequency=1, max_precondition_dim=2), adam)


def test_without_a_gradient_nothing_breaks() -> None:
    assert not moved((2, 2), [np.zeros((2, 2))] * 3, precondition_frequency=1).any()
