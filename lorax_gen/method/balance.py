"""The balance loss that keeps all experts in use (eq. 9), and three ways to watch the gates.

Dims: B batch, L edge layers, N experts.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def balance_loss(gates: Array, coefficient: float = 0.01, axis_name: str | None = None) -> Array:
    """Eq. 9: c (sigma / mu)^2 of the experts' importance, per layer, then the mean over layers.

    An expert's importance is the sum of its gates over the global batch; sigma is the population
    standard deviation over the N experts. The coefficient is inside: eq. 10 adds this as it is.

    Args:
      gates: `[B, L, N]`, after top-K.
      axis_name: the mapped axis over which shards of the batch lie (under pmap), else None.

    Returns:
      fp32 scalar.
    """
    importance = gates.astype(jnp.float32).sum(0)  # [L, N]
    if axis_name is not None:
        importance = jax.lax.psum(importance, axis_name)
    squared_cv = importance.var(-1) / jnp.square(importance.mean(-1))
    return coefficient * squared_cv.mean()


def gate_entropy(gates: Array) -> Array:
    """Mean entropy in nats of gate rows `[..., N]`: 0 for one expert, log N for all alike."""
    return jax.scipy.special.entr(gates).sum(-1).mean()


def expert_load(gates: Array) -> Array:
    """Each expert's share of the gate mass: `[B, L, N] -> [L, N]`, rows sum to 1."""
    return gates.mean(0)


def gate_distance(gates: Array, axis_name: str | None = None) -> Array:
    """How differently prompts are routed: 0 if all alike, 1 if no two share an expert.

    The mean over layers and pairs of prompts of the total variation between their gates, half of
    sum_n |g_in - g_jn|. Sorted along the batch, the i-th value of an expert is the larger one of
    i pairs and the smaller one of B - 1 - i, so no pair is looked at.

    Args:
      gates: `[B, L, N]`, rows summing to 1.
      axis_name: the mapped axis over which shards of the batch lie (under pmap), else None.

    Returns:
      fp32 scalar; 0 for a single prompt.
    """
    gates = jax.lax.stop_gradient(gates.astype(jnp.float32))
    if axis_name is not None:
        gates = jax.lax.all_gather(gates, axis_name, tiled=True)
    count = gates.shape[0]
    times = 2 * jnp.arange(count, dtype=jnp.float32) - (count - 1)  # as the larger - the smaller
    apart = jnp.sum(times[:, None, None] * jnp.sort(gates, axis=0)) / gates.shape[1]
    return apart / max(count * (count - 1), 1)  # half of it, over count (count - 1) / 2 pairs
