"""Arms: a base run each, the fields that vary, and points of them as runs.

An arm's points are mappings from a dotted field to its value and hold the fields that are active: a dimension with
`when` is there only where the fields that it names have the values that it asks for.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from elastrain.errors import SpecError
from elastrain.spec.document import plain, train_spec
from elastrain.spec.problems import Keys, Problem, Where, dotted, find, nearest, nowhere, refuse
from elastrain.spec.sweep import LISTS, ArmSpec, Dimension, SweepSpec
from elastrain.spec.train import OptimizerSpec, TrainSpec
from elastrain.sweeps import published
from elastrain.sweeps.dimensions import extremes, holds, moved, on_edge, shown, unit_of, value_at
from elastrain.sweeps.settings import (
    Setting,
    arm_settings,
    at,
    fixed_settings,
    keys_of,
    merged,
    places,
    put,
    space_settings,
)

Point = dict[str, Any]
SEARCH_ARM = "search"
_ABSENT = object()
_NAME: Keys = ("optimizer", "name")
_MANY_CORNERS = 512  # beyond, each dimension's ends are tried with the others at their defaults
_ANEW = 0.25  # the chance that a PBT recipient draws a field anew, as in the paper (arXiv 1711.09846)
_NUDGE = 0.1  # of the range on its own scale, otherwise
# What a run may change between two steps, so that its checkpoint still fits.
_MUTABLE = ("optimizer.lr", "optimizer.weight_decay", "optimizer.momentum", "optimizer.betas", "optimizer.eps")
_MUTABLE_TOP = ("clip_norm", "l1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One optimizer, or the arm of a search: `dimensions` are what varies, by field, and `base` the run around them.

    `untuned` has a value for each of the fields where nobody tunes them, and `base` has these values.
    """

    name: str
    baseline: bool
    base: TrainSpec
    dimensions: Mapping[str, Dimension]
    untuned: Mapping[str, Any]


def arms_of(spec: SweepSpec, base: TrainSpec, where: Where = nowhere) -> list[Arm]:
    """Return the arms of a sweep over `base`, the first of them the baseline where none is named.

    The runs at the corners of each space, and with each value of its lists, are proven to be specs. `where` tells where
    keys of the sweep's spec stand.

    Raises:
        SpecError: A field is unknown, a range is empty, or the run refuses a value; a line for each problem.
    """
    problems: list[Problem] = []
    fixed = fixed_settings(spec.set, ("set",), problems)
    shared = space_settings(spec.space, ("space",), (), problems)
    refuse(problems, where)
    data = _for_objective(spec, base)
    _put_all(data, fixed, problems)
    refuse(problems, where)
    start = train_spec(data, places(fixed, where))
    if start.data.eval is None:
        text = f"objective.metric {spec.objective.metric} comes from an evaluation, and the base has no data.eval"
        refuse([Problem(keys=("base",), text=text)], where)
    if start.data.on_bad_shard != "error":
        text = (
            f"{start.data.on_bad_shard}: a sweep leaves no shard out; set data.on_bad_shard to error, and mend the data"
        )
        refuse([Problem(keys=("data", "on_bad_shard"), text=text)], places(fixed, where))
    entries: list[tuple[int, ArmSpec | None]] = list(enumerate(spec.arms)) or [(0, None)]
    arms = [_arm(spec, start, shared, entry, where) for entry in entries]
    if not any(arm.baseline for arm in arms):
        arms[0] = replace(arms[0], baseline=True)
    return arms


def decode(arm: Arm, unit: Sequence[float]) -> Point:
    """Return the point at `unit`, one number from 0 to 1 a dimension in the arm's order."""
    units = dict(zip(arm.dimensions, unit, strict=True))
    return draw(arm, lambda path, each: value_at(each, units[path]))


def draw(arm: Arm, pick: Callable[[str, Dimension], Any]) -> Point:
    """Return a point whose active fields have the value that `pick` gives for field and dimension."""
    return _active(arm.dimensions, pick, arm.base.model_dump())


