"""The attention of forward passes: XLA's, cuDNN's flash attention, or TPU splash attention.

All have the signature of `models.attention.attend`. What a flash kernel cannot compute (`lacking`)
is known from the model, the dtype and the mesh: where the kernel was asked for by name it is a
UserError, and under `auto` the model gets `attend`. Calls with a mask, as of several texts in a
row, always get `attend`: the kernels know only causal masks and windows.

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
from lorax_gen.models.attention import Windows, attend, within
from lorax_gen.models.decoder import DecoderConfig, Execution, unconstrained

Array = jax.Array
Name = Literal["auto", "xla", "cudnn", "splash"]
AUTO: dict[str, Name] = {"tpu": "splash", "gpu": "cudnn"}  # by platform; elsewhere xla
BLOCK = 128  # splash attention works on tiles of 128 positions


def resolve(name: Name, mesh: Mesh) -> Name:
    """`auto` is `splash` on TPU, `cudnn` on GPU and `xla` elsewhere.

    Raises UserError for a kernel that does not run on the mesh's devices.
    """
    platform = mesh.devices.flat[0].platform
    if platform != {"cudnn": "gpu", "splash": "tpu"}.get(name, platform):
        raise UserError(f"attention={name} does not run on a {platform}; auto picks one that does")
    return AUTO.get(platform, "xla") if name == "auto" else name


def lacking(
    name: Name, *, size: int, kv_heads: int, softcap: float | None, dtype: Any, shards: int = 1
) -> str | None:
    """Why the flash kernel cannot compute the attention of a model; None: it can.

    Splash attention compiles for heads of any size, soft-caps and windows, cuDNN has no soft-cap.

    Args:
      size: E; kv_heads: K.
      shards: devices that the heads are split over.
    """
    if name == "splash" and jnp.dtype(dtype) == jnp.float16:
        return "does not take float16"
    if name == "splash" and kv_heads % shards:
        return f"cannot split {kv_heads} key/value heads over mesh.tensor={shards}"
    if name == "cudnn" and softcap is not None:
        return "has no soft-cap"
    if name == "cudnn" and jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"does not take {jnp.dtype(dtype)}, only bfloat16"
    # Up to 256 on Hopper, but not in the backward pass.
    if name == "cudnn" and (size > 128 or size % 8):
        return f"does not take heads of {size} features, only multiples of 8 up to 128"
    return None


def kernel_of(name: Name, mesh: Mesh, model: DecoderConfig, dtype: Any) -> tuple[Name, str | None]:
    """The kernel that a model gets on a mesh; where `auto` gives it `xla` in place of the
    platform's own, with the reason.

    Raises UserError where `name` is a kernel that cannot compute the model's attention.
    """
    kernel = resolve(name, mesh)
    reason = lacking(
        kernel,
        size=model.head_dim,
        kv_heads=model.num_key_value_heads,
        softcap=model.attn_logit_softcapping,
        dtype=dtype,
        shards=mesh.shape["tensor"],
    )
    if reason and name != "auto":
        raise UserError(refused(kernel, reason))
    return ("xla", f"{kernel} {reason}") if reason else (kernel, None)


def refused(kernel: Name, reason: str) -> str:
    return f"attention={kernel} {reason}; choose attention=auto or xla"


def make_attention(name: Name, mesh: Mesh, mode: str = "jit") -> Callable:
    """The attention by name, see `resolve`.

    `mode` is that of the mesh: under pmap each device has its own rows and all heads.
    """
    kernel = resolve(name, mesh)
    if kernel == "xla":
        return attend
    over = mesh if mode == "jit" else None
    return partial(flash, kernel=kernel, mesh=over, strict=name != "auto")


@lru_cache  # equal arguments give the same object, so that jit finds its compiled programs
def execution_over(
    mesh: Mesh, attention: Name = "auto", remat: str = "none", mode: str = "jit"
) -> Execution:
    """How forward passes run on a mesh: its attention, and hidden states kept sharded by row.

    Under pmap each device has its own rows, and nothing is constrained.
    """
    constrain = keep_rows(mesh) if mode == "jit" else unconstrained
    return Execution(make_attention(attention, mesh, mode), constrain, remat)


def flash(
    q: Array,
    k: Array,
    v: Array,
    *,
    kernel: Name,
    mesh: Mesh | None,
    strict: bool,
    scale: float,
    softcap: float | None = None,
    mask: Array | None = None,
    windows: Windows = (None,),
    which: Array | None = None,
    interpret: bool = False,
) -> Array:
    """`attend` by the flash kernel; with a mask `attend` itself, see the module's docstring.

    Layers that are scanned but have different windows choose between as many kernels by
    `lax.switch`: a window is static in a kernel. The alternative is a scan over groups of unrolled
    layers. For Gemma 2 and 3 at 2,048 positions both save the same for the backward pass, within
    0.2 % of what layers without windows save. But groups compile each of their layers, and need a
    period, which Qwen2's `max_window_layers` has not.

    Args:
      strict: what the kernel cannot compute is a UserError, not left to `attend`.
      interpret: emulates splash attention on the CPU.
    """
    if mask is not None:
        return attend(q, k, v, scale=scale, softcap=softcap, mask=mask)
    rows, shards = (1, 1) if mesh is None else (row_shards(mesh), mesh.shape["tensor"])
    reason = lacking(
        kernel,
        size=q.shape[-1],
        kv_heads=k.shape[2],
        softcap=softcap,
        dtype=q.dtype,
        shards=shards,
    )
    if kernel == "splash" and q.shape[0] % rows:  # as in the last batch of an evaluation
        reason = f"cannot split {q.shape[0]} rows over {rows} devices"
    if reason and strict:
        raise UserError(refused(kernel, reason))
    if reason:
        return attend(q, k, v, scale=scale, softcap=softcap, windows=windows, which=which)
    one: Callable = partial(cudnn, scale=scale)
    if kernel == "splash":
        one = partial(splash, mesh=mesh, scale=scale, softcap=softcap, interpret=interpret)
    windows = tuple(within(window, q.shape[1]) for window in windows)
    distinct = list(dict.fromkeys(windows))
    if which is None or len(distinct) == 1:
        return one(q, k, v, window=distinct[0])
    index = jnp.array([distinct.index(window) for window in windows], jnp.int32)[which]
    return jax.lax.switch(index, [partial(one, window=window) for window in distinct], q, k, v)


def cudnn(q: Array, k: Array, v: Array, *, scale: float, window: int | None) -> Array:
    """cuDNN's flash attention, causal: a query sees itself and the `window` - 1 before it."""
    near = None if window is None else (window - 1, 0)  # others to the left, to the right
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=near, implementation="cudnn"
    )


