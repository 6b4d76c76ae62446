"""What a run will do, in numbers, before anything starts: from spec and manifest alone."""

from typing import Any

import numpy as np

from elastrain.data.dataset import Dataset
from elastrain.data.plan import AHEAD_BYTES, Ints, Plan
from elastrain.spec.train import TrainSpec

MIB = 1 << 20
MAX_STARTS = 1 << 16
WASTEFUL = 4.0  # rows decoded for one used, above which `plan` says what to do about it


def forecast_run(spec: TrainSpec) -> dict[str, Any]:
    """Return steps, blocks, shuffle strength, read amplification, memory and bytes of a run.

    Amplification is rows decoded ÷ rows used, over the blocks of the first epoch. Memory is bytes: of the feed's blocks
    in the object store (two a slot, and what is read ahead), and of one slot's block in a worker. Raises DataError.
    """
    data = Dataset.open(spec.data.train).select(spec.data.columns)
    evaluation = Dataset.open(spec.data.eval).select(spec.data.columns) if spec.data.eval else None
    plan = Plan.of(data, seed=spec.data.seed, global_batch=spec.data.global_batch, slots=spec.num_slots)
    steps = spec.budget.steps or (spec.budget.epochs or 0) * plan.steps_per_epoch
    block_bytes = min(plan.block_steps, steps) * -(-plan.global_batch // plan.slots) * plan.row_bytes
    columns = -(-steps // plan.block_steps)
    decoded = decoded_rows(plan)
    feed_bytes = 2 * plan.slots * block_bytes + max(AHEAD_BYTES, plan.slots * block_bytes)
    used = plan.num_rows * max(1.0, min(plan.block_steps, steps) / plan.steps_per_epoch)
    return {
        "name": spec.name,
        "rows": plan.num_rows,
        "eval_rows": evaluation.num_rows if evaluation else 0,
        "files": len(data.shards),
        "row_groups": len(plan.group_rows),
        "columns": {c.name: f"{c.dtype}{list(c.shape)}" for c in data.columns},
        "fingerprint": plan.fingerprint,
        "global_batch": plan.global_batch,
        "slots": plan.slots,
        "slot_rows": [plan.global_batch // plan.slots, -(-plan.global_batch // plan.slots)],
        "steps_per_epoch": plan.steps_per_epoch,
        "tail": plan.tail,
        "steps": steps,
        "epochs": steps / plan.steps_per_epoch,
        "samples": steps // plan.steps_per_epoch * plan.num_rows + steps % plan.steps_per_epoch * plan.global_batch,
        "block_steps": plan.block_steps,
        "blocks": columns * plan.slots,
        "block_bytes": block_bytes,
        "units_per_block": round(
            len(plan.units[0]) / max(1.0, plan.slots * plan.steps_per_epoch / plan.block_steps), 1
        ),
        "read_amplification": decoded / used,
        "bytes_per_step": plan.global_batch * data.row_bytes,
        "bytes_read_per_epoch": int(data.size_bytes * decoded / used),
        "feed_bytes": min(feed_bytes, columns * plan.slots * block_bytes),
        "worker_block_bytes": 2 * -(-plan.slots // spec.workers.max) * block_bytes,
    }


def decoded_rows(plan: Plan) -> int:
    """Return how many rows the blocks of the first epoch decode; a block decodes each row group it touches once.

    Exact for up to 65,536 blocks. Beyond, the row groups that block ends cut are weighed at that many evenly spread
    ends, so that the time does not grow with the rows, and two units of one row group in a block count as two.
    """
    order = plan.order(0)
    starts, count = _block_starts(plan)
    if count > MAX_STARTS or len(order.row) == np.count_nonzero(plan.group_rows):
        decoded = plan.group_rows[order.group]
        inside = np.searchsorted(order.place, starts, side="right") - 1
        cut = decoded[inside] * (starts != order.place[inside])
        return int(decoded.sum() + cut.sum() * (count / max(1, len(starts))))
    places = np.unique(np.concatenate([order.place, starts]))
    block = np.searchsorted(starts, places, side="right")
    group = order.group[np.searchsorted(order.place, places, side="right") - 1]
    pairs = np.unique(block * len(plan.group_rows) + group)
    return int(plan.group_rows[pairs % len(plan.group_rows)].sum())


def _block_starts(plan: Plan) -> tuple[Ints, int]:
    """Return places of the first epoch's order at which blocks begin (place 0 left out), and how many there are."""
    columns = -(-plan.steps_per_epoch // plan.block_steps)
    every = max(1, plan.slots * columns // MAX_STARTS)
    steps = np.arange(0, columns, every, dtype=np.int64) * plan.block_steps
    slots = np.arange(plan.slots, dtype=np.int64)[:, None]
    low = slots * plan.global_batch // plan.slots
    origin = plan.full_steps * low + slots * plan.tail // plan.slots
    step_rows = (slots + 1) * plan.global_batch // plan.slots - low
    found = np.unique(origin + steps * step_rows)
    found = found[(found > 0) & (found < plan.num_rows)]
    return found, len(found) if every == 1 else plan.slots * columns


def as_text(found: dict[str, Any]) -> str:
    """Return a forecast as lines for people."""
    low, high = found["slot_rows"]
    rows = f"{low}" if low == high else f"{low} to {high}"
    tail = f"; the last step of an epoch has {found['tail']:,}" if found["tail"] else ""
    per_step = found["bytes_per_step"]
    lines = [
        ("data", f"{found['rows']:,} rows in {found['files']:,} files, {found['row_groups']:,} row groups"),
        ("columns", ", ".join(f"{name} {kind}" for name, kind in found["columns"].items())),
        ("fingerprint", found["fingerprint"][:16]),
        ("evaluation", f"{found['eval_rows']:,} rows"),
        ("batch", f"{found['global_batch']:,} samples over {found['slots']} slots of {rows}{tail}"),
        ("steps", f"{found['steps']:,} ({found['epochs']:.2f} epochs of {found['steps_per_epoch']:,} steps)"),
        ("samples", f"{found['samples']:,}, each of an epoch exactly once"),
        (
            "blocks",
            f"{found['blocks']:,} of up to {found['block_steps']:,} steps, {_size(found['block_bytes'])} each",
        ),
        ("shuffle", f"a block mixes rows from about {found['units_per_block']:,} places of the data"),
        (
            "reads",
            f"{found['read_amplification']:.2f} decoded a used one, {_size(found['bytes_read_per_epoch'])} an epoch",
        ),
        ("bandwidth", f"{_size(per_step)} a step: {_size(10 * per_step)}/s at 10 steps a second"),
        ("memory", f"{_size(found['feed_bytes'])} of object store, {_size(found['worker_block_bytes'])} in a worker"),
    ]
    if found["read_amplification"] > WASTEFUL:
        lines.append(("advice", "pack the data into smaller row groups, or use fewer slots, to read less"))
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def _size(count: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", MIB), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
