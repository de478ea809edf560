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

    def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = part
        scores = logits(params, config, hidden)
        found = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        greedy = jnp.argmax(scores, axis=-1) == targets
        return found - jax.nn.logsumexp(scores, axis=-1), greedy

    rows, time = targets.shape
    if time <= chunk:
        return score((hidden, targets))

    def split(x: Array) -> Array:  # [B, T, ...] -> [chunks, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, -time % chunk)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    # Padded: the remainder of `lax.map(batch_size=chunk)` would have logits of its own beside those
    # of the loop.
    found = jax.lax.map(jax.checkpoint(score), (split(hidden), split(targets)))
    return tuple(x.swapaxes(0, 1).reshape(rows, -1)[:, :time] for x in found)
