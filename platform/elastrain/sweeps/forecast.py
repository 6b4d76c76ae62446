"""What a sweep will do, in numbers, before anything starts: arms, points, trials at once, steps; what can never fit.

Loads neither Ray nor torch, and opens no data.
"""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elastrain.errors import ResourceError
from elastrain.spec.sweep import EarlyStopSpec, SweepSpec
from elastrain.spec.train import TrainSpec, WorkersSpec
from elastrain.sweeps.dimensions import as_text as varies
from elastrain.sweeps.dimensions import shown
from elastrain.sweeps.document import base_of
from elastrain.sweeps.search import Search, budget_of, first_points, grid
from elastrain.sweeps.space import Arm, arms_of, defaults

_SHOWN_POINTS = 3
_FEW_SEEDS = 3
_MANY_VALUES = 3


def forecast_sweep(spec: SweepSpec, *, device_s_per_step: float | None = None) -> dict[str, Any]:
    """Return what a resolved sweep will do at most, and its warnings; `device_s_per_step` is one that was measured.

    `slots` is the number of trials at once on this machine, None where RAY_ADDRESS names a cluster that nobody asked.

    Raises:
        SpecError: The spec, its base or an arm is wrong, or a library is missing that the search needs.
        ResourceError: A trial can never fit on this machine.
    """
    arms = arms_of(spec, base_of(spec))
    for arm in arms:
        Search(arm=arm, spec=spec.search, budget=budget_of(spec))
    return {
        "name": spec.name,
        "mode": spec.mode,
        "method": spec.search.method,
        "seed": spec.search.seed,
        "objective": spec.objective.model_dump(),
        "budget": spec.budget.model_dump(),
        "arms": [_arm(spec, arm) for arm in arms],
        "rungs": rungs(spec),
        "workers": arms[0].base.workers.model_dump(),
        "slots": _slots(spec, arms[0].base.workers),
        **_cost(spec, arms, device_s_per_step),
        "warnings": list(_warnings(spec, arms)),
    }


def fits(nodes: Iterable[tuple[float, float]], workers: WorkersSpec) -> int:
    """Return how many trials fit at once on `nodes` of (CPUs, GPUs): of `workers.max` each, or one of at least `min`.

    A worker does not span nodes; a trial may.

    >>> fits([(4, 0), (3, 0)], WorkersSpec(min=1, max=2))
    3
    >>> fits([(1, 0)], WorkersSpec(min=1, max=2)), fits([(8, 1)], WorkersSpec(gpus=2))
    (1, 0)
    """
    held = sum(
        math.floor(min(cpus / workers.cpus, gpus / workers.gpus if workers.gpus else math.inf) + 1e-9)
        for cpus, gpus in nodes
    )
    return held // workers.max or int(held >= workers.min)


def rungs(spec: SweepSpec) -> list[int]:
    """Return the steps at which trials of an arm are compared and may end; the rule's own, put off to an evaluation."""
    rule, every, last = spec.early_stop, spec.objective.every, spec.objective.max_steps
    if rule is None:
        return []
    if rule.method == "median":
        return list(range(_up(rule.grace, every), last, every))
    found, step = [], rule.grace
    while step < last:
        found.append(_up(step, every))
        step *= rule.factor
    return [each for each in dict.fromkeys(found) if each < last]


def expected_steps(rule: EarlyStopSpec | None, max_steps: int) -> float:
    """Return the steps that a trial takes on average where exactly one in `factor` passes each rung.

    All of them without a rule, or with the median, which lets pass what it must.
    """
    if rule is None or rule.method == "median":
        return float(max_steps)
    steps, share, before = 0.0, 1.0, 0
    rung = rule.grace
    while before < max_steps:
        steps += share * (min(rung, max_steps) - before)
        before, rung, share = min(rung, max_steps), rung * rule.factor, share / rule.factor
    return steps


