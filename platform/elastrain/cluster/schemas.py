"""Schemas that others made, and what they say in our words: Ray's of `ray up`, KubeRay's of its objects.

Ray's are read from the installed wheel, without importing Ray. KubeRay's lies beside this file, made from the
operator's definitions of version 1.7.0 (github.com/ray-project/kuberay, Apache License 2.0).
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema

from elastrain.errors import ElastrainError
from elastrain.spec.problems import Keys, nearest, short, shown

KUBERAY = Path(__file__).with_name("kuberay-1.7.0.json.gz")
_TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "boolean": "true or false",
}
Finding = tuple[Keys, str]


def ray_up_findings(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what Ray's own schema of `ray up` has against `data`: where in them, and a sentence."""
    return _findings(jsonschema.Draft7Validator(_ray_up_schema()), data)


def kuberay_findings(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what KubeRay's schema of the object's kind has against `data`, unknown keys included."""
    schemas = _kuberay_schemas()
    schema = {"$ref": f"#/$defs/{data['kind']}", "$defs": schemas["$defs"]}
    return _findings(jsonschema.Draft202012Validator(schema), data)


def arm_parameters() -> frozenset[str]:
    """Return the parameters that Ray's template of an Azure machine takes."""
    template = json.loads(_file_of_ray("autoscaler/_private/_azure/azure-vm-template.json"))
    return frozenset(template["parameters"])


def _findings(validator: Any, data: Mapping[str, Any]) -> Iterator[Finding]:
    for error in validator.iter_errors(data):
        path: Keys = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            known = list(error.schema.get("properties", {}))
            for key in [key for key in error.instance if key not in known]:
                yield (*path, key), f"unknown key {key!r}{nearest(key, known)}"
        elif error.validator == "type":
            kinds = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
            wanted = " or ".join(_TYPES.get(kind, f"a {kind}") for kind in kinds)
            yield path, f"expected {wanted}, got {shown(error.instance)}"
        elif error.validator == "enum":
            known = [str(value) for value in error.validator_value]
            yield (
                path,
                f"expected one of {', '.join(known)}, got {shown(error.instance)}{nearest(error.instance, known)}",
            )
        else:
            yield path, short(error.message)


@cache
def _ray_up_schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_file_of_ray("autoscaler/ray-schema.json"))
    return found


@cache
def _kuberay_schemas() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(KUBERAY.read_bytes()))
    return found


def _file_of_ray(name: str) -> str:
    spec = find_spec("ray")
    if spec is None or not spec.submodule_search_locations:
        raise ElastrainError("Ray is not installed here; make setup installs it")
    return (Path(spec.submodule_search_locations[0]) / name).read_text(encoding="utf-8")
