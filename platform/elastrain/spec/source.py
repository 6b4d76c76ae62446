"""From YAML text and `--set` to plain data that knows where each key was written.

In: a file or text, overrides as the command line gives them. Out: a Source: dicts, lists and scalars, and for every
key its line or its override. Reads YAML 1.2 only (`3e-4` is a number, `yes` is text); a key given twice, a tag, or
an alias that never ends is an error. Knows no spec: any kind may be read with it.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from elastrain.errors import SpecError
from elastrain.spec.problems import Keys, Problem, dotted, refuse, short, shown
from elastrain.spec.secrets import secrets_in
from elastrain.urls import holds_credentials

Position = tuple[int, int]
_MAX_BYTES = 1 << 20
_MAX_VALUES = 20_000
_MAX_DEPTH = 40
_TAG = "tag:yaml.org,2002:"
# What ruamel raises on text that is no YAML; beside its own, on escapes and tags that stand for no character.
_BROKEN = (YAMLError, ValueError, OverflowError)
_REMEDY = "give a YAML file such as train.yaml"
_REMEDIES = {
    "maximum depth": f"no spec is nested more than {_MAX_DEPTH} deep",
    "cannot start any token": "indent with spaces, and put quotes around text that starts with a sign",
    "mapping values are not allowed": "put quotes around text that holds ': '",
    "single document": "one file holds one spec: remove the line '---'",
    "undefined alias": "put quotes around text that starts with '*'",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Plain `data`, the (line, column) of its keys, both from 1, and the override that set a key, where one did."""

    name: str
    data: Any
    lines: dict[Keys, Position] = field(default_factory=dict)
    sets: dict[Keys, str] = field(default_factory=dict)

    def where(self, blame: Sequence[Keys]) -> str:
        """Return the place of the first of `blame` that an override set, or else that the file holds.

        It ends in `: `, as `train.yaml:4:3: ` or `--set optimizer.lr=-1: `. Where no key is found, its parent is.
        """
        for keys in blame:
            origin = self._origin(keys)
            if origin in self.sets:
                return f"--set {self.sets[origin]}: "
        found = next((keys for keys in blame if keys in self.lines), self._origin(blame[0]))
        line, column = self.lines.get(found, (1, 1))
        return f"{self.name}:{line}:{column}: "

    def _origin(self, keys: Keys) -> Keys:
        """Return the longest beginning of `keys` that was written somewhere."""
        parents = (keys[:length] for length in range(len(keys), 0, -1))
        return next((each for each in parents if each in self.sets or each in self.lines), ())


