"""The card of a packed dataset: where its rows come from, what each step removed, and what the columns hold.

It stands in the manifest as a JSON object, and beside it as a page, `card.md`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastrain.data.chunks import Arrays, PackOptions, Removed
from elastrain.data.columns import Column
from elastrain.data.duplicates import RowHashes
from elastrain.data.statistics import Sums
from elastrain.errors import DataError

PAGE = "card.md"
SHOWN_CLASSES = 50  # of the page's table of classes; the manifest has all that were counted
SUSPICIOUS = 20  # of what looks like a mistake in the labels, the first are told
RARE = 100  # a class with so many times fewer rows than the average one is told of
STEPS = ("nulls", "non-finite", "empty", "duplicates", "near-duplicates")


def label_of(columns: Sequence[Column], label: str | None) -> str | None:
    """Return the column whose values are classes: `--label`, or `label` where it is an integer a row; else None."""
    name = label or "label"
    scalar = [column for column in columns if not column.shape and column.dtype.startswith(("int", "uint"))]
    return next((column.name for column in scalar if column.name == name), None)


@dataclass
class Removals:
    """What the steps took out of the rows of one split, as the pieces go by."""

    rows: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    columns: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, removed: Removed) -> None:
        """Count rows that a step removed; the first place that is told stays."""
        self.rows[removed.step] = self.rows.get(removed.step, 0) + removed.rows
        self.first.setdefault(removed.step, removed.first)
        faults = self.columns.setdefault(removed.step, {})
        for name, rows in removed.columns:
            faults[name] = faults.get(name, 0) + rows

    def steps(self, written: int) -> list[dict[str, Any]]:
        """Return the rows that were read, and for each step that removed some how many and how many it left."""
        left = written + sum(self.rows.values())
        found: list[dict[str, Any]] = [{"step": "read", "rows": left}]
        for step in (step for step in STEPS if step in self.rows):
            left -= self.rows[step]
            found.append({"step": step, "removed": self.rows[step], "rows": left, "first": self.first[step]})
        return found


def check_labels(arrays: Arrays, label: str | None, classes: int | None, *, name: str, first: int) -> None:
    """Raise DataError if one of these rows of split `name`, which begin with row `first`, has no class in the range."""
    if classes is None or label is None:
        return
    wrong = (arrays[label] < 0) | (arrays[label] >= classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"column {label!r} is {arrays[label][row]} in row {first + row} of the {name} split, outside of the "
            f"{classes} classes 0 to {classes - 1}; correct the labels or --classes"
        )


def make_card(
    *, written: int, removals: Removals, sums: Sequence[Sums], options: PackOptions, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the card of a split of `written` rows; `facts` (source, parents, tokenizer, …) are noted as they are.

    Where there are `documents`, steps count these, not rows.
    """
    columns = [_column(each, removals) for each in sums]
    label = label_of([each.column for each in sums], options.label)
    counts = next((each.counts for each in sums if each.column.name == label), None)
    known = {"license": options.prepare.license, "origin": options.prepare.origin, **facts}
    card = {name: value for name, value in known.items() if value}
    counted = facts["documents"]["documents"] if facts.get("documents") else written
    card |= {"rows": written, "steps": removals.steps(counted), "columns": columns}
    if counts:
        names = (facts.get("classes") or {}).get(label)
        classes = options.prepare.classes or (len(names) if names else max(counts) + 1)
        card["labels"] = _labels(str(label), counts, classes, names)
    card.pop("classes", None)
    return card


def _column(sums: Sums, removals: Removals) -> dict[str, Any]:
    """Return what a column holds; the rows without a value, or with one that is not finite, are of those read."""
    column, (distinct, estimated) = sums.result(), sums.different()
    facts = {"name": column.name, "dtype": column.dtype, "shape": list(column.shape), "min": sums.low, "max": sums.high}
    facts |= {"mean": column.mean, "std": column.std, "distinct": distinct, "distinct_is_estimate": estimated}
    faults = {key: removals.columns.get(key, {}).get(column.name, 0) for key in ("nulls", "non-finite")}
    return {**facts, "nulls": faults["nulls"], "not_finite": sums.not_finite + faults["non-finite"]}


def _labels(name: str, counts: Mapping[int, int], classes: int, names: Sequence[str] | None) -> dict[str, Any]:
    """Return how often each class is there, which are not, how uneven it is, and what looks like a mistake.

    Uneven is the largest class by the smallest; a value without a name (-1 where a label is unknown, say) is shown as
    the number.
    """
    inside = range(min(classes, 10 * len(counts)))  # of an identifier that is called label, not every gap
    shown = {value: _shown(value, names) for value in sorted({*inside, *counts})}
    found = {
        "column": name,
        "counts": {shown[value]: counts[value] for value in sorted(counts)},
        "absent": [shown[value] for value in inside if value not in counts],
        "imbalance": max(counts.values()) / min(counts.values()),
    }
    suspicious = [*_nameless(counts, names), *_alike(names), *_rare({shown[value]: counts[value] for value in counts})]
    return {**found, "suspicious": suspicious[:SUSPICIOUS]} if suspicious else found


def _shown(value: int, names: Sequence[str] | None) -> str:
    return str(names[value]) if names and 0 <= value < len(names) else str(value)


def _nameless(counts: Mapping[int, int], names: Sequence[str] | None) -> Iterator[str]:
    for value, rows in sorted(counts.items()):
        if names and not 0 <= value < len(names):
            yield f"{value} is none of the {len(names)} named classes: {rows:,} rows"


def _alike(names: Sequence[str] | None) -> Iterator[str]:
    """Tell of names that would be the same if nobody had mistyped."""
    seen: dict[str, str] = {}
    for name in map(str, names or ()):
        first = seen.setdefault(" ".join(name.split()).casefold(), name)
        if first != name:
            yield f"{first!r} and {name!r} differ only in case or white space"


