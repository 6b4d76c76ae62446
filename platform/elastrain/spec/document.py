"""The spec of a training run as a document: YAML in and out, overrides, JSON Schema, what changed.

In: a YAML file with `--set` overrides, or a mapping from Python. Out: a TrainSpec whose paths are absolute, or one
SpecError with a line for each problem. Opens the spec and looks whether the task's file is there; opens no data.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from elastrain.errors import SpecError
from elastrain.spec.cluster import ClusterSpec
from elastrain.spec.problems import (
    Keys,
    Problem,
    Where,
    dotted,
    find,
    nowhere,
    refuse,
    short,
    shown,
    validate,
)
from elastrain.spec.secrets import refuse_secrets
from elastrain.spec.source import Source, load, override, parse
from elastrain.spec.sweep import Dimension, SweepSpec
from elastrain.spec.train import OptimizerSpec, TrainSpec
from elastrain.urls import holds_credentials, table_kind

_OTHER_KINDS = {
    "sweep": "run it with `elastrain sweep`",
    "cluster": "look at it with `elastrain cluster check`",
    "job": "this version runs no such kind",
}
_EXCLUSIVE: tuple[tuple[Keys, Keys], ...] = ((("budget", "epochs"), ("budget", "steps")),)
# These decide when and where a run goes on and what is reported, not what it computes. The data are compared by
# their fingerprint, not by where they lie.
_FREE: frozenset[Keys] = frozenset(
    {
        *[("name",), ("storage",), ("workers",), ("budget",), ("eval",), ("checkpoint",), ("audit",)],
        *[("data", "train"), ("data", "eval"), ("data", "slots"), ("data", "cache")],
    }
)
_UNSET = object()
_MAX_DEPTH = 40


def read_train(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainSpec:
    """Read the spec at `path`, apply `overrides` (`a.b=value`), and resolve its paths.

    Raises:
        SpecError: The file, an override or the spec is wrong, or the task's file is missing; a line for each problem.
    """
    source = override(_whole(load(path)), overrides, exclusive=_EXCLUSIVE)
    spec = _checked(source.data, source.where)
    cwd = working_folder()
    return _resolved(spec, base=(cwd / path).parent, cwd=cwd, where=source.where)


def working_folder() -> Path:
    """Return the working folder; raises SpecError where somebody removed it."""
    try:
        return Path.cwd()
    except OSError:
        raise SpecError("the working folder is gone, and data are looked for in it; go to another") from None


def parse_train(text: str, *, name: str = "spec.yaml") -> TrainSpec:
    """Return the spec that `dump` wrote. Its paths stay as they are, and its task's file need not be here.

    Raises:
        SpecError: The text is no spec; `name` stands in front of the line.
    """
    source = _whole(parse(text, name=name))
    return _checked(source.data, source.where)


def train_spec(data: Mapping[str, Any], where: Where = nowhere) -> TrainSpec:
    """Return the spec that `data` describes; its paths stay as they are until `resolve`. `where` tells places.

    Raises:
        SpecError: Something is unknown, missing or wrong; a line for each problem.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"a train spec is a mapping with keys such as name, task and data, got {shown(data)}")
    return _checked(data, where)


def resolve(spec: TrainSpec, *, base: Path, cwd: Path) -> TrainSpec:
    """Return `spec` with absolute paths: code relative to `base`, data and storage relative to `cwd`.

    What has a scheme (`s3://…`) and what is a module (`package.module:Class`) stays as it is.

    Raises:
        SpecError: A file of code is missing, a reference has the wrong form, or a URL holds credentials.
    """
    return _resolved(train_spec(spec.model_dump()), base=base, cwd=cwd, where=nowhere)


