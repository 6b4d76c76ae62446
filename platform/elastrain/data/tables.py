"""What CSV and Parquet sources share: which rows are in which split, rows with nulls, strings as class indices."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from elastrain.data.chunks import Arrays, Files, PackOptions, Removed, named_splits, own_split_only, place_hashes
from elastrain.data.columns import Array, Column
from elastrain.data.duplicates import KEY, as_words, hashes_of
from elastrain.data.preparation import shares
from elastrain.errors import DataError

CLASSES_MOST = 1_000_000  # more different strings than this are no classes
WHOLE = 2.0**64
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows of its files a split takes: those whose hash, as a fraction of all hashes, is in [low, high).

    The hash is of the row's place or, with `by`, of its value in that column. `key` is the column whose value tells
    duplicates. `nulls` and `non_finite` say what happens to rows that lack a value or hold NaN or infinity.
    """

    low: float = 0.0
    high: float = 1.0
    by: str | None = None
    key: str | None = None
    nulls: str = "error"
    non_finite: str = "error"
    label: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every row of the files is in the split."""
        return self.low == 0.0 and self.high == 1.0

    def helpers(self, names: Iterable[str]) -> list[str]:
        """Return the columns to read besides `names`."""
        return [name for name in dict.fromkeys((self.by, self.key)) if name is not None and name not in names]

    def takes(self, batch: pa.RecordBatch, path: str, places: npt.NDArray[np.int64]) -> Mask:
        """Say which rows of a batch, `places` in file `path`, belong to the split."""
        if self.is_whole:
            return np.ones(len(places), np.bool_)
        hashes = place_hashes(path, places) if self.by is None else _key_hashes(batch, self.by, path)[:, 0]
        mask = hashes >= np.uint64(self.low * WHOLE)
        return mask if self.high == 1.0 else mask & (hashes < np.uint64(self.high * WHOLE))


def rows_of(
    batches: Iterable[pa.RecordBatch],
    part: Part,
    columns: Sequence[Column],
    decode: Callable[[pa.RecordBatch], Arrays],
    *,
    url: str,
    place: tuple[str, int],
) -> Iterator[Arrays | Removed]:
    """Yield the split's rows as `decode` makes them, and at the end what was removed.

    `place` is the path of the file that decides the split of its rows, and the row that the first batch begins with.
    Raises DataError with the number of rows without a value, or with one that is not finite, and the first of them.
    """
    path, first = place
    names = [column.name for column in columns]
    names += part.helpers(names)
    nulls, wild = _Faults("nulls", "has no value", part.nulls), _Faults("non-finite", "is not finite", part.non_finite)
    for batch in batches:
        places = np.arange(first, first + batch.num_rows, dtype=np.int64)
        first += batch.num_rows
        mine = part.takes(batch, path, places)
        mine &= ~nulls.found({name: _missing(batch, name, part) for name in names}, places, mine)
        if nulls.stops or not mine.any():
            continue
        if not mine.all():
            batch, places = batch.filter(pa.array(mine)), places[mine]  # noqa: PLW2901 -- what is left of it
        arrays = decode(batch)
        if part.key is not None:
            arrays[KEY] = _key_hashes(batch, part.key, path)
        if part.non_finite != "keep":
            bad = wild.found({name: _not_finite(array) for name, array in arrays.items()}, places, np.True_)
            arrays = {name: array[~bad] for name, array in arrays.items()} if bad.any() else arrays
        if not wild.stops:
            yield arrays
    for faults in (nulls, wild):
        yield from faults.removed(url)


class _Faults:
    """Counts the rows of a chunk that have one fault, and remembers the first."""

    def __init__(self, step: str, words: str, policy: str) -> None:
        self.step, self.words, self.policy = step, words, policy
        self.rows, self.first, self.column = 0, -1, ""
        self.columns: dict[str, int] = {}

    @property
    def stops(self) -> bool:
        """Whether the chunk ends with an error: then the rest is only counted."""
        return bool(self.rows) and self.policy == "error"

    def found(self, masks: "dict[str, Mask | None]", places: npt.NDArray[np.int64], among: "Mask | np.bool_") -> Mask:
        """Return the rows that have the fault in any column, and count those `among` them that are asked for."""
        every = np.zeros(len(places), np.bool_)
        for mask in masks.values():
            if mask is not None:
                every |= mask
        counted = every & among
        if counted.any() and not self.rows:
            place = int(np.flatnonzero(counted)[0])
            self.first = int(places[place])
            self.column = next(name for name, mask in masks.items() if mask is not None and mask[place])
        self.rows += int(counted.sum())
        for name, mask in masks.items():
            if mask is not None:
                self.columns[name] = self.columns.get(name, 0) + int((mask & among).sum())
        return every

    def removed(self, url: str) -> Iterator[Removed]:
        """Yield what was removed, if anything was; raises DataError if nothing may be."""
        if self.stops:
            raise DataError(
                f"{url}: column {self.column!r} {self.words} in row {self.first}, the first of {self.rows} such rows; "
                f"correct them, or leave such rows out with --{self.step} drop"
            )
        if self.rows:
            where = f"{url}, row {self.first}, column {self.column!r}"
            yield Removed(self.step, self.rows, where, tuple(sorted(self.columns.items())))


def _missing(batch: pa.RecordBatch, name: str, part: Part) -> Mask | None:
    """Say which rows have no value, or a list or image that lacks one; None if no row does."""
    values = batch.column(name)
    mask = null_rows(values)
    if name in (part.label, part.by, part.key) and "string" in str(values.type):
        mask |= pc.equal(pc.fill_null(values.cast(pa.string()), ""), "").to_numpy(zero_copy_only=False)
    return mask if mask.any() else None


def null_rows(values: pa.Array) -> Mask:
    """Say which rows of a column have no value, or one in whose lists or encoded image something is missing."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    mask: Mask = np.zeros(len(values), np.bool_)
    if values.null_count:
        mask = values.is_null().to_numpy(zero_copy_only=False).copy()
    inner: pa.Array | None = None
    if pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        mask |= null_rows(values.field("bytes"))
    elif (
        pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type)
    ):
        valid = values.drop_null() if values.null_count else values
        inner = null_rows(valid.flatten())
        if inner.any():
            parents = pc.list_parent_indices(valid).to_numpy()[inner]
            mask[np.flatnonzero(~mask)[parents]] = True
    return mask


