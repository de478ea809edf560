"""Greedy decoding with a key/value cache.

Layers are unrolled here, from one dict per layer: scanning over stacked weights would copy every
layer's slice for every token. `unstack` makes the per-layer form once.

Dimensions: B batch, T prompt length, N new tokens, S cache slots, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lorax_gen.models.decoder import (
    Array,
    Block,
    DecoderConfig,
    Params,
    embed,
    logits,
    rms_norm,
    rope_tables,
)
from lorax_gen.models.huggingface import Model


def unstack(tree: Mapping | None, layers: int) -> list:
    """A tree stacked over layers `[L, ...]` as a list of L trees (a LoRA or `params['layers']`)."""
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(layers)]


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype) -> list[dict[str, Array]]:
    """An empty cache: for each layer `{'k','v': [B, S, K, E]}`."""
    shape = (batch, slots, config.num_key_value_heads, config.head_dim)
    return [
        {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
        for _ in range(config.num_hidden_layers)
    ]


def forward_with_cache(
    params: Params, layers: list, config: DecoderConfig, tokens, positions, cache, lora: list
) -> tuple[Array, list]:
    """Hidden states `[B, T, D]` of tokens at `positions` `[B, T]`, and the extended cache."""
    x = embed(params, config, tokens)
    rope = rope_tables(config, positions)
    new_cache = []
    for layer, pair, slots in zip(layers, lora, cache, strict=True):
        x, slots = Block(config).apply({"params": layer}, x, pair, None, rope, slots, positions)
        new_cache.append(slots)
    return rms_norm(x, params["final_norm"], config), new_cache


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "eos_id"))
def greedy(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    lengths: Array,
    *,
    max_new_tokens: int,
    eos_id: int,
    lora: Mapping | None = None,
) -> Array:
    """The most likely continuation, token by token.

    Args:
      tokens: `[B, T]` int32, right-padded; `lengths: [B]` int32, each at least 1.
      max_new_tokens: N; the cache holds T + N slots.
      lora: a LoRA tree for the whole batch or per example, or None.

    Returns:
      `[B, N]` int32; what follows a row's first `eos_id` is `eos_id` as well. Stops as soon as
      every row has ended.
    """
    batch, time = tokens.shape
    layers = unstack(params["layers"], config.num_hidden_layers)
    lora = unstack(lora, config.num_hidden_layers)
    cache = init_cache(config, batch, time + max_new_tokens, params["embed"].dtype)
    # Padding writes cache slots too, but a row's own new tokens overwrite them before any query
    # can see that far.
    positions = jnp.broadcast_to(jnp.arange(time), tokens.shape)
    hidden, cache = forward_with_cache(params, layers, config, tokens, positions, cache, lora)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    first = jnp.argmax(logits(params, config, last)[:, 0], axis=-1).astype(jnp.int32)

    def unfinished(carry):
        step, token, *_ = carry
        return (step < max_new_tokens) & jnp.any(token != eos_id)

    def advance(carry):
        step, token, out, cache = carry
        hidden, cache = forward_with_cache(
            params, layers, config, token[:, None], (lengths + step - 1)[:, None], cache, lora
        )
        following = jnp.argmax(logits(params, config, hidden)[:, 0], axis=-1).astype(jnp.int32)
        following = jnp.where(token == eos_id, eos_id, following)
        return step + 1, following, out.at[:, step].set(following), cache

    out = jnp.full((batch, max_new_tokens), eos_id, jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(unfinished, advance, (jnp.int32(1), first, out, cache))[2]


def generate_text(
    model: Model, texts: Sequence[str], *, max_new_tokens: int = 16, lora: Mapping | None = None
) -> list[str]:
    """Greedy continuations of texts, all in one batch, without special tokens."""
    rows = [model.tokenizer(text)["input_ids"] for text in texts]
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    made = greedy(
        model.params,
        model.config,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        max_new_tokens=max_new_tokens,
        eos_id=model.tokenizer.eos_token_id,
        lora=lora,
    )
    return model.tokenizer.batch_decode(np.asarray(made), skip_special_tokens=True)
