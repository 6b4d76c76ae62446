"""The page of a sweep: whole, self-contained, escaped, and small, whatever came of the trials."""

import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastrain.sweeps.charts import Axis, Bar, Line, axis_of, bars, scatter, spans
from elastrain.sweeps.leaderboard import Leaderboard, Scoring, fair, search
from elastrain.sweeps.page import as_html, write_html
from elastrain.sweeps.trials import Evaluation, Outcome, Trial, TrialPhase

SCORING = Scoring(target=0.3, max_steps=1000, baseline="adamw", edges={"sgd": ["optimizer.lr"], "": ["optimizer.lr"]})
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Tags that are open, texts, attributes; an end without its begin is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a tag."""
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close it."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note a text."""
        self.texts.append(data)


def checked(page: str) -> Reader:
    """The page, read: it asks for nothing, runs nothing, and each number of its drawings is one."""
    read = Reader(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not re.search(r"https?:|url\(|@import", page)
    drawn = [value for name, value in read.values if name in ("points", "d", "x", "y", "cx", "cy", "width", "height")]
    assert not [value for value in drawn if re.search(r"nan|inf|e[+-]?\d", value)]
    return read


def run(
    arm: str, number: int, evaluations: int = 20, phase: TrialPhase = "tune", outcome: Outcome = "finished"
) -> Trial:
    rng = random.Random(f"{arm}{number}{phase}")  # noqa: S311 -- curves, not keys
    power = rng.uniform(-4, -1)
    point = {"optimizer.lr": 10**power, "batch": rng.choice([64, 256]), "act": rng.choice("ab")}
    end = 0.1 + 0.1 * (power + 2.5) ** 2
    steps = range(10, 10 * evaluations + 1, 10)
    told = tuple(Evaluation(s, 64 * s, end + 2 * math.exp(-s / 40), {}, s / 10) for s in steps)
    return Trial(f"{arm}-{phase}-{number}", arm, phase, number, point, number, outcome, 10 * evaluations, 1.0, "", told)


def full(arms: tuple[str, ...] = ("adamw", "sgd")) -> list[Trial]:
    """A sweep with all that a page shows."""
    trials = [run(arm, number) for arm in arms for number in range(12)]
    trials += [run(arm, number, phase="confirm") for arm in arms for number in range(5)]
    trials = [replace(one, point=trials[0].point) if one.phase == "confirm" else one for one in trials]
    trials += [run(arm, 50, 5, outcome="pruned") for arm in arms]
    trials += [replace(run(arm, 51, 3, outcome="diverged"), evaluations=()) for arm in arms]
    trials += [replace(run(arm, 52, 2, outcome="failed"), error="Traceback:\n  <b>&\nValueError: x") for arm in arms]
    return [*trials, replace(run(arms[0], 53, 2), outcome="running")]


def board_of(mode: str, trials: list[Trial]) -> Leaderboard:
    return fair(trials, SCORING) if mode == "fair" else search(trials, SCORING)


@pytest.mark.parametrize("mode", ["fair", "search"])
def test_a_page_holds_every_section(mode: str) -> None:
    trials = full() if mode == "fair" else full(("",))
    times = {trial.id: (float(n), n + 3.0) for n, trial in enumerate(trials)}
    page = as_html("digits", board_of(mode, trials), trials, times=times)
    read = checked(page)
    text = " ".join(read.texts)
    sections = ["Leaderboard", "Confirmed", "All trials", "What decides", "Trials left", "Parallel", "What ran when"]
    sections += ["optimizer.lr", "the best is on the edge", "Error", "<b>&", *(["to target"] if mode == "fair" else [])]
    assert not [section for section in sections if section not in text]
    assert read.tags.count("polyline") >= 2 * len([trial for trial in trials if trial.phase == "tune"]) - 4
    assert read.tags.count("polygon") == (2 if mode == "fair" else 1)  # the bands over seeds


@pytest.mark.parametrize("trials", [[], [run("", 0)], [replace(run("", 0), evaluations=(), outcome="running")]])
@pytest.mark.parametrize("mode", ["fair", "search"])
def test_one_trial_or_none_is_a_page(mode: str, trials: list[Trial]) -> None:
    read = checked(as_html("digits", board_of(mode, trials), trials))
    assert any("Leaderboard" in text for text in read.texts)


def test_the_page_is_written_beside_the_rest(tmp_path: Path) -> None:
    trials = full()
    url = write_html(str(tmp_path / "digits"), board_of("fair", trials), trials)
    assert Path(url) == tmp_path / "digits" / "report.html"
    assert "<title>digits · Elastrain</title>" in Path(url).read_text()


def test_names_and_values_that_look_like_markup_stay_text() -> None:
    evil = '<script>alert("1")</script>\' onload="x" {0} {name}'
    trials = [
        replace(run(evil, n), id=f"{n}{evil}", point={evil: [evil, "b"][n % 2], "x": n}, error=evil) for n in range(9)
    ]
    trials += [replace(one, phase="confirm", id=f"c{one.id}") for one in trials[:2]]
    scoring = replace(SCORING, metric=evil, baseline=evil, edges={evil: [evil]})
    times = {trial.id: (0.0, 1.0) for trial in trials}
    for board in (fair(trials, scoring), search(trials, scoring)):
        read = checked(as_html(evil, board, trials, times=times))
        assert evil in read.texts
        assert not [name for name, _ in read.values if name.startswith("on")]


def test_a_sweep_of_500_trials_stays_below_two_megabytes() -> None:
    trials = [run("", number, 50) for number in range(500)]
    points = {f"field{n}": n for n in range(12)}
    trials = [replace(one, point={**one.point, **{k: v * one.number for k, v in points.items()}}) for one in trials]
    page = as_html("large", search(trials, SCORING), trials)
    checked(page)
    assert len(page.encode()) < 2_000_000
    assert "460 more rows are in leaderboard.csv" in page


def test_long_curves_are_thinned() -> None:
    trials = [run("", number, 2000) for number in range(40)]
    assert len(as_html("long", search(trials, SCORING), trials)) < 600_000  # whole, they would be a megabyte


strange = st.sampled_from([0.0, -1.0, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan, 0.3]) | st.floats()
anything = strange | st.integers() | st.booleans() | st.none() | st.text(max_size=3) | st.just([1, 2])
outcomes = st.sampled_from(["running", "finished", "pruned", "diverged", "failed"])
phases = st.sampled_from(["tune", "defaults", "confirm"])


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(outcomes, phases, st.lists(strange | st.none(), max_size=4), anything, anything),
        min_size=1,
        max_size=9,
    )
)
def test_no_value_and_no_way_to_end_breaks_a_page(
    told: list[tuple[Outcome, TrialPhase, list[float | None], object, object]],
) -> None:
    trials = []
    for n, (outcome, phase, values, first, second) in enumerate(told):
        seen = tuple(Evaluation(10 * k, k, value, {}, float(k)) for k, value in enumerate(values))
        point = {"first": first} if n % 3 else {"first": first, "second": second}
        trials.append(Trial(f"t{n}", f"a{n % 2}", phase, n, point, n, outcome, 10 * len(values), 1.0, "", seen))
    for board in (fair(trials, SCORING), search(trials, replace(SCORING, goal="max"))):
        checked(as_html("any", board, trials, times={trials[0].id: (0.0, 0.0)}))


