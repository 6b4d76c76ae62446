"""What a plan says of a sweep: arms, points, rungs, trials at once, cost, warnings; what can never fit is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.sweeps.texts import FAIR, SEARCH
from typer.testing import CliRunner

from elastrain.__main__ import app
from elastrain.errors import ResourceError, SpecError
from elastrain.spec.sweep import SweepSpec
from elastrain.spec.train import WorkersSpec
from elastrain.sweeps.forecast import as_text, fits, forecast_sweep, local_cpus, machine_gpus
from elastrain.sweeps.rungs import expected_steps

Read = Callable[..., SweepSpec]


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("elastrain.sweeps.forecast.machine_cpus", lambda: 8)
    monkeypatch.setattr("elastrain.sweeps.forecast.machine_gpus", lambda: 0)


def test_a_plan_counts_trials_and_steps(read: Read) -> None:
    found = forecast_sweep(read(SEARCH))
    assert found["trials"] == {"tune": 16, "defaults": 0, "confirm": 5}
    assert found["rungs"] == [20, 60, 180]
    assert found["steps"] == (16 + 5) * 200
    assert found["steps_expected"] == round(16 * (20 + 40 / 3 + 120 / 9 + 20 / 27)) + 5 * 200
    assert found["samples"] == found["steps"] * 256
    assert found["slots"] == 4
    assert found["device_s"] is None
    (arm,) = found["arms"]
    assert arm["dimensions"]["optimizer.lr"] == "log 0.0001 to 0.1"
    assert len(arm["first_points"]) == 3
    assert forecast_sweep(read(SEARCH), device_s_per_step=0.5)["device_s"] == found["steps"] / 2


def test_a_fair_plan_has_a_row_of_defaults_an_arm(read: Read) -> None:
    found = forecast_sweep(read(FAIR))
    assert found["trials"] == {"tune": 18, "defaults": 3, "confirm": 15}
    assert [arm["trials"] for arm in found["arms"]] == [6, 6, 6]
    assert any(each.startswith("without confirm") for each in found["warnings"])


def test_trials_have_the_smallest_number_of_workers_as_in_the_run(read: Read) -> None:
    found = forecast_sweep(read(SEARCH, "set={workers: {min: 1, max: 4}, data: {slots: 4}}"))
    assert (found["workers"]["min"], found["workers"]["max"], found["slots"]) == (1, 1, 8)
    assert "1 a trial, of 1 CPUs each" in as_text(found)


@pytest.mark.parametrize(
    ("budget", "trials", "steps"),
    [
        ("{unit: steps, per_arm: 450}", 3, 3 * 200),
        ("{unit: trials, per_arm: 2}", 2, 2 * 200),
        ("{unit: device_seconds, per_arm: 60}", None, None),
    ],
)
def test_a_budget_in_any_unit_is_told(read: Read, budget: str, trials: int | None, steps: int | None) -> None:
    found = forecast_sweep(read(SEARCH.replace("confirm: {seeds: 5, top_k: 1}\n", ""), f"budget={budget}"))
    assert (found["trials"]["tune"], found["steps"]) == (trials, steps)
    assert found["device_s"] == (60 if trials is None else None)
    assert as_text(found)


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([{"CPU": 8}], {"max": 2, "min": 2}, 4),
        ([{"CPU": 3}, {"CPU": 3}], {"max": 2, "min": 2, "cpus": 2}, 0),
        ([{"CPU": 1}], {"max": 2, "min": 2}, 0),
        ([{"CPU": 8}], {"max": 4, "min": 1}, 8),
        ([{"CPU": 8, "GPU": 2}], {"gpus": 0.25}, 8),
        ([{"CPU": 8, "GPU": 2}], {"gpus": 0.5, "cpus": 0.1}, 4),
        ([{"CPU": 8, "GPU": 2}], {"gpus": 1, "accelerator": "H100"}, 0),
        ([{"CPU": 8}], {"gpus": 1}, 0),
        ([], {}, 0),
        ([{"CPU": 0.3}], {"cpus": 0.1}, 3),
    ],
)
def test_trials_at_once_are_arithmetic(nodes: list[dict[str, float]], workers: dict[str, Any], expected: int) -> None:
    assert fits(nodes, WorkersSpec.model_validate(workers)) == expected


def test_a_sweep_starts_a_ray_of_the_cpus_that_the_plan_counts() -> None:
    assert local_cpus(WorkersSpec(min=1, max=4)) == 8
    assert local_cpus(WorkersSpec(min=3, max=4, cpus=4)) == 12


def test_a_machine_without_the_gpus_is_refused_and_a_cluster_is_not(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read(SEARCH, "set={workers: {gpus: 1.0}}")
    with pytest.raises(ResourceError, match=r"1 workers of 1 GPUs each: this machine has 0 GPUs; lower workers\.gpus"):
        forecast_sweep(spec)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    found = forecast_sweep(spec)
    assert found["slots"] is None
    assert "--address asks a cluster" in as_text(found)


def test_a_cluster_at_an_address_is_asked_in_place_of_this_machine(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, WorkersSpec]] = []

    def holds(address: str, workers: WorkersSpec) -> int:
        asked.append((address, workers))
        return 40

    monkeypatch.setattr("elastrain.sweeps.pool.ask_cluster", holds)
    read(SEARCH)
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--plan", "--set", "set={workers: {min: 1, max: 2, gpus: 1}}"]
    text = CliRunner().invoke(app, [*command, "--address", "10.0.0.1:6379"], catch_exceptions=False).stdout
    assert "40 on the cluster as it is now" in text
    ((address, workers),) = asked
    assert (address, workers.min, workers.max, workers.gpus) == ("10.0.0.1:6379", 1, 1, 1.0)
    with pytest.raises(ResourceError, match="this machine has 0 GPUs"):
        CliRunner().invoke(app, [*command, "--address", "local"], catch_exceptions=False)


def test_more_cpus_than_there_are_still_make_one_trial(read: Read) -> None:
    assert forecast_sweep(read(SEARCH, "set={workers: {cpus: 99.0}}"))["slots"] == 1
    assert forecast_sweep(read(SEARCH, "max_concurrent=3"))["slots"] == 3


def test_visible_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, count in (("", 0), ("-1", 0), ("0", 1), ("1,3", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert machine_gpus() == count


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{method: asha, grace: 10, factor: 4}", [20, 40, 160]),
        ("{method: asha, grace: 110, factor: 2}", [120]),
        ("{method: median, grace: 130}", [140, 160, 180]),
    ],
)
def test_rungs_are_evaluations(read: Read, rule: str, expected: list[int]) -> None:
    assert forecast_sweep(read(SEARCH, f"early_stop={rule}"))["rungs"] == expected


NINE_ROUNDS = ("early_stop={method: hyperband, grace: 20, factor: 3}", "objective.max_steps=180")


@pytest.mark.parametrize(
    ("sets", "trials", "expected"),
    [
        (("early_stop=null",), 16, 200),
        (("early_stop={method: median, grace: 20}",), 16, 200),
        (("early_stop={method: asha, grace: 20, factor: 3}", "objective.max_steps=180"), 16, 180 * 7 / 27),
        (("early_stop={method: asha, grace: 30, factor: 3}",), 16, 40 + 60 / 3 + 100 / 9),  # 30 and 90 at 40 and 100
        (NINE_ROUNDS, 9, 20 + 40 / 3 + 120 / 9),  # the first bracket
        (NINE_ROUNDS, 17, (9 * (20 + 40 / 3 + 120 / 9) + 5 * (60 + 120 / 3) + 3 * 180) / 17),
        (NINE_ROUNDS, 26, (2 * 9 * (20 + 40 / 3 + 120 / 9) + 5 * (60 + 120 / 3) + 3 * 180) / 26),
    ],
)
def test_ideal_halving_costs_what_the_arithmetic_says(
    read: Read, sets: tuple[str, ...], trials: int, expected: float
) -> None:
    spec = read(SEARCH, *sets)
    assert expected_steps(spec, trials) == pytest.approx(expected)
    assert forecast_sweep(spec)["steps_expected"] == round(16 * expected_steps(spec, 16)) + 5 * spec.objective.max_steps


def test_a_rule_that_would_stop_nobody_is_refused_by_the_plan_as_by_the_run(read: Read) -> None:
    late = read(SEARCH, "early_stop={method: hyperband, grace: 100, factor: 3}", "objective.max_steps=180")
    with pytest.raises(SpecError, match="grace 100: hyperband with factor 3 prunes after 60 of 180 steps"):
        forecast_sweep(late)


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["confirm.seeds=1"], "confirm.seeds 1: an interval over so few seeds says little; 5 are usual"),
        ([], "search: data.global_batch varies, and trials are compared at equal steps"),
        (["early_stop.grace=10"], "early_stop.grace 10 lies before the first evaluation, at step 20: that counts"),
        (["budget.per_arm=3"], "search: 3 points for 6 fields leave most of the space out"),
        (["space.l1={choice: [0.1, 0.2, 0.3]}"], "search: l1 is a choice, which has no edges; a range warns"),
        (
            [
                "space={optimizer.lr: {grid: [0.1, 0.2]}, l1: {grid: [0.1, 0.2]}}",
                "search.method=grid",
                "budget.per_arm=3",
            ],
            "search: the grid has 4 points, and the budget pays for 3: the rest is not tried",
        ),
    ],
)
def test_what_deserves_a_warning_gets_one(read: Read, sets: list[str], expected: str) -> None:
    assert any(each.startswith(expected) for each in forecast_sweep(read(SEARCH, *sets))["warnings"])


def test_pbt_over_what_a_run_cannot_change_is_refused_by_the_plan(read: Read) -> None:
    text = SEARCH.replace("early_stop: {method: asha, grace: 20, factor: 3}\n", "")
    with pytest.raises(SpecError, match=r"search\.method pbt changes runs that go on, and data\.global_batch cannot"):
        forecast_sweep(read(text, "search.method=pbt"))


def test_the_verb_prints_text_or_one_object(read: Read, tmp_path: Path) -> None:
    read(FAIR)
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--plan", "--set", "budget.per_arm=7"]
    text = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert "nesterov (nesterov): points 7" in text
    assert "warning: without confirm" in text
    line = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout
    assert json.loads(line)["trials"]["tune"] == 21
