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
from elastrain.sweeps.outcome import best_of, conclude, losers, scoring_of
from elastrain.sweeps.space import Arm, arms_of, trial_spec
from elastrain.sweeps.stats import Goal
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
    asked: list[tuple[str | None, Goal]] = [("search", "min"), ("search", "max"), (None, "min"), ("none", "min")]
    assert [getattr(best_of(trials, arm, goal), "id", None) for arm, goal in asked] == ["t1", "t0", "t7", None]


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


def test_a_confirmed_point_of_which_a_run_did_not_finish_comes_after_those_that_all_did() -> None:
    trials = [trial(f"t{number}", 0.1) for number in range(3)]
    ends: dict[str, list[tuple[float | None, Outcome]]] = {
        "t0": [(0.01, "finished"), (None, "diverged"), (None, "failed")],
        "t1": [(0.3, "finished")] * 3,
        "t2": [(0.001, "diverged")] * 3,
    }
    for name, found in ends.items():
        for seed, (value, outcome) in enumerate(found):
            trials.append(trial(f"{name}-seed{seed}", value, outcome, "confirm", seed=1000 + seed))
    order = []
    while (best := best_of(trials, "search", "min")) is not None:
        order.append(best.id)
        trials = [one for one in trials if one.number != best.number]
    assert order == ["t1", "t0", "t2"]
    unconfirmed = trial("t4", 0.9)
    assert best_of([unconfirmed, trial("t5", 0.1), trial("t5-s", None, "diverged", "confirm")], None, "min") == (
        unconfirmed
    )


def test_checkpoints_are_kept_of_each_arms_best_and_of_what_confirms_it(read: Read) -> None:
    trials = [
        trial("t0", 0.3), trial("t1", 0.1), trial("t2", 0.2, "pruned"), trial("t3", None, "running"),
        trial("t4", 0.9, arm="other"), trial("t1-s1", 0.1, phase="confirm"), trial("t0-s1", 0.2, phase="confirm"),
        trial("t1-defaults", 0.1, phase="defaults"),
    ]  # fmt: skip
    assert losers(read(SEARCH), trials) == ["t0", "t2", "t0-s1", "t1-defaults"]
    pbt = read(SEARCH, "search.method=pbt", "early_stop=null", "space={optimizer.lr: {log: [1.0e-4, 0.1]}}")
    assert losers(pbt, trials) == []


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


def test_in_mode_fair_the_best_run_is_one_of_the_first_arm_on_the_leaderboard(sweep: Callable[..., Any]) -> None:
    url, spec, arms = sweep(FAIR, "objective.target=0.35")
    told = [
        {"kind": kind, "t": 0.0, "trial": arm.name, **of}
        for arm, (early, late) in zip(arms, [(0.3, 0.3), (0.9, 0.1), (0.9, 0.2)], strict=True)
        for kind, of in [
            ("trial", {"arm": arm.name, "phase": "tune", "number": 0, "point": dict(arm.untuned), "seed": 0}),
            *[
                ("eval", {"step": step, "samples": 1, "value": value, "metrics": {}, "device_s": 1.0})
                for step, value in ((20, early), (200, late))
            ],
            ("ended", {"outcome": "finished", "step": 200, "device_s": 2.0, "error": "", "error_kind": ""}),
        ]
    ]
    result, board = conclude(url, spec, arms, told, wall_s=1.0)
    assert board.ranked_by == "steps to target"
    assert (
        board.rows[0].arm == result["best_trial"] == "sgd"
    )  # which is at the target first, and not the best at the end
    assert read_train(result["best"]).optimizer.name == "sgd"


def test_a_population_says_that_its_best_run_is_not_to_be_had_again(sweep: Callable[..., Any]) -> None:
    url, spec, arms = sweep(SEARCH)
    told = events(arms, [{"outcome": "finished", "value": 0.1}], [POINT])
    taken = {"kind": "exploit", "t": 0.2, "trial": "t0", "donor": "t1", "step": 20, "point": POINT}
    for extra, said in (([], False), ([taken], True)):
        _, board = conclude(url, spec, arms, [*told, *extra], wall_s=1.0)
        assert any("does not give the same value again" in note for note in board.notes) is said


def test_what_an_attempt_before_wrote_is_gone_where_nothing_finished(sweep: Callable[..., Any]) -> None:
    url, spec, arms = sweep(FAIR)
    points = [dict(arm.untuned) for arm in arms]
    ends = [{"outcome": "finished", "value": 0.3, "of": {"arm": arm.name}} for arm in arms]
    conclude(url, spec, arms, events(arms, ends, points), wall_s=1.0)
    assert len(list((Path(url) / "best").iterdir())) == 3
    failed = [end | {"outcome": "failed", "error": "E"} for end in ends]
    with pytest.raises(DivergedError):
        conclude(url, spec, arms, events(arms, failed, points), wall_s=1.0)
    assert not (Path(url) / "best.yaml").exists()
    assert not list((Path(url) / "best").iterdir())


def test_an_arm_that_was_given_up_is_named(sweep: Callable[..., Any]) -> None:
    url, spec, arms = sweep(FAIR)
    told = events(arms, [{"outcome": "finished", "value": 0.1}], [dict(arms[0].untuned)])
    _, board = conclude(url, spec, arms, [*told, {"kind": "gave_up", "t": 2.0, "arm": "adamw"}], wall_s=1.0)
    assert "adamw: given up with some of its budget left, since 20 trials in a row ended" in " ".join(board.notes)


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
