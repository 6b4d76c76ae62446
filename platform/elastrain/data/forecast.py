"""What a run will do, in numbers, before anything starts: from spec and manifest alone."""

from typing import Any

import numpy as np

from elastrain.data.plan import AHEAD_BYTES, INDEX_BYTES, Block, Ints, Plan, share
from elastrain.data.quarantine import opened
from elastrain.data.transforms import delivered_bytes
from elastrain.spec.train import Custom, TrainSpec

MIB = 1 << 20
MAX_STARTS = 1 << 16
MANY_BLOCKS = 64  # of one slot
MAX_CUT_ROWS = 1 << 18
WASTEFUL = 4.0  # rows decoded for one used, above which `plan` says what to do about it


def forecast_run(spec: TrainSpec) -> dict[str, Any]:
    """Return steps, blocks, shuffle strength, read amplification, memory and bytes of a run.

    Amplification is rows decoded ÷ rows used, over the blocks that hold the first epoch. Memory is bytes: of the feed's
    blocks in the object store (two a slot, and what is read ahead), and of the blocks that a worker holds. They are
    counted as transforms leave them, except for custom functions, which a plan does not run. Raises DataError.
    """
    data, evaluation = opened(spec.data)
    plan = Plan.of(data, seed=spec.data.seed, global_batch=spec.data.global_batch, slots=spec.num_slots)
    steps = spec.budget.steps or (spec.budget.epochs or 0) * plan.steps_per_epoch
    row_bytes = delivered_bytes(spec.data.transforms, data.columns)
    block_bytes = min(plan.block_steps, steps) * -(-plan.global_batch // plan.slots) * (row_bytes + INDEX_BYTES)
    columns = -(-steps // plan.block_steps)
    amplification = read_amplification(plan, steps)
    feed_bytes = 2 * plan.slots * block_bytes + max(AHEAD_BYTES, plan.slots * block_bytes)
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
        "samples": samples(plan, steps),
        "block_steps": plan.block_steps,
        "blocks": columns * plan.slots,
        "block_bytes": block_bytes,
        "units_per_block": round(
            len(plan.units[0]) / max(1.0, plan.slots * plan.steps_per_epoch / plan.block_steps), 1
        ),
        "read_amplification": amplification,
        "bytes_per_step": plan.global_batch * row_bytes,
        "bytes_read_per_epoch": int(data.size_bytes * amplification),
        "feed_bytes": min(feed_bytes, columns * plan.slots * block_bytes),
        "worker_block_bytes": 2 * -(-plan.slots // spec.workers.max) * block_bytes,
        "warnings": [doubt for held in (data, evaluation) if held is not None and (doubt := held.doubt())],
        "not_counted": [step.function for step in spec.data.transforms if isinstance(step, Custom)],
    }


def samples(plan: Plan, steps: int) -> int:
    """Return the samples of the run's first steps."""
    return steps // plan.steps_per_epoch * plan.num_rows + steps % plan.steps_per_epoch * plan.global_batch


def read_amplification(plan: Plan, steps: int) -> float:
    """Return rows decoded ÷ rows used, over the blocks that hold the first epoch; a run may end inside them.

    Exact for up to 65,536 blocks. Beyond, the row groups that block ends cut are weighed at that many evenly spread
    ends, so that the time does not grow with the rows, and two units of one row group in a block count as two.
    """
    columns = -(-min(steps, plan.steps_per_epoch) // plan.block_steps)
    if plan.slots * columns > MAX_STARTS:
        return _weighed(plan, columns)
    end = min(steps, columns * plan.block_steps)
    inside = min(steps, plan.steps_per_epoch) // plan.block_steps
    if inside >= MANY_BLOCKS:  # the one that reaches into the second epoch would double the time and change nothing
        end = inside * plan.block_steps
    return decoded_rows(plan, end) / samples(plan, end)


def decoded_rows(plan: Plan, end: int) -> int:
    """Return how many rows the blocks of the steps [0, end) decode: a block decodes a row group once, if it needs it.

    Exact; only of a block that the end cuts within an epoch, and whose rows in that epoch are very many, all row groups
    count.
    """
    last, epochs = (end - 1) // plan.block_steps, range(-(-end // plan.steps_per_epoch))
    found = [_touched(plan, epoch, last + 1) for epoch in epochs]
    cut_rows = min(plan.block_steps, plan.steps_per_epoch) * plan.global_batch
    if end % plan.steps_per_epoch and end % plan.block_steps and cut_rows <= MAX_CUT_ROWS:
        begin = max(last * plan.block_steps, epochs[-1] * plan.steps_per_epoch)
        found[-1] = np.concatenate([_touched(plan, epochs[-1], last), _cut(plan, begin, end)])
    touched = np.sort(np.concatenate(found))  # np.unique hashes, which takes ten times as long
    once = np.append(True, touched[1:] != touched[:-1])
    return int((plan.group_rows[touched % len(plan.group_rows)] * once).sum())


def _touched(plan: Plan, epoch: int, stop: int) -> Ints:
    """Return what the blocks (slot, j) with j < `stop` hold of an epoch, as numbers of (j, slot, row group)."""
    order, first = plan.order(epoch), epoch * plan.steps_per_epoch
    starts = np.arange(-first % plan.block_steps, plan.steps_per_epoch, plan.block_steps, dtype=np.int64)
    origin, step_rows = _slots(plan)
    places = np.concatenate([order.place, origin, (origin[:, None] + starts * step_rows[:, None]).ravel()])
    places = np.sort(places[places < plan.num_rows])
    slot = np.searchsorted(origin, places, side="right") - 1
    block = (first + np.minimum((places - origin[slot]) // step_rows[slot], plan.full_steps)) // plan.block_steps
    group = order.group[np.searchsorted(order.place, places, side="right") - 1]
    found: Ints = _numbered(plan, block, slot, group)[block < stop]
    return found


def _cut(plan: Plan, begin: int, end: int) -> Ints:
    """Return what the blocks of step `begin` hold of the steps [begin, end), which lie in one epoch; see `_touched`."""
    index, epoch = plan.block_of(begin), begin // plan.steps_per_epoch
    ends, found = np.cumsum(plan.group_rows), []
    for slot in range(plan.slots):
        part = next(part for part in plan.parts(slot, index) if part.epoch == epoch)
        block = Block(
            slot=slot,
            block=index,
            seed=plan.seed,
            steps_per_epoch=plan.steps_per_epoch,
            full_steps=plan.full_steps,
            step_rows=share(plan.global_batch, slot, plan.slots),
            parts=(part,),
            ranges=(plan.order(epoch).ranges(part.start, part.stop),),
        )
        group = np.searchsorted(ends, block.rows(begin, end).row, side="right")
        found.append(_numbered(plan, np.full(len(group), index), np.full(len(group), slot), group))
    return np.concatenate(found)


def _numbered(plan: Plan, block: Ints, slot: Ints, group: Ints) -> Ints:
    return (block * plan.slots + slot) * len(plan.group_rows) + group


def _slots(plan: Plan) -> tuple[Ints, Ints]:
    """Return for each slot where it begins in an epoch's order, and its rows of a full batch."""
    slots = np.arange(plan.slots, dtype=np.int64)
    low = slots * plan.global_batch // plan.slots
    origin = plan.full_steps * low + slots * plan.tail // plan.slots
    return origin, (slots + 1) * plan.global_batch // plan.slots - low


def _weighed(plan: Plan, columns: int) -> float:
    """Return the amplification of an epoch of very many blocks, from a sample of their ends."""
    order = plan.order(0)
    every = max(1, plan.slots * columns // MAX_STARTS)
    origin, step_rows = _slots(plan)
    steps = np.arange(0, columns, every, dtype=np.int64) * plan.block_steps
    starts = np.unique(origin[:, None] + steps * step_rows[:, None])
    starts = starts[(starts > 0) & (starts < plan.num_rows)]
    decoded = plan.group_rows[order.group]
    inside = np.searchsorted(order.place, starts, side="right") - 1
    cut = decoded[inside] * (starts != order.place[inside])
    return float(decoded.sum() + cut.sum() * (plan.slots * columns / max(1, len(starts)))) / plan.num_rows


def as_text(found: dict[str, Any]) -> str:
    """Return a forecast as lines for people."""
    low, high = found["slot_rows"]
    rows = f"{low}" if low == high else f"{low} to {high}"
    tail = f"; the last step of an epoch has {found['tail']:,}" if found["tail"] else ""
    per_step = found["bytes_per_step"]
    uncounted = f", {' and '.join(found['not_counted'])} not counted" if found["not_counted"] else ""
    memory = f"{_size(found['feed_bytes'])} of object store, {_size(found['worker_block_bytes'])} in a worker"
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
        ("memory", memory + uncounted),
    ]
    if found["read_amplification"] > WASTEFUL:
        lines.append(("advice", "pack the data into smaller row groups, or use fewer slots, to read less"))
    lines += [("warning", text) for text in found["warnings"]]
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def _size(count: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", MIB), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
