"""What CSV and Parquet sources share: which rows are in which split, and strings as class indices."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elastrain.data.chunks import Arrays, Files, PackOptions, in_test, named_splits, own_split_only
from elastrain.data.columns import Array, Column
from elastrain.errors import DataError

CLASSES_MOST = 1_000_000  # more different strings than this are no classes


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows of its files a split takes: all, or those whose hash falls on its side of the fraction."""

    fraction: float = 0.0
    test: bool = False

    def of(self, arrays: Arrays, path: str, first: int) -> Arrays:
        """Return the rows that belong to the split; row `first` of file `path` is the first of `arrays`."""
        if not self.fraction:
            return arrays
        rows = len(next(iter(arrays.values())))
        mask = in_test(path, np.arange(first, first + rows, dtype=np.int64), self.fraction) == self.test
        return {name: array[mask] for name, array in arrays.items()}


def split_files(source: str, files: Files, options: PackOptions) -> dict[str, tuple[Files, Part]]:
    """Return the files and rows of each split: by names, by a hash of the rows, or all in train.

    Raises SpecError if a test fraction is asked of files that are split by name.
    """
    named = named_splits(files)
    if named is not None:
        own_split_only(source, options)
        return {name: (part, Part()) for name, part in named.items()}
    fraction = options.test_fraction or 0.0
    parts = {"train": (files, Part(fraction, test=False))}
    return {**parts, "test": (files, Part(fraction, test=True))} if fraction else parts


def chosen(where: str, names: Sequence[str], options: PackOptions) -> list[str]:
    """Return the columns to pack, in the file's order; raises DataError if one is twice in the file or missing."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: column {twice[0]!r} is there twice; rename one")
    label = [] if options.label is None else [options.label]
    wanted = [*(names if options.columns is None else options.columns), *label]
    missing = [name for name in wanted if name not in names]
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
    """Return the different strings of the label column, sorted.

    Raises DataError naming the file if a row has none, or if there are too many to be classes.
    """
    found: set[str] = set()
    for where, chunk in values:
        names = set(pc.unique(chunk).to_pylist())
        if not names.isdisjoint({None, ""}):
            raise DataError(f"{where}: label column {label!r} has a row without a class; fill or drop such rows first")
        found |= names
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