def encode(arm: Arm, point: Mapping[str, Any]) -> list[float | None]:
    """Return where on its own scale each value of a point lies, 0 to 1; None where a dimension is not active.

    Raises ValueError where a list does not hold the point's value.
    """
    return [unit_of(each, point[path]) if path in point else None for path, each in arm.dimensions.items()]


def edges(arm: Arm, point: Mapping[str, Any]) -> list[str]:
    """Return the fields whose value lies in the outer 5 % of its range: a better one may lie outside."""
    return [path for path, each in arm.dimensions.items() if path in point and on_edge(each, point[path])]


def defaults(arm: Arm) -> Point:
    """Return the point that nobody tuned: the optimizer's published settings, and the base's values of all else.

    A value may lie outside its range. Where there is none, the middle of a range stands, or the first of a list.
    """
    return draw(arm, lambda path, _: arm.untuned[path])


def trial_spec(arm: Arm, point: Mapping[str, Any], *, name: str, storage: str, seed: int | None = None) -> TrainSpec:
    """Return the run of a point: the arm's base with the point's values, its own name and place, and seed if given.

    Raises:
        SpecError: The point has a field that does not vary, or the run refuses the values together.
    """
    if strange := [path for path in point if path not in arm.dimensions]:
        raise SpecError(f"arm {arm.name}: {', '.join(strange)} does not vary{nearest(strange[0], arm.dimensions)}")
    data = _at(arm, point)
    data |= {"name": name, "storage": storage}
    if seed is not None:
        data["data"]["seed"] = seed
    return train_spec(data)


def mutable(arm: Arm) -> list[str]:
    """Return the fields that PBT may change in a running trial: all of the arm's.

    Raises:
        SpecError: A field varies with which a donor's checkpoint would not fit, or the samples would not.
    """
    for path, dimension in arm.dimensions.items():
        if not (path.startswith(_MUTABLE) or path in _MUTABLE_TOP) or dimension.when:
            raise SpecError(
                f"arm {arm.name}: search.method pbt changes runs that go on, and {path} cannot change in one; "
                f"only settings of the optimizer without `when`, {' and '.join(_MUTABLE_TOP)} can"
            )
    return list(arm.dimensions)


def explore(arm: Arm, point: Mapping[str, Any], chance: random.Random) -> Point:
    """Return the point of a PBT recipient: each field of its donor's moved by a tenth of its range, or drawn anew."""
    return {
        path: value_at(each, chance.random())
        if chance.random() < _ANEW or not holds(each, point[path])
        else moved(each, point[path], chance.choice((-_NUDGE, _NUDGE)))
        for path, each in arm.dimensions.items()
    }


def _for_objective(spec: SweepSpec, base: TrainSpec) -> dict[str, Any]:
    """Return the base as plain data that runs for the objective's steps, evaluates at its steps and keeps its best.

    Checkpoints are as far apart as the base's, at evaluations, where trials are stopped and paused.
    """
    wanted = spec.objective
    data: dict[str, Any] = plain(base.model_dump(), nowhere)
    every = wanted.every * max(1, round(base.checkpoint.every_steps / wanted.every))
    data["budget"] = {"steps": wanted.max_steps}
    data["eval"] = {"every_steps": wanted.every}
    data["checkpoint"] |= {"every_steps": every, "keep": 1, "best": wanted.metric, "goal": wanted.goal}
    return data


