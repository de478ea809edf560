"""Decoding with a key/value cache: prefill, then token by token, greedily or by sampling.

Pure functions of arrays, to be jitted as one (`generate_tokens`) or as two for streaming
(`prefill`, `advance`). Layers are unrolled here, from one dict per layer: scanning over stacked
weights would copy every layer's slice for every token. `params['layers']` may be that list
(`Model.decoding_params`) or the stacked tree, which each call then unstacks.

Dims beyond the legend (`lorax_gen.method`): T prompt length, N new tokens, S cache slots and prefix
length, K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_gen.errors import UserError
from lorax_gen.models.adapter import Adapter, by_layer, prefix_length, without_prefix
from lorax_gen.models.attention import within
from lorax_gen.models.decoder import (
    Array,
    Block,
    DecoderConfig,
    Execution,
    Params,
    add_positions,
    embed,
    final_norm,
    logits,
    prepend,
    rope_of_layers,
    unstack,
)


class Sampling(NamedTuple):
    """How a token is sampled; greedy decoding has None instead.

    The values are arguments of the compiled program; it is recompiled if `top_k` or `top_p` become
    None or a value.
    """

    temperature: Any = 1.0  # above 0; logits are divided by it
    top_k: Any = None  # only the k most likely tokens
    top_p: Any = None  # of these, the fewest with this total probability


class DecodingState(NamedTuple):
    """The loop state of decoding."""

    token: Array  # [B] int32, the latest, not yet in the cache
    position: Array  # [B] int32, of that token
    finished: Array  # [B] bool; a finished row repeats its last token
    step: Array  # [] int32, tokens generated so far
    cache: list[dict[str, Array]]  # of each layer


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any) -> list[dict[str, Array]]:
    """An empty cache: for each layer `{'k','v': [B, S, K, E]}`."""
    shape = (batch, slots, config.num_key_value_heads, config.head_dim)
    return [
        {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
        for _ in range(config.num_hidden_layers)
    ]


def forward_with_cache(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    cache: list,
    adapter: Adapter | None = None,
    positions: Array | None = None,
    prefix: Array | None = None,
    execution: Execution = Execution(),
) -> tuple[Array, list]:
    """Hidden states `[B, T, D]` of tokens `[B, T]`, and the updated cache.

    The tokens are at `positions: [B, T]`, or without them at the beginning of an empty cache, after
    an optional prefix of embeddings `[B, S, D]`.
    """
    layers, count = params["layers"], config.num_hidden_layers
    layers = layers if isinstance(layers, list) else unstack(layers, count)
    x = embed(params, config, tokens)
    if prefix is not None:
        x, _, _ = prepend(prefix, x)
    x = add_positions(x, params.get("positions"), config, positions)
    ropes = rope_of_layers(config, x.shape[1], positions)
    new_cache, constrain = [], execution.constrain
    x, cache = constrain(x), jax.tree.map(constrain, cache)
    keys = x.shape[1] if positions is None else cache[0]["k"].shape[1]
    for layer, own, rope, window, slots in zip(
        layers, by_layer(adapter, count), ropes, config.windows, cache, strict=True
    ):
        block = Block(config, execution, (within(window, keys),))
        x, (slots, _) = block.apply({"params": layer}, x, own, None, rope, slots, positions)
        new_cache.append(slots)
    x = final_norm(params, config, x)
    x = x if prefix is None else x[:, prefix.shape[1] :]
    return x, jax.tree.map(constrain, new_cache)


def restrict(scores: Array, top_k: Array | None = None, top_p: Array | None = None) -> Array:
    """Logits `[..., V]` with -inf for all but the most likely tokens.

    Kept are the `top_k` most likely and of these, with renormalised probabilities, the fewest
    whose sum reaches `top_p`; at least one. Ties with the last one kept are kept too.
    """
    if top_k is None and top_p is None:
        return scores
    ordered = jnp.sort(scores, axis=-1, descending=True)
    if top_k is not None:
        ordered = jnp.where(jnp.arange(scores.shape[-1]) < top_k, ordered, -jnp.inf)
    if top_p is not None:
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        ordered = jnp.where((before < top_p) | (before == 0.0), ordered, -jnp.inf)
    last = jnp.min(ordered, axis=-1, keepdims=True, where=ordered > -jnp.inf, initial=jnp.inf)
    return jnp.where(scores >= last, scores, -jnp.inf)


def choose(scores: Array, sampling: Sampling | None, key: Array | None, step: Array) -> Array:
    """The next tokens `[B]` int32 from logits `[B, V]`; each row is sampled independently.

    Raises UserError for sampling without a key.
    """
    if sampling is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if key is None:
        raise UserError("sampling needs a key; pass key=jax.random.key(0), or no sampling")
    scores = restrict(scores / sampling.temperature, sampling.top_k, sampling.top_p)
    key = jax.random.fold_in(key, step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(scores.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def prefill(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    lengths: Array,
    *,
    slots: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    key: Array | None = None,
    adapter: Adapter | None = None,
    prefix: Array | None = None,
    execution: Execution = Execution(),
) -> DecodingState:
    """Fills the cache with prompts and chooses the first new token of each; see `generate_tokens`.

    Args:
      slots: S, for prefix, prompt and new tokens together.
      execution: decoding uses only its `constrain`.
    """
    batch, _ = tokens.shape
    adapter, prefix = without_prefix(adapter, prefix)
    before = 0 if prefix is None else prefix.shape[1]
    cache = init_cache(config, batch, slots, params["embed"].dtype)
    # Padding fills cache slots too, but a row's new tokens overwrite them before any query attends
    # to them.
    hidden, cache = forward_with_cache(
        params, config, tokens, cache, adapter, prefix=prefix, execution=execution
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token = choose(logits(params, config, last), sampling, key, jnp.int32(0))
    ended = is_stop(token, stop_ids)
    return DecodingState(token, lengths + before, ended, jnp.int32(1), cache)


def advance(
    params: Params,
    config: DecoderConfig,
    state: DecodingState,
    *,
    steps: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    key: Array | None = None,
    adapter: Adapter | None = None,
    execution: Execution = Execution(),
) -> tuple[DecodingState, Array]:
    """Up to `steps` more tokens `[B, steps]`; stops early when all rows are finished.

    Finished rows repeat their last token, up to `steps` tokens.
    """
    adapter, _ = without_prefix(adapter)  # it is in the cache

    if steps == 0:
        return state, jnp.zeros((state.token.shape[0], 0), jnp.int32)

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.finished)

    def step(carry):
        i, state, out = carry
        hidden, cache = forward_with_cache(
            params,
            config,
            state.token[:, None],
            state.cache,
            adapter,
            state.position[:, None],
            execution=execution,
        )
        token = choose(logits(params, config, hidden[:, 0]), sampling, key, state.step)
        token = jnp.where(state.finished, state.token, token)
        state = DecodingState(
            token=token,
            position=state.position + 1,
            finished=state.finished | is_stop(token, stop_ids),
            step=state.step + 1,
            cache=cache,
        )
        return i + 1, state, out.at[:, i].set(token)

    out = jnp.zeros((state.token.shape[0], steps), jnp.int32)
    i, state, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, out))
    return state, jnp.where(jnp.arange(steps) < i, out, state.token[:, None])


def is_stop(token: Array, stop_ids: Sequence[int]) -> Array:
    """Whether each of `token: [B]` ends its row."""
    return jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "stop_ids"))
def generate_tokens(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    lengths: Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    sampling: Sampling | None = None,
    key: Array | None = None,
    adapter: Adapter | None = None,
    prefix: Array | None = None,
) -> Array:
    """Continues prompts token by token, in one program.

    Args:
      tokens: `[B, T]` int32, right-padded; `lengths: [B]` int32, each at least 1.
      max_new_tokens: N; the cache has slots for the prefix, the prompt and these.
      stop_ids: tokens that end a row.
      sampling: None is greedy; otherwise `key` is the root of all randomness.
      adapter, prefix: see `decoder.hidden_states`.

    Returns:
      `[B, N]` int32; a row's stop token is repeated after it. Stops once all rows are finished.
    """
    options: dict[str, Any]
    options = {"stop_ids": stop_ids, "sampling": sampling, "key": key, "adapter": adapter}
    slots = tokens.shape[1] + max_new_tokens + prefix_length(adapter)
    slots += 0 if prefix is None else prefix.shape[1]
    state = prefill(params, config, tokens, lengths, slots=slots, prefix=prefix, **options)
    first = state.token[:, None]
    _, rest = advance(params, config, state, steps=max_new_tokens - 1, **options)
    return jnp.concatenate([first, rest], axis=1)
