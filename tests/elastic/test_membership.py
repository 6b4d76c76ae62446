"""Who trains together: generations form when all are there, and under `bitwise` only of workers that compute alike."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from elastrain.elastic.membership import Membership, Worker
from elastrain.elastic.run import _note_recovery


def worker(name: str, arithmetic: str = "torch on AVX2, 1 threads") -> Worker:
    return Worker(name=name, node=f"node-of-{name}", place=0, store=("127.0.0.1", 1), arithmetic=arithmetic)


def enter_all(membership: Membership, workers: list[Worker]) -> list[Any]:
    found: list[Any] = [None] * len(workers)

    def enter(index: int) -> None:
        found[index] = membership.enter(workers[index])

    threads = [threading.Thread(target=enter, args=(index,)) for index in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return found


def test_a_generation_forms_when_all_have_entered() -> None:
    found = enter_all(Membership(expected=2, alike=True), [worker("a"), worker("b")])
    assert [number for number, _ in found] == [1, 1]
    assert {w.name for w in found[0][1]} == {"a", "b"}


def test_workers_that_compute_other_bits_are_refused_where_bits_count() -> None:
    unlike = [worker("a"), worker("b", "torch on AVX512, 1 threads")]
    assert all(enter_all(Membership(expected=2), unlike))
    membership = Membership(expected=2, alike=True)
    found = enter_all(membership, unlike)
    assert found == [None, None]
    assert membership.failure is not None
    assert membership.failure[0] == "ResourceError"
    assert "AVX2" in membership.failure[1]
    assert "AVX512" in membership.failure[1]


@pytest.mark.parametrize(("step", "outcome", "noted"), [(30, None, 0), (31, None, 2), (30, {"step": 30}, 2)])
def test_every_loss_is_noted_once_it_is_made_good(step: int, outcome: Any, noted: int) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    host = SimpleNamespace(event=SimpleNamespace(remote=lambda kind, fields: events.append((kind, fields))))
    job: Any = SimpleNamespace(losses=[(0.0, 30), (1.0, 25)])
    now = {"last": {"step": step}, "step": step, "outcome": outcome, "resume_step": 20}
    _note_recovery(job, host, now)
    _note_recovery(job, host, now)
    assert [(kind, fields["steps_redone"]) for kind, fields in events] == [("restart", 10), ("restart", 5)][:noted]
