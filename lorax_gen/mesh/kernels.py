"""The attention of forward passes: XLA's, cuDNN's flash attention, or TPU splash attention.

All have the signature of `models.attention.attend`, to which the flash kernels fall back for what
they do not support: soft-caps, windows, and head sizes or numbers of rows that do not fit.

Dims beyond the legend (`lorax_gen.method`): K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lorax_gen.errors import UserError
from lorax_gen.mesh.sharding import BATCH_AXES, keep_rows, row_shards
from lorax_gen.models.attention import attend
from lorax_gen.models.decoder import Execution, unconstrained

Array = jax.Array
Name = Literal["auto", "xla", "cudnn", "splash"]
AUTO: dict[str, Name] = {"tpu": "splash", "gpu": "cudnn"}  # by platform; elsewhere xla
BLOCK = 128  # splash attention works on tiles of 128 positions and 128 features


def make_attention(name: Name, mesh: Mesh, mode: str = "jit") -> Callable:
    """The attention by name; `auto` is `splash` on TPU, `cudnn` on GPU and `xla` elsewhere.

    `mode` is that of the mesh: under pmap each device has its own rows and all heads.

    Raises UserError for a kernel that does not run on the mesh's devices.
    """
    platform = mesh.devices.flat[0].platform
    if platform != {"cudnn": "gpu", "splash": "tpu"}.get(name, platform):
        raise UserError(f"attention={name} does not run on a {platform}; auto picks one that does")
    if name == "auto":
        name = AUTO.get(platform, "xla")
    over = mesh if mode == "jit" else None
    every: dict[str, Callable]
    every = {"xla": attend, "cudnn": cudnn, "splash": partial(splash, mesh=over)}
    return every[name]


@lru_cache  # equal arguments give the same object, so that jit finds its compiled programs
def execution_over(
    mesh: Mesh, attention: Name = "auto", remat: str = "none", mode: str = "jit"
) -> Execution:
    """How forward passes run on a mesh: its attention, and hidden states kept sharded by row.

    Under pmap each device has its own rows, and nothing is constrained.
    """
    constrain = keep_rows(mesh) if mode == "jit" else unconstrained
    return Execution(make_attention(attention, mesh, mode), constrain, remat)


def cudnn(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """cuDNN's flash attention, for 16-bit heads of up to 128 features (256 on Hopper, but not in
    the backward pass)."""
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    return attend(q, k, v, implementation="cudnn" if fits else "xla", **options)


def splash(
    q: Array,
    k: Array,
    v: Array,
    *,
    mesh: Mesh | None,
    scale: float,
    softcap: float | None = None,
    mask: Array | None = None,
) -> Array:
    """Pallas splash attention under `shard_map`: rows over the batch axes, heads over `tensor`;
    without a mesh, as under pmap, on the device's own rows.

    The time axis is padded to full tiles; under the causal mask no query attends to the padding.
    """
    batch, time, heads, size = q.shape
    rows, shards = (1, 1) if mesh is None else (row_shards(mesh), mesh.shape["tensor"])
    fits = size % BLOCK == 0 and k.shape[2] % shards == 0 and batch % rows == 0
    if mask is not None or softcap is not None or not fits:
        return attend(q, k, v, scale=scale, softcap=softcap, mask=mask)
    # Imported here because it loads Pallas.
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    padded = time + -time % BLOCK
    causal = tpu.MultiHeadMask([tpu.CausalMask((padded, padded))] * (heads // shards))

    def run(q: Array, k: Array, v: Array) -> Array:
        kernel = tpu.make_splash_mha_single_device(causal)
        return jax.vmap(kernel)(q, k, v)

    if mesh is not None:
        spec = P(BATCH_AXES, "tensor", None, None)
        run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def tiles(x: Array) -> Array:  # [B, T, heads, E] -> [B, heads, padded, E]
        return jnp.pad(x, ((0, 0), (0, padded - time), (0, 0), (0, 0))).swapaxes(1, 2)

    return run(tiles(q * scale), tiles(k), tiles(v)).swapaxes(1, 2)[:, :time]
