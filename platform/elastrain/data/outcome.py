"""What a pack leaves in its folder: markers while it runs, manifests at its end, and nothing in between that opens.

Every split gets a marker before the first shard, and its manifest after the last shard of all splits. Where a finished
dataset is to be replaced, all is written beside it, and it is touched only when the new one is whole:

```
out/.new/<split>/…          on S3 .new/<mark>/<split>/…: shards, manifests and all else of the new dataset
out/.new/_whole.json        written last: from here on the new one counts, and a pack that finds this finishes it
out/.new/_cleared.json      the old one is gone, and shards of the new one are on their way into its place
```
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elastrain import conditional, storage
from elastrain.data.card import PAGE, page
from elastrain.data.chunks import Split
from elastrain.data.dataset import MANIFEST, PACKING, Dataset
from elastrain.encryption import Encryptor
from elastrain.errors import ConflictError, DataError, ElastrainError
from elastrain.lease import Hold
from elastrain.s3 import is_s3
from elastrain.uploads import abort

TOKENIZER = "tokenizer.json"
BESIDE = ".new"  # below OUT, and hidden: shards that will replace those of a finished dataset
WHOLE, CLEARED = "_whole.json", "_cleared.json"
MARK = 8
SHARD = re.compile(rf"part-\d{{5,}}(?:-[0-9a-f]{{{MARK}}})?\.parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A split that is there: whether it is finished, what was packed, and the names of all splits of that pack.

    Of a manifest that cannot be read, neither is known.
    """

    finished: bool
    pack: Mapping[str, Any]
    splits: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a pack of `splits` writes: in `out`, or in `base` beside the splits `old` that it will replace.

    On S3, where a writer that stood still may go on when another one has come and gone, the names of its shards, and of
    `base`, end in a `mark` that no other writer has: whatever it still writes, it writes over nobody's shard.
    """

    out: str
    base: str
    pack: Mapping[str, Any]
    splits: Mapping[str, Any]
    old: tuple[str, ...]
    hold: Hold
    mark: str = ""

    def shards(self, name: str) -> str:
        """Return the folder that the shards of a split are written to."""
        return storage.join(self.base, name)

    def remove(self, url: str) -> None:
        """Remove what lies in the place, unless another process has taken it over: then raise ConflictError."""
        self.hold.check()
        storage.remove(url)


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
            held = json.loads(storage.read_bytes(storage.join(url, name)))
            noted = held.get("info", {}) if name == MANIFEST else held
            return Found(finished=name == MANIFEST, pack=noted.get("pack") or {}, splits=tuple(noted.get("splits", ())))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, AttributeError):
            return Found(finished=name == MANIFEST, pack={}, splits=())
    return None


def finished(out: str, there: Mapping[str, Found], pack: Mapping[str, Any]) -> dict[str, Dataset] | None:
    """Return the datasets if this very pack is there as a whole, every shard of it, else None."""
    names = next((held.splits for held in there.values() if held.pack == pack), ())
    if not names or any(name not in there or not there[name].finished or there[name].pack != pack for name in names):
        return None
    try:
        found = {name: Dataset.open(storage.join(out, name)) for name in names}
    except DataError:  # a manifest of another version, say
        return None
    if not all(_is_whole(out, dataset) for dataset in found.values()):
        return None
    for name in names:  # of a pack that was killed after its last manifest
        storage.remove(storage.join(out, name, PACKING))
    return found


def _is_whole(out: str, dataset: Dataset) -> bool:
    sizes = {file.path: file.size_bytes for file in storage.list_files(dataset.url)}
    if any(sizes.get(shard.path) != shard.size_bytes for shard in dataset.shards):
        return False
    return not str(dataset.info.get("tokenizer")).endswith(TOKENIZER) or storage.exists(storage.join(out, TOKENIZER))


def refuse_others(out: str, there: Mapping[str, Found], pack: Mapping[str, Any], *, overwrite: bool) -> None:
    """Raise ConflictError if a folder in `out` holds another pack, unless it is to be overwritten."""
    for name, held in there.items():
        if held.pack == pack or overwrite:
            continue
        options, wanted = held.pack.get("options", {}), pack["options"]
        keys = [key for key in {**wanted, **options} if options.get(key) != wanted.get(key)]
        differing = [f"{key} {options.get(key, 'unset')}" for key in keys]
        if not held.pack:
            why = "has a manifest that cannot be read, or one that no pack wrote"
        elif held.pack.get("source") != pack["source"]:
            why = f"holds a pack of {held.pack.get('source', 'something else')}"
        elif differing:
            why = f"was packed with {', '.join(differing)}"
        else:
            why = "was packed from files that have changed since, or by another version"
        raise ConflictError(f"{out}/{name} {why}; choose another folder, or replace it with --overwrite")


def refuse_own_source(out: str, there: Mapping[str, Found], files: Iterable[str]) -> None:
    """Raise ConflictError if one of the source's Parquet files is a shard that the pack would replace."""
    places = {_real(storage.join(out, name)): name for name in there}
    for file in files:
        folder, _, path = _real(file).rpartition("/")
        if folder in places and SHARD.fullmatch(path):
            held = f"{out}/{places[folder]}"
            raise ConflictError(f"{file}: the source is {held}, which this pack would replace; choose another folder")


