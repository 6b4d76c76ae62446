"""What a sweep came to is one trial that finished, one spec that trains it again, or the error that all met."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.sweeps.texts import FAIR, SEARCH

from elastrain.errors import DataError, DivergedError, SpecError
from elastrain.spec.document import read_train
from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.document import base_of
from elastrain.sweeps.outcome import best_of, conclude, scoring_of
from elastrain.sweeps.space import Arm, arms_of, trial_spec
from elastrain.sweeps.trials import Evaluation, Outcome, Trial, TrialPhase

Read = Callable[..., SweepSpec]


def trial(
    name: str, value: float | None, outcome: Outcome = "finished", phase: TrialPhase = "tune", **of: Any
) -> Trial:
    told = () if value is None else (Evaluation(200, 12800, value, {"val_loss": value}, 20.0),)
    given: dict[str, Any] = {"arm": "search", "number": int(name.split("-")[0][1:]), "point": {}, "seed": 0} | of
    return Trial(id=name, phase=phase, outcome=outcome, step=200, device_s=20.0, evaluations=told, **given)


def test_the_best_is_the_smallest_or_the_largest_of_those_that_finished() -> None:
    trials = [
        trial("t0", 0.3),
        trial("t1", 0.2),
        trial("t2", 0.1, "pruned"),
        trial("t3", 0.1, "running"),
        trial("t4", 0.1, "diverged"),
        trial("t5", None),
        trial("t6", 0.05, phase="defaults"),
        trial("t7", 0.01, arm="other"),
    ]
    assert [getattr(best_of(trials, arm, goal), "id", None) for arm, goal in (
        ("search", "min"), ("search", "max"), (None, "min"), ("none", "min")
    )] == ["t1", "t0", "t7", None]  # fmt: skip


def test_what_was_confirmed_is_ranked_by_its_mean_and_before_what_was_not() -> None:
    trials = [trial("t0", 0.1), trial("t1", 0.2), trial("t2", 0.05)]
    confirmed = {"t0": (0.1, 0.5), "t1": (0.2, 0.24)}
    trials += [
        trial(f"{name}-seed{seed}", value, phase="confirm", seed=1000 + seed)
        for name, values in confirmed.items()
        for seed, value in enumerate(values)
    ]
    best = best_of(trials, "search", "min")
    assert best is not None
    assert best.id == "t1"


def test_equal_values_are_told_apart_by_name() -> None:
    best = best_of([trial("t3", 0.1), trial("t1", 0.1)], None, "min")
    assert best is not None
    assert best.id == "t1"


@pytest.fixture
def sweep(read: Read, tmp_path: Path) -> Callable[..., tuple[str, SweepSpec, list[Arm]]]:
    def made(text: str, *sets: str) -> tuple[str, SweepSpec, list[Arm]]:
        spec = read(text, *sets)
        return str(tmp_path / "runs" / spec.name), spec, arms_of(spec, base_of(spec))

    return made


def events(arms: Sequence[Arm], ends: Sequence[dict[str, Any]], points: Sequence[Any]) -> list[dict[str, Any]]:
    """The ledger of one trial each, tuned in the first arm unless it says otherwise."""
    found: list[dict[str, Any]] = []
    for number, (end, point) in enumerate(zip(ends, points, strict=True)):
        name = f"t{number}"
        told = {"arm": arms[0].name, "phase": "tune", "number": number, "point": point, "seed": 0}
        found.append({"kind": "trial", "t": float(number), "trial": name, **told, **end.get("of", {})})
        value = end.get("value")
        evaluated: dict[str, Any] = {"step": 200, "samples": 12800, "value": value, "metrics": {}, "device_s": 20.0}
        if value is not None:
            found.append({"kind": "eval", "t": number + 0.5, "trial": name, **evaluated})
        ended = {"outcome": end["outcome"], "step": 200, "device_s": 20.0}
        error = {"error": end.get("error", ""), "error_kind": end.get("error_kind", "")}
        found.append({"kind": "ended", "t": number + 0.9, "trial": name, **ended, **error})
    return found


POINT = {
    "optimizer.lr": 0.012345678901234567,
    "data.global_batch": 256,
    "optimizer.name": "momentum",
    "optimizer.momentum": 0.91,
    "task_args.hidden": 33,
}


def test_the_best_trials_spec_is_read_back_as_the_run_that_it_was(
    sweep: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, spec, arms = sweep(SEARCH)
    told = events(
        arms, [{"outcome": "finished", "value": v} for v in (0.2, 0.1)], [POINT | {"task_args.hidden": 16}, POINT]
    )
    result, _ = conclude(url, spec, arms, told, wall_s=1.0)
    assert (result["best_trial"], result["best_value"], result["point"]) == ("t1", 0.1, POINT)
    assert json.loads(json.dumps(result)) == result
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = read_train(result["best"])
    was = trial_spec(arms[0], POINT, name="search-best", storage=spec.storage, seed=0)
    assert (run.optimizer, run.task_args, run.data.global_batch) == (was.optimizer, was.task_args, 256)
    assert run.optimizer.lr == 0.012345678901234567  # to the last bit
    assert (run.num_slots, run.workers.min, run.workers.max) == (was.num_slots, 2, 2)
    assert run.budget.steps == 200
    assert run.name == "search-best"
    files = ("leaderboard.md", "leaderboard.csv", "leaderboard.json", "trials.parquet", "curves.parquet", "report.html")
    assert all((Path(url) / name).stat().st_size for name in files)


def test_in_mode_fair_each_arm_has_its_best_run(sweep: Callable[..., Any]) -> None:
    url, spec, arms = sweep(FAIR)
    points = [dict(arm.untuned) for arm in arms]
    ends = [
        {"outcome": "finished", "value": 0.3 - place / 10, "of": {"arm": arm.name}} for place, arm in enumerate(arms)
    ]
    ends[1] |= {"outcome": "diverged"}
    result, board = conclude(url, spec, arms, events(arms, ends, points), wall_s=1.0)
    assert result["best_trial"] == "t2"
    assert sorted(path.name for path in (Path(url) / "best").iterdir()) == ["adamw.yaml", "sgd.yaml"]
    assert read_train(Path(url) / "best" / "adamw.yaml").optimizer.name == "adamw"
    assert read_train(result["best"]).name == "fair-adamw-best"
    assert board.scoring.baseline == "adamw"


def test_values_on_the_edge_of_a_range_are_named(sweep: Callable[..., Any]) -> None:
    _, spec, arms = sweep(SEARCH)
    best = trial("t0", 0.1, point=POINT | {"optimizer.lr": 0.0999})
    assert scoring_of(spec, arms).edges == {}
    assert scoring_of(spec, arms, [best]).edges == {arms[0].name: ["optimizer.lr"]}


@pytest.mark.parametrize(
    ("kinds", "error"),
    [
        (("DataError", "DataError"), DataError),
        (("SpecError", "SpecError"), SpecError),
        (("DataError", "SpecError"), DivergedError),
        (("", ""), DivergedError),
    ],
)
def test_where_nothing_finished_what_all_met_is_said(
    sweep: Callable[..., Any], kinds: Sequence[str], error: type[Exception]
) -> None:
    url, spec, arms = sweep(SEARCH)
    ends = [{"outcome": "failed", "error": f"what {kind} says", "error_kind": kind} for kind in kinds]
    with pytest.raises(error, match=r"2 failed.*the first one: what ") as caught:
        conclude(url, spec, arms, events(arms, ends, [POINT, POINT]), wall_s=1.0)
    assert type(caught.value) is error
    assert (Path(url) / "leaderboard.md").exists()  # what was tried is there to look at
    assert not (Path(url) / "best.yaml").exists()
