"""A sweep goes on as what it was begun as, or says what differs; a fresh start leaves nothing of the one before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.sweeps.texts import BASE, FAIR, SEARCH

from elastrain.errors import ConflictError
from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.begun import events_of, extent_of, identity_of, is_over, store
from elastrain.sweeps.document import base_of
from elastrain.sweeps.outcome import OUTPUTS
from elastrain.sweeps.space import arms_of

Read = Callable[..., SweepSpec]
Begin = Callable[..., SweepSpec]


@pytest.fixture
def begun(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Return a function that begins a sweep, or goes on with it, as `elastrain sweep` does."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        (tmp_path / "data" / part).mkdir(parents=True)
        pq.write_table(pa.table({"x": [1.0, 2.0], "y": [0, 1]}), tmp_path / "data" / part / "0.parquet")

    def made(text: str, *sets: str, fresh: bool = False) -> SweepSpec:
        spec = read(text, *sets)
        url, identity = str(tmp_path / "sweep"), identity_of(arms_of(spec, base_of(spec)))
        if not fresh:
            events_of(url, spec, identity)
        store(url, spec, identity, fresh=fresh)
        return spec

    return made


@pytest.mark.parametrize("text", [SEARCH, FAIR])
def test_the_same_sweep_goes_on(begun: Begin, text: str) -> None:
    begun(text)
    begun(text, "budget.per_arm=50", "max_concurrent=1", "objective.target=0.5", "set.workers.cpus=2")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("warmup_steps: 20", "warmup_steps: 30", "schedule.warmup_steps: 20 -> 30"),
        ("cosine", "linear", "schedule.name: "),
        ("slots: 2", "slots: 4", "data.slots: 2 -> 4"),
    ],
)
def test_another_base_is_refused_with_what_differs(
    begun: Begin, tmp_path: Path, before: str, after: str, said: str
) -> None:
    begun(FAIR)
    (tmp_path / "train.yaml").write_text(BASE.replace(before, after))
    with pytest.raises(ConflictError, match=said) as caught:
        begun(FAIR)
    assert "another name, or start over with --fresh" in str(caught.value)
    begun(FAIR, fresh=True)
    begun(FAIR)


def test_what_arms_have_in_the_place_of_the_bases_may_change_there(begun: Begin, tmp_path: Path) -> None:
    begun(FAIR)
    (tmp_path / "train.yaml").write_text(BASE.replace("lr: 3.0e-3", "lr: 4.0e-3"))
    begun(FAIR)


@pytest.mark.parametrize("part", ["train", "test"])
def test_other_data_at_the_same_place_are_refused(begun: Begin, tmp_path: Path, part: str) -> None:
    begun(SEARCH)
    pq.write_table(pa.table({"x": [1.0, 3.0], "y": [0, 1]}), tmp_path / "data" / part / "0.parquet")
    with pytest.raises(ConflictError, match=f"the {'eval' if part == 'test' else part} data, "):
        begun(SEARCH)


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        ("search.seed=0", "search.seed=1", "search"),
        ("objective.max_steps=200", "objective.max_steps=220", "objective"),
        ("confirm.seeds=5", "confirm.seeds=4", "confirm"),
        ("confirm.top_k=2", "confirm=null", "confirm"),
    ],
)
def test_what_decides_a_trial_or_takes_a_confirmed_one_away_is_refused(
    begun: Begin, before: str, after: str, field: str
) -> None:
    begun(SEARCH, before)
    with pytest.raises(ConflictError, match=rf"other settings \({field}\)"):
        begun(SEARCH, after)


def test_more_may_be_confirmed_and_not_with_other_studies(begun: Begin) -> None:
    begun(SEARCH, "confirm=null")
    begun(SEARCH, "confirm={seeds: 2, top_k: 1}")
    begun(SEARCH, "confirm={seeds: 3, top_k: 2}")
    begun(FAIR, "confirm={seeds: 2, studies: true}", fresh=True)
    with pytest.raises(ConflictError, match="confirm"):
        begun(FAIR, "confirm={seeds: 3, studies: true}")


@pytest.mark.parametrize(
    "more", ["budget={unit: steps, per_arm: 16}", "budget.per_arm=17", "confirm.seeds=6", "confirm.top_k=2"]
)
def test_a_sweep_is_over_with_its_budget_in_its_unit_and_with_what_it_confirms(read: Read, more: str) -> None:
    spec = read(SEARCH)
    events: list[dict[str, Any]] = [{"kind": "start"}, {"kind": "end", "outcome": "done", "extent": extent_of(spec)}]
    assert is_over(events, spec)
    assert is_over(events, read(SEARCH, "objective.target=0.9"))
    assert not is_over(events, read(SEARCH, more))
    assert not is_over([*events, {"kind": "start"}], spec)


def test_a_fresh_start_leaves_nothing_of_the_sweep_before(begun: Begin, tmp_path: Path) -> None:
    begun(SEARCH)
    folder = tmp_path / "sweep"
    for name in OUTPUTS:
        if "." in name:
            (folder / name).write_text("old")
        else:
            (folder / name).mkdir()
            (folder / name / "sgd.yaml").write_text("old")
    (folder / "notes.txt").write_text("mine")
    begun(SEARCH)
    assert {path.name for path in folder.iterdir()} >= set(OUTPUTS)  # who goes on keeps them until there are new ones
    begun(SEARCH, fresh=True)
    assert {path.name for path in folder.iterdir()} == {"spec.yaml", "base.json", "notes.txt"}
