"""Prompts to gates to task cards: the one way from text to what specialises an edge model.

The cloud reads each different prompt once, in batches of few shapes, over a mesh where there is
one.

Dims: P prompts of a batch, T time, L edge layers, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lorax_gen.artifacts.card import TaskCard, make_card
from lorax_gen.artifacts.generator import Generator
from lorax_gen.data.tokens import Encoder, bucket, pad_rows, prompt_batch
from lorax_gen.inference.choices import TOKENS_PER_BATCH
from lorax_gen.inference.packing import deal
from lorax_gen.mesh import hosts
from lorax_gen.mesh.sharding import place, put_batch, row_shards, tree_shardings
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.model import Model
from lorax_gen.system import prompt_gates

Ids = Sequence[int]


def gates_of_prompts(
    prompts: Sequence[Ids],
    cloud: Model,
    edge: DecoderConfig,
    generator: Generator,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda prompts: None,
) -> np.ndarray:
    """Gates `[N, L, E]` fp32 of prompts, token ids of the cloud's tokenizer.

    Args:
      mesh: prompts are split over its batch axes, weights as training splits them; None: no mesh.
      progress: called with the number of prompts finished since the last call.

    Raises UserError where a model is not of the shape that the generator was trained with.
    """
    spec = generator.spec(cloud.config, edge)
    shape = edge.num_hidden_layers, generator.config.n_experts
    if not len(prompts):
        return np.zeros((0, *shape), np.float32)
    distinct = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = list(distinct)
    index = np.array([distinct[tuple(ids)] for ids in prompts])
    weights, shards = (generator.params, generator.stats, cloud.params), 1
    if mesh is not None:
        shards = row_shards(mesh)
        weights = place(weights, tree_shardings(weights, mesh))
    params, stats, cloud_params = weights
    found = np.empty((len(rows), *shape), np.float32)

    def read(chosen: np.ndarray, gates: jax.Array) -> None:
        found[chosen] = np.asarray(hosts.gather(gates))[: len(chosen)]
        progress(int(np.isin(index, chosen).sum()))

    before = None
    lengths = np.array([max(len(ids), 1) for ids in rows])
    for length, share, parts in deal(lengths, lengths, tokens_per_batch, shards):
        for groups in parts:
            chosen = np.concatenate(groups)
            ids = [rows[i] for i in chosen]
            ids += [()] * (share * shards - len(ids))
            batch = {
                "prompt": pad_rows(ids, length, 0, "a prompt"),
                "lengths": np.array([len(row) for row in ids], np.int32),
            }
            batch = jax.device_put(batch) if mesh is None else put_batch(batch, mesh)
            gates = prompt_gates(
                params, stats, cloud_params, spec, batch["prompt"], batch["lengths"]
            )
            if before is not None:  # one batch late: the device never waits for the host
                read(*before)
            before = chosen, gates
    read(*before)
    return found[index]


def specialize(
    prompt: str | Sequence[str], cloud: Model, edge: Model, generator: Generator
) -> TaskCard | list[TaskCard]:
    """A task card for each prompt (one for a string, a list for several).

    The card does not depend on the other prompts: BatchNorm uses its running statistics and
    padding is never seen.

    Raises UserError for an empty prompt, for one longer than the cloud model's positions, and for
    models that the generator was not trained with.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    spec = generator.spec(cloud.config, edge.config)
    encoder = Encoder.of(cloud)
    limit = cloud.config.max_position_embeddings - edge.config.num_hidden_layers
    length = min(bucket(max((len(encoder.ids(text)) for text in prompts), default=1)), limit)
    batch = prompt_batch(encoder, prompts, length)
    gates = prompt_gates(
        generator.params,
        generator.stats,
        cloud.params,
        spec,
        jnp.asarray(batch["prompt"]),
        jnp.asarray(batch["prompt_lengths"]),
    )
    cards = [
        make_card(row, text, edge, generator)
        for row, text in zip(np.asarray(gates), prompts, strict=True)
    ]
    return cards[0] if isinstance(prompt, str) else cards