def _arm(
    spec: SweepSpec, start: TrainSpec, shared: Sequence[Setting], entry: tuple[int, ArmSpec | None], where: Where
) -> Arm:
    """Return one arm, proven: `entry` is its place in the spec, and None for the arm of a search."""
    index, arm = entry
    problems = _name_problems(arm, index) if arm else []
    refuse(problems, where)
    name = str(arm.optimizer["name"]) if arm else ""
    own = arm_settings(arm, index, published.SPACES.get(name, {}), problems) if arm else []
    settings = merged(shared, own, problems)
    data = plain(start.model_dump(), nowhere)
    if arm:
        data["optimizer"] = _untuned(name)
    _put_all(data, [each for each in settings if each.dimension is None], problems)
    varying = {dotted(each.path): each for each in settings if each.dimension is not None}
    dimensions = {path: each.dimension for path, each in varying.items() if each.dimension is not None}
    if not dimensions:
        here: Keys = ("arms", index) if arm else ("space",)
        problems.append(Problem(keys=here, text="nothing varies: give a field a range or a list, or space: default"))
    refuse(problems, where)
    untuned: dict[str, Any] = {}
    for path, each in varying.items():
        problems += _when_problems(path, each, dimensions, data)
        untuned[path] = _put_default(data, each, problems)
    refuse(problems, where)
    _refuse_method(spec, varying, where)
    told = places([*varying.values(), *settings], where)
    found = Arm(
        name=arm.name if arm else SEARCH_ARM,
        baseline=arm.baseline if arm else True,
        base=train_spec(data, told),
        dimensions=dimensions,
        untuned=untuned,
    )
    _prove(found, varying, where)
    return found


def _name_problems(arm: ArmSpec, index: int) -> list[Problem]:
    """Return what is wrong with the name of an arm's optimizer, on which all else depends."""
    named = {key: value for key, value in arm.optimizer.items() if key == "name" or isinstance(value, str)}
    try:
        OptimizerSpec.model_validate({**named, "lr": 1.0})
    except ValidationError as error:
        return [each.below(("arms", index, "optimizer")) for each in find(OptimizerSpec, error)]
    return []


def _untuned(name: str) -> dict[str, Any]:
    """Return an optimizer at its published settings; `lr` is missing where none is known."""
    own = published.SETTINGS.get(name, {})
    return {**_fresh(name), "name": name, **own} if own else {"name": name}


def _fresh(name: str) -> dict[str, Any]:
    """Return what the spec puts in for an optimizer that is only named, without lr; {} where it knows no such name."""
    try:
        found: dict[str, Any] = plain(OptimizerSpec(name=name, lr=1.0).model_dump(exclude={"lr"}), nowhere)
    except ValueError:
        return {}
    return found


def _rename(optimizer: dict[str, Any], name: str) -> None:
    """Give an optimizer another name: what it has because of the name that it had gives way to the new one's."""
    before, after = _fresh(str(optimizer.get("name"))), _fresh(name)
    optimizer.update({key: value for key, value in after.items() if optimizer.get(key) == before.get(key)})
    optimizer["name"] = name


def _put_all(data: dict[str, Any], settings: Sequence[Setting], problems: list[Problem]) -> None:
    # Shorter paths first: what is set inside a mapping must not be lost with it. A name first: settings come with it.
    for each in sorted(settings, key=lambda setting: (len(setting.path), setting.path != _NAME)):
        try:
            if each.path == _NAME and isinstance(each.value, str) and isinstance(data["optimizer"], dict):
                _rename(data["optimizer"], each.value)
            put(data, each.path, plain(each.value, nowhere))
        except ValueError as error:
            problems.append(Problem(keys=each.keys, text=str(error)))


def _put_default(data: dict[str, Any], setting: Setting, problems: list[Problem]) -> Any:
    """Return a dimension's default, and put it where it varies: what stands there, if it may; see `defaults`."""
    dimension = setting.dimension
    assert dimension is not None
    try:
        found = at(data, setting.path)
        if holds(dimension, found):
            return found
    except LookupError:
        pass  # a field that nobody gave, such as one of task_args
    middle = dimension.values[0] if dimension.kind in LISTS else value_at(dimension, 0.5)
    _put_all(data, [Setting(path=setting.path, keys=setting.keys, value=middle)], problems)
    return middle


