"""The names that a cluster's spec takes are those that Ray knows."""

from elastrain.spec.accelerators import ACCELERATORS, GPUS, TPUS


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
