"""The benchmarks: what they conclude from pairs of runs, and that every case runs and does the work that it claims."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


# --- what is concluded from runs


def test_a_ratio_is_the_median_over_pairs_and_not_over_runs() -> None:
    from benchmarks.stats import median_ratio

    found = median_ratio([1.0, 10.0, 100.0], [2.0, 20.0, 50.0])  # a machine that slows down by 100 meets both sides
    assert found.value == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(2.0)


def test_an_interval_holds_the_median_and_is_the_same_every_time() -> None:
    from benchmarks.stats import median_difference

    ours, others = [5.0, 7.0, 6.0, 9.0], [1.0, 2.0, 3.0, 4.0]
    found = median_difference(ours, others)
    assert found.low <= found.value == 4.5 <= found.high
    assert found == median_difference(ours, others)


def test_one_pair_has_an_interval_without_width() -> None:
    from benchmarks.stats import median_ratio, spread

    found = median_ratio([3.0], [2.0])
    assert found.low == found.value == found.high == pytest.approx(1.5)
    assert math.isnan(spread([3.0]))


def test_sides_run_forth_and_back() -> None:
    from benchmarks.stats import alternating

    assert alternating(["a", "b", "c"], 3) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


@pytest.mark.parametrize(("better", "value", "met"), [("more", 0.7, True), ("more", 0.69, False), ("less", 0.69, True)])
def test_a_target_is_a_bound_on_the_better_side(better: Any, value: float, met: bool) -> None:  # noqa: FBT001
    from benchmarks.harness import Comparison

    assert Comparison(measure="m", unit="s", better=better, other="x", target=0.7).met(value) is met
    assert Comparison(measure="m", unit="s", better=better, other="x").met(value) is None


def run(measure: float, counter: int = 1, digest: str | None = None) -> dict[str, Any]:
    """What a side prints."""
    return {"measures": {"time_s": measure}, "counters": {"rows": counter}, "digest": digest}


def test_sides_that_did_other_work_are_refused() -> None:
    from benchmarks import harness

    series = harness.Series(name="s", sides=(), comparisons=())
    harness._same_work(series, {"ours": [run(1.0, digest="d"), run(2.0, digest="d")], "peer": [run(1.0, 5)]})
    with pytest.raises(harness.BenchmarkError, match="counters differ"):
        harness._same_work(series, {"ours": [run(1.0, 1), run(1.0, 2)]})
    with pytest.raises(harness.BenchmarkError, match="did not deliver the same"):
        harness._same_work(series, {"ours": [run(1.0, digest="a")], "peer": [run(1.0, digest="b")]})


def test_the_table_shows_losses() -> None:
    from benchmarks import harness, table

    line = harness.Comparison(measure="time_s", unit="s", better="less", other="peer", target=1.0)
    compared = harness._compare(line, {"ours": [run(2.0)], "peer": [run(1.0)]})
    text = table.markdown([{"case": "c", "series": [{"series": "s", "comparisons": [compared]}]}])
    assert "| c: s | time, s | 2 | peer | 1 | 2× (2–2) | ≤ 1× | **missed** |" in text


def test_one_process_may_hold_both_sides_and_a_target_may_have_a_condition() -> None:
    from benchmarks import harness, table

    def line(most: float) -> harness.Comparison:
        return harness.Comparison(
            measure="new_us",
            against="old_us",
            unit="µs",
            better="less",
            other="ours",
            label="a step",
            other_label="old",
            target=1.1,
            where=("share", most, "its share"),
        )

    runs = {"ours": [{"measures": {"new_us": 3.0, "old_us": 2.0, "share": 0.04}}]}
    stands, falls = (harness._compare(line(most), runs) for most in (0.05, 0.03))
    assert (stands["met"], falls["met"]) == (False, None)
    text = table.markdown([{"case": "c", "series": [{"series": "s", "comparisons": [stands, falls]}]}])
    found = "| c: s | a step, µs | 3 | old | 2 | 1.5× (1.5–1.5) | ≤ 1.1× if its share 0.04 ≤"
    assert f"{found} 0.05 | **missed** |" in text
    assert f"{found} 0.03 |  |" in text


def test_what_a_run_did_not_come_to_is_said_to_be_not_measured() -> None:
    from benchmarks import harness, table

    line = harness.Comparison(measure="other_s", unit="s", better="less", other="peer", target=1.0)
    compared = harness._compare(line, {"ours": [run(2.0)], "peer": [run(1.0)]})
    json.dumps(compared, allow_nan=False)
    text = table.markdown([{"case": "c", "series": [{"series": "s", "comparisons": [compared]}]}])
    assert "| – | peer | – | not measured | ≤ 1× |  |" in text


def test_a_case_that_takes_long_is_asked_for_by_name() -> None:
    from benchmarks.__main__ import cases, short_cases

    assert set(cases()) - set(short_cases()) == {"autoscale", "goodput", "sweep_digits"}


def test_a_failing_side_is_named_with_its_error() -> None:
    from benchmarks import harness

    with pytest.raises(harness.BenchmarkError, match=r"broken: exit 1(.|\n)*No module named benchmarks\.nothing"):
        harness.run_side(harness.Side(name="broken", module="benchmarks.nothing"))


# --- what a kill cost


def test_a_recovery_ends_with_a_step_that_was_not_done_before() -> None:
    from benchmarks.recovery.timeline import Timeline

    in_place = Timeline([(0, 1.0), (1, 2.0), (2, 3.0), (3, 3.9), (4, 4.9)])
    assert in_place.recovery_s(3.5) == pytest.approx(0.4)
    assert (in_place.done(3.5), in_place.redone(), in_place.lost()) == (2, 0, 0)
    assert in_place.recovery_s(3.895) == pytest.approx(1.005), "step 3 was as good as done"
    restarted = Timeline([(0, 1.0), (1, 2.0), (2, 3.0)])
    restarted.add([(1, 2.0), (1, 13.0)])  # seen before, and done again
    assert restarted.recovery_s(3.5) is None
    restarted.add([(2, 14.0), (3, 15.0), (5, 17.0)])
    assert restarted.recovery_s(3.5) == pytest.approx(11.5)
    assert (restarted.redone(), restarted.lost()) == (2, 1)
    assert restarted.counted(2.5, 15.0) == 2, "a step counts when it was first done"
    assert restarted.step_s(0.0, 3.0) == pytest.approx(1.0)


def test_the_pause_of_a_join_is_what_is_longer_than_usual_on_its_side() -> None:
    from benchmarks.recovery.timeline import Timeline

    slow, fast = [0.1 * step for step in range(20)], [1.9 + 0.04 + 0.05 * step for step in range(1, 20)]
    ends = list(enumerate(slow + fast))
    assert Timeline(ends).join_pause_s(20) == pytest.approx(0.04)
    assert Timeline(ends).join_pause_s(37) is None, "too few steps after it"


def test_a_join_is_a_resize_after_the_kill_with_more_workers_than_before() -> None:
    from benchmarks.recovery.ours import joined, told

    shrunk = {"kind": "resize", "t": 6.0, "step": 50, "before": 2, "workers": 1}
    grown = {"kind": "resize", "t": 9.0, "step": 70, "before": 1, "workers": 2}
    assert joined([{**grown, "t": 4.0}, shrunk], 5.0) is None
    assert joined([shrunk, grown], 5.0) == 70
    lost = {"kind": "worker_lost", "t": 5.4, "recovery_s": 0.4, "steps_redone": 0, "detect_s": 0.1, "state_s": 0.0}
    assert told({"events": [{**lost, "t": 1.0}, lost]}, 5.0) == {
        "told_recovery_s": 0.4,
        "told_detect_s": 0.1,
        "told_state_s": 1e-6,
    }


def test_only_what_a_command_has_started_is_killed_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    from benchmarks.recovery.contender import Command
    from benchmarks.script import lives

    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    command = Command([sys.executable, "-c", f"{code}; time.sleep(60)"], tmp_path)
    while not (found := command.look()):
        time.sleep(0.01)
    (child,) = found.items()
    with pytest.raises(AssertionError, match="not a process of this command"):
        command.kill(os.getpid())
    command.end()
    assert not lives(*child)
    with pytest.raises(SystemExit, match="the command ended with -15"):
        command.look()


# --- trials of a sweep


def test_trials_that_are_counted_on_take_as_long_as_those_that_were_run() -> None:
    from benchmarks.sweep.work import measured

    assert measured(0.0, [10.0, 14.0, 12.0], 3) == {
        "first_s": 10.0,
        "trial_s": 2.0,
        "all_s": 14.0,
        "trials_per_h": 771.4285714285714,
    }
    assert measured(0.0, [10.0, 14.0, 12.0], 8)["all_s"] == 24.0
    assert measured(5.0, [15.0], 4)["all_s"] == 40.0, "one alone stands for all"


def test_a_side_with_another_loss_is_void() -> None:
    from types import SimpleNamespace

    import numpy as np
    from benchmarks.sweep.work import check

    rows: Any = SimpleNamespace(order=np.zeros((1, 1, 1)), expected=[0.5, 0.25])
    assert check({0: 0.5, 1: 0.2500005}, rows) == pytest.approx(5e-7)
    for loss in (0.250002, math.nan):
        with pytest.raises(SystemExit, match="void"):
            check({0: 0.5, 1: loss}, rows)


def test_recorded_curves_are_stopped_where_a_sweep_would_stop_them() -> None:
    from benchmarks.sweep.asha import replay
    from benchmarks.sweep.work import RECORDED_EVERY, RECORDED_STEPS

    evaluations = RECORDED_STEPS // RECORDED_EVERY
    curves = [[float(place)] * evaluations for place in range(9)]  # the best comes first
    share, best = replay(curves, 1)
    assert (share, best) == ((evaluations + 8 * 2) / (9 * evaluations), 0.0)
    share, best = replay(curves[::-1], 1)
    assert best == 0.0
    assert share > 0.3, "whoever comes is better than all before"


# --- the cases


def small(case: str, work: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Run a case at its small size; return the first run of each side by series and side."""
    out = work / f"{case}.json"
    command = [sys.executable, "-m", "benchmarks", case, "--small", "--pairs", "1"]
    command += ["--json", str(out), "--work", str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())
    assert done.stdout.count("\n") == 2 + sum(len(series["comparisons"]) for series in result["series"])
    return {
        series["series"]: {side["name"]: side["runs"][0] for side in series["sides"]} for series in result["series"]
    }


