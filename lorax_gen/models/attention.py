"""Causal attention with grouped heads, for every family: soft-caps, windows, caches.

Dims beyond the legend (`lorax_gen.method`): T queries, S keys, K key/value heads, G = H / K,
E head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
Windows = tuple[int | None, ...]
"""Static windows, one of which applies; None: all positions up to a query's own."""
EVERYTHING = 2**30  # as a window: beyond any position


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    softcap: float | None = None,
    mask: Array | None = None,
    windows: Windows = (None,),
    which: Array | None = None,
) -> Array:
    """Attention `[B, T, H, E]` of queries `[B, T, H, E]` to keys and values `[B, S, K, E]`.

    Args:
      scale: of the scores q k.
      softcap: c; scores become c tanh(score / c) before the softmax (Gemma 2).
      mask: bool, broadcastable to `[B, 1, T, S]`; True is attended to. None: causal, S = T.
      windows, which: without a mask, see `window_of`.
    """
    window = window_of(windows, which)
    if mask is None and (window is not None or softcap is not None):
        positions = jnp.arange(q.shape[1])[None]
        mask = visible(positions, positions, window)
    if mask is None or softcap is None:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, mask=mask, is_causal=mask is None, implementation="xla"
        )
    batch, time, heads, size = q.shape
    q = q.reshape(batch, time, k.shape[2], -1, size)
    scores = jnp.einsum("btkge,bske->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = softcapped(scores * scale, softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bske->btkge", weights.astype(v.dtype), v).reshape(
        batch, time, heads, size
    )


def window_of(windows: Windows, which: Array | None) -> Array | int | None:
    """The window that applies: `windows[which]`, of scanned layers that differ a traced scalar, or
    without `which` the only one."""
    if not any(windows):
        return None
    if which is None:
        return windows[0]
    return jnp.array([window or EVERYTHING for window in windows], jnp.int32)[which]


def within(window: int | None, length: int) -> int | None:
    """The window in a sequence of static length; None where it holds all of it."""
    return None if window is None or window >= length else window


def softcapped(x: Array, cap: float | None) -> Array:
    """c tanh(x / c), which bounds x by +-c; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def visible(queries: Array, keys: Array, window: Array | int | None = None) -> Array:
    """`[B, 1, T, S]` bool: which keys at positions `[S]` or `[B, S]` queries at `[B, T]` attend to.

    All up to their own position, or the last `window` of these, their own included.
    """
    queries, keys = queries[:, None, :, None], jnp.atleast_2d(keys)[:, None, None, :]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
