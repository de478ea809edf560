"""Prompts to gates to task cards: the one way from text to what specialises an edge model.

The cloud reads each different prompt once, in batches of few shapes, over a mesh where there is
one.

Dims: P prompts of a batch, T time, L edge layers, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lorax_gen.artifacts.card import TaskCard, make_card
from lorax_gen.artifacts.generator import Generator
from lorax_gen.data.tokens import Encoder, bucket, pad_rows
from lorax_gen.errors import UserError
from lorax_gen.inference.choices import TOKENS_PER_BATCH
from lorax_gen.inference.packing import deal
from lorax_gen.mesh import hosts
from lorax_gen.mesh.kernels import execution_over
from lorax_gen.mesh.sharding import place, put_batch, row_shards, tree_shardings
from lorax_gen.models.decoder import DecoderConfig, Execution
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
    """Gates `[P, L, N]` fp32 of prompts, token ids of the cloud's tokenizer.

    The cloud reads each different prompt once. Memory does not grow with their number, but for the
    gates themselves.

    Args:
      tokens_per_batch: rows times padded length that the device works on at a time.
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
    weights, shards, execution = (generator.params, generator.stats, cloud.params), 1, Execution()
    if mesh is not None:
        shards, execution = row_shards(mesh), execution_over(mesh)
        weights = place(weights, tree_shardings(weights, mesh))
    found = np.empty((len(rows), *shape), np.float32)

    def read(chosen: np.ndarray, gates: jax.Array) -> None:
        found[chosen] = np.asarray(hosts.gather(gates))[: len(chosen)]
        progress(int(np.isin(index, chosen).sum()))

    before = None
    lengths = padded_lengths_of(rows, cloud.config, edge, tokens_per_batch)
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
                *weights, spec, batch["prompt"], batch["lengths"], execution=execution
            )
            if before is not None:  # one batch late: the device never waits for the host
                read(*before)
            before = chosen, gates
    read(*before)
    return found[index]


def padded_lengths_of(
    rows: Sequence[Ids], cloud: DecoderConfig, edge: DecoderConfig, tokens_per_batch: int
) -> np.ndarray:
    """Lengths that prompts count as when they are dealt out to batches.

    Few prompts are padded to one of a handful of lengths, so that a caller who comes with one
    prompt after another compiles few programs. Many decide themselves which lengths are worth one.
    """
    lengths = np.array([max(len(ids), 1) for ids in rows])
    if lengths.sum() > tokens_per_batch:
        return lengths
    room = cloud.max_position_embeddings - edge.num_hidden_layers
    return np.array([max(min(bucket(n), room), n) for n in lengths])


def specialize(
    prompt: str | Sequence[str],
    cloud: Model,
    edge: Model,
    generator: Generator,
    **options: Any,
) -> TaskCard | list[TaskCard]:
    """A task card for each prompt (one for a string, a list for several).

    The card does not depend on the other prompts: BatchNorm uses its running statistics and
    padding is never seen.

    Args:
      options: `tokens_per_batch`, `mesh` and `progress` of `gates_of_prompts`.

    Raises UserError for an empty prompt, for one longer than the cloud model's positions, and for
    models that the generator was not trained with.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    encoder, rows = Encoder.of(cloud), []
    room = cloud.config.max_position_embeddings - edge.config.num_hidden_layers
    for text in prompts:
        if not text.strip():
            raise UserError("the prompt is empty; write what the task is, in a sentence or more")
        rows.append(encoder.ids(text))
        if len(rows[-1]) > room:
            raise UserError(
                f"a prompt of {len(rows[-1])} tokens is longer than the {room} that the cloud "
                "model has room for before its meta tokens; shorten it"
            )
    gates = gates_of_prompts(rows, cloud, edge.config, generator, **options)
    cards = [
        make_card(row, text, cloud, edge, generator)
        for row, text in zip(gates, prompts, strict=True)
    ]
    return cards[0] if isinstance(prompt, str) else cards
