"""The decoder: one Flax module for every model family, written as pure functions over parameters.

Parameters are a plain dict, layers stacked on a leading axis and scanned:

    {'embed': [V, D], 'layers': {'attn_norm': [L, D], 'q': [L, D, H*E], ...}, 'final_norm': [D]}

with `'lm_head': [D, V]` where the head is not tied to the embeddings. Kernels are `[in, out]`.
Any kernel takes an optional LoRA pair (see `lorax_gen.method.lora`): one for the whole batch,
`[L, D, R]`, or one per example, `[L, B, D, R]`.

Rows are right-padded and attention is plainly causal, so nothing real ever sees padding and no
mask is needed.

Dimensions: B batch, T time, S cache slots, D model, F feed-forward, H heads, K key/value heads,
E head size, L layers, V vocabulary, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorax_gen.errors import UserError
from lorax_gen.method.lora import apply_lora

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
class DecoderConfig:
    """The shape of a decoder, in the field names of Hugging Face's `config.json`.

    `rms_norm_offset` (Gemma) multiplies by 1 + weight; `embedding_scale` (Gemma) multiplies the
    input embeddings by sqrt(D); `attention_bias` (Qwen2) adds biases to q, k and v.
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
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    attention_bias: bool = False
    rms_norm_offset: bool = False
    embedding_scale: bool = False

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; grouped attention needs one"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; rotary embeddings need it even")
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"unknown hidden_act {self.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}"
            )


def kernel_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """`{name: (d_in, d_out)}` of one layer's kernels: what a LoRA of this decoder can sit on."""
    d, f = config.hidden_size, config.intermediate_size
    h = config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    return {
        "q": (d, h), "k": (d, k), "v": (d, k), "o": (h, d),
        "gate": (d, f), "up": (d, f), "down": (f, d),
    }  # fmt: skip


def rope_tables(config: DecoderConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines `[..., T, 1, E/2]` (fp32) of rotary embeddings at integer positions."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[..., None].astype(jnp.float32) * config.rope_theta**-exponents
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotary embedding of `x: [B, T, heads, E]`, halves paired as in Hugging Face's LLaMA."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def lora_dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout on the input of a LoRA branch; the frozen branch sees `x` itself."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


class Block(nn.Module):
    """One pre-norm transformer layer: attention, then a gated feed-forward network."""

    config: DecoderConfig
    dropout: float = 0.0

    def norm(self, name: str, x: Array) -> Array:
        initial = nn.initializers.zeros if self.config.rms_norm_offset else nn.initializers.ones
        weight = self.param(name, initial, (x.shape[-1],)).astype(jnp.float32)
        return rms_norm(x, weight, self.config)

    def project(self, name: str, x: Array, lora: Mapping, key: Array | None) -> Array:
        shape = kernel_shapes(self.config)[name]
        y = x @ self.param(name, INIT, shape).astype(x.dtype)
        if self.config.attention_bias and name in ("q", "k", "v"):
            y += self.param(f"{name}_bias", nn.initializers.zeros, shape[1:]).astype(x.dtype)
        if name in lora:
            if key is not None:
                key = jax.random.fold_in(key, sorted(lora).index(name))
            y += apply_lora(lora_dropout(x, self.dropout, key), lora[name])
        return y

    @nn.compact
    def __call__(self, x, lora, key, rope, cache=None, positions=None):
        """`x: [B, T, D]` -> (`[B, T, D]`, cache).

        With a cache `{'k','v': [B, S, K, E]}`, the new keys and values are written at `positions`
        `[B, T]` and a query sees every slot up to its own position.
        """
        config, lora = self.config, lora or {}
        batch, time, _ = x.shape
        heads = lambda y: y.reshape(batch, time, -1, config.head_dim)  # noqa: E731

        h = self.norm("attn_norm", x)
        q = rotate(heads(self.project("q", h, lora, key)), rope)
        k = rotate(heads(self.project("k", h, lora, key)), rope)
        v = heads(self.project("v", h, lora, key))
        if cache is None:
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            rows = jnp.arange(batch)[:, None]
            cache = {
                "k": cache["k"].at[rows, positions].set(k),
                "v": cache["v"].at[rows, positions].set(v),
            }
            visible = jnp.arange(cache["k"].shape[1]) <= positions[:, None, :, None]
            attended = jax.nn.dot_product_attention(q, cache["k"], cache["v"], mask=visible)
        x = x + self.project("o", attended.reshape(batch, time, -1), lora, key)

        h = self.norm("mlp_norm", x)
        gate = ACTIVATIONS[config.hidden_act](self.project("gate", h, lora, key))
        up = self.project("up", h, lora, key)
        return x + self.project("down", gate * up, lora, key), cache


class Decoder(nn.Module):
    """Token ids or embeddings to final-norm hidden states; layers scanned."""

    config: DecoderConfig
    remat: str = "none"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens=None, *, embeddings=None, lora=None, dropout_key=None):
        config = self.config
        d, v = config.hidden_size, config.vocab_size
        table = self.param("embed", nn.initializers.normal(d**-0.5), (v, d))
        if not config.tie_word_embeddings:
            self.param("lm_head", INIT, (d, v))
        x = scale_embeddings(table[tokens], config) if embeddings is None else embeddings

        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=config.num_hidden_layers,
        )(config, self.dropout, name="layers")
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, config.num_hidden_layers)
        x, _ = layers(x, lora or None, keys, rope_tables(config, jnp.arange(x.shape[1])))

        initial = nn.initializers.zeros if config.rms_norm_offset else nn.initializers.ones
        return rms_norm(x, self.param("final_norm", initial, (d,)), config)


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


def embed(params: Params, config: DecoderConfig, tokens: Array) -> Array:
    """Input embeddings `[..., D]` of token ids `[...]`, as the first layer wants them."""
    return scale_embeddings(params["embed"][tokens], config)


def hidden_states(
    params: Params,
    config: DecoderConfig,
    tokens: Array | None = None,
    *,
    embeddings: Array | None = None,
    lora: Mapping | None = None,
    dropout: float = 0.0,
    dropout_key: Array | None = None,
    remat: str = "none",
) -> Array:
    """Final-norm hidden states `[B, T, D]` of tokens `[B, T]` or of embeddings `[B, T, D]`.

    `dropout` acts on the input of LoRA branches and only where `dropout_key` is given.
    `remat` names an entry of `REMAT_POLICIES`.
    """
    module = Decoder(config, remat, dropout)
    return module.apply(
        {"params": params}, tokens, embeddings=embeddings, lora=lora, dropout_key=dropout_key
    )


def logits(params: Params, config: DecoderConfig, hidden: Array) -> Array:
    """Next-token logits `[..., V]` in fp32 of hidden states `[..., D]`."""
    head = params["embed"].T if config.tie_word_embeddings else params["lm_head"]
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
