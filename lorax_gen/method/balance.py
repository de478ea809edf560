"""The balance loss that keeps all experts in use (eq. 9), and three metrics of the gates."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lorax_gen.method.explicit import shards

Array = jax.Array


def balance_loss(gates: Array, coefficient: float = 0.01, axis_name: str | None = None) -> Array:
    """Eq. 9: c (sigma / mu)^2 of the experts' importance, per layer, then the mean over layers.

    An expert's importance is the sum of its gates over the global batch; sigma is the population
    standard deviation over the N experts. The coefficient is included: eq. 10 adds the result.

    Args:
      gates: `[B, L, N]`, after top-K.
      axis_name: the mapped axis that the batch is sharded over (under pmap), else None.

    Returns:
      fp32 scalar.
    """
    importance = gates.astype(jnp.float32).sum(0)  # [L, N]
    if axis_name is not None:
        importance = jax.lax.psum(importance, axis_name)
    squared_cv = importance.var(-1) / jnp.square(importance.mean(-1))
    return coefficient * squared_cv.mean()


def gate_entropy(gates: Array) -> Array:
    """Mean entropy in nats of gate rows `[..., N]`: 0 if one-hot, log N if uniform."""
    return jax.scipy.special.entr(gates).sum(-1).mean()


def expert_load(gates: Array) -> Array:
    """Each expert's share of the gate mass: `[B, L, N] -> [L, N]`, rows sum to 1."""
    return gates.mean(0)


@shards(lambda gates, *_, **__: P())
def gate_distance(gates: Array, axis_name: str | None = None) -> Array:
    """How differently prompts are routed: 0 if all have equal gates, 1 if no two share an expert.

    The mean over layers and pairs of prompts of the total variation between their gates, half of
    sum_n |g_in - g_jn|. Sorted along the batch, the i-th value of an expert is the larger one of
    i pairs and the smaller one of B - 1 - i, so a sort replaces the sum over pairs.

    Args:
      gates: `[B, L, N]`, rows summing to 1.
      axis_name: the mapped axis that the batch is sharded over (under pmap), else None.

    Returns:
      fp32 scalar; 0 for a single prompt.
    """
    gates = jax.lax.stop_gradient(gates.astype(jnp.float32))
    if axis_name is not None:
        gates = jax.lax.all_gather(gates, axis_name, tiled=True)
    count = gates.shape[0]
    signs = 2 * jnp.arange(count, dtype=jnp.float32) - (count - 1)  # pairs as larger - as smaller
    total = jnp.sum(signs[:, None, None] * jnp.sort(gates, axis=0)) / gates.shape[1]
    return total / max(count * (count - 1), 1)  # half of it, over count (count - 1) / 2 pairs
