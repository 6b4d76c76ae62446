"""Transforms of rows, run where the rows are read. Randomness comes from one seed a row, never from who reads it."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elastrain.data.columns import Array, Column
from elastrain.data.plan import hash64, mix64
from elastrain.errors import DataError, SpecError
from elastrain.spec.train import Custom, Flip, Scale, Shift, Standardise

Seeds = npt.NDArray[np.uint64]
Step = Callable[[dict[str, Array], Seeds], dict[str, Array]]


def check_transforms(steps: Sequence[Any], columns: Sequence[Column]) -> None:
    """Raise DataError if a transform names a column that is not read or lacks what it needs of it."""
    held = {column.name: column for column in columns}
    for step in steps:
        if isinstance(step, Custom):
            continue
        if step.column not in held:
            there = ", ".join(held)
            raise DataError(f"data.transforms: {step.name} names column {step.column!r}; the columns read are {there}")
        if isinstance(step, Standardise) and held[step.column].std is None:
            raise DataError(
                f"data.transforms: column {step.column!r} has no stored statistics; pack the data: "
                f"`elastrain pack parquet:FOLDER OUT` computes them"
            )


def apply(
    steps: Sequence[Any], columns: Sequence[Column], arrays: dict[str, Array], seeds: Seeds, *, train: bool
) -> dict[str, Array]:
    """Return the rows after all transforms; random ones are left out of evaluation.

    `seeds` holds one uint64 a row. Raises SpecError if a custom function cannot be loaded or changes the row count.
    """
    held: Mapping[str, Column] = {column.name: column for column in columns}
    for index, step in enumerate(steps):
        own = mix64(seeds ^ np.uint64(hash64(index)))
        if isinstance(step, Scale):
            factor, offset = np.float32(step.factor), np.float32(step.offset)
            arrays = {**arrays, step.column: arrays[step.column].astype(np.float32) * factor + offset}
        elif isinstance(step, Standardise):
            column = held[step.column]
            mean, std = np.float32(column.mean or 0.0), np.float32(column.std or 1.0)
            arrays = {**arrays, step.column: (arrays[step.column].astype(np.float32) - mean) / std}
        elif isinstance(step, Flip) and train:
            arrays = {**arrays, step.column: _flipped(arrays[step.column], own, step.p)}
        elif isinstance(step, Shift) and train:
            arrays = {**arrays, step.column: _shifted(arrays[step.column], own, step.pixels)}
        elif isinstance(step, Custom) and (train or not step.train_only):
            arrays = _custom(step.function, arrays, own)
    return arrays


def load_object(name: str, *, where: str) -> Any:
    """Return the object `file.py:Name` or `module:Name`; raises SpecError, naming `where`, if there is none."""
    source, _, attribute = name.rpartition(":")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except FileNotFoundError as error:
        raise SpecError(f"{where}: no file {source}") from error
    except ImportError as error:
        raise SpecError(f"{where}: cannot import {source} ({error})") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise SpecError(f"{where}: {source} has no {attribute!r}") from error


def _load_file(path: Path) -> Any:
    """Import a file once a process, under a name of its own, with its folder importable as for a script."""
    path = path.resolve()
    name = f"elastrain_user_{path.stem}_{hash64(*str(path).encode()):016x}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(path)
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
        raise SpecError(f"data.transforms: {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(result, dict) or any(len(array) != rows for array in result.values()):
        raise SpecError(
            f"data.transforms: {name} must return a dict of arrays with {rows} rows, as many as it was given"
        )
    return {key: np.asarray(value) for key, value in result.items()}
