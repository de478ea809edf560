"""The decoder: one Flax module for all families, as pure functions over parameters.

Parameters are a plain dict, layers stacked on a leading axis and scanned:

    {'embed': [V, D], 'layers': {'attn_norm': [L, D], 'q': [L, D, H*E], ...}, 'final_norm': [D]}

with `'lm_head': [D, V]` where the head is not tied to the embeddings, `'positions': [P, D]` where
positions are learned, `'project_in': [W, D]` and `'project_out': [D, W]` where embeddings are of
another width W, and biases and further norms where the config has them. Kernels are `[in, out]`, or
pairs of int8 values and scales (`models.int8`).
A family is a set of switches in `DecoderConfig`; no code asks for one by name. What adapts the
decoder comes in as an `Adapter` (`models.adapter`), how it runs as an `Execution`.

Rows are right-padded and attention is plainly causal, so nothing real ever sees padding and no
mask is needed.

Dims: B batch, T time, S cache slots, D model, F feed-forward, H heads, K key/value heads,
E head size, L layers, V vocabulary, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from lorax_gen.errors import UserError
from lorax_gen.models import int8
from lorax_gen.models.adapter import Adapter, Delta, Mlp, without_prefix
from lorax_gen.models.attention import Windows, attend, softcapped, visible, window_of, within
from lorax_gen.models.config import ACTIVATIONS, DecoderConfig, kernel_shapes
from lorax_gen.models.rope import Tables, rope_tables, rotate

Array = jax.Array
# Variance 1 / fan-in. LLaMA's fixed 0.02 is about that at its width of some thousands; in models a
# hundred wide it is far too small, and following prompts took several times the steps to appear.
INIT = nn.initializers.lecun_normal()
Params = dict[str, Any]

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def unconstrained(x: Array) -> Array:
    """The states as they are; see `Execution`."""
    return x


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a forward pass runs, whatever it computes. Static: equal ones share a compiled program.

    Attributes:
      attention: stands in for `models.attention.attend`.
      constrain: called on the states between layers, and in decoding on caches `[B, S, K, E]`, to
        say how they are sharded over a mesh.
      remat: an entry of `REMAT_POLICIES`: what the backward pass computes again.
    """

    attention: Callable = attend
    constrain: Callable = unconstrained
    remat: str = "none"


