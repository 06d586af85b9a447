"""GPUs by a part of the device's name: what they can do, and what an hour of one costs."""

from typing import NamedTuple


class GPU(NamedTuple):
    """What is not known is None; every name that contains `part`, in any case, is of this kind."""

    part: str
    flops: float | None  # dense bf16 peak, FLOP/s (the vendors' data sheets)
    bandwidth: float | None = None  # of the memory, bytes/s (the same)
    price: float | None = None  # US dollars per hour, typical on-demand, late 2025


GPUS = [  # the first match counts
    GPU("GH200", 989e12, 4.0e12, 3.50),
    GPU("H200", 989e12, 4.8e12, 3.50),
    GPU("H100 NVL", 835e12, 3.9e12, 3.00),
    GPU("H100 PCIe", 756e12, 2.0e12, 3.00),
    GPU("H100", 989e12, 3.35e12, 3.00),
    GPU("H800", 989e12, 3.35e12),
    GPU("B200", 2250e12, 8.0e12, 5.00),
    GPU("B100", 1800e12),
    GPU("A100-SXM4-80GB", 312e12, 2.039e12, 1.80),
    GPU("A100 80GB", 312e12, 1.935e12, 1.80),
    GPU("A100", 312e12, 1.555e12, 1.80),
    GPU("A800", 312e12),
    GPU("A40", 149.7e12),
    GPU("A10G", 70e12, None, 0.75),
    GPU("A10", 125e12, None, 0.75),
    GPU("L40S", 362e12, 0.864e12, 1.00),
    GPU("L40", 181e12, 0.864e12),
    GPU("L4", 121e12, 0.3e12, 0.70),
    GPU("RTX 5090", 209.5e12, 1.792e12, 0.70),
    GPU("RTX 5080", 112.6e12),
    GPU("RTX 4090", 165.2e12, 1.008e12, 0.45),
    GPU("RTX 4080", 97.5e12),
    GPU("RTX 3090", 71e12, 0.936e12, 0.25),
    GPU("RTX 6000 Ada", 364e12),
    GPU("MI300X", 1307e12, 5.3e12),
    GPU("V100", None, None, 0.55),
]
UNKNOWN = GPU("", None)


def gpu_of(name: str) -> GPU:
    """The kind of GPU that has this device name; UNKNOWN if none has."""
    return next((gpu for gpu in GPUS if gpu.part.lower() in name.lower()), UNKNOWN)
