"""Direct generation (an ablation of the paper): the cloud's meta state of edge layer i through a
feed-forward network to the LoRA factors of layer i, without a pool of experts or a router.

    h^i = SiLU(W1 T^i + b1)    A^i = W_A h^i + A_0    B^i = W_B h^i + B_0

The last layer's weights are a tree of factors with an axis of units, and its biases one more unit
that is always 1. So theta^i is eq. 8 with the H + 1 units as gates that nothing restricts, and
what composes and applies a pool of experts composes and applies it too (`units_config`). B is zero
at first, for every prompt: the edge starts as its base.

Dims beyond the legend (`lorax_gen.method`): C cloud layers, H units.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lorax_gen.config import BelowOne, Positive, Size, check
from lorax_gen.method.experts import init_pool
from lorax_gen.method.generator import GeneratorConfig, select_kernels
from lorax_gen.method.lora import init_lora
from lorax_gen.method.meta_tokens import init_meta_tokens
from lorax_gen.models.decoder import Array, DecoderConfig, kernel_shapes
from lorax_gen.system import GeneratorSpec


@dataclasses.dataclass(frozen=True)
class DirectConfig:
    """Direct generation of a LoRA: the network, and the cloud model's own LoRA and meta tokens as
    in `GeneratorConfig`."""

    units: Size = 64
    """Units of the network's hidden layer. It has units times as many parameters as a LoRA of the
    edge layers that it serves."""
    network: Literal["shared", "per_layer"] = "shared"
    """One network for all edge layers, whose meta states differ, or one for each."""
    rank: Size = 16
    alpha: Positive = 16.0
    """The generated LoRA is scaled by alpha / rank."""
    meta_tokens: Literal["per_layer", "shared"] = "per_layer"
    """One meta token per edge layer, or one vector for all."""
    cloud_rank: Size = 16
    cloud_alpha: Positive = 16.0
    cloud_dropout: BelowOne = 0.05
    cloud_targets: tuple[str, ...] = ("q", "v")
    """Kernels of the cloud model that its own LoRA adapts."""
    edge_targets: tuple[str, ...] = ("gate", "up", "down")
    """Kernels of the edge model that are adapted."""
    last_layers: Size | None = None
    """Only so many of the edge's last layers, each with a meta token; None: all."""

    def __post_init__(self):
        check(self)


def units_config(config: DirectConfig) -> GeneratorConfig:
    """The same as a generator with H + 1 experts, whose gates are the units: all of them count."""
    return GeneratorConfig(
        n_experts=config.units + 1,
        top_k=1,
        strategy="gumbel",  # all of the gates count
        composition="factors",
        pool=config.network,
        rank=config.rank,
        alpha=config.alpha,
        meta_tokens=config.meta_tokens,
        cloud_rank=config.cloud_rank,
        cloud_alpha=config.cloud_alpha,
        cloud_dropout=config.cloud_dropout,
        cloud_targets=config.cloud_targets,
        edge_targets=config.edge_targets,
        last_layers=config.last_layers,
    )


def direct_spec(config: DirectConfig, cloud: DecoderConfig, edge: DecoderConfig) -> GeneratorSpec:
    """What `system.meta_states`, `lora_from_gates` and `system.gated_pool` take."""
    return GeneratorSpec(units_config(config), cloud, edge)


def init_direct(key: Array, spec: GeneratorSpec, embedding: Array) -> dict[str, Any]:
    """Initial trainables, fp32; every generated LoRA is zero.

    * `meta_tokens`, `cloud_lora`: as of `method.generator.init_generator`.
    * `network`: `w1 [L, D, H]`, `b1 [L, H]`, without L where it is shared.
    * `pool`: for each target `a [L, H + 1, D, R]` and `b [L, H + 1, R, F]`, the last unit being the
      biases; without L where it is shared.

    Args:
      embedding: `[D]` of the cloud, which meta tokens are initialised from.
    """
    config, edge, cloud = spec.generator, spec.edge, spec.cloud
    layers = spec.layers if config.pool == "per_layer" else None
    lead = () if layers is None else (layers,)
    meta_key, cloud_key, network_key, pool_key = jax.random.split(key, 4)
    width, units = embedding.shape[-1], config.n_experts - 1
    w1 = width**-0.5 * jax.random.normal(network_key, (*lead, width, units), jnp.float32)
    targets = select_kernels(kernel_shapes(edge), config.edge_targets, "edge")
    adapted = select_kernels(kernel_shapes(cloud), config.cloud_targets, "cloud")
    return {
        "meta_tokens": init_meta_tokens(meta_key, embedding, spec.layers, config.meta_tokens),
        "cloud_lora": init_lora(
            cloud_key, dict(adapted), config.cloud_rank, cloud.num_hidden_layers
        ),
        "network": {"w1": w1, "b1": jnp.zeros((*lead, units), jnp.float32)},
        "pool": init_pool(pool_key, targets, config.rank, config.n_experts, layers),
    }


def units_of_states(network: dict[str, Array], states: Array) -> Array:
    """The units `[P, L, H + 1]` fp32 of meta states `[P, L, D]`; the last one is 1."""
    states = states.astype(jnp.float32)
    equation = "pld,ldh->plh" if network["w1"].ndim == 3 else "pld,dh->plh"
    hidden = jax.nn.silu(jnp.einsum(equation, states, network["w1"]) + network["b1"])
    return jnp.concatenate([hidden, jnp.ones((*hidden.shape[:-1], 1), jnp.float32)], axis=-1)