def all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: save everything but slices, here of the stacked weights."""
    return primitive.name not in ("dynamic_slice", "squeeze")


class Block(nn.Module):
    """One pre-norm transformer layer: attention, then a feed-forward network.

    `windows` are those of its kinds of layers, or of its only one.
    """

    config: DecoderConfig
    execution: Execution = Execution()
    windows: Windows = (None,)

    def linear(self, name: str) -> Callable[[Array, Delta], Array]:
        """The frozen kernel as a function, with what a `delta` adds."""
        shape = kernel_shapes(self.config)[name]
        kernel, bias = self.param(name, INIT, shape), None
        if name in self.config.biases:
            bias = self.param(f"{name}_bias", nn.initializers.zeros, shape[1:])

        def project(x: Array, delta: Delta) -> Array:
            y = int8.matmul(x, kernel)
            y = y if bias is None else y + bias.astype(x.dtype)
            added = delta(name, x)
            return y if added is None else y + added

        return project

    @nn.compact
    def __call__(
        self,
        x,
        adapter,
        key,
        rope,
        cache=None,
        positions=None,
        mask=None,
        which=None,
    ):
        """`x: [B, T, D]` -> (`[B, T, D]`, (cache, auxiliary values of the adapter)).

        `rope` is the layer's of `rope_of_layers`, or with `which`, its kind of layer, that entry of
        stacked ones. With a cache `{'k','v': [B, S, K, E]}`, new
        keys and values are written into it: at `positions: [B, T]`, where a query sees every slot
        up to its own, or, where there are none, into the first T slots of an empty one. Without
        one, `positions` and `mask` are those of `hidden_states`.
        """
        config, adapter = self.config, adapter or Adapter()
        batch, time, _ = x.shape
        heads = lambda y: y.reshape(batch, time, -1, config.head_dim)  # noqa: E731
        delta = lambda name, h: adapter.kernel(name, h, key)  # noqa: E731

        before = config.do_layer_norm_before
        h = norm(self, "attn_norm", x) if before else x
        *qkv, o = map(self.linear, "qkvo")
        q, k, v = (heads(project(h, delta)) for project in qkv)
        if config.qk_norm:
            q, k = norm(self, "q_norm", q), norm(self, "k_norm", k)
        if which is not None:
            rope = jax.tree.map(lambda tables: tables[which], rope)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            cache = {name: write(cache[name], new, positions) for name, new in (("k", k), ("v", v))}
        if cache is not None and positions is not None:
            k, v = cache["k"], cache["v"]
            mask = visible(positions, jnp.arange(k.shape[1]), window_of(self.windows, which))
        elif any(self.windows) and (positions is not None or mask is not None):
            where = jnp.arange(time)[None] if positions is None else positions
            near = visible(where, where, window_of(self.windows, which))
            mask = near if mask is None else mask & near
        attended = self.execution.attention(
            q,
            k,
            v,
            scale=(config.query_pre_attn_scalar or config.head_dim) ** -0.5,
            softcap=config.attn_logit_softcapping,
            mask=mask,
            windows=self.windows,
            which=which,
        )
        attended = o(attended.reshape(batch, time, -1), delta)
        x = x + (norm(self, "attn_post_norm", attended) if config.post_norms else attended)
        x = x if before else norm(self, "attn_norm", x)

        h = norm(self, "mlp_norm", x) if before else x
        gate = self.linear("gate") if config.mlp == "gated" else None
        up, down, act = self.linear("up"), self.linear("down"), ACTIVATIONS[config.hidden_act]

        def inner(h: Array, delta: Delta) -> Array:
            if gate is None:
                return act(up(h, delta))
            return act(gate(h, delta)) * up(h, delta)

        h, aux = adapter.feed_forward(h, Mlp(inner, down), key)
        x = x + (norm(self, "mlp_post_norm", h) if config.post_norms else h)
        x = x if before else norm(self, "mlp_norm", x)
        return self.execution.constrain(x), (cache, aux)


def write(cache: Array, new: Array, positions: Array | None) -> Array:
    """A cache `[B, S, K, E]` with `new: [B, T, K, E]` at positions `[B, T]`, or at the start."""
    new = new.astype(cache.dtype)
    if positions is None:
        return cache.at[:, : new.shape[1]].set(new)
    return cache.at[jnp.arange(new.shape[0])[:, None], positions].set(new)


class Decoder(nn.Module):
    """Token ids or embeddings to final-norm hidden states; layers scanned."""

    config: DecoderConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        tokens=None,
        *,
        embeddings=None,
        prefix=None,
        positions=None,
        mask=None,
        adapter=None,
        dropout_key=None,
    ):
        config, execution = self.config, self.execution
        d, v, width = config.hidden_size, config.vocab_size, config.embedding_size
        table = self.param("embed", nn.initializers.normal(width**-0.5), (v, width))
        if not config.tie_word_embeddings:
            self.param("lm_head", INIT, (width, v))
        project_in = None
        if width != d:
            project_in = self.param("project_in", INIT, (width, d))
            self.param("project_out", INIT, (d, width))
        learned = None
        if config.positions == "learned":
            rows = config.max_position_embeddings + config.position_offset
            learned = self.param("positions", nn.initializers.normal(d**-0.5), (rows, d))
        x = embeddings
        if x is None:
            x = scale_embeddings(projected(table[tokens], project_in), config)
        if prefix is not None:
            x, positions, mask = prepend(prefix, x, positions, mask)
        x = execution.constrain(add_positions(x, learned, config, positions))

        # One scan over what is stacked [L, ...]: layers that differ are told which kind they are.
        time, ropes = x.shape[1], rope_of_layers(config, x.shape[1], positions)
        windows = config.windows
        if positions is None:
            windows = tuple(within(window, time) for window in windows)
        each = list(zip(config.ropes, windows, strict=True))
        kinds = list(dict.fromkeys(each))
        rope, which = ropes[0], None
        if len(kinds) > 1:
            which = jnp.array([kinds.index(kind) for kind in each], jnp.int32)
            distinct = (ropes[each.index(kind)] for kind in kinds)
            rope = jax.tree.map(lambda *tables: jnp.stack(tables), *distinct)
        windows, count = tuple(window for _, window in kinds), config.num_hidden_layers
        depth = count if adapter is None else adapter.depth(count)
        keys = None if dropout_key is None else jax.random.split(dropout_key, count)
        if depth == count:
            block = Block
            if execution.remat != "none":
                policy = REMAT_POLICIES[execution.remat]
                block = nn.remat(Block, policy=policy, prevent_cse=False)
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, *[nn.broadcast] * 4, 0),
                length=count,
            )(config, execution, windows, name="layers")
            x, (_, aux) = layers(x, adapter, keys, rope, None, positions, mask, which)
        else:
            unbound = Block(config, execution, windows, parent=None)
            run = partial(scan_layers, unbound, self.variables["params"]["layers"])
            inputs = (keys, which), (rope, None, positions, mask)
            x, _ = run(x, range(count - depth), None, *inputs)
            x, aux = run(x, range(count - depth, count), adapter, *inputs)
        x = norm(self, "final_norm", x) if config.do_layer_norm_before else x
        return x if prefix is None else x[:, prefix.shape[1] :], aux


def scan_layers(
    block: Block,
    params: Params,
    x: Array,
    layers: range,
    adapter: Adapter | None,
    each: tuple[Array | None, Array | None],
    alike: tuple,
) -> tuple[Array, dict[str, Array]]:
    """Some consecutive ones of the stacked layers.

    They are indexed in the stack of all: slices `[m, ...]` of it, to scan over, would be copies of
    the weights, and so would what the backward pass keeps of them. It indexes them again.

    Args:
      block: not bound to a module.
      params: of all L layers; `each`: the keys and kinds of all of them.
      adapter: of these m layers.
      alike: the other arguments of `Block`, which all layers share.

    Returns:
      The states after them `[B, T, D]`, and auxiliary values `[m, ...]`.
    """

    def layer(x: Array, own: tuple) -> tuple[Array, dict[str, Array]]:
        index, adapter, key, which = own
        one = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), params)
        found: Any = block.apply({"params": one}, x, adapter, key, *alike, which)
        x, (_, aux) = found
        return x, aux

    policy = REMAT_POLICIES[block.execution.remat] or all_but_slices
    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    every = (jnp.arange(block.config.num_hidden_layers), *each)
    index, key, which = jax.tree.map(lambda leaf: leaf[layers.start : layers.stop], every)
    x, aux = jax.lax.scan(layer, x, (index, adapter, key, which))
    return x, aux


def prepend(
    prefix: Array, x: Array, positions: Array | None = None, mask: Array | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Embeddings `[B, S, D]` before embeddings `[B, T, D]`, whose positions and mask follow suit:
    the prefix is causal, and every token sees all of it."""
    batch, length, _ = prefix.shape
    x = jnp.concatenate([prefix.astype(x.dtype), x], axis=1)
    if positions is not None:
        own = jnp.broadcast_to(jnp.arange(length), (batch, length))
        positions = jnp.concatenate([own, positions + length], axis=1)
    if mask is not None:
        time = mask.shape[-1]
        mask = jnp.pad(mask, ((0, 0), (0, 0), (length, 0), (length, 0)))
        before = jnp.arange(length) <= jnp.arange(length + time)[:, None]
        mask = mask.at[..., :length].set(before)
    return x, positions, mask


