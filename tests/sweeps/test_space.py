"""Arms and points: on their scales and back, conditional fields, defaults, edges, runs."""

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sweeps.texts import FAIR, SEARCH

from elastrain.errors import SpecError
from elastrain.spec.sweep import Dimension
from elastrain.spec.train import OPTIMIZERS, OptimizerSpec
from elastrain.sweeps import published
from elastrain.sweeps.dimensions import as_text, extremes, moved, on_edge, unit_of, value_at
from elastrain.sweeps.space import Arm, decode, defaults, edges, encode, explore, mutable, trial_spec

Arms = Callable[..., list[Arm]]
UNIT = st.floats(0.0, 1.0)
DOCS = Path(__file__).parents[2] / "docs" / "optimizers.md"
FIELDS = (("lr", "log"), ("betas.0", "one_minus_log"), ("momentum", "one_minus_log"), ("weight_decay", "log"))


@st.composite
def dimensions(draw: st.DrawFn) -> Dimension:
    kind = draw(st.sampled_from(["uniform", "log", "int", "int_log", "normal", "one_minus_log", "choice", "grid"]))
    if kind in ("choice", "grid"):
        values: Any = draw(st.lists(st.sampled_from(["a", 1, 2.5, None, (1, 2)]), min_size=1, unique=True))
    elif kind in ("int", "int_log"):
        low = draw(st.integers(1, 1000))
        values = (low, low + draw(st.integers(1, 1000)))
    elif kind == "normal":
        values = (draw(st.floats(-10, 10)), draw(st.floats(0.01, 10)))
    else:
        small = draw(st.floats(1e-6, 0.4))
        values = (small, small * draw(st.floats(1.01, 2.0)))
    return Dimension.model_validate({kind: values})


@given(dimensions(), UNIT)
def test_a_value_lies_in_its_range_and_comes_back(dimension: Dimension, unit: float) -> None:
    value = value_at(dimension, unit)
    low, high = (extremes(dimension)[0], extremes(dimension)[-1])
    if dimension.kind in ("choice", "grid"):
        assert value in dimension.values
    elif dimension.kind == "one_minus_log":
        assert high <= value <= low
    else:
        assert low <= value <= high
    back = unit_of(dimension, value)
    assert 0.0 <= back <= 1.0
    assert value_at(dimension, back) == pytest.approx(value, rel=1e-4) if isinstance(value, float) else True
    if not isinstance(value, float):
        assert value_at(dimension, back) == value


@pytest.mark.parametrize("given", [{"choice": ["a", None, 1]}, {"grid": [1, 2]}, {"int": [3, 9]}])
def test_evenly_spread_units_give_each_value_as_often(given: dict[str, Any]) -> None:
    dimension = Dimension.model_validate(given)
    count = len(dimension.values) if dimension.kind != "int" else 7
    drawn = [repr(value_at(dimension, (at + 0.5) / (4 * count))) for at in range(4 * count)]
    assert sorted(drawn.count(each) for each in set(drawn)) == [4] * count


@pytest.mark.parametrize(
    ("kind", "values", "middle"),
    [
        ("uniform", (1, 3), 2.0),
        ("log", (1e-4, 1e-2), 1e-3),
        ("int", (1, 3), 2),
        ("int_log", (1, 99), 10),
        ("normal", (2, 1), 2.0),
        ("one_minus_log", (0.001, 0.1), 0.99),
    ],
)
def test_the_middle_of_a_range_is_that_of_its_scale(kind: str, values: Any, middle: float) -> None:
    assert value_at(Dimension.model_validate({kind: values}), 0.5) == middle


@pytest.mark.parametrize(
    ("kind", "values", "inside", "outside"),
    [
        ("uniform", (0, 1), (0.06, 0.94), (0.04, 0.96)),
        ("log", (1e-4, 1e-2), (1.3e-4, 7e-3), (1.2e-4, 9e-3)),
        ("int", (1, 8), (2, 7), (1, 8)),
        ("normal", (0, 1), (-2.6, 2.6), (-2.8, 2.8)),
        ("one_minus_log", (0.01, 0.1), (0.987, 0.92), (0.99, 0.901)),
        ("choice", (1.0, 2.0, 3.0), (1.0, 3.0), ()),
        ("grid", (1.0, 2.0, 3.0), (2.0,), (1.0, 3.0)),
        ("grid", ("a", "b", "c"), ("a", "c"), ()),
    ],
)
def test_edges_are_the_outer_twentieth_of_the_scale(kind: str, values: Any, inside: Any, outside: Any) -> None:
    dimension = Dimension.model_validate({kind: values})
    assert [on_edge(dimension, value) for value in inside] == [False] * len(inside)
    assert [on_edge(dimension, value) for value in outside] == [True] * len(outside)


