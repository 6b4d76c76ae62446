"""What a pack leaves in its folder: markers while it runs, manifests at its end, and nothing in between that opens.

Every split gets a marker before the first shard, and its manifest after the last shard of all splits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elastrain import storage
from elastrain.data.chunks import Split
from elastrain.data.dataset import MANIFEST, PACKING, Dataset
from elastrain.errors import ConflictError

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A split that is there: whether it is finished, what was packed, and the names of all splits of that pack."""

    finished: bool
    pack: Mapping[str, Any]
    splits: tuple[str, ...]


def find(out: str) -> dict[str, Found]:
    """Return the folders in `out` that a pack began or finished.

    Raises ConflictError if `out` is such a folder itself, StorageError if storage does not answer.
    """
    if _noted(out) is not None:
        raise ConflictError(f"{out}: this is one split of a dataset; choose the folder above, or another one")
    noted = {name: _noted(storage.join(out, name)) for name in storage.list_folders(out)}
    return {name: held for name, held in noted.items() if held is not None}


def _noted(url: str) -> Found | None:
    for name in (MANIFEST, PACKING):
        try:
            held = storage.read_json(storage.join(url, name))
        except FileNotFoundError:
            continue
        noted = held.get("info", {}) if name == MANIFEST else held
        return Found(finished=name == MANIFEST, pack=noted.get("pack") or {}, splits=tuple(noted.get("splits", ())))
    return None


def finished(out: str, there: Mapping[str, Found], pack: Mapping[str, Any]) -> dict[str, Dataset] | None:
    """Return the datasets if this very pack is there as a whole, else None."""
    names = next((held.splits for held in there.values() if held.pack == pack), ())
    if not names or any(name not in there or not there[name].finished or there[name].pack != pack for name in names):
        return None
    for name in names:  # of a pack that was killed after its last manifest
        storage.remove(storage.join(out, name, PACKING))
    return {name: Dataset.open(storage.join(out, name)) for name in names}


def refuse_others(out: str, there: Mapping[str, Found], pack: Mapping[str, Any], *, overwrite: bool) -> None:
    """Raise ConflictError if a folder in `out` holds another pack, unless it is to be overwritten."""
    for name, held in there.items():
        if held.pack == pack or overwrite:
            continue
        options, wanted = held.pack.get("options", {}), pack["options"]
        differing = [f"{key} {options.get(key)}" for key in wanted if options.get(key) != wanted[key]]
        if held.pack.get("source") != pack["source"]:
            why = f"holds a pack of {held.pack.get('source', 'something else')}"
        elif differing:
            why = f"was packed with {', '.join(differing)}"
        else:
            why = "was packed from files that have changed since, or by another version"
        raise ConflictError(f"{out}/{name} {why}; choose another folder, or replace it with --overwrite")


def prepare(out: str, there: Mapping[str, Found], splits: Mapping[str, Split], pack: Mapping[str, Any]) -> None:
    """Mark every split as unfinished and clear what an earlier pack left; nothing opens from here on.

    Raises ConflictError if a split's folder holds files that no pack wrote, StorageError if it cannot be written.
    """
    for name in splits:
        url = storage.join(out, name)
        if name not in there and storage.exists(url) and storage.list_files(url):
            raise ConflictError(f"{url}: there are files that no pack wrote; choose another folder")
    for name in {**there, **splits}:
        _clear(storage.join(out, name), {"pack": pack, "splits": list(splits)})
        if name not in splits:
            storage.remove(storage.join(out, name))
    if there:
        storage.remove(storage.join(out, TOKENIZER))
    for name, data in next(iter(splits.values())).files.items():
        storage.put(storage.join(out, name), data)


def _clear(url: str, marker: Mapping[str, Any]) -> None:
    storage.put_json(storage.join(url, PACKING), marker)
    storage.remove(storage.join(url, MANIFEST))
    for file in storage.list_files(url):
        storage.remove(storage.join(url, file.path))
    if storage.is_local(url):
        for path in storage.local_path(url).glob(".*.tmp"):  # what a killed pack was writing
            path.unlink()


def commit(out: str, packed: Mapping[str, Dataset], pack: Mapping[str, Any]) -> dict[str, Dataset]:
    """Write the manifests, `train` last, then remove the markers: if `train` opens, the whole pack is there.

    Integer columns get as many values as in the split that has most, so that a model made for one fits all.
    """
    counts = [{c.name: c.num_values for c in dataset.columns} for dataset in packed.values()]
    done = {}
    for name in reversed(list(packed)):
        columns = [replace(c, num_values=_most([held[c.name] for held in counts])) for c in packed[name].columns]
        info = {**packed[name].info, "pack": pack, "splits": list(packed)}
        done[name] = replace(packed[name], columns=tuple(columns), info=info)
        storage.put_json(storage.join(out, name, MANIFEST), done[name].manifest())
    for name in packed:
        storage.remove(storage.join(out, name, PACKING))
    return {name: done[name] for name in packed}


def _most(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return max(known) if len(known) == len(counts) else None
