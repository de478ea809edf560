"""Meta tokens: L trainable embeddings after the prompt, one for each layer of the edge model.

Rows are right-padded, and each row's meta tokens directly follow its last real token. Under a
causal mask no real token then attends to padding, so no padding mask is needed.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lorax_gen.method.explicit import shards

Array = jax.Array


def init_meta_tokens(
    key: Array,
    embedding: Array,
    layers: int,
    sharing: Literal["per_layer", "shared"] = "per_layer",
    noise: float = 0.02,
) -> Array:
    """One existing embedding `[D]` plus Gaussian noise: like inputs that the cloud was trained on.

    Returns:
      fp32 `[L, D]`, or `[1, D]` when all layers share one vector.
    """
    rows = layers if sharing == "per_layer" else 1
    perturbation = noise * jax.random.normal(key, (rows, embedding.shape[-1]), jnp.float32)
    return embedding.astype(jnp.float32) + perturbation


@shards(lambda embeddings, *_, **__: P(embeddings[0], None, embeddings[2]))
def insert_meta_tokens(embeddings: Array, lengths: Array, meta: Array, layers: int) -> Array:
    """Writes the meta tokens to positions `length .. length + L - 1` of every row.

    Args:
      embeddings: `[B, T, D]`, right-padded; the padding may have any values, since what
        remains of it is after the meta tokens.
      lengths: `[B]` int32, real tokens per row, at most T.
      meta: `[L, D]` or `[1, D]`.

    Returns:
      `[B, T + L, D]` in the dtype of `embeddings`.
    """
    block = jnp.broadcast_to(meta, (layers, meta.shape[-1])).astype(embeddings.dtype)
    padded = jnp.pad(embeddings, ((0, 0), (0, layers), (0, 0)))

    def insert_row(row: Array, length: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, block, length, axis=0)

    return jax.vmap(insert_row)(padded, lengths)


@shards(lambda hidden, *_, **__: P(hidden[0], None, hidden[2]))
def read_meta_states(hidden: Array, lengths: Array, layers: int) -> Array:
    """The states T^1 .. T^L at the meta positions: `[B, T + L, D] -> [B, L, D]`."""

    def read_row(row: Array, length: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(row, length, layers, axis=0)

    return jax.vmap(read_row)(hidden, lengths)
