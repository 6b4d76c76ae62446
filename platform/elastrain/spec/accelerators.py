"""Accelerators by the names that Ray knows them under, and the resource that each is counted as: GPU or TPU."""

GPU, TPU = "GPU", "TPU"

# A GPU's name is what Ray puts into the label ray.io/accelerator-type of a node on which it finds one. Names of a size
# (A100-80G) are left out: Ray never finds them by itself, and a pool says its instance anyway.
GPUS = (
    *("V100", "P100", "T4", "P4", "K80", "A10G", "L4", "L40S", "A100", "H100", "H200", "H20", "B200", "B300"),
    *("GB200", "GB300", "RTX-PRO-6000"),
    *("Intel-GPU-Max-1550", "Intel-GPU-Max-1100"),
    *("AMD-Instinct-MI100", "AMD-Instinct-MI250X", "AMD-Instinct-MI250X-MI250", "AMD-Instinct-MI210"),
    *("AMD-Instinct-MI300A", "AMD-Instinct-MI300X-OAM", "AMD-Instinct-MI300X-HF", "AMD-Instinct-MI308X"),
    *("AMD-Instinct-MI325X-OAM", "AMD-Instinct-MI350X-OAM", "AMD-Instinct-MI355X-OAM"),
)
TPUS = ("TPU-V2", "TPU-V3", "TPU-V4", "TPU-V5P", "TPU-V5LITEPOD", "TPU-V6E", "TPU-V7X")
ACCELERATORS = (*GPUS, *TPUS)
FAKE_GPUS = "ELASTRAIN_FAKE_GPUS"  # in the environment of nodes whose GPUs are names, so that workers compute on CPUs


def resource_of(accelerator: str) -> str:
    """Return the resource of Ray that counts an accelerator.

    >>> resource_of("H100"), resource_of("TPU-V6E")
    ('GPU', 'TPU')
    """
    return TPU if accelerator in TPUS else GPU