def splash(
    q: Array,
    k: Array,
    v: Array,
    *,
    mesh: Mesh | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    interpret: bool = False,
) -> Array:
    """Pallas splash attention under `shard_map`: rows over the batch axes, heads over `tensor`;
    without a mesh, as under pmap, on the device's own rows.

    The time axis is padded to full tiles; under the causal mask no query attends to the padding.
    """
    # Imported here because it loads Pallas.
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    time, heads = q.shape[1:3]
    padded, shards = time + -time % BLOCK, 1 if mesh is None else mesh.shape["tensor"]
    seen: Any = tpu.CausalMask((padded, padded))
    if window is not None:  # others to the left, to the right
        seen = tpu.LocalMask((padded, padded), (window - 1, 0), offset=0)
    masks = tpu.MultiHeadMask([seen] * (heads // shards))

    def run(q: Array, k: Array, v: Array) -> Array:
        kernel = tpu.make_splash_mha_single_device(
            masks, attn_logits_soft_cap=softcap, interpret=interpret
        )
        return jax.vmap(kernel)(q, k, v)

    if mesh is not None:
        spec = P(BATCH_AXES, "tensor", None, None)
        run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def tiles(x: Array) -> Array:  # [B, T, heads, E] -> [B, heads, padded, E]
        return jnp.pad(x, ((0, 0), (0, padded - time), (0, 0), (0, 0))).swapaxes(1, 2)

    return run(tiles(q * scale), tiles(k), tiles(v)).swapaxes(1, 2)[:, :time]