@pytest.mark.bench
@pytest.mark.timeout(600)
def test_loop_does_the_same_steps_on_both_sides(work: Path) -> None:
    for series in small("loop", work).values():
        assert {side["counters"]["steps"] for side in series.values()} == {40}
        assert len({side["digest"] for side in series.values()}) == 1


@pytest.mark.bench
@pytest.mark.timeout(600)
def test_cold_start_reaches_a_first_step_on_all_sides(work: Path) -> None:
    (series,) = small("cold_start", work).values()
    for side in series.values():
        assert side["counters"]["steps"] == 1
        assert 0 < side["measures"]["first_step_s"] <= side["measures"]["command_s"]


@pytest.mark.bench
@pytest.mark.timeout(600)
def test_submit_sends_as_many_jobs_each_way(work: Path) -> None:
    series = small("submit", work)
    assert series["a job is sent"]["ours"]["counters"] == {"jobs": 2}
    assert series["a cluster is checked"]["ours"]["counters"] == {"turns": 1}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_checkpoint_saves_the_same_bytes_on_all_sides(work: Path) -> None:
    (series,) = small("checkpoint", work).values()
    assert len({json.dumps(side["counters"], sort_keys=True) for side in series.values()}) == 1
    assert series["ours"]["counters"]["bytes"] > 12e6
    assert series["ours"]["measures"]["stall_s"] < series["ours"]["measures"]["write_s"]


