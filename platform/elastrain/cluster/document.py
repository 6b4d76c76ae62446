"""The spec of a cluster as a document: YAML in, overrides, secrets refused wherever they hide.

In: a YAML file with `--set` overrides, or a mapping from Python. Out: a ClusterSpec, and a function that tells where
each key was written; or one SpecError with a line for each problem. `spec.document.dump` writes it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastrain.errors import SpecError
from elastrain.spec.cluster import ClusterSpec
from elastrain.spec.document import absolute, plain
from elastrain.spec.problems import Problem, Where, nearest, nowhere, refuse, shown, validate
from elastrain.spec.secrets import refuse_secrets
from elastrain.spec.source import load, override

_KEYS = "a cluster spec has name, provider, image, head and pools"


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
    refuse_secrets(found, where)
    provider = found.get("provider")
    if isinstance(provider, dict) and "type" not in provider:
        # Which provider's keys the others are nobody knows, so this one is told before them.
        near = [key for key in provider if nearest(key, ["type"])]
        refuse([Problem(keys=("provider", key), text="unknown key; did you mean 'type'?") for key in near], where)
    return validate(ClusterSpec, found, where)
