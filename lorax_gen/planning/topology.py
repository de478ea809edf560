"""Devices that are not attached: TPU slices described by libtpu, GPUs by their data sheets."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

from lorax_gen.errors import UserError
from lorax_gen.mesh.chips import CHIPS, Chip
from lorax_gen.planning.compiling import plain_signals

# Names that `--topology` takes.
_KINDS = {chip.kind: chip for chip in CHIPS}
TPUS = {
    "v4": _KINDS["TPU v4"],
    "v5e": _KINDS["TPU v5 lite"],
    "v5p": _KINDS["TPU v5"],
    "v6e": _KINDS["TPU v6 lite"],
}
GPUS = {
    "gpu": _KINDS["NVIDIA H100"],
    "gpu-a100": _KINDS["NVIDIA A100"],
    "gpu-h100": _KINDS["NVIDIA H100"],
    "gpu-h200": _KINDS["NVIDIA H200"],
}


LARGEST = 65_536  # devices


@dataclasses.dataclass(frozen=True)
class Absent:
    """The attributes of a device that a mesh reads."""

    id: int
    device_kind: str
    platform: str = "gpu"
    process_index: int = 0


def find_devices(topology: str) -> tuple[Chip, list]:
    """The chip of a topology such as `v5e:4x4` or `gpu:8`, and its devices.

    Raises UserError for an unknown one, or a TPU where libtpu is not installed.
    """
    name, _, size = topology.partition(":")
    dimensions = 3 if name in ("v4", "v5p") else 2
    if any(int(number) > LARGEST for number in re.findall(r"\d+", size[:100])):
        raise UserError(f"the topology {topology!r} is larger than any; at most {LARGEST} devices")
    if name in GPUS and re.fullmatch(r"[1-9]\d*", size):
        chip = GPUS[name]
        return chip, [Absent(i, chip.kind) for i in range(int(size))]
    if name in TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{dimensions - 1}}}", size):
        return TPUS[name], tpu_devices(topology)
    raise UserError(
        f"unknown topology {topology!r}; expected v5e:4x4 or v6e:4x4 (two numbers), v4:2x2x1 or "
        f"v5p:2x2x1 (three), or {', '.join(f'{gpu}:8' for gpu in GPUS)} (gpu is an H100)"
    )


def tpu_devices(topology: str) -> list:
    """Descriptions of a TPU slice's devices, from libtpu; no TPU is needed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for a TPU needs its compiler, libtpu: pip install 'lorax-gen[plan]'"
        )
    # Read when libtpu is loaded: do not query the metadata server for this machine's TPU, take no
    # lock file, and print no warnings about either.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    }.items():
        os.environ.setdefault(name, value)
    # libtpu aborts on flags of other backends; its own flags are in LIBTPU_INIT_ARGS.
    os.environ.pop("XLA_FLAGS", None)
    from jax.experimental import topologies

    sizes = [int(size) for size in topology.partition(":")[2].split("x")]
    options: dict[str, Any] = {}
    if any(size % 2 for size in sizes[:2]):  # less than a host of 2x2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.startswith("v4:"):  # two cores as one device, as jax has them on a TPU v4
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except Exception as error:  # from libtpu: an unsupported shape
        raise UserError(f"no topology {topology}: {str(error).splitlines()[0]}") from None
    finally:
        plain_signals()
