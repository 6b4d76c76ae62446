"""From what pydantic found to what a person can act on: one line a problem, in plain words.

In: a model, plain data (dicts, lists, scalars) and a function that tells where a key was written. Out: the validated
object, or one SpecError with a line for each problem: place, key, what was expected, what was given, the nearest
known key. Knows no YAML and no particular spec: every spec of ours goes through here.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from elastrain.errors import SpecError
from elastrain.urls import holds_credentials

Keys = tuple[str | int, ...]
Where = Callable[[Sequence[Keys]], str]
M = TypeVar("M", bound=BaseModel)

# What each of pydantic's error types expected, filled from the error's context.
_EXPECTED: dict[str, str] = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of a sane size",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "a number greater than {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number less than {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "literal_error": "{expected}",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_long": "at most {max_length} values",
    "too_short": "at least {min_length} values",
    "invalid_key": "text as a key",
}
_SHOWN_CHARS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is wrong at `keys`; `blame` are the keys by which its line may be found, the most telling first."""

    keys: Keys
    text: str
    blame: tuple[Keys, ...] = ()

    def below(self, keys: Keys) -> "Problem":
        """Return the problem as it is told of data that hold the problem's data at `keys`."""
        return replace(self, keys=keys + self.keys, blame=tuple(keys + each for each in self.blame))


def nowhere(_: Sequence[Keys]) -> str:
    """Return no place: data made in Python has no lines."""
    return ""


def dotted(keys: Keys) -> str:
    """Return keys as users write them.

    >>> dotted(("data", "transforms", 0, "p"))
    'data.transforms.0.p'
    """
    return ".".join(str(key) for key in keys)


def shown(value: Any) -> str:  # noqa: PLR0911 -- one for each type
    """Return `value` in the words of a YAML file, short, and never with a secret.

    >>> [shown(value) for value in (True, None, -1, "fast", [1, 2])]
    ['true', 'nothing', '-1', "'fast'", 'a list of 2']
    """
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    if isinstance(value, str) and holds_credentials(value):
        return "a URL with credentials"
    if isinstance(value, int) and abs(value) >= 10**_SHOWN_CHARS:
        return "a huge number"
    if isinstance(value, str | int | float):
        return short(repr(value))
    if isinstance(value, Mapping):
        return "a mapping"
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else f"a Python {type(value).__name__}"


def short(text: str) -> str:
    """Return `text`, its end cut off where it is long."""
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def nearest(word: object, known: Iterable[object]) -> str:
    """Return `; did you mean 'x'?` for the known word nearest to `word`; empty if none is near.

    >>> nearest("momentun", ["lr", "momentum"]), nearest("colour", ["lr"])
    ("; did you mean 'momentum'?", '')
    """
    by_lower = {str(each).lower(): str(each) for each in known}
    found = difflib.get_close_matches(str(word).lower(), by_lower, n=1)
    return f"; did you mean '{by_lower[found[0]]}'?" if found else ""


def refuse(problems: Sequence[Problem], where: Where) -> None:
    """Raise all `problems` as one error; without problems, return.

    Raises:
        SpecError: There is a problem; its text has one line for each.
    """
    if problems:
        raise SpecError(_told(problems, where))


def validate(model: type[M], data: Any, where: Where = nowhere) -> M:
    """Return `data` as a `model`.

    Raises:
        SpecError: Something is unknown, missing or wrong; one line for each problem.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SpecError(_told(find(model, error), where)) from None


def find(model: type[BaseModel], error: ValidationError) -> list[Problem]:
    """Return the problems in an `error` of `model`, in its order, each once.

    A misspelt key is also a missing key, and a value that fits no member of a union fails once for each member;
    either is one problem to its author.
    """
    details = error.errors(include_url=False)
    misspelt = _misspelt(model, details)
    wanted: dict[Keys, list[str]] = {}
    problems: dict[Keys, Problem] = {}
    for detail in details:
        place = _place(model, detail["loc"])
        expected = _expected(detail, place)
        if expected is None:
            if place.keys not in misspelt:
                problems.setdefault(place.keys, _TOLD.get(detail["type"], _other)(detail, place))
            continue
        wanted.setdefault(place.keys, []).append(expected)
        text = f"expected {' or '.join(dict.fromkeys(wanted[place.keys]))}, got {shown(detail['input'])}"
        problems[place.keys] = Problem(keys=place.keys, text=text + _hint(detail))
    return list(problems.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where an error is: `keys` in the data, and the `owner` model of the last key, where it is a model's."""

    keys: Keys
    owner: type[BaseModel] | None


def _told(problems: Sequence[Problem], where: Where) -> str:
    return "\n".join(dict.fromkeys(_line(problem, where) for problem in problems))


def _line(problem: Problem, where: Where) -> str:
    key = f"{dotted(problem.keys)}: " if problem.keys else ""
    return f"{where(problem.blame or (problem.keys,))}{key}{problem.text}"


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return what `annotation` allows, without None: a union's members, each bare."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(each for member in get_args(annotation) for each in _members(member))
    return () if annotation is NoneType else (annotation,)


def _models(types: tuple[Any, ...]) -> list[type[BaseModel]]:
    return [each for each in types if isinstance(each, type) and issubclass(each, BaseModel)]


