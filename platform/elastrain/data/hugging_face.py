"""Dataset folders of Hugging Face: as on the Hub (Parquet), or as `save_to_disk` leaves them (Arrow streams).

Splits are told by names, `train-00000-of-00002.parquet` or `train/data-00000-of-00001.arrow`; classes have the names
that the features give them.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from elastrain import storage
from elastrain.data.chunks import Files, PackOptions, Split, find
from elastrain.data.footers import PARQUET
from elastrain.data.parquet_files import ARROW, open_files, schema_of
from elastrain.errors import DataError

STATE = "state.json"  # beside the Arrow files that count; what is cached lies there, too


def open_hugging_face(source: str, options: PackOptions) -> dict[str, Split]:
    """Return the splits of a dataset folder.

    Raises DataError naming file and column if one cannot be read, or the files do not fit together (those of another
    configuration, say).
    """
    files = _files(find(source, (*PARQUET, ARROW)))
    splits = open_files(source, files, options)
    classes = dict(_classes(schema_of(files.url(files.files[0]), files.files[0].size_bytes)))
    return {name: replace(split, info={**split.info, **_named(split, classes)}) for name, split in splits.items()}


def _files(found: Files) -> Files:
    """Return the Parquet files where there are any, else the Arrow files that their folders' states name."""
    parquet = [file for file in found.files if file.path.endswith(PARQUET)]
    if parquet:
        return Files(found.root, tuple(parquet))
    folders = sorted({file.path.rpartition("/")[0] for file in found.files})
    counted = {path for folder in folders for path in _counted(found.root, folder)}
    return Files(found.root, tuple(file for file in found.files if file.path in counted))


def _counted(root: str, folder: str) -> Iterator[str]:
    parts = [folder] if folder else []
    url = storage.join(root, *parts, STATE)
    try:
        state = storage.read_json(url)
        yield from ("/".join([*parts, entry["filename"]]) for entry in state["_data_files"])
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise DataError(
            f"{url}: missing or broken, so that nobody knows which Arrow files count; save the dataset again"
        ) from error


def _classes(schema: pa.Schema) -> Iterator[tuple[str, list[str]]]:
    """Yield the columns that are classes, with the names of these."""
    held: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    for name, feature in held.get("info", {}).get("features", {}).items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            yield name, list(feature["names"])


def _named(split: Split, classes: dict[str, list[str]]) -> dict[str, Any]:
    there = {column.name for column in split.columns}
    held = {name: names for name, names in classes.items() if name in there}
    return {"classes": held} if held else {}
