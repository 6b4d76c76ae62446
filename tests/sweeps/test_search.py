"""Which points are tried: as many in each arm, the same for a seed, the same after a kill."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sweeps.texts import FAIR, SEARCH

from elastrain.errors import SpecError
from elastrain.spec.sweep import SearchSpec
from elastrain.sweeps.models import Told, _trial, check_installed, suggest
from elastrain.sweeps.search import Budget, Search, first_points, grid
from elastrain.sweeps.sobol import MOST_DIMENSIONS, Sobol
from elastrain.sweeps.space import Arm
from elastrain.sweeps.trials import Outcome, Trial

Arms = Callable[..., list[Arm]]
Method = Literal["random", "quasirandom", "tpe", "gp"]


def searching(arm: Arm, method: str, *, count: float = 8, unit: str = "trials", seed: int = 1) -> Search:
    spec = SearchSpec(method=method, seed=seed)  # type: ignore[arg-type] # any of them
    return Search(arm=arm, spec=spec, budget=Budget(unit=unit, per_arm=count, most_steps=100))


def tried(search: Search, *, value: Callable[[dict[str, Any]], float | None]) -> list[dict[str, Any]]:
    """Run a search to its end, one trial after another."""
    points = []
    while asked := search.ask():
        number, point = asked
        points.append(point)
        search.tell(number, value(point), "finished", step=100)
        search.budget.spent(100, 1.0)
    return points


# --- Sobol


def test_unscrambled_points_are_those_of_torch() -> None:
    from torch.quasirandom import SobolEngine

    ours = [Sobol(MOST_DIMENSIONS, seed=None).point(number) for number in range(300)]
    theirs = SobolEngine(MOST_DIMENSIONS).draw(300).tolist()
    assert ours == theirs


@given(st.integers(0, 1 << 32), st.integers(1, MOST_DIMENSIONS))
def test_scrambled_points_are_still_one_in_each_cell(seed: int, dimensions: int) -> None:
    sequence = Sobol(dimensions, seed=seed)
    points = np.array([sequence.point(number) for number in range(32)])
    assert ((points >= 0) & (points < 1)).all()
    for column in points.T:
        assert sorted((column * 32).astype(int)) == list(range(32))


# --- determinism


@pytest.mark.parametrize("method", ["random", "quasirandom", "tpe"])
def test_a_seed_decides_the_points(arms: Arms, method: str) -> None:
    (arm,) = arms(SEARCH)
    runs = [
        tried(searching(arm, method, count=14, seed=seed), value=lambda point: point["optimizer.lr"])
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(runs[0]) == 14
    assert len({repr(point) for point in runs[0]}) == 14


@pytest.mark.parametrize("method", ["random", "quasirandom"])
def test_points_do_not_depend_on_what_is_told_or_when(arms: Arms, method: str) -> None:
    (arm,) = arms(SEARCH)
    search = searching(arm, method)
    asked = [search.ask() for _ in range(8)]
    assert search.ask() is None
    points = [each[1] for each in asked if each]
    assert points == tried(searching(arm, method), value=lambda _: None)
    assert points[:3] == first_points(arm, search.spec, 3)


def test_arms_get_as_many_points_and_equal_luck(arms: Arms) -> None:
    found = {arm.name: tried(searching(arm, "quasirandom", count=6), value=lambda _: 1.0) for arm in arms(FAIR)}
    assert {name: len(points) for name, points in found.items()} == {"sgd": 6, "nesterov": 6, "adamw": 6}
    for points in zip(found["sgd"], found["nesterov"], found["adamw"], strict=True):
        assert points[0]["optimizer.lr"] == points[1]["optimizer.lr"]
        assert points[0]["clip_norm"] == points[2]["clip_norm"]
    assert Sobol(2, seed=4).point(9) == Sobol(5, seed=4).point(9)[:2]


# --- a killed sweep


def trial(arm: Arm, number: int, point: dict[str, Any], outcome: Outcome, value: float | None = None) -> Trial:
    from elastrain.sweeps.trials import Evaluation

    seen = (Evaluation(100, 6400, value, {}, 1.0),) if value is not None else ()
    return Trial(
        id=f"{arm.name}-{number}", arm=arm.name, phase="tune", number=number, point=point, seed=0, outcome=outcome,
        step=100, device_s=1.0, evaluations=seen,
    )  # fmt: skip


# --- budgets


def test_trials_are_counted_when_they_begin(arms: Arms) -> None:
    search = searching(arms(SEARCH)[0], "random", count=2)
    assert search.ask()
    assert search.ask()
    assert search.ask() is None
    assert search.exhausted


def test_steps_of_running_trials_are_set_aside_until_they_end(arms: Arms) -> None:
    search = searching(arms(SEARCH)[0], "random", count=200, unit="steps")
    assert search.ask()
    assert search.ask()
    assert search.ask() is None
    assert not search.exhausted
    search.budget.spent(30, 0.0)
    assert search.budget.left() == 70
    assert search.ask()
    search.budget.spent(100, 0.0)
    search.budget.spent(100, 0.0)
    assert search.ask() is None
    assert search.exhausted


def test_device_seconds_count_running_trials_with_the_mean() -> None:
    budget = Budget(unit="device_seconds", per_arm=10.0, most_steps=100)
    budget.begin()
    budget.begin()
    assert budget.left() == 10.0
    budget.spent(100, 6.0)
    assert budget.left() == -2.0
    before = budget.exhausted
    budget.spent(100, 4.0)
    assert (before, budget.exhausted) == (False, True)


# --- grid


def test_a_grid_is_each_point_once_in_order(arms: Arms) -> None:
    (arm,) = arms(
        SEARCH,
        "search.method=grid",
        "space={optimizer.name: {grid: [sgd, momentum]}, optimizer.lr: {grid: [0.1, 1.0]}, "
        "optimizer.momentum: {choice: [0.5, 0.9], when: {optimizer.name: momentum}}}",
    )
    points = grid(arm)
    assert [(each["optimizer.name"], each["optimizer.lr"], each.get("optimizer.momentum")) for each in points] == [
        ("sgd", 0.1, None),
        ("sgd", 1.0, None),
        ("momentum", 0.1, 0.5),
        ("momentum", 0.1, 0.9),
        ("momentum", 1.0, 0.5),
        ("momentum", 1.0, 0.9),
    ]
    assert tried(searching(arm, "grid", count=99), value=lambda _: 1.0) == points
    assert tried(searching(arm, "grid", count=4), value=lambda _: 1.0) == points[:4]


# --- models


def told(arm: Arm, count: int, *, best: float) -> list[Told]:
    points = first_points(arm, SearchSpec(method="random", seed=5), count)
    values = [abs(np.log10(point["optimizer.lr"]) - best) for point in points]
    return [
        Told(number=at, point=point, value=value, outcome="finished", step=100)
        for at, (point, value) in enumerate(zip(points, values, strict=True))
    ]


@pytest.mark.parametrize(("goal", "sign"), [("min", 1.0), ("max", -1.0)])
def test_tpe_goes_where_values_are_good(arms: Arms, goal: str, sign: float) -> None:
    (arm,) = arms(SEARCH, "space={optimizer.lr: {log: [1.0e-4, 1.0]}}")
    entries = told(arm, 30, best=-1.0)
    for entry in entries:
        entry.value = sign * (entry.value or 0.0)
    spec = SearchSpec(method="tpe", seed=0)
    found = [suggest(arm, spec, entries, number, goal=goal)["optimizer.lr"] for number in range(30, 50)]
    assert sum(abs(np.log10(lr) + 1.0) < 1.0 for lr in found) >= 15


@pytest.mark.parametrize("outcome", ["diverged", "failed", "running", "pruned"])
def test_models_take_trials_that_did_not_finish(arms: Arms, outcome: Outcome) -> None:
    (arm,) = arms(SEARCH)
    entries = told(arm, 20, best=-1.0)
    for entry in entries[::2]:
        entry.outcome, entry.value, entry.step = outcome, entry.value if outcome == "pruned" else None, 20
    assert suggest(arm, SearchSpec(method="tpe"), entries, 20, goal="min")


@pytest.mark.parametrize(
    ("outcome", "value", "state"),
    [
        ("finished", 1.0, "COMPLETE"),
        ("finished", None, "FAIL"),
        ("pruned", 1.0, "PRUNED"),
        ("pruned", None, "FAIL"),
        ("diverged", 1.0, "FAIL"),
        ("failed", None, "FAIL"),
        ("running", None, "RUNNING"),
    ],
)
def test_an_outcome_is_told_as_what_it_is(arms: Arms, outcome: Outcome, value: float | None, state: str) -> None:
    (arm,) = arms(SEARCH)
    entry = Told(number=0, point=first_points(arm, SearchSpec(), 1)[0], value=value, outcome=outcome, step=20)
    found = _trial(arm, entry)
    assert found.state.name == state
    assert found.intermediate_values == ({20: 1.0} if state == "PRUNED" else {})
    assert set(found.params) == set(entry.point)


@pytest.mark.slow
def test_a_gaussian_process_goes_where_values_are_good(arms: Arms) -> None:
    (arm,) = arms(SEARCH, "space={optimizer.lr: {log: [1.0e-4, 1.0]}}")
    spec = SearchSpec(method="gp", seed=0)
    point = suggest(arm, spec, told(arm, 12, best=-1.0), 12, goal="min")
    assert abs(np.log10(point["optimizer.lr"]) + 1.0) < 0.5
    assert suggest(arm, spec, told(arm, 12, best=-1.0), 12, goal="min") == point


def test_a_missing_extra_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastrain.sweeps.models.find_spec", lambda name: None if name == "scipy" else object())
    check_installed("tpe")
    check_installed("quasirandom")
    with pytest.raises(SpecError, match=r"search.method gp needs scipy: pip install 'elastrain\[optuna\]'"):
        check_installed("gp")


def test_too_many_fields_for_sobol_are_a_sentence(arms: Arms) -> None:
    space = ", ".join(f"task_args.a{at}: {{uniform: [0, 1]}}" for at in range(MOST_DIMENSIONS + 1))
    (arm,) = arms(SEARCH, f"space={{{space}}}")
    with pytest.raises(SpecError, match="22 fields vary, and quasirandom points have 21 dimensions at most"):
        searching(arm, "quasirandom")
    assert tried(searching(arm, "random", count=2), value=lambda _: 1.0)