def _real(url: str) -> str:
    return os.path.realpath(storage.local_path(url)) if storage.is_local(url) else url


@contextlib.contextmanager
def placed(
    out: str,
    there: Mapping[str, Found],
    splits: Mapping[str, Split],
    pack: Mapping[str, Any],
    hold: Hold | None = None,
) -> Iterator[Place]:
    """Yield where to write the shards, then `commit`; what an earlier pack left unfinished is cleared before.

    A finished dataset stays as it is until `commit`, and after any error before that; so there must be room for both.
    What a killed `commit` left has to be finished first, see `recover`. Raises ConflictError if a split's folder holds
    files that no pack wrote, StorageError if it cannot be written.
    """
    for name in splits:
        url = storage.join(out, name)
        if name not in there and storage.exists(url) and storage.list_files(url):
            raise ConflictError(f"{url}: there are files that no pack wrote; choose another folder")
    hold, beside = hold or Hold(out), storage.join(out, BESIDE)
    storage.remove(beside)  # of packs that were killed
    abort([beside, *(storage.join(out, name) for name in splits)])
    mark = f"-{hold.token[:MARK]}" if hold.token and is_s3(out) else ""  # elsewhere who packs dies with its hold
    is_fresh = not any(held.finished for held in there.values())
    base = out if is_fresh else storage.join(beside, mark[1:]) if mark else beside
    place = Place(out=out, base=base, pack=pack, splits=splits, old=tuple(there), hold=hold, mark=mark)
    if is_fresh:
        _clear(place)
    try:
        yield place
    except BaseException:
        with contextlib.suppress(ElastrainError):  # what went wrong before tells more
            _leave(place)
        raise


def _leave(place: Place) -> None:
    """Remove what an error has left, but for what the next pack will finish, or write again in its place."""
    if place.base != place.out:
        if not storage.exists(storage.join(place.base, WHOLE)):
            storage.remove(place.base)
        return
    for name in place.splits if place.mark else ():
        url = storage.join(place.out, name)
        try:
            manifest = storage.read_bytes(storage.join(url, MANIFEST))
        except FileNotFoundError:
            manifest = b""
        if place.mark.encode() in manifest or b'"encrypted"' in manifest:  # which may be ours
            continue
        for file in storage.list_files(url):
            if file.path.endswith(f"{place.mark}.parquet"):
                storage.remove(storage.join(url, file.path))


def _clear(place: Place) -> None:
    """Mark every split as unfinished, then remove what earlier packs left; nothing opens from here on."""
    urls = [storage.join(place.out, name) for name in dict.fromkeys((*place.splits, *place.old))]
    for url in urls:
        storage.put_json(storage.join(url, PACKING), {"pack": place.pack, "splits": list(place.splits)})
    for url in urls:
        place.remove(storage.join(url, MANIFEST))
    for url in urls:
        place.remove(storage.join(url, PAGE))
        _remove_shards(place, url)
    for url in urls[len(place.splits) :]:
        place.remove(storage.join(url, PACKING))
        if storage.is_local(url):
            with contextlib.suppress(OSError):  # what no pack wrote stays
                storage.local_path(url).rmdir()
    if place.old:
        place.remove(storage.join(place.out, TOKENIZER))


