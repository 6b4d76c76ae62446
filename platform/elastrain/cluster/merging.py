"""Plain data merged into plain data, as `override` is into what is rendered."""

from collections.abc import Mapping
from typing import Any


def merged(base: Any, over: Any) -> Any:
    """Return `base` with `over` in it: mappings key by key, lists of named mappings by name, all else replaced.

    >>> merged({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"c": 3}, "d": [2]})
    {'a': {'b': 1, 'c': 3}, 'd': [2]}
    >>> merged([{"name": "x", "value": 1}], [{"name": "x", "value": 2}, {"name": "y"}])
    [{'name': 'x', 'value': 2}, {'name': 'y'}]
    """
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        both = {key: merged(base[key], over[key]) for key in over if key in base}
        return {**base, **over, **both}
    if _named(base) and _named(over):
        names = [each["name"] for each in base]
        kept = {each["name"]: each for each in base}
        for each in over:
            kept[each["name"]] = merged(kept.get(each["name"], {}), each)
        return [kept[name] for name in dict.fromkeys([*names, *kept])]
    return over


def _named(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) and "name" in each for each in value)
    )
