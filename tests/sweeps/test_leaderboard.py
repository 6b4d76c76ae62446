"""Rows, ranks and ties of sweeps made by hand, and what is written of them."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from elastrain.sweeps import results
from elastrain.sweeps.leaderboard import Leaderboard, Row, Scoring, across, best_trials, fair, search
from elastrain.sweeps.trials import Evaluation, Outcome, Trial, TrialPhase

SCORING = Scoring(target=0.5, max_steps=40, baseline="adamw")


def run(
    arm: str,
    phase: TrialPhase,
    seed: int,
    values: Sequence[float | None],
    outcome: Outcome = "finished",
    lr: float = 0.1,
    error: str = "",
) -> Trial:
    """A trial with an evaluation every 10 steps, which take 1 device-second (arm slow: 3)."""
    seconds = 3.0 if arm == "slow" else 1.0
    told = tuple(Evaluation(10 * n, 640 * n, v, {"acc": 0.5}, seconds * n) for n, v in enumerate(values, start=1))
    step, spent = 10 * len(values), seconds * len(values)
    name = f"{arm}-{phase}-{lr}-{seed}"
    return Trial(name, arm, phase, 0, {"optimizer.lr": lr}, seed, outcome, step, spent, error, told)


def curve(reach: int, final: float, length: int = 4) -> list[float]:
    """Values that are at the target from evaluation `reach` on (0: never) and end with `final`."""
    return [0.4 if reach and n >= reach else 0.9 for n in range(1, length)] + [final]


def confirmed(arm: str, reach: Sequence[int], finals: Sequence[float]) -> list[Trial]:
    pairs = zip(reach, finals, strict=True)
    runs = [run(arm, "confirm", 100 + n, curve(at, final)) for n, (at, final) in enumerate(pairs)]
    return [run(arm, "tune", 0, curve(reach[0], finals[0])), run(arm, "defaults", 0, curve(0, 0.45)), *runs]


FIVE = [0.30, 0.31, 0.32, 0.33, 0.34]


def rows_of(board: Leaderboard) -> dict[str, Row]:
    return {row.arm: row for row in board.rows if row.kind == "tuned"}


# --- mode fair


def test_the_faster_arm_is_first_with_its_time_speed_up_and_p() -> None:
    trials = [*confirmed("adamw", [2, 2, 2, 2, 2], FIVE), *confirmed("muon", [1, 1, 1, 1, 1], FIVE)]
    board = fair(trials, SCORING)
    assert board.ranked_by == "steps to target"
    assert [(row.arm, row.kind, row.rank) for row in board.rows] == [
        ("muon", "tuned", 1),
        ("muon", "defaults", None),
        ("adamw", "tuned", 2),
        ("adamw", "defaults", None),
    ]
    muon = rows_of(board)["muon"]
    assert (muon.reached, muon.runs, muon.defaults) == (5, 5, 0.45)
    assert muon.steps
    assert (muon.steps.value, muon.steps.low, muon.steps.high) == (10, 10, 10)
    assert muon.speed_up
    assert muon.speed_up.value == 2
    assert muon.p == pytest.approx(2 / 252)
    assert muon.value
    assert muon.value.value == pytest.approx(0.32)
    assert muon.sd == pytest.approx(0.0158114)
    assert (muon.cost_steps, muon.cost_device_s) == (40, 4)
    assert rows_of(board)["adamw"].p is None  # the baseline is not compared with itself


def test_arms_that_the_runs_cannot_tell_apart_share_a_rank() -> None:
    trials = [*confirmed("adamw", [2, 1, 2, 1, 2], FIVE), *confirmed("muon", [1, 2, 1, 2, 1], FIVE)]
    trials += confirmed("sgd", [3, 3, 3, 3, 3], FIVE)
    board = fair(trials, SCORING)
    assert {arm: row.rank for arm, row in rows_of(board).items()} == {"muon": 1, "adamw": 1, "sgd": 3}
    assert any("2 arms share rank 1" in note for note in board.notes)


def test_an_arm_of_fewer_steps_and_more_seconds_has_another_rank_by_seconds() -> None:
    trials = [*confirmed("adamw", [2, 2, 2, 2, 2], FIVE), *confirmed("slow", [1, 1, 1, 1, 1], FIVE)]
    rows = rows_of(fair(trials, SCORING))
    assert (rows["slow"].rank, rows["slow"].rank_device_s) == (1, 2)
    assert (rows["adamw"].rank, rows["adamw"].rank_device_s) == (2, 1)


def test_a_miss_is_never_and_below_all_that_got_there() -> None:
    trials = [*confirmed("adamw", [2, 0, 0, 0, 0], [0.4, *[0.6] * 4]), *confirmed("sgd", [0] * 5, [0.55] * 5)]
    board = fair(trials, SCORING)
    rows = rows_of(board)
    assert (rows["adamw"].rank, rows["adamw"].reached, rows["sgd"].rank, rows["sgd"].reached) == (1, 1, None, 0)
    assert rows["sgd"].steps
    assert rows["sgd"].steps.value == math.inf
    assert "never" in results.as_text(board)


def test_where_nobody_reaches_the_target_final_values_decide_and_it_says_so() -> None:
    trials = [*confirmed("adamw", [0] * 5, [0.8, 0.81, 0.82, 0.83, 0.84])]
    trials += confirmed("sgd", [0] * 5, [0.7, 0.71, 0.72, 0.73, 0.74])
    board = fair(trials, SCORING)
    assert board.ranked_by == "final value"
    assert {arm: row.rank for arm, row in rows_of(board).items()} == {"sgd": 1, "adamw": 2}
    assert any("No arm reached the target" in note for note in board.notes)
    assert rows_of(board)["sgd"].speed_up is None


def test_more_is_better_where_the_goal_is_max() -> None:
    trials = [*confirmed("adamw", [0] * 5, [0.8, 0.81, 0.82, 0.83, 0.84])]
    trials += confirmed("sgd", [0] * 5, [0.7, 0.71, 0.72, 0.73, 0.74])
    board = fair(trials, Scoring(metric="acc", goal="max"))
    assert {arm: row.rank for arm, row in rows_of(board).items()} == {"adamw": 1, "sgd": 2}


def test_an_arm_whose_every_trial_diverged_or_failed_is_last_and_says_why() -> None:
    trials = confirmed("adamw", [2] * 5, FIVE)
    trials += [run("bad", "tune", 0, [0.9, None], "diverged", lr) for lr in (0.1, 0.2)]
    trials.append(run("bad", "tune", 0, [], "failed", 0.3, "Traceback\n  File x\nRuntimeError: out of memory\n"))
    board = fair(trials, SCORING, ["adamw", "bad", "waiting"])
    bad, waiting = rows_of(board)["bad"], rows_of(board)["waiting"]
    assert (bad.rank, bad.runs, bad.value, bad.steps) == (None, 0, None, None)
    assert bad.note == "nothing to compare: 2 diverged, 1 failed (RuntimeError: out of memory)"
    assert waiting.note == "no trial yet"
    assert "RuntimeError: out of memory" in results.as_text(board)


def test_runs_of_the_confirmation_that_diverge_count_as_misses_and_are_named() -> None:
    trials = confirmed("adamw", [1] * 5, FIVE)
    trials[-2:] = [replace(one, outcome="diverged", evaluations=()) for one in trials[-2:]]
    row = rows_of(fair(trials, SCORING))["adamw"]
    assert (row.reached, row.runs, row.note) == (3, 5, "of the runs 2 diverged")
    assert row.value
    assert row.value.value == pytest.approx(0.31)


def test_of_several_confirmed_points_the_best_mean_stands() -> None:
    lucky = [run("a", "confirm", seed, [value], lr=0.1) for seed, value in enumerate([0.1, 0.9, 0.9])]
    solid = [run("a", "confirm", seed, [0.4], lr=0.2) for seed in range(3)]
    row = rows_of(fair([*lucky, *solid], SCORING))["a"]
    assert row.point == {"optimizer.lr": 0.2}


def test_all_studies_of_an_arm_count_and_one_that_came_to_nothing_is_a_miss() -> None:
    scoring = replace(SCORING, seeds=(100, 101, 102))
    whole = [run("adamw", "confirm", 100 + n, curve(1, 0.3 + n / 10), lr=0.1 + n) for n in range(3)]
    broken = [run("muon", "confirm", seed, curve(1, 0.3), lr=float(seed)) for seed in (100, 102)]
    rows = rows_of(fair([*whole, *broken], scoring))
    row = rows["adamw"]
    assert (row.runs, row.reached, row.point) == (3, 3, {"optimizer.lr": 0.1}), "all of them, and the best one's point"
    assert row.value
    assert row.value.value == pytest.approx(0.4)
    row = rows["muon"]
    assert (row.runs, row.reached) == (2, 2)
    assert row.steps
    assert (row.steps.value, row.steps.high) == (10, math.inf)


def test_without_confirmation_one_run_stands_without_intervals_and_it_says_so() -> None:
    trials = [run("adamw", "tune", 0, [0.9, value], lr=value) for value in (0.4, 0.3)]
    board = fair(trials, SCORING)
    row = rows_of(board)["adamw"]
    assert row.point == {"optimizer.lr": 0.3}
    assert row.steps
    assert (row.steps.low, row.sd, row.runs) == (None, None, 1)
    assert row.note.startswith("not confirmed")


def test_few_runs_and_best_values_on_the_edge_are_warned_of() -> None:
    trials = [*confirmed("adamw", [1] * 3, FIVE[:3]), *confirmed("sgd", [3] * 3, FIVE[:3])]
    board = fair(trials, replace(SCORING, edges={"sgd": ["optimizer.lr"]}))
    assert {row.rank for row in rows_of(board).values()} == {1}  # three runs cannot tell them apart
    assert any("With 3 runs" in note for note in board.notes)
    assert "sgd: the best optimizer.lr is on the edge of its range; widen it." in board.notes


def test_scores_over_workloads_are_those_of_the_performance_profile() -> None:
    one = fair([*confirmed("a", [1] * 5, FIVE), *confirmed("b", [2] * 5, FIVE)], SCORING)
    two = fair([*confirmed("a", [0] * 5, [0.9] * 5), *confirmed("b", [2] * 5, FIVE)], SCORING)
    assert across({"one": one, "two": two}) == {"b": pytest.approx(5 / 6), "a": pytest.approx(0.5)}
    assert across({}) == {}


# --- mode search


def test_confirmed_points_come_first_then_finished_pruned_diverged_and_failed() -> None:
    trials = [
        run("", "tune", 0, [0.9], "failed", 0.5, "ValueError: no such thing"),
        run("", "tune", 0, [0.9, None], "diverged", 0.4),
        run("", "tune", 0, [0.6], "pruned", 0.3),
        run("", "tune", 0, [0.5, 0.25], lr=0.2),
        run("", "tune", 0, [0.5, 0.20], lr=0.1),
        *[run("", "confirm", seed, [0.5, 0.3 + 0.01 * seed], lr=0.1) for seed in (1, 2, 3)],
        run("", "tune", 0, [0.7], "running", 0.6),
        run("", "tune", 0, [], "running", 0.7),
    ]
    board = search(trials, replace(SCORING, edges={"": ["optimizer.lr"]}))
    assert [(row.point["optimizer.lr"], row.rank) for row in board.rows] == [
        *((0.1, 1), (0.2, 2), (0.6, None), (0.7, None), (0.3, None), (0.4, None), (0.5, None))
    ]
    assert board.rows[0].value
    assert board.rows[0].value.value == pytest.approx(0.32)  # the mean over its seeds, not the luck that chose it
    assert board.rows[0].trial == trials[4].id
    assert board.rows[-1].note == "ValueError: no such thing"
    assert board.ends == {"finished": 5, "pruned": 1, "diverged": 1, "failed": 1, "running": 2}
    assert board.notes == ("The best optimizer.lr is on the edge of its range; widen it.",)


def test_the_best_are_finished_trials_of_the_tuning_with_a_value() -> None:
    trials = [
        run("a", "tune", 0, [0.1], "pruned", 0.1),
        run("a", "tune", 0, [math.nan], lr=0.2),
        run("a", "tune", 0, [0.3], lr=0.3),
        run("a", "tune", 0, [0.2], lr=0.4),
        run("a", "defaults", 0, [0.0], lr=0.5),
    ]
    assert [trial.point["optimizer.lr"] for trial in best_trials(trials, "min")] == [0.4, 0.3]
    assert [trial.point["optimizer.lr"] for trial in best_trials(trials, "max")] == [0.3, 0.4]


def test_a_target_that_no_trial_reached_is_named() -> None:
    missed = search([run("", "tune", 0, [0.9, 0.6])], SCORING)
    assert missed.notes == ("No trial reached the target of 0.5.",)
    assert search([run("", "tune", 0, [0.4, 0.6])], SCORING).notes == ()
    assert search([run("", "tune", 0, [0.9])], Scoring()).notes == ()


def test_a_confirmed_point_of_which_all_runs_finished_stands_before_one_that_was_luckier_once() -> None:
    lucky = [run("", "confirm", seed, [0.1], "diverged" if seed else "finished", lr=0.2) for seed in range(5)]
    steady = [run("", "confirm", seed, [0.4], lr=0.3) for seed in range(5)]
    board = search([*lucky, *steady], SCORING)
    assert [row.point["optimizer.lr"] for row in board.rows] == [0.3, 0.2]
    arms = fair([replace(one, arm="adamw") for one in (*lucky, *steady)], SCORING)
    assert rows_of(arms)["adamw"].point["optimizer.lr"] == 0.3


# --- what is written


def strange() -> list[Trial]:
    """All that can go wrong in one sweep, with names that need escaping."""
    told = Evaluation(10, 640, math.inf, {"acc": math.nan}, 1.0)
    odd = {"optimizer.lr": math.inf, "layers": [1, 2], "a|b": "<x>\n", "none": None, "flag": True, "big": 2**70}
    return [
        *confirmed("adamw", [1, 0, 0, 0, 2], FIVE),
        *confirmed("far", [0] * 5, [1e308] * 5),
        Trial("odd", "o|dd", "tune", 0, odd, 0, "diverged", 10, 1.0, "E: <script>\n\n", (told,)),
        Trial("none", "none", "tune", 0, {}, 0),
    ]


@pytest.mark.parametrize("trials", [[], strange(), strange()[-1:]], ids=["none", "strange", "running"])
@pytest.mark.parametrize("mode", [fair, search])
def test_all_files_are_written_and_strict(trials: list[Trial], mode: object, tmp_path: Path) -> None:
    board = fair(trials, SCORING) if mode is fair else search(trials, SCORING)
    results.write_results(str(tmp_path), board, trials)
    assert {path.name for path in tmp_path.iterdir()} == set(results.FILES)

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    told = json.loads((tmp_path / "leaderboard.json").read_text(), parse_constant=refuse)
    assert len(told["rows"]) == len(board.rows)
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [line["trial"] for line in lines] == [trial.id for trial in trials]
    assert pq.read_table(tmp_path / "trials.parquet").num_rows == len(trials)
    assert pq.read_table(tmp_path / "curves.parquet").num_rows == sum(len(trial.evaluations) for trial in trials)
    table = list(csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text())))
    assert len(table) == len(board.rows)
    assert results.as_text(board)
    table_lines = [line for line in (tmp_path / "leaderboard.md").read_text().splitlines() if line.startswith("|")]
    assert len(table_lines) == (len(board.rows) + 2 if board.rows else 0)  # no newline of a name breaks a row
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table_lines}) <= 1  # and no bar does


def test_trials_and_curves_come_back_from_parquet_with_their_types(tmp_path: Path) -> None:
    trials = confirmed("adamw", [1] * 5, FIVE)
    results.write_results(str(tmp_path), fair(trials, SCORING), trials)
    table = pq.read_table(tmp_path / "trials.parquet")
    assert [str(table.schema.field(name).type) for name in ("trial", "seed", "point.optimizer.lr", "value")] == [
        *("string", "int64", "double", "double")
    ]
    curves = pq.read_table(tmp_path / "curves.parquet").to_pylist()
    first = {name: curves[0][name] for name in ("trial", "step", "samples", "value", "device_s", "metric.acc")}
    assert first == {
        "trial": "adamw-tune-0.1-0", "step": 10, "samples": 640, "value": 0.4, "device_s": 1.0, "metric.acc": 0.5
    }  # fmt: skip


def test_never_is_null_in_json_and_inf_in_csv() -> None:
    board = fair(confirmed("sgd", [0] * 5, [0.6] * 5), SCORING)
    row = results.as_json(board)["rows"][0]
    assert (row["steps"], row["speed_up"]) == ({"value": None, "low": None, "high": None}, None)
    assert next(csv.DictReader(io.StringIO(results.as_csv(board))))["steps"] == "inf"


def test_a_long_leaderboard_is_cut_on_a_terminal_only() -> None:
    board = search([run("", "tune", 0, [0.5], lr=lr / 1000) for lr in range(1, 100)], SCORING)
    assert "… and 69 more in leaderboard.csv" in results.as_text(board)
    assert len(results.as_markdown(board).splitlines()) > 100