def as_text(found: dict[str, Any]) -> str:
    """Return a forecast as lines for people."""
    aim, trials = found["objective"], found["trials"]
    target = f", target {aim['target']:g}" if aim["target"] is not None else ""
    beside = "".join(f", {phase} {trials[phase]:,}" for phase in ("defaults", "confirm") if trials[phase])
    at_once = "the cluster decides" if found["slots"] is None else f"{found['slots']:,} on this machine"
    workers = found["workers"]
    size = f"{workers['max']}" if workers["min"] == workers["max"] else f"{workers['min']} to {workers['max']}"
    gpus = f" and {workers['gpus']:g} GPUs" if workers["gpus"] else ""
    lines = [
        ("sweep", f"{found['name']}: {found['mode']}, {found['method']}, seed {found['seed']}"),
        ("objective", f"{aim['metric']} ({aim['goal']}) every {aim['every']:,} of {aim['max_steps']:,} steps{target}"),
        ("budget", f"{found['budget']['per_arm']:g} {found['budget']['unit'].replace('_', ' ')} an arm"),
        ("trials", f"tune {_count(trials['tune'])}{beside}"),
        ("workers", f"{size} a trial, of {workers['cpus']:g} CPUs{gpus} each"),
        ("at once", at_once),
        *([("compared at", ", ".join(f"{step:,}" for step in found["rungs"][:8]))] if found["rungs"] else []),
        *(
            [("steps", f"{found['steps']:,} at most, {_count(found['steps_expected'])} expected")]
            if found["steps"]
            else []
        ),
        *([("samples", f"{found['samples']:,} at most")] if found["samples"] else []),
        *([("device", f"{found['device_s']:,.0f} s at most")] if found["device_s"] else []),
    ]
    text = [f"{name:<12} {value}" for name, value in lines]
    for arm in found["arms"]:
        text += _arm_lines(arm)
    return "\n".join([*text, *(f"warning: {each}" for each in found["warnings"])])


