"""Kernels in int8: a frozen model in half the bytes of bfloat16, quantised by qwix.

A kernel `[..., D, F]` becomes a pair of arrays,

    {'qvalue': [..., D, F] int8, 'scale': [..., 1, F] fp32}

symmetric, with one scale for each output feature. Activations, LoRA and gradients keep their
dtypes; embeddings, norms, biases and head are not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax_gen.errors import UserError

Array = jax.Array
Params = dict[str, Any]


def quantize(kernel: Array) -> dict[str, Array]:
    """The pair of a kernel `[..., D, F]`; no value changes by more than half of max |w| / 127.

    Raises UserError where qwix is not installed.
    """
    shared = kernel.ndim - 2  # D; scales are per index of all other axes
    found = import_qwix().quantize(
        kernel.astype(jnp.float32),  # a quotient in bfloat16 would be rounded twice
        jnp.int8,
        channelwise_axes=[axis for axis in range(kernel.ndim) if axis != shared],
    )
    return {"qvalue": found.qvalue, "scale": found.scale}


def quantize_kernels(params: Params) -> Params:
    """A decoder's parameters with all kernels of its layers, `[L, D, F]`, as pairs."""
    layers = {
        name: quantize(leaf) if leaf.ndim == 3 else leaf for name, leaf in params["layers"].items()
    }
    return {**params, "layers": layers}


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a decoder's parameters is a pair."""
    return isinstance(leaf, Mapping) and "qvalue" in leaf


def refuse(params: Params, what: str) -> None:
    """Raises UserError where a decoder's kernels are in int8."""
    if any(map(is_quantized, params["layers"].values())):
        raise UserError(f"cannot {what} a model whose kernels are in int8; load it without int8")


def matmul(x: Array, kernel: Array | Mapping[str, Array]) -> Array:
    """x W `[..., F]` in the dtype of `x: [..., D]`, for a kernel in int8 or not.

    The scales are applied after the product, so that a sharded kernel is gathered as int8: half the
    bytes of a product with `qvalue * scale`, for which XLA gathers the dequantised kernel.
    """
    if isinstance(kernel, Mapping):
        return (x @ kernel["qvalue"].astype(x.dtype) * kernel["scale"]).astype(x.dtype)
    return x @ kernel.astype(x.dtype)


def import_qwix() -> Any:
    """The module qwix, which only int8 needs; raises UserError where it is not installed."""
    try:
        import qwix
    except ModuleNotFoundError as error:
        if error.name != "qwix":
            raise
        raise UserError("int8 weights need qwix: pip install 'lorax-gen[int8]'") from None
    return qwix