def _picked(types: tuple[Any, ...], label: str | int) -> tuple[Any, ...]:
    """Return the members of a union that pydantic's `label` means: a discriminator's value, or a type in words."""
    fields = ((model, field.annotation) for model in _models(types) for field in model.model_fields.values())
    tagged = tuple(model for model, kind in fields if get_origin(kind) is Literal and label in get_args(kind))
    return tagged or tuple(each for each in types if getattr(get_origin(each) or each, "__name__", "?") in str(label))


def _item(types: tuple[Any, ...], part: str | int) -> tuple[Any, ...] | None:
    """Return the types of a container's item `part`, or None where no type is a container."""
    for each in types:
        arguments = get_args(each)
        if get_origin(each) in (tuple, list) and isinstance(part, int):
            return _members(arguments[min(part, len(arguments) - 1)] if arguments[-1] is not ... else arguments[0])
        if get_origin(each) is dict:
            return _members(arguments[1])
        if each is Any:
            return types
    return None


def _place(model: type[BaseModel], loc: tuple[str | int, ...]) -> _Place:
    """Follow pydantic's `loc` through the types, leaving out the parts that name a union's member and no key."""
    keys: list[str | int] = []
    owner: type[BaseModel] | None = None
    types: tuple[Any, ...] = (model,)
    for part in loc:
        item = _item(types, part)
        if len(types) > 1:
            types = _picked(types, part)
        elif models := _models(types):
            owner = models[0]
            field = owner.model_fields.get(str(part))
            types = _members(field.annotation) if field else ()
            keys.append(part)
        elif item is not None and part != "[key]":
            owner, types = None, item
            keys.append(part)
    return _Place(keys=tuple(keys), owner=owner)


def _misspelt(model: type[BaseModel], details: list[ErrorDetails]) -> set[Keys]:
    """Return the missing keys that stand in the data under another spelling."""
    places = [(detail["type"], _place(model, detail["loc"])) for detail in details]
    missing = {place.keys for kind, place in places if kind == "missing"}
    unknown = [place for kind, place in places if kind == "extra_forbidden"]
    return {
        keys
        for place in unknown
        for keys in missing
        if keys[:-1] == place.keys[:-1] and f"'{keys[-1]}'" in nearest(place.keys[-1], _fields(place.owner))
    }


def _fields(owner: type[BaseModel] | None) -> list[str]:
    return list(owner.model_fields) if owner else []


def _expected(detail: ErrorDetails, place: _Place) -> str | None:
    """Return what was expected, or None for problems that are told otherwise."""
    if detail["type"] == "string_pattern_mismatch":
        field = place.owner.model_fields.get(str(place.keys[-1])) if place.owner else None
        return field.description if field and field.description else f"text like {detail['ctx']['pattern']}"
    template = _EXPECTED.get(detail["type"])
    return template.format(**detail.get("ctx", {})) if template else None


def _hint(detail: ErrorDetails) -> str:
    value = detail["input"]
    if detail["type"] == "literal_error" and isinstance(value, str):
        return nearest(value, _quoted(detail["ctx"]["expected"]))
    if detail["type"] == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"; put quotes around it: '{shown(value)}'"
    return ""


def _unknown(_: ErrorDetails, place: _Place) -> Problem:
    keys, known = place.keys, _fields(place.owner)
    hint = nearest(keys[-1], known) or f"; known keys: {', '.join(known)}"
    return Problem(keys=keys[:-1], text=f"unknown key {keys[-1]!r}{hint}", blame=(keys,))


def _missing(_: ErrorDetails, place: _Place) -> Problem:
    parent, key = place.keys[:-1], place.keys[-1]
    if isinstance(key, int):
        return Problem(keys=parent, text=f"value {key + 1} is missing")
    field = place.owner.model_fields[key] if place.owner else None
    meaning = f" ({field.description})" if field and field.description else ""
    return Problem(keys=parent, text=f"missing key '{key}'{meaning}")


def _untagged(detail: ErrorDetails, place: _Place) -> Problem:
    return Problem(keys=place.keys, text=f"missing key {detail['ctx']['discriminator']}")


def _mistagged(detail: ErrorDetails, place: _Place) -> Problem:
    tag, known = detail["ctx"]["tag"], _quoted(detail["ctx"]["expected_tags"])
    text = f"expected one of {', '.join(known)}, got {shown(tag)}{nearest(tag, known)}"
    return Problem(keys=(*place.keys, detail["ctx"]["discriminator"].strip("'")), text=text)


def _rule(detail: ErrorDetails, place: _Place) -> Problem:
    fields = [(*place.keys, *name.split(".")) for name in detail["ctx"]["fields"]]
    return Problem(keys=place.keys, text=detail["ctx"]["text"], blame=(*fields, place.keys))


def _other(detail: ErrorDetails, place: _Place) -> Problem:
    return Problem(keys=place.keys, text=detail["msg"])


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


# The error types that need more than `expected …, got …`.
_TOLD: dict[str, Callable[[ErrorDetails, _Place], Problem]] = {
    "extra_forbidden": _unknown,
    "missing": _missing,
    "union_tag_not_found": _untagged,
    "union_tag_invalid": _mistagged,
    "wrong": _rule,
}