def _up(step: int, every: int) -> int:
    """Return the first evaluation at or after `step`."""
    return -(-step // every) * every


def _count(number: int | None) -> str:
    return "until it is spent" if number is None else f"{number:,}"


def _arm_lines(arm: dict[str, Any]) -> list[str]:
    width = max(map(len, arm["dimensions"]))
    points = [("defaults", arm["defaults"]), *((str(at), point) for at, point in enumerate(arm["first_points"]))]
    baseline = ", baseline" if arm["baseline"] else ""
    return [
        "",
        f"{arm['name']} ({arm['optimizer']}{baseline}): points {_count(arm['trials'])}",
        *(f"  {path:<{width}}  {text}" for path, text in arm["dimensions"].items()),
        *(f"  {name + ':':<9} {_point_text(point)}" for name, point in points),
    ]


def _point_text(point: dict[str, Any]) -> str:
    return ", ".join(f"{path} {shown(value)}" for path, value in point.items())


def _arm(spec: SweepSpec, arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "baseline": arm.baseline,
        "optimizer": arm.base.optimizer.name,
        "trials": _trials(spec, arm),
        "dimensions": {path: varies(each) for path, each in arm.dimensions.items()},
        "defaults": defaults(arm),
        "first_points": first_points(arm, spec.search, _SHOWN_POINTS),
    }


def _trials(spec: SweepSpec, arm: Arm) -> int | None:
    """Return the whole trials that the arm's budget pays for; None in device seconds: nobody knows what one takes."""
    if spec.budget.unit == "device_seconds":
        return None
    each = spec.objective.max_steps if spec.budget.unit == "steps" else 1
    count = math.ceil(spec.budget.per_arm / each)
    return min(count, len(grid(arm))) if spec.search.method == "grid" else count


def _cost(spec: SweepSpec, arms: Sequence[Arm], device_s_per_step: float | None) -> dict[str, Any]:
    """Return trials, steps, samples and device seconds at most; None where the spec does not tell."""
    tuning = [_trials(spec, arm) for arm in arms]
    tune = None if None in tuning else sum(each or 0 for each in tuning)
    untuned = len(arms) if spec.mode == "fair" else 0
    confirm = spec.confirming.seeds * spec.confirming.top_k * len(arms) if spec.confirming else 0
    full = spec.objective.max_steps
    beside = (untuned + confirm) * full
    steps = None if tune is None else tune * full + beside
    expected = None if tune is None else round(tune * expected_steps(spec.early_stop, full)) + beside
    batches = [size for arm in arms for size in _batches(arm)]
    largest = None if "all" in batches else max(batches)
    seconds = spec.budget.per_arm * len(arms) if steps is None else steps * (device_s_per_step or 0.0)
    return {
        "trials": {"tune": tune, "defaults": untuned, "confirm": confirm},
        "steps": steps,
        "steps_expected": expected if spec.budget.unit == "trials" else steps,
        "samples": steps * largest if steps and largest else None,
        "device_s": seconds + (beside * (device_s_per_step or 0.0) if steps is None else 0.0) or None,
    }


def _batches(arm: Arm) -> Sequence[Any]:
    """Return the global batches that an arm may have, or the largest of a range."""
    dimension = arm.dimensions.get("data.global_batch")
    if dimension is None:
        return [arm.base.data.global_batch]
    return dimension.values


def _slots(spec: SweepSpec, workers: WorkersSpec) -> int | None:
    """Return the trials at once on this machine, or None where a cluster is named; its own Ray counts CPUs as it likes.

    Raises ResourceError where a trial needs more GPUs than there are.
    """
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return None
    cpus, gpus = machine_cpus(), machine_gpus()
    if workers.gpus and fits([(math.inf, gpus)], workers) == 0:
        raise ResourceError(
            f"workers.min {workers.min} of {workers.gpus:g} GPUs each: this machine has {gpus}; "
            "lower workers.gpus in set, or name a cluster by RAY_ADDRESS"
        )
    return min(max(1, fits([(cpus, gpus)], workers)), spec.max_concurrent or 1 << 30)


def machine_cpus() -> int:
    """Return the CPUs that this process may use: its affinity, and the quota of its container."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):
        return allowed


def machine_gpus() -> int:
    """Return the NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([each for each in visible.split(",") if each.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _warnings(spec: SweepSpec, arms: Sequence[Arm]) -> Iterable[str]:
    yield from _fairness(spec, arms[0].base)
    if spec.early_stop and spec.early_stop.grace < spec.objective.every:
        every = spec.objective.every
        yield f"early_stop.grace {spec.early_stop.grace} lies before the first evaluation, at step {every}: that counts"
    for arm in arms:
        sizes = _batches(arm)
        if len(sizes) > 1:
            yield (
                f"{arm.name}: data.global_batch varies, and trials are compared at equal steps: "
                "a larger batch sees more samples for them"
            )
        yield from _coverage(spec, arm)


def _fairness(spec: SweepSpec, base: TrainSpec) -> Iterable[str]:
    if spec.confirm is not None and spec.confirm.seeds < _FEW_SEEDS:
        yield f"confirm.seeds {spec.confirm.seeds}: an interval over so few seeds says little; 5 are usual"
    if spec.mode != "fair":
        return
    if not (spec.confirm and spec.confirm.studies):
        yield "without confirm.studies the intervals hold the luck of the seed, and not that of the tuning"
    if spec.objective.target is None:
        yield "without objective.target no time to a target is measured, only the final metric"
    if base.workers.min != base.workers.max:
        sizes = f"{base.workers.min} to {base.workers.max}"
        yield f"trials have {sizes} workers: seconds are only comparable at one size; set workers.min and max alike"


def _coverage(spec: SweepSpec, arm: Arm) -> Iterable[str]:
    """Yield what the arm's points leave out."""
    if spec.search.method == "grid":
        size, paid = len(grid(arm)), _trials(spec, arm)
        if paid is not None and paid < size:
            yield f"{arm.name}: the grid has {size:,} points, and the budget pays for {paid:,}: the rest is not tried"
        return
    if spec.budget.unit == "trials" and spec.budget.per_arm < len(arm.dimensions):
        yield f"{arm.name}: {spec.budget.per_arm:g} points for {len(arm.dimensions)} fields leave most of the space out"
    for path, each in arm.dimensions.items():
        numbers = [one for one in each.values if isinstance(one, float)]
        if each.kind == "choice" and len(numbers) >= _MANY_VALUES:
            yield f"{arm.name}: {path} is a choice, which has no edges; a range warns where the best lies on its edge"
