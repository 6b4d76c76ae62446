"""Shards that cannot be read, left out of a run: found before it begins, noted with it, the same when it goes on.

What is left is a dataset like any other, with a fingerprint of its own: plan, weights and positions follow from it, for
any number of workers. A shard that goes bad later is an error: without it the steps before would have been others.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from elastrain import storage
from elastrain.data.dataset import Dataset, fingerprint
from elastrain.errors import DataError
from elastrain.spec.train import DataSpec

QUARANTINE = "quarantine.json"
READERS = 4
Note = dict[str, Any]
"""What is left out of one dataset: the `fingerprint` of it all, and of each bad shard `file`, `rows` and `why`."""


def opened(data: DataSpec) -> tuple[Dataset, Dataset | None]:
    """Return what a run trains and is evaluated on, with the columns that it wants; raises as `Dataset.open` does."""
    train, *more = (
        Dataset.open(url, on_bad_shard=data.on_bad_shard).select(data.columns) for url in (data.train, data.eval) if url
    )
    return train, more[0] if more else None


def find_bad(dataset: Dataset) -> Note:
    """Return what cannot be read of a dataset, after reading all of it once.

    Raises StorageError if storage does not answer, DataError if a shard is missing or none can be read.
    """
    from elastrain.data.reader import forget_files  # noqa: PLC0415 -- pyarrow, which a plan does without

    forget_files()
    with ThreadPoolExecutor(READERS) as pool:
        reasons = list(pool.map(lambda index: _why_bad(dataset, index), range(len(dataset.shards))))
    shards = [
        {"file": shard.path, "rows": sum(shard.row_groups), "why": why}
        for shard, why in zip(dataset.shards, reasons, strict=True)
        if why
    ]
    if len(shards) == len(dataset.shards):
        raise DataError(f"{dataset.url}: no shard can be read, so none can be left out; {shards[0]['why']}")
    return {"fingerprint": dataset.fingerprint, "shards": [*map(dict, dataset.broken), *shards]}


def noted(run: str) -> dict[str, Note]:
    """Return what a run leaves out, by dataset ("train", "eval"); empty where nothing was noted."""
    try:
        found: dict[str, Note] = storage.read_json(storage.join(run, QUARANTINE))
    except FileNotFoundError:
        return {}
    return found


def without(dataset: Dataset, note: Note) -> Dataset:
    """Return a dataset without its bad shards; the same one where there are none."""
    bad = {shard["file"] for shard in note["shards"]}
    if not bad:
        return dataset
    shards = tuple(shard for shard in dataset.shards if shard.path not in bad)
    return replace(dataset, shards=shards, fingerprint=fingerprint(dataset.columns, shards))


def left_out(datasets: Mapping[str, Dataset], run: str, *, fresh: bool) -> dict[str, Note]:
    """Return what a run leaves out: what it began without, or, of data that it did not begin with, what is bad now.

    Raises as `find_bad` does.
    """
    before = {} if fresh else noted(run)
    return {name: _known(before.get(name), found) or find_bad(found) for name, found in datasets.items()}


def _known(note: Note | None, dataset: Dataset) -> Note | None:
    """Return a note if it is about this dataset, also where files that had no readable footer have been restored."""
    if note is None:
        return None
    unread = {"shards": [shard for shard in note["shards"] if not shard["rows"]]}
    return note if note["fingerprint"] in (dataset.fingerprint, without(dataset, unread).fingerprint) else None


def events(datasets: Mapping[str, Dataset], notes: Mapping[str, Note]) -> list[dict[str, Any]]:
    """Return a line for the ledger for each shard that is left out."""
    return [
        {"file": storage.join(datasets[name].url, shard["file"]), "rows": shard["rows"], "why": shard["why"]}
        for name, note in notes.items()
        for shard in note["shards"]
    ]


def _why_bad(dataset: Dataset, index: int) -> str | None:
    """Read a shard, and once more if it is bad: what the network did to it may pass."""
    url = storage.join(dataset.url, dataset.shards[index].path)
    try:
        _read(dataset, index)
    except DataError:
        if not storage.exists(url):
            raise
        try:
            _read(dataset, index)
        except DataError as error:
            return str(error)
    return None


def _read(dataset: Dataset, index: int) -> None:
    from elastrain.data.reader import read_group, sources_of  # noqa: PLC0415

    counts = [len(shard.row_groups) for shard in dataset.shards]
    first = sum(counts[:index])
    for source in sources_of(dataset, np.arange(first, first + counts[index])):
        read_group(dataset.columns, source)