def load(path: str | os.PathLike[str]) -> Source:
    """Read the YAML file at `path`.

    Raises:
        SpecError: There is no such file, it is a folder, too large, not text, or not YAML.
    """
    name = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{name}: no such file; {_REMEDY}{_others(name)}") from None
    except IsADirectoryError:
        raise SpecError(f"{name}: this is a folder; give the spec in it{_others(str(Path(name) / 'x'))}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SpecError(f"{name}: cannot be read: {reason}") from None
    if len(content) > _MAX_BYTES:
        raise SpecError(f"{name}: larger than {_MAX_BYTES >> 20} MiB, so no spec; {_REMEDY}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{name}: byte {error.start} is not UTF-8 text; {_REMEDY}") from None
    return parse(text, name=name)


def parse(text: str, *, name: str) -> Source:
    """Read YAML `text`; `name` stands in front of line and column in errors.

    Raises:
        SpecError: The text is no YAML 1.2, or uses what a spec cannot hold.
    """
    builder = _Builder(name=name)
    try:
        root = builder.yaml.compose(text)
        data = builder.build(root, ()) if root is not None else None
    except _BROKEN as error:
        raise SpecError(_broken(error, name)) from None
    builder.lines.setdefault((), (1, 1))
    return Source(name=name, data=data, lines=builder.lines)


def override(source: Source, overrides: Sequence[str], *, exclusive: Sequence[tuple[Keys, Keys]] = ()) -> Source:
    """Return `source` with `a.b=value` applied in order; a number in the path is an index of a list.

    A value replaces what was there, a mapping too; mappings on the way are made. Of an `exclusive` pair, setting one
    removes the other that the file holds; two overrides that set both are left for the model to refuse.

    Raises:
        SpecError: An override has no `=`, its value is no YAML, or its path leads through a scalar.
    """
    source = replace(source, data=copy.deepcopy(source.data), lines=dict(source.lines), sets={})
    rivals = {one: other for pair in exclusive for one, other in (pair, pair[::-1])}
    for text in overrides:
        keys, value = _assignment(text)
        keys = _put(source.data, keys, value, text)
        _forget(source, keys)
        source.sets[keys] = _masked(text)
        rival = rivals.get(keys)
        if rival and value is not None and rival not in source.sets and rival[:-1] not in source.sets:
            _remove(source.data, rival)
            _forget(source, rival)
    return source


class _Builder:
    """Turns YAML nodes into plain data and notes where the keys stand."""

    def __init__(self, *, name: str) -> None:
        self.name = name
        self.lines: dict[Keys, Position] = {}
        self.num_values = 0
        self.yaml = YAML(typ="safe", pure=True)
        self.yaml.version = (1, 2)
        self.yaml.max_depth = _MAX_DEPTH
        self.yaml.composer.warn_double_anchors = False

    def build(self, node: Node, keys: Keys) -> Any:
        """Return the plain value of `node`, which stands at `keys`."""
        self.lines.setdefault(keys, _position(node))
        self.num_values += 1
        if len(keys) > _MAX_DEPTH or self.num_values > _MAX_VALUES:
            self.refuse(node, keys[:3], "nested too deep or too large for a spec; an alias may hold itself")
        if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
            return self.mapping(node, keys)
        if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.build(each, (*keys, index)) for index, each in enumerate(node.value)]
        if isinstance(node, ScalarNode):
            return self.scalar(node, keys)
        return self.refuse(node, keys, f"the tag {_tag(node)} cannot stand in a spec; write a plain list or mapping")

    def mapping(self, node: MappingNode, keys: Keys) -> dict[str | int, Any]:
        """Return a mapping as a dict; what `<<` brings in gives way to the mapping's own keys."""
        built: dict[str | int, Any] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
                continue
            key = self.key(key_node, keys)
            if key in built:
                first = self.lines[*keys, key][0]
                self.refuse(key_node, (*keys, key), f"this key stands twice, first in line {first}; remove one")
            # What `<<` brings in is built later under the same keys, and must not move the mapping's own.
            self.lines.setdefault((*keys, key), _position(key_node))
            built[key] = self.build(value_node, (*keys, key))
        for source in merged:
            inherited = self.build(source, keys)
            if not isinstance(inherited, dict):
                self.refuse(source, keys, "'<<' takes a mapping, such as *name")
            built = {**inherited, **built}
        return built

    def key(self, node: Node, keys: Keys) -> Any:
        """Return a mapping's key: text, or a whole number as class ids are."""
        key = self.scalar(node, keys) if isinstance(node, ScalarNode) else node.value
        if isinstance(key, bool) or not isinstance(key, str | int):
            return self.refuse(node, keys, f"expected text as a key, got {shown(key)}")
        return key

    def scalar(self, node: ScalarNode, keys: Keys) -> Any:
        """Return a scalar; what only YAML 1.1 would take for a date or a sign stays text."""
        kind = str(node.tag).removeprefix(_TAG)
        text = str(node.value)
        try:
            # The escape "\ud800" makes half a character, which no file and no terminal takes.
            text.encode()
            if kind in ("str", "timestamp", "value", "merge"):
                return text
            if kind in ("int", "float", "bool", "null"):
                return self.yaml.constructor.construct_object(node)
        except (ValueError, LookupError):
            return self.refuse(node, keys, f"{shown(text)} cannot be read as {kind}; put quotes around text")
        return self.refuse(node, keys, f"the tag {_tag(node)} cannot stand in a spec; write a plain value")

    def refuse(self, node: Node, keys: Keys, text: str) -> Any:
        """Raise `text` as the problem of `node`."""
        line, column = _position(node)
        refuse([Problem(keys=keys, text=text)], lambda _: f"{self.name}:{line}:{column}: ")