def norm(module: Block | Decoder, name: str, x: Array) -> Array:
    """A module's norm over the last axis of `x`; its parameters are `name` and, of a LayerNorm,
    `{name}_bias`."""
    config, bias = module.config, None
    initial = nn.initializers.zeros if config.rms_norm_offset else nn.initializers.ones
    weight = module.param(name, initial, x.shape[-1:])
    if config.norm == "layer":
        bias = module.param(f"{name}_bias", nn.initializers.zeros, x.shape[-1:])
    return normalize(x, config, weight, bias)


def normalize(x: Array, config: DecoderConfig, weight: Array, bias: Array | None = None) -> Array:
    """RMSNorm or LayerNorm over the last axis, computed in fp32 and returned in `x.dtype`."""
    y = x.astype(jnp.float32)
    if config.norm == "layer":
        y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.rms_norm_eps)
    weight = weight.astype(jnp.float32)
    y *= 1.0 + weight if config.rms_norm_offset else weight
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def scale_embeddings(x: Array, config: DecoderConfig) -> Array:
    """Gemma's sqrt(D) on the input embeddings; others pass through."""
    return x * jnp.asarray(config.hidden_size**0.5, x.dtype) if config.embedding_scale else x


def projected(x: Array, kernel: Array | None) -> Array:
    """`x` itself where there is no such projection of embeddings."""
    return x if kernel is None else x @ kernel.astype(x.dtype)


