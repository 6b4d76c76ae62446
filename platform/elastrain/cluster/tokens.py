"""Where a rendered file would have Ray ask nobody for a token, or speak without TLS, whatever form that has in it.

In: plain data, of `ray up` or Kubernetes. Out: where in them it stands, and a sentence.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from elastrain.cluster.schemas import Finding
from elastrain.spec.problems import Keys

_END = r"""(?:$|[\s"';&|)])"""
# Any mention but the one value that is meant: also `unset`, and a variable that is handed on from the machine.
_OPENS = re.compile(rf"""RAY_AUTH_MODE(?!=["']?token{_END})|RAY_USE_TLS(?!=["']?1{_END})""")


def unlocked(data: Any, keys: Keys = ()) -> Iterator[Finding]:
    """Yield where `data` turn Ray's tokens or its TLS off.

    >>> [keys for keys, _ in unlocked({"run": ["--env RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled ray start"]})]
    [('run', 1)]
    >>> [keys for keys, _ in unlocked([{"name": "RAY_AUTH_MODE", "value": mode} for mode in ("token", "disabled")])]
    [(1, 'name')]
    """
    for path, text in _settings(data, keys):
        if found := _OPENS.search(text):
            yield path, f"{found[0]} is set to what would let strangers in or listen; remove it"


def _settings(data: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """Yield all texts; of a variable of a container, and of a mapping's entry, as NAME=value."""
    if isinstance(data, str):
        yield keys, data
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _settings(value, (*keys, index))
    elif isinstance(data, Mapping):
        if "name" in data and data.keys() & {"value", "valueFrom"}:
            data = {**data, "name": f"{data['name']}={data.get('value', '')}"}
        for key, value in data.items():
            yield from _settings(f"{key}={value}" if isinstance(value, str) else value, (*keys, key))
