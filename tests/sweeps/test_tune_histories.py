"""In whatever order Ray Tune's actors, the cells and the desk are heard, each trial of a sweep ends, and once."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from tests.sweeps.texts import SEARCH
from tests.sweeps.tune_stage import Theatre, quiet

from elastrain.observe.ledger import read_ledger
from elastrain.spec.sweep import SweepSpec

pytestmark = pytest.mark.usefixtures("quiet")
__all__ = ["quiet"]

BANDS = ("early_stop={method: hyperband, grace: 20, factor: 2}", "objective.every=20", "objective.max_steps=60")
DEEP = ("early_stop={method: hyperband, grace: 20, factor: 3}", "objective.every=20", "objective.max_steps=180")
ASHA = ("early_stop={method: asha, grace: 20, factor: 2}", "objective.every=20", "objective.max_steps=100")
PBT = ("search.method=pbt", "early_stop=null", "space={optimizer.lr: {log: [1.0e-4, 0.1]}}", "objective.max_steps=100")
MEDIAN = ("early_stop={method: median, grace: 20}", "objective.every=20", "objective.max_steps=100")

Stage = Callable[[int, Sequence[str], int], Theatre]


@pytest.fixture
def stage(read: Callable[..., SweepSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    def made(seed: int, sets: Sequence[str], trials: int) -> Theatre:
        spec = read(SEARCH, *sets, "confirm=null", f"budget.per_arm={trials}")
        return Theatre(spec, tmp_path / f"sweep-{seed}", seed, monkeypatch)

    return made


def outcomes(on: Theatre) -> dict[str, str]:
    ended = Counter(event["trial"] for event in read_ledger(on.url) if event["kind"] == "ended")
    assert set(ended.values()) == {1}, "an end twice"
    for trial in on.trials():
        assert [entry.step for entry in trial.evaluations][:1] in ([], [20]), "an evaluation was never told"
        assert {b.step - a.step for a, b in pairwise(trial.evaluations)} <= {20}, "an evaluation was never told"
    return {trial.id: trial.outcome for trial in on.trials()}


@pytest.mark.parametrize(("sets", "trials", "finish"), [(BANDS, 4, {0, 2, 3}), (DEEP, 9, {0})])
def test_hyperband_ends_each_trial_and_the_same_ones_finish_in_any_order(
    stage: Stage, sets: Sequence[str], trials: int, finish: set[int]
) -> None:
    for seed in range(5):
        on = stage(seed, sets, trials)
        assert on.play()
        found = outcomes(on)
        assert len(found) == trials
        assert {int(trial[-4:]) for trial, outcome in found.items() if outcome == "finished"} == finish, (seed, found)
        assert set(found.values()) <= {"finished", "pruned"}, (seed, found)


@pytest.mark.parametrize("sets", [BANDS, DEEP, ASHA, MEDIAN, PBT], ids=["bands", "deep", "asha", "median", "pbt"])
def test_trials_that_diverge_and_cells_that_break_off_keep_nobody_from_ending(
    stage: Stage, sets: Sequence[str]
) -> None:
    for seed in range(3):
        on = stage(seed, sets, 7)
        on.crashes, on.moves = 0.1, 0.02
        on.diverges = {f"search-{number:04d}": on.chance.choice((20, 40, 60)) for number in range(7) if number % 3 == 0}
        assert on.play()
        found = outcomes(on)
        assert len(found) == 7
        assert set(found.values()) <= {"finished", "pruned", "diverged", "failed"}, (seed, found)


@pytest.mark.parametrize("sets", [BANDS, DEEP, ASHA, MEDIAN], ids=["bands", "deep", "asha", "median"])
def test_a_sweep_that_is_killed_goes_on_to_its_end(stage: Stage, sets: Sequence[str]) -> None:
    """Twice, at any time; what was not yet in the ledger is done again."""
    for seed in range(3):
        on = stage(seed, sets, 7)
        for _ in range(2):
            on.play(until=on.chance.randrange(200))
        assert on.play()
        found = outcomes(on)
        assert len(found) == 7
        assert set(found.values()) <= {"finished", "pruned"}, (seed, found)
        assert found["search-0000"] == "finished", "the best of all"


@pytest.mark.parametrize("sets", [DEEP, PBT], ids=["deep", "pbt"])
def test_trials_that_pause_follow_the_cells_that_there_are(stage: Stage, sets: Sequence[str]) -> None:
    on = stage(0, sets, 9)
    on.cells = 1
    assert on.play()
    assert on.actors.peak <= 1 + 2, "what waits for a cell has no process of its own"
    on = stage(1, sets, 9)
    on.cells = 1
    on.later = 4
    assert on.play()
    assert 4 <= on.actors.peak <= 4 + 2
