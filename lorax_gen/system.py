"""Where the method meets the models: prompts through the cloud LM to gates and to LoRA.

Dims: P prompts, T time, L edge layers, D width of the cloud model, N experts.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax

from lorax_gen.method import generator, meta_tokens
from lorax_gen.method.generator import GeneratorConfig, gates_from_states
from lorax_gen.models import decoder
from lorax_gen.models.decoder import Array, DecoderConfig, Params, kernel_shapes


@dataclasses.dataclass(frozen=True)
class GeneratorSpec:
    """The static part of a LoRA-Gen system: the generator's and both models' shapes."""

    generator: GeneratorConfig
    cloud: DecoderConfig
    edge: DecoderConfig


def meta_states(
    params: dict,
    cloud_params: dict,
    spec: GeneratorSpec,
    prompt: Array,
    lengths: Array,
    **options: Any,
) -> Array:
    """The cloud LM reads prompts `[P, T]` in one forward pass; its states `[P, L, D]`.

    L meta tokens stand directly behind each prompt; T^i is the final-norm hidden state at the
    i-th. The cloud's own LoRA is applied, its head never computed.
    """
    layers = spec.edge.num_hidden_layers
    embeddings = decoder.embed(cloud_params, spec.cloud, prompt)
    embeddings = meta_tokens.insert_meta_tokens(embeddings, lengths, params["meta_tokens"], layers)
    lora = generator.cloud_lora(params, spec.generator)
    hidden = decoder.hidden_states(
        cloud_params, spec.cloud, embeddings=embeddings, lora=lora, **options
    )
    return meta_tokens.read_meta_states(hidden, lengths, layers)


def model_shape(config: DecoderConfig) -> dict[str, Any]:
    """What of a decoder's shape a generator depends on, as plain values."""
    return {
        "layers": config.num_hidden_layers,
        "kernels": {name: list(shape) for name, shape in kernel_shapes(config).items()},
    }


@partial(jax.jit, static_argnames="spec")
def prompt_gates(
    params: dict, stats: dict, cloud: Params, spec: GeneratorSpec, prompt: Array, lengths: Array
) -> Array:
    """Gates `[P, L, N]` of prompts `[P, T]`, at inference: no prompt changes another's gates."""
    states = meta_states(params, cloud, spec, prompt, lengths)
    return gates_from_states(params, stats, states, spec.generator)[0]
