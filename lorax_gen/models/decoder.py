"""The decoder: one Flax module for LLaMA, Gemma, Gemma 2 and Qwen2, as pure functions over params.

Parameters are a plain dict, layers stacked on a leading axis and scanned:

    {'embed': [V, D], 'layers': {'attn_norm': [L, D], 'q': [L, D, H*E], ...}, 'final_norm': [D]}

with `'lm_head': [D, V]` where the head is not tied to the embeddings. Kernels are `[in, out]`, or
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
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorax_gen.errors import UserError
from lorax_gen.models import int8
from lorax_gen.models.adapter import Adapter, Delta
from lorax_gen.models.attention import attend, softcapped, visible

Array = jax.Array
# Variance 1 / fan-in. LLaMA's fixed 0.02 is about that at its width of some thousands; in models a
# hundred wide it is far too small, and following prompts took several times the steps to appear.
INIT = nn.initializers.lecun_normal()
Params = dict[str, Any]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched to longer texts, `rope_type: llama3` (LLaMA 3.1 and later)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, in the field names of Hugging Face's `config.json` where it has them.

    The switches below `hidden_act` are what families differ in; their defaults are LLaMA's.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    biases: tuple[str, ...] = ()
    """Kernels that a bias is added to (Qwen2: q, k and v)."""
    rms_norm_offset: bool = False
    """Norms multiply by 1 + weight (Gemma)."""
    embedding_scale: bool = False
    """Input embeddings are multiplied by sqrt(D) (Gemma)."""
    post_norms: bool = False
    """Norms after attention and feed-forward as well as before (Gemma 2)."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by its root; None: head_dim (Gemma 2)."""
    attn_logit_softcapping: float | None = None
    """Scores stay within this, by tanh (Gemma 2)."""
    final_logit_softcapping: float | None = None
    """Logits stay within this, by tanh (Gemma 2)."""
    sliding_window: int | None = None
    """Positions that a `sliding_attention` layer sees, its own among them (Gemma 2, Qwen2)."""
    layer_types: tuple[str, ...] = ()
    """`sliding_attention` or `full_attention` for each layer; empty: all full."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.default is dataclasses.MISSING and getattr(self, field.name) < 1:
                raise UserError(f"{field.name}={getattr(self, field.name)}; expected 1 or more")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; grouped attention needs one"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; rotary embeddings need it even")
        if unknown := set(self.biases) - set(kernel_shapes(self)):
            raise UserError(
                f"biases names {min(unknown)!r}; the kernels are {[*kernel_shapes(self)]}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"unknown hidden_act {self.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}"
            )
        unknown = set(self.layer_types) - {"sliding_attention", "full_attention"}
        if unknown or len(self.layer_types) not in (0, self.num_hidden_layers):
            raise UserError(
                f"layer_types has {len(self.layer_types)} entries {sorted(set(self.layer_types))}; "
                f"expected sliding_attention or full_attention for {self.num_hidden_layers} layers"
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise UserError("layer_types has sliding_attention, but there is no sliding_window")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer the positions that a query sees; None: all before it."""
        types = self.layer_types or ("full_attention",) * self.num_hidden_layers
        return tuple(self.sliding_window if t == "sliding_attention" else None for t in types)


