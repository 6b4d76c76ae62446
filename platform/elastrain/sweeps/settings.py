"""Settings of a sweep's spec: which field of the run each names, whether it is fixed or varies, and where it stands.

A key is a field of the run, dotted from the top (`optimizer.lr`, `optimizer.betas.0`, `task_args.hidden`). A mapping
that has a kind's name as a key is a dimension; any other is gone into: `schedule: {final: 0.1}` changes one field.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from elastrain.spec.problems import Keys, Problem, Where, dotted, find, nearest, shown
from elastrain.spec.sweep import KINDS, ArmSpec, Dimension

# What the sweep itself decides, and by what.
_OWN: Mapping[Keys, str] = {
    ("kind",): "a sweep varies runs of the kind train",
    ("name",): "the sweep names its trials",
    ("storage",): "storage of the sweep says where its trials lie",
    ("budget",): "objective.max_steps decides it",
    ("eval",): "objective.every decides it",
}
_NOT_IN_SPACE: Mapping[Keys, str] = {
    ("workers",): "all trials have the same workers; put it into set",
    ("checkpoint",): "it changes no result; put it into set",
    ("data", "seed"): "a seed is no setting to tune; confirm repeats the best over seeds",
    ("data", "cache"): "it changes no result; put it into set",
    ("data", "on_bad_shard"): "all trials see the same data; put it into set",
}
_INVERSE = "one_minus_"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One field of the run: its `path`, the `keys` of the spec at which it stands, and its `value` or `dimension`."""

    path: Keys
    keys: Keys
    value: Any = None
    dimension: Dimension | None = None


def fixed_settings(given: Mapping[str, Any], keys: Keys, problems: list[Problem]) -> list[Setting]:
    """Return what `set` changes; what a sweep decides itself, and what varies, goes to `problems`."""
    found = list(_settings(given, keys, (), problems))
    for each in found:
        if each.dimension:
            problems.append(Problem(keys=each.keys, text="set holds fixed values; what varies belongs into space"))
        problems.extend(_reserved(each, _OWN))
    return found


def space_settings(given: Mapping[str, Any], keys: Keys, prefix: Keys, problems: list[Problem]) -> list[Setting]:
    """Return what a space, or an arm's optimizer, says of the run's fields below `prefix`."""
    found = list(_settings(given, keys, prefix, problems))
    for each in found:
        problems.extend(_reserved(each, {**_OWN, **_NOT_IN_SPACE}))
    return found


def arm_settings(arm: ArmSpec, index: int, published: Mapping[str, Any], problems: list[Problem]) -> list[Setting]:
    """Return what an arm says, and the `published` space of its optimizer where it asks for it or gives no lr.

    `published` are fields of the optimizer, dotted, as in the spec; what the arm says of one takes its place.
    """
    here: Keys = ("arms", index)
    own = space_settings(arm.optimizer, (*here, "optimizer"), ("optimizer",), problems)
    if isinstance(arm.space, dict):
        own += space_settings(arm.space, (*here, "space"), (), problems)
    if arm.space == "default" or not any(each.path == ("optimizer", "lr") for each in own):
        taken = {each.path for each in own}
        others = space_settings(published, (*here, "optimizer", "name"), ("optimizer",), problems)
        own += [each for each in others if not any(_nested(each.path, path) for path in taken)]
    return own


def merged(shared: Iterable[Setting], own: Iterable[Setting], problems: list[Problem]) -> list[Setting]:
    """Return both, `own` instead of what `shared` says of the same field; what lies inside a dimension is a problem."""
    own = list(own)
    found = [each for each in shared if not any(each.path == one.path for one in own)] + own
    for one in found:
        for other in found:
            if other is not one and other.path == one.path:
                problems.append(Problem(keys=one.keys, text=f"{dotted(one.path)} is given twice; remove one"))
            elif other is not one and other.dimension and one.path[: len(other.path)] == other.path:
                text = f"it lies inside {dotted(other.path)}, which varies as a whole; give one of the two"
                problems.append(Problem(keys=one.keys, text=text))
    return found


