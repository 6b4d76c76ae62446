"""What a sweep will do, in numbers, before anything starts: arms, points, trials at once, steps; what can never fit.

Loads neither Ray nor torch, and opens no data.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastrain.errors import ResourceError, SpecError
from elastrain.spec.sweep import SweepSpec
from elastrain.spec.train import WorkersSpec
from elastrain.sweeps.dimensions import as_text as varies
from elastrain.sweeps.dimensions import shown
from elastrain.sweeps.document import base_of
from elastrain.sweeps.rungs import decisions, expected_steps
from elastrain.sweeps.search import Search, budget_of, first_points, grid
from elastrain.sweeps.space import Arm, arms_of, defaults

_SHOWN_POINTS = 3
_FEW_SEEDS = 3
_MANY_VALUES = 3


Ask = Callable[[WorkersSpec], int]
"""From what a trial runs on to how many fit on a cluster at once."""


def forecast_sweep(
    spec: SweepSpec, *, device_s_per_step: float | None = None, ask: Ask | None = None
) -> dict[str, Any]:
    """Return what a resolved sweep will do at most, and its warnings; `device_s_per_step` is one that was measured.

    `slots` is the number of trials at once: on the cluster that `ask` asks, else on this machine; None where
    RAY_ADDRESS names a cluster that nobody asked.

    Raises:
        SpecError: The spec, its base or an arm is wrong, or a library is missing that the search needs.
        ResourceError: A trial can never fit.
    """
    arms = arms_of(spec, base_of(spec))
    workers = workers_of(arms)
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
        "rungs": sorted(decisions(spec)[0]),
        "workers": workers.model_dump(),
        "slots": _slots(spec, workers, ask),
        "asked": ask is not None,
        **_cost(spec, arms, device_s_per_step),
        "warnings": list(_warnings(spec, arms)),
    }


def workers_of(arms: Sequence[Arm]) -> WorkersSpec:
    """Return what a trial runs on: `min` workers, so that as many trials as can be run at once.

    Raises SpecError if the arms differ in it.
    """
    first, *others = (arm.base.workers for arm in arms)
    if any(other != first for other in others):
        raise SpecError("arms differ in workers, and all are to run on the same; set workers under `set:`")
    return first.model_copy(update={"max": first.min})


def fits(nodes: Iterable[Mapping[str, float]], workers: WorkersSpec) -> int:
    """Return how many trials of `workers.min` workers fit at once on nodes that hold so much; none spans two of them.

    >>> fits([{"CPU": 4}, {"CPU": 3}], WorkersSpec(min=2, max=2))
    3
    >>> fits([{"CPU": 8, "GPU": 2}], WorkersSpec(gpus=0.5)), fits([{"CPU": 8}], WorkersSpec(gpus=1))
    (4, 0)
    """
    needs = workers.needs().items()
    held = (math.floor(min(node.get(name, 0.0) / need for name, need in needs) + 1e-9) for node in nodes)
    return sum(count // workers.min for count in held)


def local_cpus(workers: WorkersSpec) -> float:
    """Return the logical CPUs of a Ray that a sweep starts: the machine's, and enough for a trial in any case."""
    return max(float(machine_cpus()), workers.min * workers.cpus)


def as_text(found: dict[str, Any]) -> str:
    """Return a forecast as lines for people."""
    aim, trials = found["objective"], found["trials"]
    target = f", target {aim['target']:g}" if aim["target"] is not None else ""
    beside = "".join(f", {phase} {trials[phase]:,}" for phase in ("defaults", "confirm") if trials[phase])
    where = "on the cluster as it is now" if found["asked"] else "on this machine"
    at_once = (
        f"{found['slots']:,} {where}" if found["slots"] is not None else "as many as fit: --address asks a cluster"
    )
    workers = found["workers"]
    gpus = f" and {workers['gpus']:g} GPUs" if workers["gpus"] else ""
    lines = [
        ("sweep", f"{found['name']}: {found['mode']}, {found['method']}, seed {found['seed']}"),
        ("objective", f"{aim['metric']} ({aim['goal']}) every {aim['every']:,} of {aim['max_steps']:,} steps{target}"),
        ("budget", f"{found['budget']['per_arm']:g} {found['budget']['unit'].replace('_', ' ')} an arm"),
        ("trials", f"tune {_count(trials['tune'])}{beside}"),
        ("workers", f"{workers['min']} a trial, of {workers['cpus']:g} CPUs{gpus} each"),
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
    expected = (
        None if tune is None else round(tune * expected_steps(spec, tune // (len(arms) * spec.num_studies))) + beside
    )
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


def _slots(spec: SweepSpec, workers: WorkersSpec, ask: Ask | None) -> int | None:
    """Return the trials at once; see `forecast_sweep`.

    Raises ResourceError where a trial needs more GPUs than there are: CPUs of its own Ray are counted as it likes.
    """
    most = spec.max_concurrent or 1 << 30
    if ask is not None:
        return min(ask(workers), most)
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return None
    held = {"CPU": local_cpus(workers), "GPU": float(machine_gpus())}
    if (slots := fits([held], workers.model_copy(update={"accelerator": None}))) == 0:
        raise ResourceError(
            f"a trial of {workers.min} workers of {workers.gpus:g} GPUs each: this machine has {held['GPU']:g} GPUs; "
            "lower workers.gpus under `set:`, or name a cluster by --address"
        )
    return min(slots, most)


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
    yield from _fairness(spec)
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


def _fairness(spec: SweepSpec) -> Iterable[str]:
    if spec.confirm is not None and spec.confirm.seeds < _FEW_SEEDS:
        yield f"confirm.seeds {spec.confirm.seeds}: an interval over so few seeds says little; 5 are usual"
    if spec.mode != "fair":
        return
    if not (spec.confirm and spec.confirm.studies):
        yield "without confirm.studies the intervals hold the luck of the seed, and not that of the tuning"
    if spec.objective.target is None:
        yield "without objective.target no time to a target is measured, only the final metric"


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