def kernel_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """`{name: (d_in, d_out)}` of one layer's kernels: what a LoRA of this decoder can sit on."""
    d, f = config.hidden_size, config.intermediate_size
    h = config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    return {
        "q": (d, h), "k": (d, k), "v": (d, k), "o": (h, d),
        "gate": (d, f), "up": (d, f), "down": (f, d),
    }  # fmt: skip


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """`[E/2]` fp32: angles per position of rotary embeddings."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    # Rounded where torch rounds: at position 100,000 a last bit is an angle of 0.01.
    frequencies = np.float32(1) / (config.rope_theta**exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Turns over the original context: many are kept, few are slowed by `factor`, blended between.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (frequencies * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def rope_tables(config: DecoderConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines `[..., T, 1, E/2]` (fp32) of rotary embeddings at integer positions."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotary embedding of `x: [B, T, heads, E]`, halves paired as in Hugging Face's LLaMA."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


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


class Block(nn.Module):
    """One pre-norm transformer layer: attention, then a gated feed-forward network."""

    config: DecoderConfig
    execution: Execution = Execution()

    def norm(self, name: str, x: Array) -> Array:
        initial = nn.initializers.zeros if self.config.rms_norm_offset else nn.initializers.ones
        weight = self.param(name, initial, (x.shape[-1],)).astype(jnp.float32)
        return rms_norm(x, weight, self.config)

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
    def __call__(self, x, adapter, key, rope, window=None, cache=None, positions=None, mask=None):
        """`x: [B, T, D]` -> (`[B, T, D]`, (cache, auxiliary losses of the adapter)).

        `window` limits the positions that a query sees. With a cache `{'k','v': [B, S, K, E]}`, new
        keys and values are written into it: at `positions: [B, T]`, where a query sees every slot
        up to its own, or, where there are none, into the first T slots of an empty one. Without
        one, `positions` and `mask` are those of `hidden_states`.
        """
        config, adapter = self.config, adapter or Adapter()
        batch, time, _ = x.shape
        heads = lambda y: y.reshape(batch, time, -1, config.head_dim)  # noqa: E731
        delta = lambda name, h: adapter.kernel(name, h, key)  # noqa: E731

        h = self.norm("attn_norm", x)
        q, k, v, o = map(self.linear, "qkvo")
        q, k = rotate(heads(q(h, delta)), rope), rotate(heads(k(h, delta)), rope)
        v = heads(v(h, delta))
        if cache is not None:
            cache = {name: write(cache[name], new, positions) for name, new in (("k", k), ("v", v))}
        if cache is not None and positions is not None:
            k, v = cache["k"], cache["v"]
            mask = visible(positions, jnp.arange(k.shape[1]), window)
        elif window is not None:
            where = jnp.arange(time)[None] if positions is None else positions
            near = visible(where, where, window)
            mask = near if mask is None else mask & near
        attended = self.execution.attention(
            q,
            k,
            v,
            scale=(config.query_pre_attn_scalar or config.head_dim) ** -0.5,
            softcap=config.attn_logit_softcapping,
            mask=mask,
        )
        attended = o(attended.reshape(batch, time, -1), delta)
        x = x + (self.norm("attn_post_norm", attended) if config.post_norms else attended)

        h = self.norm("mlp_norm", x)
        gate, up, down = map(self.linear, ("gate", "up", "down"))

        def mlp(h: Array, delta: Delta) -> Array:
            return down(ACTIVATIONS[config.hidden_act](gate(h, delta)) * up(h, delta), delta)

        h, aux = adapter.feed_forward(h, mlp, key)
        x = x + (self.norm("mlp_post_norm", h) if config.post_norms else h)
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
        d, v = config.hidden_size, config.vocab_size
        table = self.param("embed", nn.initializers.normal(d**-0.5), (v, d))
        if not config.tie_word_embeddings:
            self.param("lm_head", INIT, (d, v))
        x = scale_embeddings(table[tokens], config) if embeddings is None else embeddings
        if prefix is not None:
            x, positions, mask = prepend(prefix, x, positions, mask)
        x = execution.constrain(x)

        block = Block
        if execution.remat != "none":
            policy = REMAT_POLICIES[execution.remat]
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, 0, *[nn.broadcast] * 3),
            length=config.num_hidden_layers,
        )(config, execution, name="layers")
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, config.num_hidden_layers)
        windows = None
        if any(config.windows):  # scanned, so layers without one get one that holds everything
            windows = jnp.array([window or x.shape[1] for window in config.windows], jnp.int32)
        rope = rope_tables(config, jnp.arange(x.shape[1]) if positions is None else positions)
        x, (_, aux) = layers(x, adapter, keys, rope, windows, None, positions, mask)

        initial = nn.initializers.zeros if config.rms_norm_offset else nn.initializers.ones
        x = rms_norm(x, self.param("final_norm", initial, (d,)), config)
        return x if prefix is None else x[:, prefix.shape[1] :], aux


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


def rms_norm(x: Array, weight: Array, config: DecoderConfig) -> Array:
    """RMSNorm over the last axis, computed in fp32 and returned in `x.dtype`."""
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.rms_norm_eps)
    weight = weight.astype(jnp.float32)
    return (y * (1.0 + weight if config.rms_norm_offset else weight)).astype(x.dtype)


def scale_embeddings(x: Array, config: DecoderConfig) -> Array:
    """Gemma's sqrt(D) on the input embeddings; others pass through."""
    return x * jnp.asarray(config.hidden_size**0.5, x.dtype) if config.embedding_scale else x


# --- the decoder as pure functions ---------------------------------------------------------------


def init_params(key: Array, config: DecoderConfig) -> Params:
    """Fresh fp32 parameters. Under `jax.eval_shape`, their shapes without the memory."""
    return Decoder(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def unstack(tree: Mapping | None, layers: int) -> list:
    """A tree stacked over layers `[L, ...]` as a list of L trees (a LoRA or `params['layers']`)."""
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(layers)]


def embed(params: Params, config: DecoderConfig, tokens: Array) -> Array:
    """Input embeddings `[..., D]` of token ids `[...]`, as the first layer wants them."""
    return scale_embeddings(params["embed"][tokens], config)


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
        a soft prompt; no states of it are returned.
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
    execution: Execution = Execution(),
    **options: Any,
) -> tuple[Array, dict[str, Array]]:
    """`hidden_states`, and the adapter's auxiliary losses by name, `[L]` each."""
    return Decoder(config, execution).apply({"params": params}, tokens, **options)


def logits(params: Params, config: DecoderConfig, hidden: Array) -> Array:
    """Next-token logits `[..., V]` in fp32 of hidden states `[..., D]`."""
    tied = config.tie_word_embeddings
    head = params["embed" if tied else "lm_head"].astype(hidden.dtype)
    equation = "...d,vd->...v" if tied else "...d,dv->...v"
    scores = jnp.einsum(equation, hidden, head, preferred_element_type=jnp.float32)
    return softcapped(scores, config.final_logit_softcapping)


def abstract_params(config: DecoderConfig) -> Params:
    """The parameter tree as shapes and dtypes; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))