@given(dimensions(), UNIT, st.sampled_from([-0.1, 0.1]))
def test_what_moves_stays_inside(dimension: Dimension, unit: float, by: float) -> None:
    assert 0.0 <= unit_of(dimension, moved(dimension, value_at(dimension, unit), by)) <= 1.0


def test_ranges_read_well() -> None:
    assert as_text(Dimension(normal=(0.0, 1.0))) == "normal 0 ± 1"
    assert as_text(Dimension(choice=(None, True, {"a": 1}))) == "choice null, true, {a: 1}"


# --- points


def test_inactive_fields_are_absent_and_leave_the_run_as_it_is(arms: Arms) -> None:
    (arm,) = arms(SEARCH)
    seen = set()
    chance = random.Random(0)  # noqa: S311 -- no secret
    for _ in range(100):
        unit = [chance.random() for _ in arm.dimensions]
        point = decode(arm, unit)
        run = trial_spec(arm, point, name="t", storage="/s")
        name = point["optimizer.name"]
        seen.add(name)
        assert ("optimizer.momentum" in point) == (name == "momentum")
        assert ("optimizer.betas.0" in point) == (name == "adamw")
        assert run.optimizer.momentum == point.get("optimizer.momentum", 0.9)
        assert run.optimizer.betas == (point.get("optimizer.betas.0", 0.9), 0.999)
        back = encode(arm, point)
        assert [each is None for each in back] == [path not in point for path in arm.dimensions]
        again = decode(arm, [0.5 if each is None else each for each in back])
        assert {path: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for path, v in point.items()} == again
    assert seen == {"adamw", "momentum", "sgd"}


def test_a_condition_on_an_inactive_field_does_not_hold(arms: Arms) -> None:
    (arm,) = arms(
        SEARCH,
        "space.schedule.name={choice: [cosine, wsd], when: {optimizer.name: sgd}}",
        "space.schedule.decay={uniform: [0.1, 0.5], when: {schedule.name: [wsd, cosine]}}",
        "space.l1={uniform: [0.1, 0.5], when: {clip_norm: null}}",
        "space.ema={uniform: [0.1, 0.5], when: {compile: true}}",
    )
    order = list(arm.dimensions)
    unit = [0.1] * len(order)
    assert decode(arm, unit)["optimizer.name"] == "adamw"
    assert {"schedule.name", "schedule.decay", "ema"}.isdisjoint(decode(arm, unit))
    assert "l1" in decode(arm, unit)
    unit[order.index("optimizer.name")] = 0.9
    assert {"schedule.name", "schedule.decay"} <= set(decode(arm, unit))


def test_fields_that_wait_for_each_other_are_refused(arms: Arms) -> None:
    with pytest.raises(SpecError, match="wait for each other"):
        arms(
            SEARCH,
            "space.schedule.name={choice: [cosine, wsd], when: {consistency: sample}}",
            "space.consistency={choice: [sample, bitwise], when: {schedule.name: wsd}}",
        )


def test_a_trial_is_a_whole_run_of_its_own(arms: Arms) -> None:
    (arm,) = arms(SEARCH)
    point = decode(arm, [0.5] * len(arm.dimensions))
    run = trial_spec(arm, point, name="trial-7", storage="/sweep/trials", seed=11)
    assert (run.name, run.storage, run.data.seed) == ("trial-7", "/sweep/trials", 11)
    assert (run.budget.steps, run.eval.every_steps) == (200, 20)
    assert (run.checkpoint.every_steps, run.checkpoint.best, run.checkpoint.goal) == (100, "val_loss", "min")
    assert (run.workers.min, run.workers.max) == (2, 2)
    assert run.optimizer.lr == point["optimizer.lr"]
    assert run.task_args["hidden"] == point["task_args.hidden"]
    assert trial_spec(arm, point, name="a", storage="/b").data.seed == 0
    with pytest.raises(SpecError, match=r"does not vary; did you mean 'optimizer\.lr'"):
        trial_spec(arm, {"optimizer.rl": 1.0}, name="a", storage="/b")


def test_the_task_decides_on_checkpoints_only_where_set_does_not(arms: Arms) -> None:
    (arm,) = arms(SEARCH, "set.checkpoint={every_steps: 7}")
    assert (arm.base.checkpoint.every_steps, arm.base.checkpoint.best) == (7, "val_loss")


