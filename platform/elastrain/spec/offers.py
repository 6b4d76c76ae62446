"""What a pool's nodes would hold, as a label of the head: Ray tells nobody which nodes its autoscaler could add."""

import re
from collections.abc import Mapping

PREFIX = "elastrain-pool/"  # then the pool's name
KIND = "accelerator_type:"  # a resource of nodes that have accelerators, with their kind
_OFFER = re.compile(r"[A-Z]+_\d+(\.[A-Z]+_\d+)*(\.[A-Za-z0-9-]+)?")


def offer_of(resources: Mapping[str, int]) -> str:
    """Return resources as the value of a label.

    >>> offer_of({"CPU": 192, "GPU": 8, "accelerator_type:H100": 1})
    'CPU_192.GPU_8.H100'
    """
    kinds = [name.removeprefix(KIND) for name in resources if name.startswith(KIND)]
    return ".".join([f"{name}_{n}" for name, n in resources.items() if not name.startswith(KIND)] + kinds)


def offered(labels: Mapping[str, str]) -> list[dict[str, float]]:
    """Return what a node of each pool would hold, by the labels of a head; what nobody here has written is passed over.

    >>> offered({"elastrain-pool/h100-spot": "CPU_192.GPU_8.H100", "elastrain-pool/x": "?", "ray.io/zone": "a"})
    [{'CPU': 192.0, 'GPU': 8.0, 'accelerator_type:H100': 1.0}]
    """
    values = [value for name, value in labels.items() if name.startswith(PREFIX)]
    return [_resources(value.split(".")) for value in values if _OFFER.fullmatch(value)]


def _resources(parts: list[str]) -> dict[str, float]:
    counted = [part.split("_") for part in parts if "_" in part]
    return {name: float(n) for name, n in counted} | {f"{KIND}{part}": 1.0 for part in parts if "_" not in part}
