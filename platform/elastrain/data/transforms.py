"""Transforms of rows, run where the rows are read. Randomness comes from one seed a row, never from who reads it."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elastrain.data.dataset import Column, Dataset
from elastrain.data.plan import hash64, mix64, row_seeds
from elastrain.errors import DataError, SpecError
from elastrain.spec.train import Custom, Flip, Scale, Shift, Standardise

Array = npt.NDArray[Any]
Seeds = npt.NDArray[np.uint64]
TRIED_ROWS = 8


def check_transforms(steps: Sequence[Any], train: Dataset, evaluation: Dataset | None) -> None:
    """Raise what would stop a run at its first block, or only at its first evaluation; custom functions are tried.

    Raises DataError if evaluation's columns are not training's, or a transform names a column that is not there or is
    not of the kind it works on; SpecError if a custom function cannot be loaded, or fails on the first rows.
    """
    if evaluation is not None:
        _check_evaluation(train, evaluation)
    for step in steps:
        if isinstance(step, Custom):
            _forget(step.function)
    first = _first_rows(train) if any(isinstance(step, Custom) for step in steps) else {}
    _check_steps(steps, train, first, training=True)
    if evaluation is not None:
        _check_steps(steps, train, first, training=False)


def delivered(steps: Sequence[Any], columns: Iterable[Column]) -> tuple[Column, ...]:
    """Return the columns as workers get them; what custom functions make of them only rows tell, and is left out."""
    wide = {step.column for step in steps if isinstance(step, Scale | Standardise)}
    return tuple(replace(column, dtype="float32") if column.name in wide else column for column in columns)


def delivered_bytes(steps: Sequence[Any], columns: Iterable[Column]) -> int:
    """Return the bytes of one row as workers get it; see `delivered`."""
    return sum(column.row_bytes for column in delivered(steps, columns))


def apply(
    steps: Sequence[Any], columns: Sequence[Column], arrays: dict[str, Array], seeds: Seeds, *, train: bool
) -> dict[str, Array]:
    """Return the rows after all transforms; random ones are left out of evaluation.

    `columns` are the training data's, for evaluation too: both are standardised alike. `seeds` holds one uint64 a row.
    Raises SpecError if a custom function cannot be loaded, fails, or changes the row count.
    """
    held: Mapping[str, Column] = {column.name: column for column in columns}
    for index, step in enumerate(steps):
        own = mix64(seeds ^ np.uint64(hash64(index)))
        if not train and _is_for_training(step):
            continue
        if isinstance(step, Scale):
            factor, offset = np.float32(step.factor), np.float32(step.offset)
            arrays = {**arrays, step.column: arrays[step.column].astype(np.float32) * factor + offset}
        elif isinstance(step, Standardise):
            column = held[step.column]
            mean, std = np.float32(column.mean or 0.0), np.float32(column.std or 1.0)
            arrays = {**arrays, step.column: (arrays[step.column].astype(np.float32) - mean) / std}
        elif isinstance(step, Flip):
            arrays = {**arrays, step.column: _flipped(arrays[step.column], own, step.p)}
        elif isinstance(step, Shift):
            arrays = {**arrays, step.column: _shifted(arrays[step.column], own, step.pixels)}
        elif isinstance(step, Custom):
            arrays = _custom(step.function, arrays, own)
    return arrays


def _is_for_training(step: Any) -> bool:
    return isinstance(step, Flip | Shift) or (isinstance(step, Custom) and step.train_only)


def load_object(name: str, *, where: str) -> Any:
    """Return the object `file.py:Name` or `module:Name`; raises SpecError, naming `where`, if there is none."""
    source, _, attribute = name.rpartition(":")
    if not source:
        raise SpecError(f"{where}: {name!r} is neither file.py:name nor module:name")
    if source.endswith(".py") and not Path(source).is_file():
        raise SpecError(f"{where}: no file {source}")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:
        raise SpecError(f"{where}: cannot import {source}: {_said(error)}; correct it, or the name") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise SpecError(f"{where}: {source} has no {attribute!r}") from error


def _load_file(path: Path) -> Any:
    """Import a file once a process, under a name of its own, with its folder importable as for a script."""
    path = path.resolve()
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_name(path: Path) -> str:
    return f"elastrain_user_{path.stem}_{hash64(*str(path).encode()):016x}"


def _forget(name: str) -> None:
    """Let a file be imported anew: in a notebook it may have been corrected since it was."""
    sys.modules.pop(_module_name(Path(name.rpartition(":")[0]).resolve()), None)


def _said(error: BaseException) -> str:
    """Return what an error of the user's code says, and the line of theirs that it came from."""
    ours = {__file__, importlib.__file__}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename[0] != "<" and f.filename not in ours]
    place = f" at {frames[-1].filename} line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _check_evaluation(train: Dataset, evaluation: Dataset) -> None:
    """Raise DataError unless the evaluation data hold each column of the training data, as it is there."""
    held = {column.name: column for column in evaluation.columns}
    for column in train.columns:
        if column.name not in held:
            raise DataError(
                f"{evaluation.url}: {evaluation.why_missing(column.name)}; evaluation reads what training reads: add "
                f"{column.name!r}, or leave it out with data.columns"
            )
        given, wanted = _kind(held[column.name]), _kind(column)
        if given != wanted:
            raise DataError(
                f"{evaluation.url}: column {column.name!r} is {given}, but {wanted} in {train.url}; pack both alike, "
                f"or leave it out with data.columns"
            )