def _position(node: Node) -> Position:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _tag(node: Node) -> str:
    return str(node.tag).replace(_TAG, "!!")


def _broken(error: BaseException, name: str) -> str:
    """Return the sentence for text that is no YAML."""
    if not isinstance(error, MarkedYAMLError):
        if isinstance(error, YAMLError) and hasattr(error, "character"):
            return f"{name}: not a text file (character {error.character!r}); {_REMEDY}"
        return f"{name}: not YAML: {error}"
    mark = error.problem_mark or error.context_mark
    place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    begun = f"{error.context} from line {error.context_mark.line + 1}: " if error.context_mark else ""
    problem = begun + str(error.problem).partition(", if necessary")[0]
    remedy = next((f"; {remedy}" for words, remedy in _REMEDIES.items() if words in problem), "")
    return f"{place}: not YAML: {problem}{remedy}"


def _others(name: str) -> str:
    """Return the specs that lie in the folder of `name`, as the end of a sentence."""
    try:
        found = sorted(each.name for each in Path(name).parent.glob("*.y*ml"))
    except (OSError, ValueError):
        return ""
    return f" (there: {', '.join(found[:5])})" if found else ""


def _masked(text: str) -> str:
    """Return an override fit to be shown: no secrets, one line, not long."""
    key, _, value = text.partition("=")
    flat = text.replace(": ", "=").replace(",", " ")  # as arguments of a program would say it
    hidden = holds_credentials(value) or any(True for _ in secrets_in(flat))
    return f"{key}=…" if hidden else f"{key}={short(' '.join(value.split()))}"


def _assignment(text: str) -> tuple[Keys, Any]:
    """Return the keys and the value of one override."""
    path, sign, value = text.partition("=")
    keys = tuple(part.strip() for part in path.split("."))
    if not sign or not all(keys):
        given = _masked(text) if sign else short(text)
        raise SpecError(f"--set {given}: expected a.b=value, such as --set optimizer.lr=0.01")
    try:
        return keys, parse(value, name="value").data
    except SpecError as error:
        reason = str(error).partition(": ")[2]
        raise SpecError(f"--set {_masked(text)}: {reason}") from None


def _put(data: Any, keys: Keys, value: Any, text: str) -> Keys:
    """Set `value` at `keys` in `data`, making mappings on the way; return the keys, a list's as numbers."""
    here, done = data, list[str | int]()
    for position, key in enumerate(keys):
        step = _step(here, key)
        if step is None:
            path = dotted(tuple(done)) or "the spec"
            known = f"has {len(here)} items, counted from 0" if isinstance(here, list) else f"is {shown(here)}"
            raise SpecError(f"--set {_masked(text)}: {path} {known}: {dotted(keys)} cannot be set in it")
        done.append(step)
        if position == len(keys) - 1:
            here[step] = value
        elif isinstance(here, dict) and here.get(step) is None:
            here[step] = {}
        here = here[step]
    return tuple(done)


def _step(here: Any, key: str | int) -> str | int | None:
    """Return `key` as it indexes `here`, or None where it cannot."""
    number = int(key) if str(key).isascii() and str(key).isdigit() else None
    if isinstance(here, dict):
        # A mapping read from YAML may have whole numbers as keys.
        return number if number is not None and key not in here and number in here else key
    if isinstance(here, list):
        return number if number is not None and number < len(here) else None
    return None


def _remove(data: Any, keys: Keys) -> None:
    for key in keys[:-1]:
        data = data[key]
    data.pop(keys[-1], None)


def _forget(source: Source, keys: Keys) -> None:
    """Drop the places of `keys` and of what lay below: something else stands there now."""
    for places in (source.lines, source.sets):
        for each in [each for each in places if each[: len(keys)] == keys]:
            del places[each]
