"""What a trial reports reaches the desk in order, though a desk's calls may overtake one another."""

from types import SimpleNamespace
from typing import Any

import pytest


def test_an_evaluation_is_sent_only_when_the_one_before_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    import ray

    from elastrain.sweeps import worker
    from elastrain.sweeps.orders import Objective

    done: list[Any] = []
    monkeypatch.setattr(ray, "get", lambda sent: done.append(f"{sent} arrived"))

    def send(cell: str, trial: str, fields: dict[str, Any]) -> int:
        assert cell == "cell"
        done.append(f"{trial} {fields['step']} sent")
        return int(fields["step"])

    desk = SimpleNamespace(evaluated=SimpleNamespace(remote=send))
    objective = Objective(metric="val_loss", goal="min", decisions=frozenset(), saves=False)
    order: Any = SimpleNamespace(trial="a", objective=objective, decided=0, resume=None, spent_s=0.0)
    group: Any = SimpleNamespace(rank=0, size=1)
    running = worker.Running(desk, "cell", order, group)
    for step in (20, 40):
        state: Any = SimpleNamespace(
            metrics={"val_loss": 1.0}, evaluated=step, step=step, due=False, samples=step, device=None
        )
        running.group(state)
        running.group(state)  # asked again at the same step, it is not told again
    running.arrived()
    running.arrived()
    assert done == ["a 20 sent", "20 arrived", "a 40 sent", "40 arrived"]