def _when_problems(
    path: str, setting: Setting, dimensions: Mapping[str, Dimension], data: Mapping[str, Any]
) -> list[Problem]:
    """Return what is wrong with the conditions of a dimension."""
    assert setting.dimension is not None
    found: list[Problem] = []
    for other, wanted in setting.dimension.when.items():
        keys, named = (*setting.keys, "when", other), dimensions.get(other)
        if named is None:
            try:
                at(data, keys_of(other))
            except LookupError:
                text = f"unknown field {other!r}{nearest(other, [*dimensions, 'optimizer.name'])}"
                found.append(Problem(keys=keys, text=text))
        elif named.kind not in (*LISTS, "int"):
            text = f"{other} varies as {named.kind}, and a condition needs a value that comes up: a choice or int"
            found.append(Problem(keys=keys, text=text))
        elif named.kind in LISTS and not any(one in _listed(wanted) for one in named.values):
            text = f"{other} is never {shown(wanted)}: its values are {', '.join(map(shown, named.values))}"
            found.append(Problem(keys=keys, text=text))
        if named is not None and path in _depends_on(other, dimensions):
            found.append(Problem(keys=keys, text=f"{path} and {other} wait for each other"))
    return found


def _depends_on(path: str, dimensions: Mapping[str, Dimension]) -> set[str]:
    """Return the fields on which the activity of `path` depends, itself among them."""
    found, todo = set[str](), [path]
    while todo:
        here = todo.pop()
        if here not in found:
            found.add(here)
            todo += dimensions[here].when if here in dimensions else ()
    return found


def _refuse_method(spec: SweepSpec, varying: Mapping[str, Setting], where: Where) -> None:
    """Refuse dimensions that the method of search cannot do."""
    problems = []
    for path, each in varying.items():
        kind = each.dimension.kind if each.dimension else ""
        if spec.search.method == "grid" and kind not in LISTS:
            text = f"search.method grid tries lists, and {path} is {kind}; give grid: [...], or another method"
            problems.append(Problem(keys=each.keys, text=text))
        if spec.search.method != "grid" and kind == "grid":
            text = f"each value of a grid is tried by search.method grid only; write choice for {spec.search.method}"
            problems.append(Problem(keys=each.keys, text=text))
    refuse(problems, where)


def _prove(arm: Arm, varying: Mapping[str, Setting], where: Where) -> None:
    """Refuse an arm whose run does not take the ends of a range or a value of a list."""
    ends = {path: extremes(each) for path, each in arm.dimensions.items()}
    if math.prod(len(values) for values in ends.values()) <= _MANY_CORNERS:
        corners = [dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values())]
    else:
        corners = [
            {**arm.untuned} | _conditions(path, arm) | {path: end} for path, values in ends.items() for end in values
        ]
    for corner in corners:
        active = draw(arm, lambda path, _: corner[path])  # noqa: B023 -- called at once
        # What is blamed first is what the corner set; the rest stands at its defaults.
        train_spec(_at(arm, active), places([varying[path] for path in active], where))


def _at(arm: Arm, point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arm's base with a point's values, as plain data."""
    data: dict[str, Any] = plain(arm.base.model_dump(), nowhere)
    _put_all(data, [Setting(path=keys_of(path), keys=(), value=value) for path, value in point.items()], [])
    return data


def _conditions(path: str, arm: Arm) -> Point:
    """Return values that make the dimension at `path` active."""
    found: Point = {}
    for other in _depends_on(path, arm.dimensions) & arm.dimensions.keys():
        for named, wanted in arm.dimensions[other].when.items():
            if named in arm.dimensions:
                values = arm.dimensions[named].values
                found[named] = next((one for one in values if one in _listed(wanted)), _listed(wanted)[0])
    return found


def _active(
    dimensions: Mapping[str, Dimension], pick: Callable[[str, Dimension], Any], base: Mapping[str, Any]
) -> Point:
    """Return what `pick` gives for the fields whose conditions hold, in the order of `dimensions`."""
    found: Point = {}
    # A field depends on fewer fields than those that depend on it.
    for path in sorted(dimensions, key=lambda path: len(_depends_on(path, dimensions))):
        conditions = dimensions[path].when.items()
        if all(
            _met(found.get(other, _ABSENT) if other in dimensions else at(base, keys_of(other)), wanted)
            for other, wanted in conditions
        ):
            found[path] = pick(path, dimensions[path])
    return {path: found[path] for path in dimensions if path in found}


def _met(value: Any, wanted: Any) -> bool:
    return value in _listed(wanted)


def _listed(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else [wanted]
