"""What was prepared, packed by Ray: reported, written, and the same bytes on any number of CPUs."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from tests.data.test_documents import options as of_documents
from tests.data.test_documents import planted, unpacked
from tests.data.test_preparation import options, people, rows_of, with_nulls

from elastrain import storage
from elastrain.data.card import PAGE
from elastrain.data.chunks import PackOptions
from elastrain.data.columns import Array
from elastrain.data.dataset import Dataset
from elastrain.data.pack import pack_dataset
from elastrain.errors import ConflictError, DataError

ONE_CPU = """
import pickle, sys
import ray
from elastrain.data.pack import pack_dataset
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
for source, out, options in pickle.load(sys.stdin.buffer):
    pack_dataset(source, out, options)
"""


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def files_of(folder: Path) -> dict[str, bytes]:
    """Return all files of a pack: shards, manifests and cards."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def twins(folder: Path) -> dict[str, Array]:
    """Three Parquet files of rows of which a third are there before, in the same file or another; return all rows."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    base = {"x": rng.random((2000, 3)), "who": rng.integers(0, 300, 2000), "label": rng.integers(0, 4, 2000)}
    take = np.concatenate([np.arange(2000), rng.integers(0, 2000, 1000)])
    rng.shuffle(take)
    rows = {name: array[take] for name, array in base.items()}
    rows["label"][-1] = (rows["label"][-1] + 1) % 4
    for part in range(3):
        held = {name: array[part * 1000 : part * 1000 + 1000] for name, array in rows.items()}
        table = pa.table({**{k: held[k] for k in ("who", "label")}, "x": held["x"].tolist()})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=170)
    return rows


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_what_was_removed_is_reported_and_written(tmp_path: Path) -> None:
    with_nulls(tmp_path / "in")
    given = options(label="kind", nulls="drop", non_finite="drop", license="CC0-1.0", origin="a survey")
    result = pack_dataset(f"csv:{tmp_path}/in", str(tmp_path / "out"), given)
    card = result["cards"]["train"]
    place = f"{tmp_path}/in/b.csv, row"
    assert card["steps"] == [
        {"step": "read", "rows": 2000},
        {"step": "nulls", "removed": 5, "rows": 1995, "first": f"{place} 10, column 'n'"},
        {"step": "non-finite", "removed": 1, "rows": 1994, "first": f"{place} 50, column 'x'"},
    ]
    assert (card["rows"], card["license"], card["origin"]) == (1994, "CC0-1.0", "a survey")
    rows = rows_of(str(tmp_path / "out" / "train"))
    left = [*range(1000), *(row for row in range(1000) if row not in (10, 20, 30, 40, 50, 60))]
    assert rows["n"].tolist() == left
    assert np.isfinite(rows["x"]).all()
    n, x, kind = card["columns"]
    assert [(each["nulls"], each["not_finite"]) for each in (n, x, kind)] == [(2, 0), (2, 1), (1, 0)]
    assert (n["distinct"], x["distinct"], kind["distinct"], n["distinct_is_estimate"]) == (1000, 1000, 2, False)
    assert (n["min"], n["max"], n["mean"]) == (0, 999, pytest.approx(np.mean(left)))
    assert (x["min"], x["max"]) == (0.0, 499.5)
    assert card["labels"]["counts"] == {"cat": sum(v % 2 for v in left), "dog": sum(v % 2 == 0 for v in left)}
    assert Dataset.open(str(tmp_path / "out" / "train")).info["card"] == card
    text = (tmp_path / "out" / "train" / PAGE).read_text()
    for words in ("1,994 rows", "license: CC0-1.0", "| nulls | 5 | 1,995 |", "| non-finite | 1 |", "| cat | "):
        assert words in text, text
    assert pack_dataset(f"csv:{tmp_path}/in", str(tmp_path / "out"), given)["cards"] == result["cards"]
    with pytest.raises(ConflictError, match="nulls drop"):
        pack_dataset(f"csv:{tmp_path}/in", str(tmp_path / "out"), options(label="kind"))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_first_of_equal_rows_stays(tmp_path: Path) -> None:
    rows = twins(tmp_path / "in")
    given = options(duplicates="drop", label="label")
    result = pack_dataset(f"parquet:{tmp_path}/in", str(tmp_path / "out"), given)
    whole = np.concatenate([rows["who"][:, None], rows["label"][:, None], rows["x"]], axis=1)
    _, first = np.unique(whole, axis=0, return_index=True)
    found = rows_of(str(tmp_path / "out" / "train"))
    assert np.array_equal(found["x"], rows["x"][np.sort(first)])
    card = result["cards"]["train"]
    assert card["steps"][1]["removed"] == card["looked_for"]["duplicates"] == 3000 - len(first)
    contradictions = card["looked_for"]["contradictions"]
    for pair in contradictions["first"]:
        one, two = (int(place.removeprefix("train ")) for place in pair["rows"])
        assert np.array_equal(found["x"][one], found["x"][two])
        assert [found["label"][one], found["label"][two]] == pair["labels"]
    counted = pack_dataset(f"parquet:{tmp_path}/in", str(tmp_path / "all"), options(duplicates="count"))
    assert counted["cards"]["train"]["looked_for"]["duplicates"] == 3000 - len(first)
    assert counted["splits"]["train"]["rows"] == 3000


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_duplicates_by_a_key_and_across_splits(tmp_path: Path) -> None:
    rows = twins(tmp_path / "in")
    given = options(duplicates="drop", key="who", split="train=0.7,test=0.3")
    result = pack_dataset(f"parquet:{tmp_path}/in", str(tmp_path / "out"), given)
    who = [rows_of(f"{tmp_path}/out/{name}")["who"].tolist() for name in ("train", "test")]
    assert sorted(who[0] + who[1]) == sorted(set(rows["who"].tolist())), "each key once, whatever the split"
    assert result["cards"]["test"]["steps"][0]["rows"] > 800
    assert len(who[1]) < 100, "what train has, test has not"


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_labels_outside_the_declared_classes_are_refused(tmp_path: Path) -> None:
    lines = [f"{row},{row % 3}" for row in range(500)]
    lines[321] = "321,3"
    (tmp_path / "a.csv").write_text("x,label\n" + "\n".join(lines) + "\n")
    with pytest.raises(DataError, match="column 'label' is 3 in row 321 of the train split, outside of the 3 classes"):
        pack_dataset(f"csv:{tmp_path}/a.csv", str(tmp_path / "out"), options(classes=3))
    result = pack_dataset(f"csv:{tmp_path}/a.csv", str(tmp_path / "five"), options(classes=5))
    assert Dataset.open(str(tmp_path / "five" / "train")).columns[1].num_values == 5, "what a model is made for"
    labels = result["cards"]["train"]["labels"]
    assert labels == {
        "column": "label",
        "counts": {"0": 166, "1": 167, "2": 166, "3": 1},
        "absent": ["4"],
        "imbalance": 167,
        "suspicious": ["3 has 1 rows, where a class has 125 on average"],
    }


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_card_names_the_packs_that_it_was_made_from(tmp_path: Path) -> None:
    twins(tmp_path / "in")
    first = pack_dataset(f"parquet:{tmp_path}/in", str(tmp_path / "one"), options())
    second = pack_dataset(f"parquet:{tmp_path}/one/train", str(tmp_path / "two"), options(duplicates="drop"))
    assert "parents" not in first["cards"]["train"]
    assert second["cards"]["train"]["parents"] == [
        {"path": f"{tmp_path}/one/train", "fingerprint": first["splits"]["train"]["fingerprint"]}
    ]
    assert json.dumps(second["cards"])


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Files of documents some of which are alike, for each the first that it is like, and what their pack came to."""

    source: str
    written: list[str]
    first: list[int]
    given: PackOptions
    out: Path
    result: dict[str, Any]