# --- charts


def test_axes_are_linear_logarithmic_or_names() -> None:
    assert not axis_of([0.1, 0.5, 0.9, 0.01, 0.6, 0.7], 0, 100).log  # even on a linear axis, though it spans 90 times
    log = axis_of([1e-4, 1e-3, 1e-2, 1e-1], 0, 100)
    assert log.log
    assert [text for _, text in log.marks(5)] == ["0.0001", "0.001", "0.01", "0.1"]
    assert log.at(1e-2) - log.at(1e-3) == pytest.approx(log.at(1e-3) - log.at(1e-4))
    names = axis_of(["b", None, "a"], 0, 90)
    assert sorted(round(names.at(name)) for name in ("a", "b", None)) == [15, 45, 75]


def test_values_far_out_do_not_flatten_the_rest() -> None:
    usual = [1 + n / 100 for n in range(30)]
    axis = axis_of([*usual, 1e6, 2e6], 200, 0, bad="high")
    assert axis.high < 2
    assert axis.at(1e6) == 0
    assert axis.at(math.nan) == 0
    flipped = axis_of([*usual, -1e6], 200, 0, bad="low")
    assert flipped.low > 0
    assert flipped.at(None) == 200


def test_a_bar_that_never_ends_has_no_length_and_an_interval_without_end_an_arrow() -> None:
    drawn = bars(
        [Bar("a", 10, 5, math.inf, "10", "c0"), Bar("b", math.inf, math.inf, math.inf, "0/5 reached", "c1")], "t"
    )
    assert 'width="0.0"' in drawn
    assert "l5 4l-5 4" in drawn
    assert "0/5 reached" in drawn


def test_trials_that_overlap_lie_on_lanes_of_their_own() -> None:
    drawn = spans([(0, 10, "c0", "a"), (5, 12, "c0", "b"), (10, 20, "c0", "c")])
    assert re.findall(r'y="(\d+)" width', drawn) == ["8", "24", "8"]


def test_the_best_range_is_shaded_where_the_best_lie() -> None:
    drawn = scatter([Line([(x, x)], "c0") for x in range(11)], [2, 4], "f", bad="high", size=(500, 230))
    found = re.search(r'class="range c0" x="([\d.]+)" y="8" width="([\d.]+)"', drawn)
    assert found
    axis = axis_of(range(11), 58, 490, room=0.05)
    left, width = map(float, found.groups())
    assert left == pytest.approx(axis.at(2) - 2, abs=0.1)
    assert left + width == pytest.approx(axis.at(4) + 2, abs=0.2)


def test_an_axis_clamps() -> None:
    assert [Axis(0, 10).at(value) for value in (-5, 0.5, 7)] == [0, 5, 10]
