"""What looks like a secret in data that are stored, shown or sent: by its name or its form, also within arguments."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from elastrain.spec.problems import Keys, Problem, Where, refuse
from elastrain.urls import holds_credentials

_WORDS = r"secret|passw|passphrase|token(?!i[sz])|credential|api[_-]?key|access[_-]?key|private[_-]?key|account[_-]?key"
_NAME = re.compile(rf"(?i){_WORDS}")
# What has such a name and yet holds a name, a path or a setting: secretName, RAY_AUTH_TOKEN_PATH, mask_token, …
_HARMLESS = re.compile(
    r"(?i)(name|ref|refs|path|file|dir|tokens|mode|ttl|class|secrets|keyref|_arn|accounttoken"
    r"|(pad|mask|eos|bos|sep|cls|unk|end|start|stop|special|image)[_-]?token)$"
)
_VALUE = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|\b(ghp|gho|github_pat|glpat|hf|xox[bp])[_-]\w{16,}"
    r"|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}"
)
# NAME=value, and --name value as arguments of a program have it; $NAME is a reference.
_ASSIGNED = re.compile(rf"(?i)([\w-]*(?:{_WORDS})[\w-]*)=(?!\$|\s|$)|(?<!\S)--([\w-]*(?:{_WORDS})[\w-]*)\s+(?![-$])\S")
_REMEDY = "specs and jobs are stored, logged and shown: use a role, a file that is mounted or, on Kubernetes, a Secret"
_OURS = {"token_dir", "token_secret", "ssh_private_key", "ssh_public_key"}  # fields with names of files and Secrets


def refuse_secrets(data: Any, where: Where) -> None:
    """Raise SpecError, a line for each, if plain `data` hold what looks like a secret; `where` tells places."""
    refuse([Problem(keys=keys, text=text) for keys, text in secrets_in(data)], where)


def secrets_in(data: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield where plain `data` hold what looks like a secret, and a sentence that does not show it.

    >>> [text.partition(";")[0] for _, text in secrets_in({"env": {"HF_TOKEN": "x", "RAY_AUTH_MODE": "token"}})]
    ['HF_TOKEN looks like a secret']
    >>> [keys for keys, _ in secrets_in(["run --api-key=x", "run --password x --tokenizer bpe", ["--token", "x"]])]
    [(0,), (1,), (2, 1)]
    """
    if isinstance(data, Mapping):
        yield from _in_mapping(data, keys)
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from secrets_in(value, (*keys, index))
        yield from _in_arguments(data, keys)
    elif isinstance(data, str):
        if _VALUE.search(data) or holds_credentials(data):
            yield keys, f"this looks like a secret; {_REMEDY}"
        for found in _ASSIGNED.finditer(data):
            yield from _named(keys, found[1] or found[2], "x")


def _in_arguments(data: Sequence[Any], keys: Keys) -> Iterator[tuple[Keys, str]]:
    for index, (option, value) in enumerate(pairwise(map(str, data)), start=1):
        if option.startswith("--") and not value.startswith(("-", "$")):
            yield from _named((*keys, index), option[2:], value)


def _in_mapping(data: Mapping[Any, Any], keys: Keys) -> Iterator[tuple[Keys, str]]:
    # A variable of a container in Kubernetes.
    if isinstance(data.get("name"), str) and isinstance(data.get("value"), str):
        yield from _named((*keys, "value"), data["name"], data["value"])
    for key, value in data.items():
        if isinstance(value, str):
            yield from _named((*keys, key), str(key), value)
        yield from secrets_in(value, (*keys, key))


def _named(keys: Keys, name: str, value: str) -> Iterator[tuple[Keys, str]]:
    is_word = value[:1] in ("<", "[")  # of a language model: <pad>, [MASK]
    if value and not is_word and name not in _OURS and _NAME.search(name) and not _HARMLESS.search(name):
        yield keys, f"{name} looks like a secret; {_REMEDY}"
