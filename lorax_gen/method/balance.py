"""The balance loss that keeps all experts in use (eq. 9), and two ways to watch the gates.

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
