"""The training state: one dict, without the frozen weights.

{'step', 'key', 'params': trainables, 'stats': BatchNorm statistics, 'opt_state'}
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

State = dict[str, Any]


def init_state(
    params: Any, stats: Any, optimizer: optax.GradientTransformation, seed: int
) -> State:
    """A state at step 0. `key` is the root of all randomness; each step folds in its number."""
    return {
        "step": jnp.int32(0),
        "key": jax.random.key_data(jax.random.key(seed)),
        "params": params,
        "stats": stats,
        "opt_state": optimizer.init(params),
    }
