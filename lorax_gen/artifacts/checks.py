"""Checks of the arrays in artifacts, on the host."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.method.lora import Tree
from lorax_gen.tensors import open_safetensors

# Dtypes of floating-point arrays, as safetensors names them.
FLOATS = ("F32", "BF16", "F16")


def read_arrays(path: AnyPath, dtypes: Collection[str] = FLOATS) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file, finite and of one of the dtypes.

    Raises UserError if the file is missing or truncated, and for any other array, naming it.
    """
    with open_safetensors(path) as file:
        names = list(file.keys())
        for name in names:
            if (dtype := file.get_slice(name).get_dtype()) not in dtypes:
                raise UserError(
                    f"{path}: {name} is {dtype}; expected {' or '.join(dtypes)}, get the file again"
                )
        arrays = {name: file.get_tensor(name) for name in names}
    for name, value in arrays.items():
        if value.dtype.kind not in "iu":
            check_finite(value, f"{path}: {name}")
    return arrays


def check_finite(value: np.ndarray, name: str, advice: str = "train or get it again") -> None:
    """Raises UserError that begins with `name` where an array holds NaN or an infinity."""
    finite = np.isfinite(value)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise UserError(f"{name} holds {float(value[index])} at {list(index)}; {advice}")


def check_tree(tree: Tree) -> None:
    """Raises UserError where a LoRA tree holds NaN or an infinity."""
    for name, pair in tree.items():
        for factor, value in pair.items():
            check_finite(np.asarray(value), f"the LoRA for {name!r}, {factor},")
