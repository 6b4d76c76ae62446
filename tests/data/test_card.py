"""Cards: what they say of labels, where these are not what their names promise."""

from typing import Any

import numpy as np
import pytest

from elastrain.data.card import Removals, as_text, make_card, page
from elastrain.data.chunks import PackOptions
from elastrain.data.columns import Column
from elastrain.data.statistics import Sums


def card_of(labels: list[int], names: list[str] | None) -> dict[str, Any]:
    """The card of rows that have nothing but a label."""
    sums = Sums(Column(name="label", dtype="int64", shape=()))
    sums.add(np.array(labels))
    facts = {"source": "x", "classes": {"label": names} if names else None}
    return make_card(written=len(labels), removals=Removals(), sums=[sums], options=PackOptions(), facts=facts)


def test_labels_that_have_no_name_are_counted_and_told() -> None:
    card = card_of([0, 0, 1, -1, -1, -1, 7], ["cat", "dog"])
    assert card["labels"]["counts"] == {"-1": 3, "cat": 2, "dog": 1, "7": 1}
    told = ["-1 is none of the 2 named classes: 3 rows", "7 is none of the 2 named classes: 1 rows"]
    assert card["labels"]["suspicious"] == told
    assert f"train: suspicious label: {told[0]}" in as_text({"train": card})
    assert f"- suspicious: {told[1]}" in page("train", card)


@pytest.mark.parametrize(
    ("labels", "names", "told"),
    [
        ([0, 1, 1], ["a", "b"], None),
        ([-1, 0, 3], None, None),
        ([0, 1, 2], ["New York", "bern", " new  york"], "'New York' and ' new  york' differ only in case or white"),
        ([0] * 301 + [1], ["a", "b"], "b has 1 rows, where a class has 151 on average"),
        ([*range(4000)], None, None),
    ],
)
def test_what_looks_like_a_mistake_is_told(labels: list[int], names: list[str] | None, told: str | None) -> None:
    found = card_of(labels, names)["labels"].get("suspicious")
    assert (found is None) if told is None else (len(found) == 1 and told in found[0])