def dump(spec: BaseModel) -> str:
    """Return `spec` as YAML, defaults included, so that a later default does not change the run.

    Raises:
        SpecError: `task_args` or other free values hold what YAML cannot, such as an object.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] # ruamel types it as None only
    # One line a text, for diff and grep; ruamel would fold long ones.
    yaml.width = 1 << 30
    stream = io.StringIO()
    yaml.dump(plain(spec.model_dump(), nowhere), stream)
    return stream.getvalue()


def schema() -> dict[str, Any]:
    """Return the JSON Schema of specs: runs, sweeps, clusters. For editors; every key has a title and a description."""
    kinds: list[tuple[type[BaseModel], Literal["validation"]]] = [
        (kind, "validation") for kind in (TrainSpec, SweepSpec, ClusterSpec, Dimension)
    ]
    found = models_json_schema(kinds)[1]
    for model in found["$defs"].values():
        for key, value in model["properties"].items():
            value.setdefault("title", key.replace("_", " ").capitalize())
    either = [{"$ref": f"#/$defs/{kind.__name__}"} for kind in (TrainSpec, SweepSpec, ClusterSpec)]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "anyOf": either, **found}


def changed(old: TrainSpec, new: TrainSpec) -> list[str]:
    """Return how `new` would compute something else than `old`, a line a field: `optimizer.lr: 0.001 -> 0.002`.

    A file of code counts by its name and class, wherever it lies. Slots count where `new` sets them.
    """
    before, after = (_by_name(spec.model_dump()) for spec in (old, new))
    found = list(_differences((), before, after))
    if new.data.slots is not None and new.data.slots != old.num_slots:
        found.append((("data", "slots"), old.num_slots, new.data.slots))
    return [f"{dotted(keys)}: {_brief(one)} -> {_brief(other)}" for keys, one, other in found]


class _Representer(SafeRepresenter):
    """Writes text with line breaks and the like in double quotes, where ruamel's plain style would lose some."""

    def represent_str(self, data: str) -> Any:
        """Return the node of a text."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_str)


def _whole(source: Source) -> Source:
    """Return `source` if it is a mapping of the kind train."""
    if source.data is None:
        raise SpecError(f"{source.name}: the file is empty; a train spec has name, task, data, optimizer and budget")
    if not isinstance(source.data, dict):
        place = source.where([()])
        raise SpecError(f"{place}expected a mapping with keys such as name, task and data, got {shown(source.data)}")
    return source


def _checked(data: Mapping[str, Any], where: Where) -> TrainSpec:
    """Return `data` as a spec, of the right kind and with phases that an optimizer can take."""
    kind = data.get("kind", "train")
    if isinstance(kind, str) and kind in _OTHER_KINDS:
        text = f"this is a {kind} spec, and a train spec is wanted; {_OTHER_KINDS[kind]}"
        refuse([Problem(keys=("kind",), text=text)], where)
    spec = validate(TrainSpec, plain(data, where), where)
    refuse([problem for phase in spec.optimizer.phases for problem in _phase_problems(spec.optimizer, phase)], where)
    return spec


def _phase_problems(optimizer: OptimizerSpec, phase: str) -> list[Problem]:
    """Return what is wrong with a phase's settings, which are those of an optimizer, each of them optional."""
    here: Keys = ("optimizer", "phases", phase)
    settings = optimizer.phases[phase]
    if "phases" in settings:
        return [Problem(keys=(*here, "phases"), text="a phase has no phases of its own; remove the key")]
    try:
        OptimizerSpec.model_validate({"name": optimizer.name, "lr": optimizer.lr, **settings})
    except ValidationError as error:
        return [each.below(here) for each in find(OptimizerSpec, error)]
    return []


def plain(data: Any, where: Where) -> Any:
    """Return `data` as YAML can hold it: lists for tuples, Python's numbers for others', text for paths."""
    problems: list[Problem] = []
    plain = _made_plain(data, (), problems)
    refuse(problems, where)
    return plain


def _made_plain(value: Any, keys: Keys, problems: list[Problem]) -> Any:
    """Return one value of data that `plain` makes plain; what cannot be goes to `problems`."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if len(keys) > _MAX_DEPTH:
        problems.append(Problem(keys=keys[:4], text=f"nested more than {_MAX_DEPTH} deep; it may hold itself"))
        return None
    if isinstance(value, Mapping):
        return {_key(key, keys, problems): _made_plain(each, (*keys, key), problems) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_made_plain(each, (*keys, index), problems) for index, each in enumerate(value)]
    return _made_scalar(value, keys, problems)


def _key(key: Any, keys: Keys, problems: list[Problem]) -> str | int:
    """Return a mapping's key as YAML can hold it: text, or a whole number as class ids are."""
    if isinstance(key, bool) or not isinstance(key, str | Integral):
        problems.append(Problem(keys=keys, text=f"expected text as a key, got {shown(key)}"))
        return ""
    return str.__str__(key) if isinstance(key, str) else int(key)