def _first_rows(dataset: Dataset) -> dict[str, Array]:
    from elastrain.data.reader import read_first  # noqa: PLC0415 -- pyarrow, which a plan does without

    return read_first(dataset, TRIED_ROWS)


def _check_steps(steps: Sequence[Any], train: Dataset, first: dict[str, Array], *, training: bool) -> None:
    """Raise SpecError or DataError, naming the first step that cannot work on what those before it leave."""
    columns = {column.name: column for column in train.columns}
    rows = len(next(iter(first.values()), ()))
    seeds = row_seeds(0, np.zeros(rows, np.int64), np.arange(rows))
    for index, step in enumerate(steps):
        if not training and _is_for_training(step):
            continue
        if not isinstance(step, Custom):
            _check_step(step, columns)
            columns = {column.name: column for column in delivered([step], columns.values())}
        else:
            given = {name: array.copy() for name, array in first.items()}  # it may change in place what it is given
            arrays = apply(steps[: index + 1], train.columns, given, seeds, train=training)
            columns = {name: _described(columns.get(name), name, array) for name, array in arrays.items()}


def _described(before: Column | None, name: str, array: Array) -> Column:
    found = Column(name=name, dtype=str(array.dtype), shape=array.shape[1:])
    return found if before is None else replace(before, dtype=found.dtype, shape=found.shape)


def _check_step(step: Any, columns: Mapping[str, Column]) -> None:
    if step.column not in columns:
        there = ", ".join(columns)
        raise DataError(f"data.transforms: {step.name} names column {step.column!r}; the columns read are {there}")
    column = columns[step.column]
    if isinstance(step, Standardise) and column.std is None:
        raise DataError(
            f"data.transforms: column {step.column!r} has no stored statistics; pack the data: "
            f"`elastrain pack parquet:FOLDER OUT` computes them"
        )
    if isinstance(step, Flip | Shift) and len(column.shape) not in (2, 3):
        raise DataError(
            f"data.transforms: {step.name} needs images of shape [height, width] or [height, width, channels], and "
            f"column {step.column!r} is {_kind(column)}; give it that shape when you pack it, or leave {step.name} out"
        )


def _kind(column: Column) -> str:
    return f"{column.dtype}{list(column.shape)}"


def _flipped(images: Array, seeds: Seeds, p: float) -> Array:
    """(rows, height, width[, channels]) mirrored along the width where the row's seed says so."""
    chosen = (seeds >> np.uint64(11)).astype(np.float64) * 2.0**-53 < p
    result = images.copy()
    result[chosen] = images[chosen][:, :, ::-1]
    return result


def _shifted(images: Array, seeds: Seeds, pixels: int) -> Array:
    """(rows, height, width[, channels]) moved by -pixels…pixels down and right, zeros coming in."""
    span = np.uint64(2 * pixels + 1)
    down = (seeds % span).astype(np.int64)
    right = ((seeds >> np.uint64(32)) % span).astype(np.int64)
    height, width = images.shape[1:3]
    padding = [(0, 0), (pixels, pixels), (pixels, pixels), *[(0, 0)] * (images.ndim - 3)]
    padded = np.pad(images, padding)
    rows = np.arange(len(images))[:, None, None]
    moved: Array = padded[
        rows, down[:, None, None] + np.arange(height)[:, None], right[:, None, None] + np.arange(width)
    ]
    return moved


def _custom(name: str, arrays: dict[str, Array], seeds: Seeds) -> dict[str, Array]:
    rows = len(seeds)
    function = load_object(name, where="data.transforms")
    try:
        result = function(arrays, seeds)
    except Exception as error:
        raise SpecError(f"data.transforms: {name} raised {_said(error)}") from error
    wrong = f"data.transforms: {name} must return a dict of arrays with {rows} rows, as many as it was given"
    if not isinstance(result, dict) or not result:
        raise SpecError(f"{wrong}; it gave {'an empty one' if result == {} else type(result).__name__}")
    return {key: _numbers(value, rows, f"{wrong}; its {key!r} is") for key, value in result.items()}


def _numbers(value: Any, rows: int, wrong: str) -> Array:
    """Return a value as an array; raises SpecError, beginning with `wrong`, unless it holds a number a row or more."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"{wrong} no array ({error})") from error
    if array.ndim == 0 or len(array) != rows or array.dtype.kind not in "biuf":
        raise SpecError(f"{wrong} {array.dtype}{list(array.shape)}")
    return array