def test_defaults_are_the_bases_in_a_search_and_published_in_an_arm(arms: Arms) -> None:
    (arm,) = arms(SEARCH)
    assert defaults(arm) == {
        "optimizer.lr": 0.003,
        "data.global_batch": 64,
        "optimizer.name": "adamw",
        "optimizer.betas.0": 0.9,
        "task_args.hidden": 128,
    }
    found = {each.name: defaults(each) for each in arms(FAIR)}
    assert found["sgd"] == {"clip_norm": None, "optimizer.lr": 0.1, "optimizer.weight_decay": 0.0}
    assert found["nesterov"] == {"clip_norm": None, "optimizer.lr": 0.1, "optimizer.momentum": 0.9}
    assert found["adamw"] == {"clip_norm": None, "optimizer.lr": 0.001, "optimizer.betas.0": 0.9}


def test_arms_share_the_space_and_nothing_else(arms: Arms) -> None:
    found = {each.name: each for each in arms(FAIR)}
    assert {name: each.baseline for name, each in found.items()} == {"sgd": False, "nesterov": False, "adamw": True}
    assert found["adamw"].base.optimizer.weight_decay == 0.1
    assert found["sgd"].base.optimizer.weight_decay == 0.0  # not the base's 0.01, which is another optimizer's
    assert list(found["nesterov"].dimensions) == ["clip_norm", "optimizer.lr", "optimizer.momentum"]
    assert list(found["adamw"].dimensions) == ["clip_norm", "optimizer.lr", "optimizer.betas.0"]
    assert found["sgd"].dimensions["optimizer.lr"].log == (0.02, 5.0)
    assert arms(FAIR, "arms.2.baseline=false")[0].baseline


def test_edges_name_the_fields_of_a_point(arms: Arms) -> None:
    (arm,) = arms(SEARCH)
    assert edges(arm, {"optimizer.lr": 0.0999, "task_args.hidden": 100, "data.global_batch": 64}) == ["optimizer.lr"]


def test_another_name_brings_what_is_its_own(arms: Arms) -> None:
    fresh = {name: OptimizerSpec(name=name, lr=0.003) for name in OPTIMIZERS}
    choice = f"space={{optimizer.name: {{choice: [{', '.join(set(OPTIMIZERS) - {'full_batch'})}]}}}}"
    (arm,) = arms(SEARCH, choice, "set.optimizer.eps=0.5")
    for name in arm.dimensions["optimizer.name"].values:
        found = trial_spec(arm, {"optimizer.name": name}, name="t", storage="/s").optimizer
        assert found.eps == 0.5  # which somebody gave
        assert (found.momentum, found.betas) == (fresh[name].momentum, fresh[name].betas), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_has_a_space_and_settings_that_fit_the_spec(arms: Arms, name: str) -> None:
    batch = "all" if name == "full_batch" else 64
    arm = arms(FAIR, f"set.data.global_batch={batch}", f"arms.0.optimizer.name={name}")[0]
    space = {f"optimizer.{path}" for path in published.SPACES[name] if path != "args"}
    assert set(arm.dimensions) == {"clip_norm"} | space
    assert math.isclose(arm.base.optimizer.lr, published.SETTINGS[name]["lr"])
    assert arm.base.optimizer.args == published.SPACES[name].get("args", {})


def test_the_spaces_are_those_of_the_docs() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) ?\| (.*?) \| .*? \|$", DOCS.read_text(), re.MULTILINE)
    told = {
        name: [re.findall(r"[\d.]+(?:e-?\d+)?", cell) if "…" in cell else [] for cell in cells]
        for names, *cells in rows
        if "…" in cells[0]
        for name in re.findall(r"`(\w+)`", names)
    }
    ours = {
        name: [list(space.get(key, {}).get(kind, ())) for key, kind in FIELDS if key in space or key == "betas.0"]
        for name, space in published.SPACES.items()
    }
    assert {name: [list(map(float, cell)) for cell in cells] for name, cells in told.items()} == {
        name: [found[0], next((each for each in found[1:-1] if each), []), found[-1]] for name, found in ours.items()
    }


def test_pbt_moves_what_a_checkpoint_allows(arms: Arms) -> None:
    (arm,) = arms(SEARCH)
    with pytest.raises(SpecError, match=r"data\.global_batch cannot change"):
        mutable(arm)
    (_, nesterov, _) = arms(FAIR)
    assert mutable(nesterov) == ["clip_norm", "optimizer.lr", "optimizer.momentum"]
    chance = random.Random(1)  # noqa: S311 -- no secret
    point = decode(nesterov, [0.5] * 3)
    for _ in range(200):
        point = explore(nesterov, point, chance)
        trial_spec(nesterov, point, name="t", storage="/s")
        assert 0.02 <= point["optimizer.lr"] <= 5.0