def add_positions(
    x: Array, table: Array | None, config: DecoderConfig, positions: Array | None
) -> Array:
    """Embeddings `[B, T, D]` plus the rows of a learned table `[P, D]`; None: as they are.

    Without `positions` a sequence longer than the table raises UserError. Those given are not
    known yet when this is compiled: beyond the table they take its last row.
    """
    if table is None:
        return x
    if positions is None:
        if x.shape[1] > config.max_position_embeddings:
            raise UserError(
                f"a sequence of {x.shape[1]} positions, padding included, does not fit the "
                f"{config.max_position_embeddings} learned positions of the model; shorten it"
            )
        positions = jnp.arange(x.shape[1])
    rows = jnp.take(table, positions + config.position_offset, axis=0, mode="clip")
    return x + rows.astype(x.dtype)


def rope_of_layers(
    config: DecoderConfig, time: int, positions: Array | None = None
) -> list[Tables | None]:
    """For each layer the tables of `time` positions from 0, or of `positions`; equal ropes share
    them. None where positions are learned."""
    if config.positions == "learned":
        return [None] * config.num_hidden_layers
    positions = jnp.arange(time) if positions is None else positions
    tables = {rope: rope_tables(rope, config.head_dim, positions) for rope in set(config.ropes)}
    return [tables[rope] for rope in config.ropes]


# --- the decoder as pure functions ---------------------------------------------------------------


def init_params(key: Array, config: DecoderConfig) -> Params:
    """Fresh fp32 parameters. Under `jax.eval_shape`, their shapes without the memory."""
    return Decoder(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def unstack(tree: Any, layers: int) -> list:
    """A pytree stacked over layers `[L, ...]`, such as a LoRA or `params['layers']`, as L trees."""
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(layers)]


def embed(params: Params, config: DecoderConfig, tokens: ArrayLike) -> Array:
    """Input embeddings `[..., D]` of token ids `[...]`; learned positions are added later."""
    return scale_embeddings(projected(params["embed"][tokens], params.get("project_in")), config)


def hidden_states(
    params: Params,
    config: DecoderConfig,
    tokens: Array | None = None,
    *,
    embeddings: Array | None = None,
    prefix: Array | None = None,
    positions: Array | None = None,
    mask: Array | None = None,
    adapter: Adapter | None = None,
    dropout_key: Array | None = None,
    execution: Execution = Execution(),
) -> Array:
    """Final-norm hidden states `[B, T, D]` of tokens `[B, T]` or of embeddings `[B, T, D]`.

    Several texts may share a row: `positions: [B, T]` says where in its text a token stands, and
    `mask: [B, 1, T, T]` bool what a query sees, of which windows leave what is near by position.

    Args:
      prefix: `[B, S, D]`, embeddings that stand before every row and are seen by all of it, such as
        a soft prompt; no states of it are returned. An adapter may bring its own instead.
      adapter: see `models.adapter`.
      dropout_key: of the adapter's dropout; None: none.
      execution: see `Execution`.
    """
    return hidden_and_aux(
        params,
        config,
        tokens,
        embeddings=embeddings,
        prefix=prefix,
        positions=positions,
        mask=mask,
        adapter=adapter,
        dropout_key=dropout_key,
        execution=execution,
    )[0]


def hidden_and_aux(
    params: Params,
    config: DecoderConfig,
    tokens: Array | None = None,
    *,
    prefix: Array | None = None,
    adapter: Adapter | None = None,
    execution: Execution = Execution(),
    **options: Any,
) -> tuple[Array, dict[str, Array]]:
    """`hidden_states`, and the adapter's auxiliary values by name, `[L, ...]` each, of the layers
    that it adapts."""
    adapter, prefix = without_prefix(adapter, prefix)
    options |= {"adapter": adapter, "prefix": prefix}
    found: Any = Decoder(config, execution).apply({"params": params}, tokens, **options)
    return found


def final_norm(params: Params, config: DecoderConfig, x: Array) -> Array:
    """The norm after the last layer, if there is one."""
    if not config.do_layer_norm_before:
        return x
    return normalize(x, config, params["final_norm"], params.get("final_norm_bias"))


def logits(params: Params, config: DecoderConfig, hidden: Array) -> Array:
    """Next-token logits `[..., V]` in fp32 of hidden states `[..., D]`."""
    hidden = projected(hidden, params.get("project_out"))
    tied = config.tie_word_embeddings
    head = params["embed" if tied else "lm_head"].astype(hidden.dtype)
    equation = "...d,vd->...v" if tied else "...d,dv->...v"
    scores = jnp.einsum(equation, hidden, head, preferred_element_type=jnp.float32)
    return softcapped(scores, config.final_logit_softcapping)


def abstract_params(config: DecoderConfig) -> Params:
    """The parameter tree as shapes and dtypes; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))