def put(data: dict[str, Any], path: Keys, value: Any) -> None:
    """Set `value` at `path` in a run's plain data; mappings on the way are made.

    Raises ValueError, with a sentence, where the path leads through a value, or beyond a list.
    """
    here: Any = data
    for at, key in enumerate(path):
        step = _step(here, key)
        if step is None:
            inside = dotted(path[:at])
            text = f"{inside} is {shown(here)}: {dotted(path)} cannot be set in it"
            hint = nearest(key, KINDS) if not isinstance(here, list) else ""
            raise ValueError(f"{text}; how it varies is one of {', '.join(KINDS)}{hint}" if hint else text)
        if at == len(path) - 1:
            here[step] = value
            return
        if isinstance(here, dict) and here.get(step) is None:
            here[step] = {}
        here = here[step]


def at(data: Mapping[str, Any], path: Keys) -> Any:
    """Return the value at `path` in a run's plain data; raises LookupError where it has none."""
    here: Any = data
    for key in path:
        step = _step(here, key)
        if step is None or (isinstance(here, dict) and step not in here):
            raise LookupError(dotted(path))
        here = here[step]
    return here


def keys_of(path: str) -> Keys:
    """Return a dotted field as keys.

    >>> keys_of("optimizer.betas.0")
    ('optimizer', 'betas', '0')
    """
    return tuple(path.split("."))


def places(settings: Sequence[Setting], where: Where) -> Callable[[Sequence[Keys]], str]:
    """Return a function that tells where a field of the run was decided: at a setting's line, or else at `base`."""

    def found(blame: Sequence[Keys]) -> str:
        for keys in blame:
            texts = tuple(map(str, keys))
            near = [each for each in settings if each.path == texts[: len(each.path)]]
            near += [each for each in settings if texts == each.path[: len(texts)]]
            if near:
                return where([near[0].keys])
        return where([("base",)])

    return found


def _settings(given: Mapping[str, Any], keys: Keys, prefix: Keys, problems: list[Problem]) -> Iterator[Setting]:
    for key, value in given.items():
        path, here = (*prefix, *keys_of(key)), (*keys, key)
        if not all(path):
            problems.append(Problem(keys=here, text="expected a field of the run, such as optimizer.lr"))
        elif str(path[-1]).startswith(_INVERSE) and path[0] != "task_args":
            field = str(path[-1]).removeprefix(_INVERSE)
            field = {"beta1": "betas.0", "beta2": "betas.1"}.get(field, field)
            name = dotted((*path[:-1], field))
            text = f"name the field itself: {name}: {{one_minus_log: [0.005, 0.3]}} spreads 1 - x in the logarithm"
            problems.append(Problem(keys=here, text=text))
        elif isinstance(value, Mapping) and any(kind in value for kind in KINDS):
            yield from _dimension(value, path, here, problems)
        elif isinstance(value, Mapping) and value and all(isinstance(each, str) for each in value):
            yield from _settings(value, here, path, problems)
        else:
            yield Setting(path=path, keys=here, value=value)


def _dimension(value: Mapping[str, Any], path: Keys, keys: Keys, problems: list[Problem]) -> Iterator[Setting]:
    try:
        yield Setting(path=path, keys=keys, dimension=Dimension.model_validate(value))
    except ValidationError as error:
        problems.extend(each.below(keys) for each in find(Dimension, error))


def _reserved(setting: Setting, own: Mapping[Keys, str]) -> Iterator[Problem]:
    for path, reason in own.items():
        if setting.path[: len(path)] == path:
            yield Problem(keys=setting.keys, text=f"{dotted(path)} cannot be set here: {reason}")


def _nested(one: Keys, other: Keys) -> bool:
    """Say whether one of two fields is the other or lies in it."""
    short = min(len(one), len(other))
    return one[:short] == other[:short]


def _step(here: Any, key: str | int) -> str | int | None:
    """Return `key` as it indexes `here`, or None where it cannot."""
    if isinstance(here, list | tuple):
        number = int(key) if str(key).isascii() and str(key).isdigit() else -1
        return number if 0 <= number < len(here) else None
    return key if isinstance(here, dict) else None
