"""A sum over slots has the same bits at any number of workers under `bitwise`, and other bits without it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.harness import Setup, Tokens, lockstep, make_spec, train_alone, train_together
from tests.training.test_tasks import KINDS, make_setup
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from elastrain.training import slotsum
from elastrain.training.reduce import Group, Solo, slots_of
from elastrain.training.slotsum import PlainSum, TreeSum, nodes_of
from elastrain.training.state import digest
from elastrain.training.task import Batch, Loss, Losses, Task


def leaf(slot: int, length: int) -> Tensor:
    """Numbers of very different sizes: any other order of adding shows in their sum."""
    generator = torch.Generator().manual_seed(slot)
    return torch.randn(length, generator=generator) * torch.exp(5 * torch.randn(length, generator=generator))


def reference(slots: int, length: int) -> Tensor:
    """The tree written down as it is defined: halves of halves."""

    def node(first: int, last: int, width: int) -> Tensor:
        if width == 1:
            return leaf(first, length)
        left = node(first, min(last, first + width // 2), width // 2)
        return left + node(first + width // 2, last, width // 2) if first + width // 2 < last else left

    return node(0, slots, 1 << (slots - 1).bit_length())


def summed(kind: type[Any], slots: int, sizes: tuple[int, ...], length: int) -> list[Tensor]:
    """What each worker of each size holds after a sum; they keep their `total`, and break off a step before each."""
    totals = [
        TreeSum(torch.zeros(length), slots) if kind is TreeSum else PlainSum(torch.zeros(length))
        for _ in range(max(sizes))
    ]

    def work(group: Group) -> Tensor:
        total = totals[group.rank]
        for broken in (True, False):
            total.begin()
            for slot in slots_of(group.rank, group.size, slots):
                total.begin_slot(slot)
                total.buffer.add_(leaf(slot, length))
            if not broken:
                total.reduce(group)
        return total.buffer.clone()

    return [found for size in sizes for found in lockstep(size, work)]


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 13), st.integers(1, 40), st.integers(1, 50), st.sampled_from([0, 1 << 16]), st.data())
def test_the_tree_gives_the_same_bits_on_any_number_of_workers(
    slots: int, length: int, chunk: int, small: int, data: st.DataObject
) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, slots), min_size=1, max_size=3)))
    expected = reference(slots, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slotsum, "CHUNK", chunk)
        patch.setattr(slotsum, "SMALL", small)
        for found in summed(TreeSum, slots, sizes, length):
            assert torch.equal(found, expected)


def test_a_plain_sum_does_not() -> None:
    found = {tuple(summed(PlainSum, 8, (size,), 40)[0].tolist()) for size in (1, 2, 3, 4)}
    assert len(found) > 1


@settings(deadline=None)
@given(st.integers(1, 64), st.data())
def test_nodes_cover_the_slots(slots: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, slots))
    held = [node for rank in range(size) for node in nodes_of(slots_of(rank, size, slots))]
    assert [slot for first, level in held for slot in range(first, first + 2**level)] == list(range(slots))
    assert all(first % 2**level == 0 for first, level in held)


def test_a_worker_holds_one_partial_sum_a_level() -> None:
    slots, total = 64, TreeSum(torch.zeros(10), 64)
    for _ in range(3):
        total.begin()
        for slot in range(slots):
            total.begin_slot(slot)
            assert len(total._nodes) + len(total._spare) <= 6
        total.reduce(Solo())


class Mute:
    """A group of which only one member is there: what it would receive is not written."""

    generation = 1

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_to_all(self, output: Tensor, tensor: Tensor, received: list[int], sent: list[int]) -> None:
        """Check that what is sent and received has its place."""
        assert (output.numel(), tensor.numel()) == (sum(received), sum(sent))

    def all_gather(self, output: Tensor, tensor: Tensor) -> None:
        """Check that all have the same share."""
        assert output.numel() == self.size * tensor.numel()

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not to be called")


@pytest.mark.parametrize(("slots", "most"), [(8, 4.2), (9, 5), (13, 5), (24, 6), (31, 6), (64, 7.5)])
def test_no_worker_holds_the_gradients_of_all_slots(slots: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks.bitwise.reduction import Held

    length = 1000
    monkeypatch.setattr(slotsum, "CHUNK", length // 20)
    monkeypatch.setattr(slotsum, "SMALL", 0)
    assert most < min(slots, math.log2(slots) + 2)
    for size in (1, 2, 3, 5, slots):
        for rank in range(0, size, 1 + size // 8):
            total = TreeSum(torch.zeros(length), slots)
            with Held() as held:
                for _ in range(2):  # the second step has what the first keeps
                    total.begin()
                    for slot in slots_of(rank, size, slots):
                        total.begin_slot(slot)
                    total.reduce(Mute(rank, size))
            assert held.peak / total.buffer.nbytes < most


@pytest.mark.parametrize(("slots", "sizes"), [(4, {2}), (8, {2, 4}), (9, {2}), (13, {2, 3}), (24, {2, 3, 5, 6, 12})])
def test_short_gradients_are_gathered_where_partial_sums_are_no_more_than_half_the_slots(
    slots: int, sizes: set[int]
) -> None:
    def meets_once(size: int) -> bool:
        group = Mute(0, size)
        met: list[str] = []
        group.all_to_all = lambda *_: met.append("all_to_all")  # type: ignore[method-assign]
        total = TreeSum(torch.zeros(10), slots)
        total.begin()
        for slot in slots_of(0, size, slots):
            total.begin_slot(slot)
        total.reduce(group)
        return not met

    held = {size: [nodes_of(slots_of(rank, size, slots)) for rank in range(size)] for size in range(2, slots + 1)}
    once = {size for size in held if meets_once(size)}
    assert once == {size for size, nodes in held.items() if sum(map(len, nodes)) <= slots / 2}
    assert sizes <= once


def test_exchanges_keep_their_memory_from_step_to_step() -> None:
    def work(group: Group) -> None:
        total, kept = TreeSum(torch.zeros(100), 5), set()
        for _ in range(3):
            total.begin()
            for slot in slots_of(group.rank, group.size, 5):
                total.begin_slot(slot)
            total.reduce(group)
            kept.add(total._kept.data_ptr())
        assert len(kept) == 1

    lockstep(3, work)


class Counting:
    """A group that counts the elements that it sends to others."""

    generation = 1

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self._group, self.sent = group.rank, group.size, group, 0

    def all_to_all(self, output: Tensor, tensor: Tensor, received: list[int], sent: list[int]) -> None:
        """Count all but one's own."""
        self.sent += sum(sent) - sent[self.rank]
        self._group.all_to_all(output, tensor, received, sent)

    def all_gather(self, output: Tensor, tensor: Tensor) -> None:
        """A ring hands on every share but one."""
        self.sent += (self.size - 1) * tensor.numel()
        self._group.all_gather(output, tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


@pytest.mark.parametrize(("slots", "size"), [(8, 2), (8, 4), (24, 3), (4, 4)])
def test_whole_nodes_cost_the_traffic_of_a_ring_all_reduce(
    slots: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slotsum, "SMALL", 0)

    def work(group: Group) -> int:
        counting = Counting(group)
        total = TreeSum(torch.zeros(12 * size), slots)
        total.begin()
        for slot in slots_of(group.rank, group.size, slots):
            total.begin_slot(slot)
        total.reduce(counting)
        return counting.sent

    assert lockstep(size, work) == [2 * (size - 1) * 12] * size


class Spectral(Task):
    """A task whose forwards move buffers: spectral norm's vectors."""

    def build(self) -> nn.Module:
        """6 numbers to 3 classes."""
        return nn.Sequential(spectral_norm(nn.Linear(6, 16)), nn.Tanh(), nn.Linear(16, 3))

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Cross entropy."""
        logits = model(batch["x"].to(next(model.parameters()).dtype))
        return {"loss": Loss(nn.functional.cross_entropy(logits, batch["label"], reduction="sum"), len(logits))}


def digests(setup: Setup, sizes: tuple[int, ...]) -> set[str]:
    """The weights at the end of a run on each of these numbers of workers."""
    alone = train_alone(setup)[0].state.model.state_dict()
    loops = [loop for size in sizes for loop in train_together(setup, size)]
    return {digest(alone)} | {digest(loop.state.model.state_dict()) for loop in loops}


CHANGES: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"precision": "bf16", "clip_norm": 0.5, "ema": 0.9},
    {"precision": "fp16", "micro_batch": 2, "l1": 1e-4},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: changes["precision"])
@pytest.mark.parametrize("slots", [4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_equal_to_the_bit(kind: str, slots: int, changes: dict[str, Any]) -> None:
    setup = make_setup(kind, slots=slots, consistency="bitwise", **{"budget.steps": 6, **changes})
    assert len(digests(setup, (2, 3, 4))) == 1


def test_moving_buffers_are_equal_to_the_bit() -> None:
    setup = Setup(spec=make_spec(**{"data.slots": 5, "consistency": "bitwise"}), kind=Spectral)
    assert len(digests(setup, (2, 3, 4, 5))) == 1


def test_sample_consistency_is_not_bitwise() -> None:
    setup = Setup(spec=make_spec(**{"data.slots": 5, "consistency": "sample"}), kind=Tokens)
    assert len(digests(setup, (2, 3, 4))) > 1
