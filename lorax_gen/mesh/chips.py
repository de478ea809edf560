"""Accelerators as their vendors specify them: peak FLOPs, memory, links. One table."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device."""

    kind: str
    """Prefix of its `device_kind`."""
    peak_flops: float
    """Dense bf16 FLOPs per second."""
    capacity: float | None = None
    """Nominal memory in GB. This and the next two fields are set for chips that `plan` supports."""
    usable: float | None = None
    """Memory available to a program, in GiB: the limit of libtpu's compiler; 92 % of a GPU's, where
    CUDA, NCCL and cuDNN use the rest."""
    link: float | None = None
    """Bytes per second that it can send to other chips."""


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; half of the bidirectional bandwidth. A TPU v7
# chip is two devices. GPUs: the data sheets of the SXM boards; half of NVLink's bandwidth.
CHIPS = (
    Chip("TPU v2", 23e12),
    Chip("TPU v3", 61.5e12),
    Chip("TPU v4", 275e12, 32, 30.75, 300e9),
    Chip("TPU v4 lite", 138e12),
    Chip("TPU v5", 459e12, 95, 95.74, 600e9),  # v5p
    Chip("TPU v5 lite", 197e12, 16, 15.75, 200e9),  # v5e
    Chip("TPU v5e", 197e12),
    Chip("TPU v6 lite", 918e12, 32, 31.25, 400e9),  # v6e
    Chip("TPU v6e", 918e12),
    Chip("TPU7x", 1153e12),
    Chip("NVIDIA A100", 312e12, 80, 73.6, 300e9),
    Chip("NVIDIA L4", 121e12),
    Chip("NVIDIA L40", 181e12),
    Chip("NVIDIA L40S", 362e12),
    Chip("NVIDIA H100", 989e12, 80, 73.2, 450e9),
    Chip("NVIDIA H100 PCIe", 756e12),
    Chip("NVIDIA H100 NVL", 835e12),
    Chip("NVIDIA GH200", 989e12),
    Chip("NVIDIA H200", 989e12, 141, 129.1, 450e9),
    Chip("NVIDIA B200", 2250e12),
    Chip("NVIDIA GB200", 2500e12),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip with the longest matching `kind`; None if unknown, as for a CPU."""
    fitting = [chip for chip in CHIPS if device_kind.startswith(chip.kind)]
    return max(fitting, key=lambda chip: len(chip.kind), default=None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOPs per second of one device; None if unknown, as for a CPU."""
    chip = find_chip(device_kind)
    return None if chip is None else chip.peak_flops
