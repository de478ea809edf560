"""Bytes that a train step of the generator needs on each device, estimated without compiling.

Bytes of arrays (weights, state, batch) are exact. Activations are an estimate: XLA decides what
is fused, recomputed or live at the same time. For devices whose compiler is not available.

Dims beyond the legend (`lorax_gen.method`): K key/value heads, E head size; P and B are of one
microbatch on one device.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax_gen.cost import generated_ranks
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.system import GeneratorSpec


def bytes_per_device(tree: Any) -> int:
    """Bytes per device of a tree of arrays or shapes, by their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def activations(
    spec: GeneratorSpec,
    *,
    prompts: int,
    queries: int,
    prompt_length: int,
    length: int,
    answered: int,
    bytes_each: int,
    remat: str,
    flash: dict[str, bool],
    sharded: bool,
    microbatches: int = 1,
) -> dict[str, int]:
    """Estimated peak of the activations in a step, in parts.

        kept      what the forward pass saves for the backward pass: L B T (D + saved), L of the
                  edge being its layers with experts
        layer     one layer's backward pass, values and gradients: B T (2 inner + scores)
                  and its weights twice, if gathered from shards
        logits    B min(answered, 128) V of 4 bytes, three times: values, softmax, gradient
                  and the head, if gathered
        lora      the generated LoRA and its gradient, 4 bytes: 2 L P R (D_in + D_out)
                  and the pool and its gradient, if gathered

        inner     2 D + 2 (H + 2 K) E + 4 F, without a gate 2 F; 8 D bytes of norms in fp32
        scores    10 H T bytes: twice in fp32 and once rounded; with flash 4 H
        saved     remat=none: inner + scores; dots: 2 D + (H + 2 K) E + 2 F or F; full: nothing

    `kept` and `layer` are those of the cloud's or the edge's backward pass, whichever is more; in
    the edge's, the cloud's `kept` is live too, except with microbatches, which recompute it.

    Args:
      prompts: prompts on one device, of all microbatches together.
      answered: positions of a row that go through the head.
      bytes_each: item size of the frozen models' dtype.
      flash: of `cloud` and `edge`, whether the attention kernel never materialises the scores.
      sharded: whether weights are gathered before use.
    """
    prompts = -(-prompts // microbatches)
    rows = prompts * queries
    cloud, edge = spec.cloud, spec.edge
    cloud_tokens = prompts * (prompt_length + spec.layers)
    edge_tokens = rows * (length - 1)

    def passes(
        config: DecoderConfig, layers: int, tokens: int, time: int, flash: bool
    ) -> tuple[int, int]:
        d, gated = config.hidden_size, config.mlp == "gated"
        wide = config.intermediate_size * (2 if gated else 1)  # outputs of gate and up
        qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        scores = config.num_attention_heads * (4 if flash else 10 * time)
        inner = bytes_each * (2 * d + 2 * qkv + 2 * wide) + 8 * d
        saved = {"none": inner + scores, "dots": bytes_each * (2 * d + qkv + wide), "full": 0}
        weights = bytes_each * sum(d_in * d_out for d_in, d_out in kernel_shapes(config).values())
        kept = layers * tokens * (bytes_each * d + saved[remat])
        return kept, tokens * (2 * inner + scores) + (2 * weights if sharded else 0)

    cloud_kept, cloud_layer = passes(
        cloud, cloud.num_hidden_layers, cloud_tokens, prompt_length + spec.layers, flash["cloud"]
    )
    edge_kept, edge_layer = passes(edge, spec.layers, edge_tokens, length - 1, flash["edge"])
    logits = 3 * rows * min(answered, 128) * edge.vocab_size * 4
    if sharded:
        logits += edge.hidden_size * edge.vocab_size * bytes_each
    shapes, ranks = kernel_shapes(edge), generated_ranks(spec.generator)
    factors = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    lora = 2 * 4 * spec.layers * prompts * factors
    if sharded:
        per_expert = spec.generator.rank * sum(sum(shapes[name]) for name in ranks)
        pool_layers = spec.layers if spec.generator.pool == "per_layer" else 1
        lora += 2 * 4 * pool_layers * spec.generator.n_experts * per_expert
    still = cloud_kept if microbatches == 1 else 0
    edge_phase = {"kept": edge_kept + still, "layer": edge_layer, "logits": logits, "lora": lora}
    cloud_phase = {"kept": cloud_kept, "layer": cloud_layer, "logits": 0, "lora": 0}
    return max(edge_phase, cloud_phase, key=lambda phase: sum(phase.values()))