def _rare(counts: Mapping[str, int]) -> Iterator[str]:
    mean = sum(counts.values()) / len(counts)
    for name, rows in counts.items():
        if rows * RARE < mean:
            yield f"{name} has {rows:,} rows, where a class has {mean:,.0f} on average"


def duplicates_found(hashes: RowHashes, starts: Mapping[str, int], *, dropped: bool) -> dict[str, Any]:
    """Return what a card says of duplicates in all splits together; `starts` are the first rows of the splits.

    Contradictions are rows that differ in nothing but the label, as rows of the packed splits.
    """
    found: dict[str, Any] = {"duplicates": hashes.duplicates}
    if not hashes.by_key:
        pairs = [
            {"rows": [_place(hashes, starts, row, dropped=dropped) for row in pair["rows"]], "labels": pair["labels"]}
            for pair in hashes.contradictions
        ]
        found["contradictions"] = {"inputs": hashes.num_contradictions, "first": pairs}
    return found


def _place(hashes: RowHashes, starts: Mapping[str, int], row: int, *, dropped: bool) -> str:
    name = [name for name, start in starts.items() if start <= row][-1]
    before = hashes.count(starts[name], row) if dropped else 0
    return f"{name} {row - starts[name] - before}"


def as_text(cards: Mapping[str, Any]) -> str:
    """Return a line for each step that removed rows or found something, each after a line end."""
    lines = [
        f"{name}: {step['removed']:,} of {step['removed'] + step['rows']:,} {_unit(card)} removed: {step['step']}"
        for name, card in cards.items()
        for step in (card or {}).get("steps", ())[1:]
    ]
    looked = next(((card or {}).get("looked_for") for card in cards.values()), None)
    if looked:
        lines.append(f"duplicates: {looked['duplicates']:,}")
        if "near" in looked:
            lines.append(f"near-duplicates, at least {looked['near']:g} alike: {looked['near_duplicates']:,}")
        if "contradictions" in looked:
            lines.append(f"inputs with more than one label: {looked['contradictions']['inputs']:,}")
    for name, card in cards.items():
        lines += [f"{name}: suspicious label: {text}" for text in (card or {}).get("labels", {}).get("suspicious", ())]
    return "".join(f"\n{line}" for line in lines)


def _unit(card: Mapping[str, Any] | None) -> str:
    """Return what the steps of a card count."""
    return "documents" if (card or {}).get("documents") else "rows"


def page(name: str, card: Mapping[str, Any]) -> str:
    """Return the card as a page of Markdown."""
    head = [f"# {name}: {card['rows']:,} rows", ""]
    return "\n".join([*head, *_origin(card), *_steps(card), *_columns(card), *_classes(card), ""])


def _origin(card: Mapping[str, Any]) -> Iterator[str]:
    for key in ("source", "origin", "license", "tokenizer", "fingerprint"):
        if key in card or key in ("origin", "license"):
            yield f"- {key}: {card.get(key, 'not given')}"
    for parent in card.get("parents", ()):
        yield f"- packed from: {parent['path']}, fingerprint {parent['fingerprint']}"
    yield ""


def _steps(card: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"## {_unit(card).capitalize()}", "", "| step | removed | left | first removed |", "|---|---|---|---|")
    for step in card["steps"]:
        yield f"| {step['step']} | {step.get('removed', 0):,} | {step['rows']:,} | {step.get('first', '')} |"
    yield ""
    if held := card.get("documents"):
        end = held["end_of_document"]
        yield f"{held['documents']:,} documents, {held['tokens']:,} tokens; token {end} ends each one."
        yield f"The last row is filled up with {held['padding']:,} more of it."
    looked = card.get("looked_for")
    if looked is None:
        return
    yield f"Duplicates in all splits together: {looked['duplicates']:,}."
    if "near" in looked:
        yield f"Near-duplicates, at least {looked['near']:g} alike: {looked['near_duplicates']:,}."
    if "contradictions" in looked:
        yield f"Inputs with more than one label: {looked['contradictions']['inputs']:,}."
        for pair in looked["contradictions"]["first"]:
            yield f"- rows {' and '.join(pair['rows'])} have labels {' and '.join(map(str, pair['labels']))}"
    yield ""


def _columns(card: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "## Columns",
        "",
        "| column | type | min | max | mean | std | distinct | nulls | not finite |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    for column in card["columns"]:
        shape = f"{column['dtype']}{column['shape'] or ''}"
        numbers = " | ".join(_number(column[key]) for key in ("min", "max", "mean", "std"))
        about = "about " if column["distinct_is_estimate"] else ""
        counts = f"{about}{_number(column['distinct'])} | {column['nulls']} | {column['not_finite']}"
        yield f"| {column['name']} | {shape} | {numbers} | {counts} |"
    yield ""


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _classes(card: Mapping[str, Any]) -> Iterator[str]:
    labels = card.get("labels")
    if labels is None:
        return
    yield from (f"## Classes of {labels['column']}", "", "| class | rows |", "|---|---|")
    counts = list(labels["counts"].items())
    yield from (f"| {name} | {count:,} |" for name, count in counts[:SHOWN_CLASSES])
    if len(counts) > SHOWN_CLASSES:
        yield f"| {len(counts) - SHOWN_CLASSES} more | {sum(count for _, count in counts[SHOWN_CLASSES:]):,} |"
    yield ""
    yield f"The most frequent class has {labels['imbalance']:.3g} times the rows of the rarest."
    if labels["absent"]:
        yield f"Classes without a row: {', '.join(labels['absent'][:SHOWN_CLASSES])}."
    for text in labels.get("suspicious", ()):
        yield f"- suspicious: {text}"
