"""The names that a cluster's spec takes are those that Ray knows, and fit into the labels of a head."""

import pytest

from elastrain.spec.accelerators import ACCELERATORS, GPUS, TPUS, resource_of
from elastrain.spec.cluster import LABEL_NAME
from elastrain.spec.offers import offer_of, offered


@pytest.mark.parametrize("kind", [None, *ACCELERATORS])
def test_a_label_tells_what_a_node_would_hold(kind: str | None) -> None:
    held = {"CPU": 192} | ({resource_of(kind): 16, f"accelerator_type:{kind}": 1} if kind else {})
    label = offer_of(held)
    assert LABEL_NAME.fullmatch(label)
    assert offered({"elastrain-pool/a": label, "b": label}) == [held]


@pytest.mark.parametrize("label", ["", "x", "CPU", "CPU_", "CPU_x.H100", "CPU_8..H100", "CPU_8.H100.T4"])
def test_a_label_that_somebody_else_wrote_tells_nothing(label: str) -> None:
    assert offered({"elastrain-pool/a": label}) == []


def test_accelerators_are_those_that_ray_finds() -> None:
    from ray.util.accelerators import accelerators

    known = {name for key, name in vars(accelerators).items() if key.isupper() or key.startswith("AMD_")}
    assert set(ACCELERATORS) <= known
    # What is left out: no accelerator that torch trains on here, or a size instead of a kind.
    others = {
        name for name in known - set(ACCELERATORS) if not name.startswith(("M1", "M2", "M3", "Apple", "MX", "MOB"))
    }
    assert others == {
        "aws-neuron-core",
        "Intel-GAUDI",
        "A100-40G",
        "A100-80G",
        "Ascend910B",
        "Ascend910B4",
        "FURIOSA_RNGD",
        "AMD-Radeon-R9-200-HD-7900",
        "AMD-Radeon-HD-7900",
    }
    assert all(name.startswith("TPU-") for name in TPUS)
    assert not set(GPUS) & set(TPUS)