def _made_scalar(value: Any, keys: Keys, problems: list[Problem]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    makers = ((str, str.__str__), (Integral, int), (Real, float), (os.PathLike, os.fspath))
    make = next((make for kind, make in makers if isinstance(value, kind)), None)
    if make is None:
        text = f"expected text, a number, true or false, a list or a mapping, got {shown(value)}"
        problems.append(Problem(keys=keys, text=text))
    return make(value) if make else None


def _resolved(spec: TrainSpec, *, base: Path, cwd: Path, where: Where) -> TrainSpec:
    data = plain(spec.model_dump(), where)
    problems: list[Problem] = []
    places: dict[Keys, Callable[[str], str]] = {
        **dict.fromkeys(references(spec), lambda value: located(value, base)),
        **dict.fromkeys((("data", "train"), ("data", "eval"), ("storage",)), lambda value: placed(value, cwd)),
        **dict.fromkeys([("data", "cache", "folder")] if spec.data.cache else [], lambda value: placed(value, cwd)),
    }
    for keys, change in places.items():
        parent: Any = data
        for key in keys[:-1]:
            parent = parent[key]
        try:
            parent[keys[-1]] = change(parent[keys[-1]]) if parent[keys[-1]] is not None else None
        except ValueError as error:
            problems.append(Problem(keys=keys, text=str(error)))
    refuse(problems, where)
    refuse_secrets(data, where)
    return _checked(data, where)


def references(spec: TrainSpec) -> list[Keys]:
    """Return the keys at which `spec` names code: the task, optimizers and functions that are no built-in ones."""
    transforms: list[Keys] = [
        ("data", "transforms", index, "function")
        for index, transform in enumerate(spec.data.transforms)
        if transform.name == "custom"
    ]
    optimizers: list[Keys] = [("optimizer", "name")] if ":" in spec.optimizer.name else []
    phases: list[Keys] = [
        ("optimizer", "phases", phase, "name")
        for phase, settings in spec.optimizer.phases.items()
        if ":" in settings.get("name", "")
    ]
    return [("task",), *transforms, *optimizers, *phases]


def located(reference: str, base: Path) -> str:
    """Return `file.py:Name` with an absolute file; raise ValueError where form or file is wrong."""
    left, _, name = reference.rpartition(":")
    is_file = left.endswith(".py")
    if not _is_dotted(name) or not (is_file or _is_dotted(left)):
        raise ValueError(f"expected file.py:Name or module:Name, got {shown(reference)}")
    if not is_file:
        return reference
    file = absolute(left, base)
    if not os.path.isfile(file):  # noqa: PTH113 -- pathlib raises on names that are too long
        raise ValueError(f"there is no file {file}; its path is relative to the spec's folder")
    return f"{file}:{name}"


def _is_dotted(name: str) -> bool:
    return bool(name) and all(part.isidentifier() for part in name.split("."))


def placed(path: str, cwd: Path) -> str:
    """Return a local `path` as absolute; raise ValueError where a URL holds a secret, which a spec must not."""
    if holds_credentials(path):
        raise ValueError("the URL holds credentials, and specs are stored and shown; take them from the environment")
    if not path:
        raise ValueError("expected a folder or a URL, got empty text")
    if "://" in path:
        return path
    table = table_kind(path)
    return f"{table}:{absolute(path.removeprefix(f'{table}:'), cwd)}" if table else absolute(path, cwd)


def absolute(path: str, base: Path) -> str:
    """Return `path` from the root, `..` and `~` worked out, and links kept: other machines may link elsewhere."""
    return os.path.normpath(base.absolute() / os.path.expanduser(path))  # noqa: PTH111 -- pathlib raises without a home


def _by_name(data: dict[str, Any]) -> dict[str, Any]:
    """Return a dumped spec in which files of code are named without their folders."""
    optimizer = data["optimizer"]
    for holder in (data, optimizer, *optimizer["phases"].values(), *data["data"]["transforms"]):
        for key in {"task", "name", "function"} & holder.keys():
            holder[key] = _base_name(holder[key])
    return data


def _base_name(reference: str) -> str:
    left, sign, name = reference.rpartition(":")
    return f"{Path(left).name}:{name}" if sign and left.endswith(".py") else reference


def _differences(keys: Keys, one: Any, other: Any) -> Iterator[tuple[Keys, Any, Any]]:
    """Yield the keys at which two dumped specs differ, and both values."""
    if keys in _FREE:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            yield from _differences((*keys, key), one.get(key, _UNSET), other.get(key, _UNSET))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from _differences((*keys, index), left, right)
    # Not-a-number differs from itself; in print it does not.
    elif one != other and repr(one) != repr(other):
        yield keys, one, other


def _brief(value: Any) -> str:
    if value is _UNSET or value is None:
        return "unset"
    return short(str(value).lower() if isinstance(value, bool) else str(value))
