"""Runs of processes on a GPU, whose sums go through NCCL: the same bits, whoever is killed, stopped, drained or joins.

One GPU is enough: all workers share it (see `process_worker.in_process`). `GPU_HISTORIES=40` plays more histories by
chance. `make test-gpu` is for a machine that has one; elsewhere these tests are skipped, which says nothing of GPUs.
"""

import os
from typing import Any

import pytest
import torch
from tests.elastic.process_histories import History, Violation, alone, check, play, random_history, told
from tests.elastic.process_stage import Event

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.usefixtures("forked_workers"),
]

HISTORIES = int(os.environ.get("GPU_HISTORIES", "4"))


def on_gpu(*events: Event, **settings: Any) -> History:
    """Play a history on the GPU."""
    return play(*events, device="cuda", **settings)


@pytest.mark.parametrize(("kind", "size"), [("mlp", 4), ("cnn", 3), ("gpt", 2), ("gan", 3)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_any_number_of_workers_computes_the_same_bits(kind: str, size: int, precision: str) -> None:
    on_gpu(kind=kind, size=size, changes={"precision": precision, "data.slots": 7})


@pytest.mark.parametrize("who", ["lead", "other"])
@pytest.mark.parametrize("place", ["audited", "phase 0", "evaluation"])
def test_the_others_go_on_when_one_is_killed(place: str, who: str) -> None:
    history = on_gpu(Event(action="kill", step=5, place=place, who=who), kind="cnn")
    assert not history.seen["attempt"]
    assert [record["workers"] for record in told(history, "worker_lost")] == [2]


def test_two_die_at_once_and_are_replaced_by_new_processes() -> None:
    history = on_gpu(Event(action="kill_two", step=5, who="lead", newcomers=2), kind="gpt", size=4)
    assert not history.seen["attempt"]
    assert len([member for member in history.members if member.end == "finished"]) >= 2


def test_a_worker_without_a_sign_is_given_up() -> None:
    history = on_gpu(Event(action="stop", step=5, who="lead"))
    assert {record["why"] for record in told(history, "worker_lost")} >= {"its lease ran out"}


def test_a_worker_that_never_comes_to_the_sum_ends_itself() -> None:
    history = on_gpu(Event(action="hang", step=6, place="phase 0", who="other"))
    assert not history.seen["attempt"]


def test_nobody_is_left_and_the_run_goes_on_from_storage() -> None:
    history = on_gpu(Event(action="kill_all", step=10), kind="cnn")
    assert history.seen["attempt"] == 1


def test_a_run_grows_and_shrinks() -> None:
    grow, shrink = (
        Event(action="resize", step=3, newcomers=2, limits=(4, 4)),
        Event(action="resize", step=9, limits=(1, 2)),
    )
    history = on_gpu(grow, shrink, kind="gan", size=2, limits=(1, 2))
    assert [(record["before"], record["workers"]) for record in told(history, "resize")] == [(2, 4), (4, 2)]


@pytest.mark.parametrize("place", ["join", "broadcast"])
def test_a_worker_dies_while_another_joins(place: str) -> None:
    history = on_gpu(
        Event(action="grow", step=4, newcomers=1),
        Event(action="kill", step=4, place=place, who="newcomer"),
        kind="cnn",
        size=3,
    )
    assert not history.seen["attempt"]


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_a_random_history_ends_in_the_same_bits(seed: int) -> None:
    history = random_history(seed)
    history.device = "cuda"
    print(f"seed {seed}: {history.kind}, {history.size} workers, {history.changes}", *history.events, sep="\n")  # noqa: T201
    check(history.run(), alone(history.kind, history.changes, "cuda"))


def test_control_sums_in_the_order_of_the_workers_have_other_bits() -> None:
    with pytest.raises(Violation, match="weights_sha256"):
        on_gpu(size=3, changes={"consistency": "sample"})
