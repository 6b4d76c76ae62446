"""The spec of a cluster as a document: YAML in, overrides, secrets refused wherever they hide.

In: a YAML file with `--set` overrides, or a mapping from Python. Out: a ClusterSpec, and a function that tells where
each key was written; or one SpecError with a line for each problem. `spec.document.dump` writes it.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastrain.errors import SpecError
from elastrain.spec.cluster import ClusterSpec
from elastrain.spec.document import absolute, plain
from elastrain.spec.problems import Keys, Problem, Where, nearest, nowhere, refuse, shown, validate
from elastrain.spec.source import load, override
from elastrain.urls import holds_credentials

_KEYS = "a cluster spec has name, provider, image, head and pools"
_NAME = re.compile(r"(?i)secret|passw|token|credential|api_?key|access_?key|private_?key")
# What has such a name and yet holds a name, a path or a setting: secretName, RAY_AUTH_TOKEN_PATH, HttpTokens, …
_HARMLESS = re.compile(r"(?i)(name|ref|refs|path|file|dir|tokens|mode|ttl|class|secrets|keyref|_arn|accounttoken)$")
_VALUE = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|\b(ghp|gho|github_pat|glpat|hf|xox[bp])[_-]\w{16,}"
    r"|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}"
)
_ASSIGNED = re.compile(r"(?i)\b(\w*(?:secret|passw|token|api_?key|access_?key)\w*)=(?!\$|\s|$)")
_REMEDY = "a spec is stored and shown, and what it renders is logged by Ray: use an identity, a mount or a Secret"
_OURS = {"token_dir", "token_secret", "ssh_private_key", "ssh_public_key"}  # fields with names of files and Secrets


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterDocument:
    """A spec, and where each of its keys was written."""

    spec: ClusterSpec
    where: Where


def read_cluster(path: str | os.PathLike[str], sets: Sequence[str] = ()) -> ClusterDocument:
    """Read the cluster's spec at `path` and apply `sets` (`a.b=value`); its table of prices is relative to the file.

    Raises:
        SpecError: The file, an override or the spec is wrong; a line for each problem.
    """
    source = override(load(path), sets)
    if source.data is None:
        raise SpecError(f"{source.name}: the file is empty; {_KEYS}")
    spec = cluster_spec(source.data, source.where)
    if spec.prices is not None:
        found = absolute(spec.prices, (Path.cwd() / path).parent)
        if not Path(found).is_file():
            refuse([Problem(keys=("prices",), text=f"there is no file {found}")], source.where)
        spec = spec.model_copy(update={"prices": found})
    return ClusterDocument(spec=spec, where=source.where)


def cluster_spec(data: Mapping[str, Any], where: Where = nowhere) -> ClusterSpec:
    """Return the spec that `data` describes.

    Raises:
        SpecError: Something is unknown, missing, wrong or a secret; a line for each problem.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"{where([()])}expected a mapping, got {shown(data)}: {_KEYS}")
    if (kind := data.get("kind", "cluster")) in ("train", "sweep"):
        refuse([Problem(keys=("kind",), text=f"this is a {kind} spec, and a cluster spec is wanted")], where)
    found = plain(data, where)
    refuse([Problem(keys=keys, text=text) for keys, text in secrets_in(found)], where)
    provider = found.get("provider")
    if isinstance(provider, dict) and "type" not in provider:
        # Which provider's keys the others are nobody knows, so this one is told before them.
        near = [key for key in provider if nearest(key, ["type"])]
        refuse([Problem(keys=("provider", key), text="unknown key; did you mean 'type'?") for key in near], where)
    return validate(ClusterSpec, found, where)


def secrets_in(data: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield where plain `data` hold what looks like a secret, and a sentence that does not show it.

    >>> [text.partition(";")[0] for _, text in secrets_in({"env": {"HF_TOKEN": "x", "RAY_AUTH_MODE": "token"}})]
    ['HF_TOKEN looks like a secret']
    """
    if isinstance(data, Mapping):
        yield from _in_mapping(data, keys)
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from secrets_in(value, (*keys, index))
    elif isinstance(data, str):
        if _VALUE.search(data) or holds_credentials(data):
            yield keys, f"this looks like a secret; {_REMEDY}"
        for found in _ASSIGNED.finditer(data):
            yield from _named(keys, found[1], "x")


def _in_mapping(data: Mapping[Any, Any], keys: Keys) -> Iterator[tuple[Keys, str]]:
    # A variable of a container in Kubernetes.
    if isinstance(data.get("name"), str) and isinstance(data.get("value"), str):
        yield from _named((*keys, "value"), data["name"], data["value"])
    for key, value in data.items():
        if isinstance(value, str):
            yield from _named((*keys, key), str(key), value)
        yield from secrets_in(value, (*keys, key))


def _named(keys: Keys, name: str, value: str) -> Iterator[tuple[Keys, str]]:
    if value and name not in _OURS and _NAME.search(name) and not _HARMLESS.search(name):
        yield keys, f"{name} looks like a secret; {_REMEDY}"
