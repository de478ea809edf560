"""The method applied to the models: prompts through the cloud LM to gates and to LoRA."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lorax_gen.method import generator, meta_tokens
from lorax_gen.method.experts import apply_experts
from lorax_gen.method.generator import (
    GeneratorConfig,
    gates_from_states,
    lora_from_gates,
    select_kernels,
)
from lorax_gen.method.lora import Tree, apply_lora
from lorax_gen.models import decoder
from lorax_gen.models.adapter import Adapter, Apply, LowRank
from lorax_gen.models.decoder import Array, DecoderConfig, Execution, Params, kernel_shapes


@dataclasses.dataclass(frozen=True)
class GeneratorSpec:
    """The static part of a LoRA-Gen system: the configs of the generator and of both models.

    Raises UserError where a target is not a kernel of its model, or the edge has fewer layers than
    the generator serves.
    """

    generator: GeneratorConfig
    cloud: DecoderConfig
    edge: DecoderConfig

    def __post_init__(self):
        select_kernels(kernel_shapes(self.cloud), self.generator.cloud_targets, "cloud")
        select_kernels(kernel_shapes(self.edge), self.generator.edge_targets, "edge")
        self.generator.layers(self.edge.num_hidden_layers)

    @property
    def layers(self) -> int:
        """Layers of the edge that have experts, and so the number of meta tokens: L below."""
        return self.generator.layers(self.edge.num_hidden_layers)


def meta_states(
    params: dict,
    cloud_params: dict,
    spec: GeneratorSpec,
    prompt: Array,
    lengths: Array,
    **options: Any,
) -> Array:
    """Meta states `[P, L, D]` of prompts `[P, T]`, by one forward pass of the cloud LM.

    L meta tokens directly follow each prompt; T^i is the final-norm hidden state at the i-th. The
    cloud's own LoRA is applied; its head is not computed.

    Args:
      options: `dropout_key` and `execution` of `decoder.hidden_states`.
    """
    layers = spec.layers
    embeddings = decoder.embed(cloud_params, spec.cloud, prompt)
    embeddings = meta_tokens.insert_meta_tokens(embeddings, lengths, params["meta_tokens"], layers)
    config = spec.generator
    adapter = Adapter(generator.cloud_lora(params, config), apply=LowRank(config.cloud_dropout))
    hidden = decoder.hidden_states(
        cloud_params, spec.cloud, embeddings=embeddings, adapter=adapter, **options
    )
    return meta_tokens.read_meta_states(hidden, lengths, layers)


def model_shape(config: DecoderConfig) -> dict[str, Any]:
    """The part of a decoder's shape that a generator depends on, as plain values."""
    return {
        "layers": config.num_hidden_layers,
        "kernels": {name: list(shape) for name, shape in kernel_shapes(config).items()},
    }


@dataclasses.dataclass(frozen=True)
class GatedPool(Apply):
    """Eq. 8 in a decoder: `shared` is the pool of experts, `rows` the gates of each row.

    A row with zero gates gets the frozen model's output. `gated_pool` builds the adapter.
    """

    config: GeneratorConfig

    def kernel(self, name, x, shared, rows, key):
        if name not in shared:
            return None
        gates, config = rows["gates"], self.config
        if x.shape[1] == 1:  # one token, as in decoding: composing a LoRA would cost more
            scale = config.alpha / config.rank
            return scale * apply_experts(x, shared[name], gates, config.composition)
        # `lora_from_gates` treats the rows as layers that share this layer's pool.
        return apply_lora(x, lora_from_gates({name: shared[name]}, gates, config)[name])


def gated_pool(pool: Tree, gates: Any, config: GeneratorConfig) -> Adapter:
    """The edge model's adapter for a pool and gates `[P, L, N]`, one row per prompt.

    The decoder composes a row's LoRA layer by layer, so only the pool and the gates are stored;
    the gates may stay on the host.
    """
    if config.pool == "shared":
        pool = jax.tree.map(lambda x: jnp.broadcast_to(x, (gates.shape[1], *x.shape)), pool)
    return Adapter(pool, {"gates": gates.swapaxes(0, 1)}, GatedPool(config))


@partial(jax.jit, static_argnames=("spec", "execution"))
def prompt_gates(
    params: dict,
    stats: dict,
    cloud: Params,
    spec: GeneratorSpec,
    prompt: Array,
    lengths: Array,
    *,
    execution: Execution = Execution(),
) -> Array:
    """Gates `[P, L, N]` of prompts `[P, T]`, at inference; they do not depend on each other."""
    states = meta_states(params, cloud, spec, prompt, lengths, execution=execution)
    return gates_from_states(params, stats, states, spec.generator)[0]