@pytest.mark.bench
@pytest.mark.timeout(600)
def test_bitwise_comes_to_the_same_bits_at_any_number_of_workers(work: Path) -> None:
    series = small("bitwise", work)
    for sides in series.values():
        assert len({side["digest"] for side in sides.values()}) == 1
        assert {name: side["counters"]["workers"] for name, side in sides.items()} == {"1 worker": 1, "2 workers": 2}
    gradient_bytes, sums = 4 * 10_000, series["sum of 10,000 floats"]
    assert sums["1 worker"]["counters"]["peak_bytes_adding_8_slots"] == 4 * gradient_bytes, "the buffer and log2(8)"
    assert sums["2 workers"]["counters"]["peak_bytes_adding_24_slots"] == 5 * gradient_bytes


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_recovery_goes_on_after_a_kill_on_all_sides(work: Path) -> None:
    (series,) = small("recovery", work).values()
    for side in series.values():
        assert 0 < side["measures"]["recovery_s"] < 120
        assert side["measures"]["steps_lost"] == 0
        assert 0.05 <= side["measures"]["step_s"] < 0.5


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_sweep_comes_to_the_same_losses_on_all_sides_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from benchmarks.sweep.work import TOLERANCE

    found = small("sweep", tmp_path)
    one = found["one worker a trial"]
    assert all(side["measures"]["furthest"] <= TOLERANCE for side in one.values())
    assert one["ours"]["counters"] == {"trials": 4, "workers": 1, "left_behind": 0}
    (decided,) = found["decisions"].values()
    assert decided["counters"] == {"trials": 4, "left_behind": 0}
    assert decided["measures"]["decisions"] + decided["measures"]["pruned"] >= 4, "each trial was decided on once"
    (asha,) = found["asha"].values()
    assert 0 < asha["measures"]["share_1"] < 1


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_autoscale_submits_a_run_for_which_two_nodes_come_and_go(work: Path) -> None:
    (series,) = small("autoscale", work).values()
    assert series["ours"]["counters"] == {"rounds": 1, "stuck": 0}
    assert series["ours"]["measures"]["allowed_up_s"] == 12.0


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_goodput_counts_the_steps_of_a_window_with_a_kill(work: Path) -> None:
    (series,) = small("goodput", work).values()
    for side in series.values():
        measures = side["measures"]
        assert measures["kills"] == 1
        assert measures["window_steps"] > 0
        assert 0 < measures["goodput"] < 1.2
