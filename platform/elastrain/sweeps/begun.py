"""What a sweep was begun as, stored in its folder: compared when the same command goes on, gone with a fresh start."""

from collections.abc import Mapping, Sequence
from typing import Any

from elastrain import storage
from elastrain.data.dataset import Dataset
from elastrain.errors import ConflictError
from elastrain.observe.ledger import read_ledger
from elastrain.spec.document import changed, dump, plain, train_spec
from elastrain.spec.problems import nowhere
from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.document import parse_sweep
from elastrain.sweeps.outcome import OUTPUTS
from elastrain.sweeps.space import Arm

SPEC, BASE, TRIALS = "spec.yaml", "base.json", "trials"
FREE = ("storage", "budget", "max_concurrent", "base", "set", "confirm")  # compared otherwise, or not at all
DATA = ("train", "eval")

Identity = dict[str, dict[str, Any]]
"""Of each arm `spec`, the run that it varies, as plain data, and the fingerprints of its data under `DATA`."""


def identity_of(arms: Sequence[Arm]) -> Identity:
    """Return what decides a sweep's results besides its spec. Raises DataError, StorageError."""
    found: Identity = {}
    known: dict[str, str] = {}
    for arm in arms:
        run = arm.base.model_copy(update={"data": arm.base.data.model_copy(update={"slots": arm.base.num_slots})})
        found[arm.name] = {"spec": plain(run.model_dump(), nowhere)}
        for name in DATA:
            url = str(getattr(arm.base.data, name))
            known[url] = found[arm.name][name] = known.get(url) or Dataset.open(url).fingerprint
    return found


def events_of(url: str, spec: SweepSpec, identity: Identity) -> list[dict[str, Any]]:
    """Return the events of the sweep so far, none of one that is new. Raises ConflictError if another one is there."""
    place = storage.join(url, SPEC)
    try:
        stored = parse_sweep(storage.read_bytes(place).decode(), name=place)
        differs = _changed(stored, spec) or _moved(storage.read_json(storage.join(url, BASE)), identity)
    except FileNotFoundError:
        differs = []
    if differs:
        raise ConflictError(
            f"{url} holds a sweep that was begun with other settings ({'; '.join(differs)}); undo that, give this "
            f"sweep another name, or start over with --fresh"
        )
    return read_ledger(url)


def store(url: str, spec: SweepSpec, identity: Identity, *, fresh: bool) -> None:
    """Store what the sweep is, once nothing stands against it; `fresh` first removes what is there of another one."""
    for part in (*OUTPUTS, TRIALS, "ledger", BASE, SPEC) if fresh else ():
        storage.remove(storage.join(url, part))
    storage.put_json(storage.join(url, BASE), identity)
    storage.put(storage.join(url, SPEC), dump(spec).encode())


def extent_of(spec: SweepSpec) -> dict[str, Any]:
    """Return how far a sweep goes, as the ledger notes it of one that is done: more of it goes on."""
    confirm = spec.confirming
    return {"budget": spec.budget.model_dump(), "confirm": confirm.model_dump() if confirm else None}


def is_over(before: Sequence[Mapping[str, Any]], spec: SweepSpec) -> bool:
    """Say whether the sweep was brought to its end, as far as it is to go."""
    ends = [event for event in before if event["kind"] in ("start", "end")]
    return bool(ends) and ends[-1].get("outcome") == "done" and ends[-1].get("extent") == extent_of(spec)


def _changed(old: SweepSpec, new: SweepSpec) -> list[str]:
    """Return the fields that differ and decide what comes out; a larger budget goes on with what there is.

    The target decides nothing but the score, and what is confirmed may become more.
    """
    one, other = old.model_dump(), new.model_dump()
    for each in (one, other):
        del each["objective"]["target"]
    found = [key for key in one if key not in FREE and one[key] != other[key]]
    return found if _confirms_all(old, new) else [*found, "confirm"]


def _confirms_all(old: SweepSpec, new: SweepSpec) -> bool:
    """Say whether what `old` confirms, `new` does, too, with the same studies."""
    before, after = old.confirming, new.confirming
    if before is None or before == after:
        return True
    if after is None or before.studies or after.studies:
        return False
    return after.seeds >= before.seeds and after.top_k >= before.top_k


def _moved(old: Identity, new: Identity) -> list[str]:
    """Return the fields of the base that are not what they were, and the data that hold something else."""
    found: dict[str, None] = {}
    for arm in old.keys() & new.keys():
        before, after = old[arm], new[arm]
        found |= dict.fromkeys(
            f"the {name} data, {before[name][:12]} -> {after[name][:12]}"
            for name in DATA
            if before[name] != after[name]
        )
        differs = changed(train_spec(before["spec"]), train_spec(after["spec"]))
        found |= dict.fromkeys(f"in base and set, {text}" for text in differs)
    return list(found)
