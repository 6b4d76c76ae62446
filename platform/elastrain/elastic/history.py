"""What a run directory already holds: is this the same run, and from where does it go on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elastrain import storage
from elastrain.data.dataset import Dataset
from elastrain.data.plan import Plan
from elastrain.data.quarantine import QUARANTINE, Note
from elastrain.elastic.attempts import NOTE
from elastrain.errors import ConflictError, ElastrainError, StorageError
from elastrain.spec.document import changed, dump, parse_train
from elastrain.spec.train import TrainSpec
from elastrain.training.manifests import newest_whole, read_manifests

SPEC, PLAN = "spec.yaml", "plan.json"
PARTS = ("checkpoints", "metrics", "audit", "ledger", "report.html", QUARANTINE, NOTE, PLAN, SPEC)


@dataclass(frozen=True, slots=True)
class Resume:
    """The newest whole checkpoint: its step and what was noted with it (`complete` at the end of a run)."""

    step: int
    info: Mapping[str, Any]


def resumable(run: str, *, warn: Callable[[str], None]) -> Resume | None:
    """Return where the run goes on, None for its beginning; broken checkpoints are passed over with a warning."""
    step = newest_whole(run, warn=warn)
    return None if step is None else Resume(step, read_manifests(run)[step]["info"])


def prepare(spec: TrainSpec, dataset: Dataset, run: str, *, fresh: bool) -> tuple[TrainSpec, Plan]:
    """Return spec and plan with what the run had fixed before, unless it starts afresh; writes nothing.

    Raises ConflictError, saying what changed, if the directory holds a run that is another one.
    """
    stored = None if fresh else _stored(run)
    if stored is None:
        spec = _with_slots(spec, spec.num_slots)
        return spec, _plan(spec, dataset)
    old, identity = stored
    if spec.data.slots is None:
        spec = _with_slots(spec, int(identity["slots"]))
    plan = _plan(spec, dataset)
    _compare(run, changed(old, spec), identity, plan.identity())
    return spec, plan


def is_same(run: str, spec: TrainSpec, plan: Plan) -> bool:
    """Say whether the directory holds this very run, be it one that has committed nothing yet."""
    try:
        found = _begun(run)
    except ElastrainError:  # of another version, or cut off: a run to go on from is refused in `prepare`
        return False
    return found is not None and not changed(found[0], spec) and found[1] == plan.identity()


def begin(run: str, spec: TrainSpec, plan: Plan, left_out: Mapping[str, Note], *, fresh: bool) -> None:
    """Store what the run is, and what of its data is left out; `fresh` removes what it was before."""
    for part in PARTS if fresh else ():
        storage.remove(storage.join(run, part))
    if left_out:
        storage.put_json(storage.join(run, QUARANTINE), left_out)
    storage.put(storage.join(run, SPEC), dump(spec).encode())
    storage.put_json(storage.join(run, PLAN), plan.identity())


def _compare(run: str, differences: list[str], old: dict[str, Any], new: dict[str, Any]) -> None:
    found = list(differences)
    if old["fingerprint"] != new["fingerprint"]:
        found.insert(0, f"the training data ({old['fingerprint'][:12]} -> {new['fingerprint'][:12]})")
    for key in ("seed", "global_batch", "slots", "block_steps"):
        if old[key] != new[key] and not any(f".{key}:" in text for text in found):
            found.append(f"data.{key}: {old[key]} -> {new[key]}")
    if found:
        raise ConflictError(
            f"{run} holds a run that would come out differently: {'; '.join(found)}. Undo that, give this run another "
            f"name, or start over with --fresh"
        )


def _stored(run: str) -> tuple[TrainSpec, dict[str, Any]] | None:
    """Return spec and plan identity of the run; None where nothing was committed that they would bind."""
    if not read_manifests(run):
        return None
    found = _begun(run)
    if found is None:
        raise StorageError(f"{run}: checkpoints without {PLAN} or {SPEC}; restore them or use --fresh")
    return found


def _begun(run: str) -> tuple[TrainSpec, dict[str, Any]] | None:
    try:
        identity = storage.read_json(storage.join(run, PLAN))
        text = storage.read_bytes(storage.join(run, SPEC)).decode()
    except FileNotFoundError:
        return None
    return parse_train(text, name=storage.join(run, SPEC)), identity


def _with_slots(spec: TrainSpec, slots: int) -> TrainSpec:
    """Return the spec with the run's slots fixed, and no more workers than slots."""
    workers = {"max": min(spec.workers.max, slots), "min": min(spec.workers.min, slots)}
    return spec.model_copy(
        update={
            "data": spec.data.model_copy(update={"slots": slots}),
            "workers": spec.workers.model_copy(update=workers),
        }
    )


def _plan(spec: TrainSpec, dataset: Dataset) -> Plan:
    return Plan.of(dataset, seed=spec.data.seed, global_batch=spec.data.global_batch, slots=spec.num_slots)