def _not_finite(array: Array) -> Mask | None:
    """Say which rows of a float column hold NaN or infinity; None if no row does."""
    if not np.issubdtype(array.dtype, np.floating):
        return None
    finite = np.isfinite(array)
    if finite.all():
        return None
    bad: Mask = np.any(~finite.reshape(len(array), -1), axis=1)
    return bad


def _key_hashes(batch: pa.RecordBatch, name: str, where: str) -> npt.NDArray[np.uint64]:
    """Return a 128-bit hash of each value of a column as text, of shape (rows, 2); rows without one are alike.

    Raises DataError, naming `where`, if the column holds neither texts nor numbers.
    """
    values = batch.column(name)
    try:
        encoded = pc.dictionary_encode(pc.fill_null(values.cast(pa.string()), ""))
    except pa.ArrowException as error:
        raise DataError(f"{where}: column {name!r} holds {values.type}; a key is a text or a number") from error
    known = as_words(hashes_of(text.encode() for text in encoded.dictionary.to_pylist()))
    hashes: npt.NDArray[np.uint64] = known[encoded.indices.to_numpy()]
    return hashes


def split_files(source: str, files: Files, options: PackOptions) -> dict[str, tuple[Files, Part]]:
    """Return the files and rows of each split: by names, by a hash of the rows, or all in train.

    Raises SpecError if a split is asked of files that are split by name, DataError if only some of their names tell.
    """
    prepare = options.prepare
    part = Part(key=prepare.key, nulls=prepare.nulls, non_finite=prepare.non_finite, label=options.label)
    named = named_splits(files, options)
    if named is not None:
        own_split_only(source, options)
        return {name: (held, part) for name, held in named.items()}
    test = options.test_fraction or 0.0
    parts = shares(prepare.split) or ({"train": 1 - test, "test": test} if test else {"train": 1.0})
    found, low = {}, 0.0
    for name in reversed(parts):
        high = 1.0 if name == "train" else low + parts[name]
        found[name] = (files, replace(part, low=low, high=high, by=prepare.by))
        low = high
    return {name: found[name] for name in parts}


def chosen(where: str, kinds: Mapping[str, str], names: Sequence[str], options: PackOptions) -> list[str]:
    """Return the columns to pack, in the file's order; `kinds` is what each holds.

    Texts that only tell splits or duplicates are left out, unless --columns or --label names them. Raises DataError if
    a column is twice in the file or missing.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: column {twice[0]!r} is there twice; rename one")
    helpers = [name for name in (options.prepare.by, options.prepare.key) if name is not None]
    every = [name for name in names if name not in helpers or "string" not in kinds.get(name, "")]
    label = [] if options.label is None else [options.label]
    wanted = [*(every if options.columns is None else options.columns), *label]
    missing = [name for name in (*wanted, *helpers) if name not in names]
    if missing:
        raise DataError(f"{where}: no column {missing[0]!r}; the file has {', '.join(names) or 'none'}")
    return [name for name in names if name in wanted]


def no_numbers(where: str, name: str, kind: str) -> DataError:
    """Return the error for a column that cannot be packed."""
    return DataError(
        f"{where}: column {name!r} holds {kind}, which is no number; turn it into numbers, leave it out with "
        f"--columns, or if its strings are classes name it with --label {name}"
    )


def class_names(values: Iterable[tuple[str, pa.Array]], label: str) -> list[str]:
    """Return the different strings of the label column, sorted; rows without one are an error, or removed, later.

    Raises DataError naming the file if there are too many to be classes.
    """
    found: set[str] = set()
    for where, chunk in values:
        found |= set(pc.unique(chunk).to_pylist()) - {None, ""}
        if len(found) > CLASSES_MOST:
            raise DataError(f"{where}: label column {label!r} has over {CLASSES_MOST} different strings: not classes")
    return sorted(found)


def as_classes(values: pa.Array, classes: Sequence[str], column: Column, where: str) -> Array:
    """Return the class index of each string; raises DataError if one is no class."""
    found = pc.index_in(values.cast(pa.string()), value_set=pa.array(classes, pa.string()))
    if found.null_count:
        raise DataError(f"{where}: column {column.name!r} holds a class that was not there before; pack again")
    indices: Array = found.to_numpy(zero_copy_only=False)
    return indices.astype(column.dtype)
