"""What `pack` does to rows before it writes them: the options of its checks, of what it removes and of its splits.

```
rows read ─► split ─► nulls ─► non-finite ─► duplicates ─► rows written        a card says what each step removed
documents ─► split ─► nulls ─► empty ─► duplicates ─► near-duplicates ─► tokens ─► rows of one length
```
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from elastrain.data.dataset import Column
from elastrain.errors import DataError, SpecError

NULLS, NON_FINITE, DUPLICATES = ("error", "drop"), ("error", "drop", "keep"), ("keep", "count", "drop")
NEAR = (0.5, 0.95)  # below, unlike documents would be taken for alike; above, a few words decide
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """What is checked, removed and noted; raises SpecError if a value makes no sense.

    `expect` is what the packed columns must be (`x:float64,image:uint8[8,8]`), `classes` the number of labels. `nulls`
    is error or drop, `non_finite` (NaN and infinity in float columns) error, drop or keep. `duplicates` is keep, count
    or drop, and two rows are the same if their packed columns are, or their `key`. `documents` says what a document of
    a text is (file, blank, line or column:NAME); two are the same if all their text is, or with `near` if that share of
    what occurs in either occurs in both. `split` gives shares such as
    `train=0.9,test=0.1`, by a hash of each row's place or, with `by`, of its value in that column. `license` and
    `origin` are noted in the card.
    """

    nulls: str = "error"
    non_finite: str = "error"
    duplicates: str = "keep"
    key: str | None = None
    documents: str | None = None
    near: float | None = None
    split: str | None = None
    by: str | None = None
    expect: str | None = None
    classes: int | None = None
    license: str | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        given = (("nulls", self.nulls, NULLS), ("non-finite", self.non_finite, NON_FINITE))
        for name, value, allowed in (*given, ("duplicates", self.duplicates, DUPLICATES)):
            if value not in allowed:
                raise SpecError(f"--{name} {value!r} is not one of {', '.join(allowed)}")
        if self.key is not None and self.duplicates == "keep":
            raise SpecError("--key says which rows are duplicates; give --duplicates count or drop with it")
        if self.classes is not None and self.classes < 1:
            raise SpecError(f"--classes {self.classes} is not positive")
        self._check_documents()
        shares(self.split)
        expected(self.expect)

    def _check_documents(self) -> None:
        if self.documents is not None and not re.fullmatch(r"file|blank|line|column:.+", self.documents):
            raise SpecError(f"--documents {self.documents!r} is not file, blank, line or column:NAME")
        if self.near is None:
            return
        if not NEAR[0] <= self.near <= NEAR[1]:
            raise SpecError(f"--near {self.near} is not in {NEAR[0]} to {NEAR[1]}; 0.8 is a good start")
        if self.documents is None or self.duplicates == "keep":
            raise SpecError(
                "--near says which documents are duplicates; give --documents, and --duplicates count or drop"
            )

    def identity(self) -> dict[str, Any]:
        """Return what was asked for, as a JSON object; what was not is left out, as in packs made before it was."""
        defaults = asdict(Preparation())
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @property
    def removes(self) -> bool:
        """Whether fewer rows may be written than are read."""
        return "drop" in (self.nulls, self.non_finite, self.duplicates)


def shares(split: str | None) -> dict[str, float]:
    """Return the share of each split, `train` first; raises SpecError unless they are splits whose shares sum to 1.

    >>> shares("test=0.1,train=0.9")
    {'train': 0.9, 'test': 0.1}
    """
    if split is None:
        return {}
    wrong = f"--split {split!r}: expected shares of train, val and test that sum to 1, such as train=0.9,test=0.1"
    found: dict[str, float] = {}
    for part in split.split(","):
        name, _, share = part.strip().partition("=")
        try:
            found[name] = float(share)
        except ValueError as error:
            raise SpecError(wrong) from error
        if name not in SPLITS or not 0 < found[name] <= 1:
            raise SpecError(wrong)
    if "train" not in found or len(found) != split.count(",") + 1 or not math.isclose(sum(found.values()), 1.0):
        raise SpecError(wrong)
    return {name: found[name] for name in SPLITS if name in found}


def expected(expect: str | None) -> dict[str, str]:
    """Return the expected type of each column; raises SpecError unless the text names columns and types.

    >>> expected("x:float64, image:uint8[8,8]")
    {'x': 'float64', 'image': 'uint8[8,8]'}
    """
    if expect is None:
        return {}
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", expect)]
    found = [re.fullmatch(r"(.+):([a-z]+[0-9]+(?:\[[0-9, ]+\])?)", part) for part in parts]
    if not all(found):
        raise SpecError(f"--expect {expect!r}: expected NAME:TYPE for each column, such as x:float64,image:uint8[8,8]")
    return {item[1]: item[2].replace(" ", "") for item in found if item}


def check_expected(source: str, columns: Sequence[Column], expect: str | None) -> None:
    """Raise DataError that names all that differs, unless the columns are those expected; None expects nothing."""
    if expect is None:
        return
    wanted, held = expected(expect), {column.name: _kind(column) for column in columns}
    wrong = [f"no column {name!r}" for name in wanted if name not in held]
    wrong += [f"column {name!r}, which is not expected" for name in held if name not in wanted]
    wrong += [
        f"column {name!r} is {held[name]} where {kind} is expected"
        for name, kind in wanted.items()
        if held.get(name, kind) != kind
    ]
    if wrong:
        raise DataError(f"{source}: {'; '.join(wrong)}; correct the data or --expect, or choose with --columns")


def _kind(column: Column) -> str:
    shape = f"[{','.join(map(str, column.shape))}]" if column.shape else ""
    return f"{column.dtype}{shape}"