def _remove_shards(place: Place, url: str) -> None:
    for file in storage.list_files(url):
        if SHARD.fullmatch(file.path):
            place.remove(storage.join(url, file.path))
    storage.remove_staged(url)  # what a killed pack was writing


def commit(place: Place, packed: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Write the manifests, `train` last, then remove the markers: if `train` opens, the whole pack is there.

    Integer columns get as many values as in the split that has most, so that a model made for one fits all. Where a
    dataset is to be replaced all is written beside it first, and from then on a kill loses neither: see `recover`.
    Raises ConflictError if another process has taken the folder over.
    """
    key = next(iter(packed.values())).key
    encryptor = None if key is None else Encryptor(key)
    files = next(iter(place.splits.values())).files.items()
    small = {name: data if encryptor is None else encryptor.encrypt(data, context=name) for name, data in files}
    counts = [{c.name: c.num_values for c in dataset.columns} for dataset in packed.values()]
    done = {}
    for name in reversed(list(packed)):
        columns = [replace(c, num_values=_most([held[c.name] for held in counts])) for c in packed[name].columns]
        info = {**packed[name].info, "pack": place.pack, "splits": list(packed)}
        url = storage.join(place.out, name)
        done[name] = replace(packed[name], url=url, columns=tuple(columns), info=info)
        if "card" in info and key is None:  # the manifest, which is encrypted, has it too
            small[f"{name}/{PAGE}"] = page(name, {**info["card"], "fingerprint": packed[name].fingerprint}).encode()
        small[f"{name}/{MANIFEST}"] = (json.dumps(done[name].manifest(), indent=1) + "\n").encode()
    if place.base != place.out:
        for path, data in small.items():
            storage.put(storage.join(place.base, path), data)
        held = {"pack": place.pack, "splits": list(packed), "old": list(place.old), "files": list(small)}
        place.hold.check()
        storage.put_json(storage.join(place.base, WHOLE), held)
        _replace(place)
    for path, data in small.items():
        _appear(place, path, data)
    _end(place, packed)
    return {name: done[name] for name in packed}


def recover(hold: Hold) -> bool:
    """Finish what a pack was killed over while it put a whole dataset in the place of another; say if there was any.

    Raises as `commit` does.
    """
    out, beside = hold.folder, storage.join(hold.folder, BESIDE)
    bases = [beside, *(storage.join(beside, name) for name in storage.list_folders(beside))]
    whole = next((base for base in bases if storage.exists(storage.join(base, WHOLE))), None)
    if whole is None:
        return False
    held = storage.read_json(storage.join(whole, WHOLE))
    splits = dict.fromkeys(held["splits"])
    place = Place(out=out, base=whole, pack=held["pack"], splits=splits, old=tuple(held["old"]), hold=hold)
    _replace(place)
    for path in held["files"]:
        _appear(place, path, storage.read_bytes(storage.join(whole, path)))
    _end(place, splits)
    return True


def _replace(place: Place) -> None:
    """Bring the shards that lie beside a dataset into its place; again after a kill at any moment."""
    cleared = storage.join(place.base, CLEARED)
    if not storage.exists(cleared):
        _clear(place)
        storage.put_json(cleared, {})  # from here on shards of the new dataset lie in the place
    for name in place.splits:
        for file in storage.list_files(storage.join(place.base, name)):
            if SHARD.fullmatch(file.path):
                place.hold.check()
                storage.move(storage.join(place.base, name, file.path), storage.join(place.out, name, file.path))


def _appear(place: Place, path: str, data: bytes) -> None:
    """Write a small file of the dataset; a manifest on S3 only where there is none, so that none is ever replaced."""
    url = storage.join(place.out, path)
    place.hold.check()
    if not is_s3(url) or not path.endswith(MANIFEST):
        storage.put(url, data)
    elif conditional.create(url, data) is None:
        raise ConflictError(f"{url}: another pack has written it meanwhile; what it has committed is kept")


def _end(place: Place, names: Iterable[str]) -> None:
    for name in names:
        storage.remove(storage.join(place.out, name, PACKING))
    storage.remove(storage.join(place.out, BESIDE))


def _most(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return max(known) if len(known) == len(counts) else None
