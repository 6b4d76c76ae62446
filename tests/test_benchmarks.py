"""The benchmarks: what they conclude from pairs of runs, and that every case runs and does the work that it claims."""

import json
import math
import subprocess
import sys
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


def test_a_failing_side_is_named_with_its_error() -> None:
    from benchmarks import harness

    with pytest.raises(harness.BenchmarkError, match=r"broken: exit 1(.|\n)*No module named benchmarks\.nothing"):
        harness.run_side(harness.Side(name="broken", module="benchmarks.nothing"))


# --- the cases


def small(case: str, tmp_path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Run a case at its small size; return the first run of each side by series and side."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", case, "--small", "--pairs", "1"]
    command += ["--json", str(out), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())
    assert done.stdout.count("\n") == 2 + sum(len(series["comparisons"]) for series in result["series"])
    return {
        series["series"]: {side["name"]: side["runs"][0] for side in series["sides"]} for series in result["series"]
    }


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ingest_delivers_every_row_once_an_epoch(tmp_path: Path) -> None:
    from benchmarks.ingest.case import SMALL_EPOCHS, SMALL_ROWS
    from benchmarks.ingest.data import WARM

    rows = (WARM + SMALL_EPOCHS + 1) * SMALL_ROWS
    for series in small("ingest", tmp_path).values():
        ours, raw = series["ours"], series["raw"]
        assert ours["counters"]["rows"] == raw["counters"]["rows"] == rows
        assert ours["counters"]["object_store_bytes"] == rows * (784 + 1 + 20), "the index takes 20 bytes a row"
        assert ours["digest"] == raw["digest"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_loop_does_the_same_steps_on_both_sides(tmp_path: Path) -> None:
    for series in small("loop", tmp_path).values():
        assert {side["counters"]["steps"] for side in series.values()} == {40}
        assert len({side["digest"] for side in series.values()}) == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cold_start_reaches_a_first_step_on_all_sides(tmp_path: Path) -> None:
    (series,) = small("cold_start", tmp_path).values()
    for side in series.values():
        assert side["counters"]["steps"] == 1
        assert 0 < side["measures"]["first_step_s"] <= side["measures"]["command_s"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_checkpoint_saves_the_same_bytes_on_all_sides(tmp_path: Path) -> None:
    (series,) = small("checkpoint", tmp_path).values()
    assert len({json.dumps(side["counters"], sort_keys=True) for side in series.values()}) == 1
    assert series["ours"]["counters"]["bytes"] > 12e6
    assert series["ours"]["measures"]["stall_s"] < series["ours"]["measures"]["write_s"]