@pytest.fixture(scope="module")
def documents(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """Pack documents, some of them twice, with all that is looked for in texts."""
    del local_ray
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    written, first = planted(3, documents=200, copies=60, changes=0.0015)
    written += written[:20]
    first += first[:20]
    for part in range(4):
        (folder / f"{part}.txt").write_text("\n\n".join(written[part * 70 : part * 70 + 70]))
    given = of_documents("blank", duplicates="drop", near=0.8, split="train=0.8,test=0.2")
    given = replace(given, context=50, tokenizer="bpe:300")
    result = pack_dataset(f"text:{folder}", str(out), given)
    return Documents(source=f"text:{folder}", written=written, first=first, given=given, out=out, result=result)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_number_of_cpus_changes_no_byte(tmp_path: Path, documents: Documents) -> None:
    with_nulls(tmp_path / "nulls")
    twins(tmp_path / "twins")
    people(tmp_path / "people", range(2000))
    shares = {"split": "train=0.7,val=0.1,test=0.2"}
    jobs: list[tuple[str, PackOptions, int]] = [
        (f"csv:{tmp_path}/nulls", options(label="kind", nulls="drop", non_finite="drop"), 3),
        (f"parquet:{tmp_path}/twins", options(label="label", duplicates="drop", **shares), 9),
        (f"parquet:{tmp_path}/twins", options(duplicates="drop", key="who"), 3),
        (f"csv:{tmp_path}/people", options(**shares, by="who"), 9),
        (documents.source, documents.given, 7),
    ]
    work = [(source, f"{tmp_path}/one{place}", given) for place, (source, given, _) in enumerate(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(Path(storage.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", ONE_CPU]
    subprocess.run(command, env=environment, check=True, input=pickle.dumps(work))
    for place, (source, given, files) in enumerate(jobs):
        out = documents.out if source == documents.source else tmp_path / f"four{place}"
        pack_dataset(source, str(out), given)
        one, four = files_of(tmp_path / f"one{place}"), files_of(out)
        assert one == four
        assert len(one) == files, "shards, manifests, cards and a tokenizer"


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_pack_of_documents_drops_what_is_alike_and_loses_none(documents: Documents) -> None:
    from tokenizers import Tokenizer

    written, first, out = documents.written, documents.first, documents.out
    cards = documents.result["cards"]
    steps = {name: {s["step"]: s for s in card["steps"]} for name, card in cards.items()}
    assert sum(held["read"]["rows"] for held in steps.values()) == len(written)
    looked = cards["train"]["looked_for"]
    assert looked == {"duplicates": looked["duplicates"], "near_duplicates": looked["near_duplicates"], "near": 0.8}
    for step, key in (("duplicates", "duplicates"), ("near-duplicates", "near_duplicates")):
        assert sum(held.get(step, {"removed": 0})["removed"] for held in steps.values()) == looked[key]
    model = Tokenizer.from_file(str(out / "tokenizer.json"))
    kept = {}
    for name, card in cards.items():
        info = Dataset.open(f"{out}/{name}").info
        found = unpacked(rows_of(f"{out}/{name}")["tokens"], card["documents"]["end_of_document"])
        assert len(found) == card["documents"]["documents"] == card["steps"][-1]["rows"] == info["documents"]
        assert info["dropped_tokens"] == 0
        kept[name] = [model.decode(document) for document in found]
    originals = {first[written.index(text)] for name in kept for text in kept[name]}
    assert len(originals) == len(kept["train"]) + len(kept["test"]), "one of each group is left"
    assert originals == set(first), "and none is lost"
    page = (out / "train" / "card.md").read_text()
    for words in ("## Documents", "| near-duplicates | ", "at least 0.8 alike", "token 0 ends each one"):
        assert words in page, page
