"""Log-likelihoods of tokens, in training and in evaluation: logits of a few positions at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lorax_gen.models.decoder import Array, DecoderConfig, Params, logits


def score_tokens(
    params: Params, config: DecoderConfig, hidden: Array, targets: Array, *, chunk: int
) -> tuple[Array, Array]:
    """Log-likelihoods `[B, T]` fp32 of target tokens, and whether each is the argmax.

    Where there are more than `chunk` positions, that many go through the head at a time, and again
    in the backward pass: [B, chunk, V] is the most that a large vocabulary ever takes.

    Args:
      hidden: `[B, T, D]`, final-norm hidden states.
      targets: `[B, T]` int32, the token that each state should predict.
    """

    def score(hidden: Array, targets: Array) -> tuple[Array, Array]:
        scores = logits(params, config, hidden)
        found = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        greedy = jnp.argmax(scores, axis=-1) == targets
        return found - jax.nn.logsumexp(scores, axis=-1), greedy

    if hidden.shape[1] <= chunk:
        return score(hidden, targets)
    by_position = hidden.swapaxes(0, 1), targets.swapaxes(0, 1)
    found = jax.lax.map(jax.checkpoint(lambda x: score(*x)), by_position, batch_size=chunk)
    return tuple(x.swapaxes(0, 1) for x in found)
