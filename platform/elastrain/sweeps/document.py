"""The spec of a sweep as a document: YAML in, overrides, paths resolved, and its base and arms proven with it.

In: a YAML file with `--set` overrides, or a mapping from Python. Out: a SweepSpec whose paths are absolute, or one
SpecError with a line for each problem. `spec.document.dump` writes it. Opens sweep and base; opens no data.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastrain.errors import SpecError
from elastrain.spec.document import absolute, located, placed, plain, read_train, working_folder
from elastrain.spec.problems import Keys, Problem, Where, dotted, nowhere, refuse, shown, validate
from elastrain.spec.secrets import refuse_secrets
from elastrain.spec.source import Source, load, override, parse
from elastrain.spec.sweep import KINDS, LISTS, SweepSpec
from elastrain.spec.train import TrainSpec
from elastrain.sweeps.settings import keys_of
from elastrain.sweeps.space import arms_of

_KEYS = "a sweep spec has name, base, objective, budget and a space or arms"
_FOLDERS = (("data", "train"), ("data", "eval"), ("data", "cache", "folder"))


def read_sweep(path: str | os.PathLike[str], sets: Sequence[str] = ()) -> SweepSpec:
    """Read the sweep's spec at `path`, apply `sets` (`a.b=value`), resolve its paths and prove its base and arms.

    `base` and code are relative to the file; data and storage to the working folder.

    Raises:
        SpecError: The file, an override, the base, the space or an arm is wrong; a line for each problem.
    """
    source = override(_whole(load(path)), sets)
    for keys in source.sets:
        _forget_dotted(source.data, keys)
    spec = sweep_spec(source.data, source.where)
    return _resolved(spec, base=(working_folder() / path).parent, where=source.where)


def parse_sweep(text: str, *, name: str = "sweep.yaml") -> SweepSpec:
    """Return the spec that `dump` wrote; its paths stay as they are, and its base need not be here.

    Raises:
        SpecError: The text is no sweep's spec; `name` stands in front of the line.
    """
    source = _whole(parse(text, name=name))
    return sweep_spec(source.data, source.where)


def sweep_spec(data: Mapping[str, Any], where: Where = nowhere) -> SweepSpec:
    """Return the spec that `data` describes; paths stay as they are, base and arms unproven, until `resolve_sweep`.

    Raises:
        SpecError: Something is unknown, missing or wrong; a line for each problem.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"{where([()])}expected a mapping, got {shown(data)}: {_KEYS}")
    kind = data.get("kind", "sweep")
    if kind == "train":
        text = "this is a train spec, and a sweep spec is wanted, whose base may be this file"
        refuse([Problem(keys=("kind",), text=text)], where)
    return validate(SweepSpec, plain(data, where), where)


def resolve_sweep(spec: SweepSpec, *, base: Path) -> SweepSpec:
    """Return `spec` with absolute paths, `base` the folder of its file, and prove it as `read_sweep` does.

    Raises:
        SpecError: As `read_sweep`.
    """
    return _resolved(sweep_spec(spec.model_dump()), base=base, where=nowhere)


def base_of(spec: SweepSpec) -> TrainSpec:
    """Return the run that a resolved sweep varies.

    Raises:
        SpecError: Its spec is missing or wrong.
    """
    return read_train(spec.base)


def _whole(source: Source) -> Source:
    if source.data is None:
        raise SpecError(f"{source.name}: the file is empty; {_KEYS}")
    return source


def _forget_dotted(data: Any, keys: Keys) -> None:
    """Drop what the file says of a field that an override at `keys` gives anew, and of all in it.

    An override's dots make mappings in mappings, and the file may have the field's dotted name as one key.
    """
    for at, key in enumerate(keys):
        rest = dotted(keys[at:])
        if isinstance(data, dict):
            for known in [known for known in data if known != key and f"{known}.".startswith(f"{rest}.")]:
                del data[known]
        data = data[key]


def _resolved(spec: SweepSpec, *, base: Path, where: Where) -> SweepSpec:
    data: dict[str, Any] = plain(spec.model_dump(), where)
    problems: list[Problem] = []
    cwd = working_folder()
    _change(data, ("base",), lambda value: _file(value, base), problems)
    _change(data, ("storage",), lambda value: placed(value, cwd), problems)
    for keys, prefix in (("set",), ()), (("space",), ()):
        _relocate(data, keys, prefix, base, problems)
    for index in range(len(data["arms"])):
        _relocate(data, ("arms", index, "optimizer"), ("optimizer",), base, problems)
        _relocate(data, ("arms", index, "space"), (), base, problems)
    refuse(problems, where)
    refuse_secrets(data, where)
    found = sweep_spec(data, where)
    arms_of(found, base_of(found), where)
    return found


def _relocate(data: dict[str, Any], keys: Keys, path: Keys, base: Path, problems: list[Problem]) -> None:
    """Make the paths absolute that stand at or below `keys`, where the settings of the run's field `path` are."""
    here: Any = data
    for key in keys:
        here = here[key]
    if isinstance(here, dict):
        # A list's values are values of the same field; ranges hold none that is a path.
        lists = [(kind, index) for kind in LISTS for index in range(len(here.get(kind) or ()))]
        for below in lists:
            _relocate(data, (*keys, *below), path, base, problems)
        for key in here if not any(kind in here for kind in KINDS) else ():
            _relocate(data, (*keys, key), (*path, *keys_of(str(key))), base, problems)
    elif isinstance(here, str) and _is_code(path) and ".py:" in here:
        _change(data, keys, lambda value: located(value, base), problems)
    elif isinstance(here, str) and path in _FOLDERS:
        _change(data, keys, lambda value: placed(value, working_folder()), problems)


def _is_code(path: Keys) -> bool:
    """Say whether a field names code: the task, an optimizer (a phase's, too), a transform's function."""
    return path[-1:] == ("function",) or path == ("task",) or (path[:1] == ("optimizer",) and path[-1] == "name")


def _change(data: Any, keys: Keys, change: Callable[[str], str], problems: list[Problem]) -> None:
    for key in keys[:-1]:
        data = data[key]
    try:
        data[keys[-1]] = change(data[keys[-1]])
    except ValueError as error:
        problems.append(Problem(keys=keys, text=str(error)))


def _file(path: str, base: Path) -> str:
    found = absolute(path, base)
    if not os.path.isfile(found):  # noqa: PTH113 -- pathlib raises on names that are too long
        raise ValueError(f"there is no file {found}; base is relative to the folder of the sweep's spec")
    return found
