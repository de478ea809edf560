"""Prompts to gates to task cards, which specialise an edge model.

The cloud reads each distinct prompt once, in batches of few shapes, over a mesh if one is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

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
from lorax_gen.prompts import check_size
from lorax_gen.system import prompt_gates
from lorax_gen.tokenizers import check_ids

Ids = Sequence[int]


def gates_of_prompts(
    prompts: Sequence[Ids],
    cloud: Model,
    edge: Model,
    generator: Generator,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    wanted: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda prompts: None,
) -> np.ndarray:
    """Gates `[P, L, N]` fp32 of prompts, token ids of the cloud's tokenizer.

    The cloud reads each distinct prompt once. Apart from the gates, memory does not grow with the
    number of prompts.

    Args:
      tokens_per_batch: rows times padded length of a batch, at most.
      wanted: indices of the prompts to read; None: all. Batches are made of all prompts, and those
        with a wanted one are read, so that gates do not depend on it. Those of others may be zero.
      mesh: prompts are sharded over its batch axes, weights as in training; None: no mesh.
      progress: called with the number of prompts finished since the last call.

    Raises UserError if a model is not the one that the generator was trained with, or a token is
    not in the cloud's vocabulary.
    """
    spec = generator.spec(cloud, edge)
    shape = spec.edge.num_hidden_layers, generator.config.n_experts
    if not len(prompts):
        return np.zeros((0, *shape), np.float32)
    distinct = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = list(distinct)
    for ids in rows:
        check_ids(ids, cloud.config.vocab_size, cloud.tokenizer)
    index = np.array([distinct[tuple(ids)] for ids in prompts])
    asked = index if wanted is None else index[np.array(wanted, int)]
    weights, shards, execution = (generator.params, generator.stats, cloud.params), 1, Execution()
    if mesh is not None:
        shards, execution = row_shards(mesh), execution_over(mesh)
        weights = place(weights, tree_shardings(weights, mesh))
    found = np.zeros((len(rows), *shape), np.float32)

    def read(chosen: np.ndarray, gates: jax.Array) -> None:
        found[chosen] = np.asarray(hosts.gather(gates))[: len(chosen)]
        progress(int(np.isin(asked, chosen).sum()))

    pending = None
    lengths = padded_lengths_of(rows, spec.cloud, spec.edge, tokens_per_batch)
    for length, share, parts in deal(lengths, lengths, tokens_per_batch, shards):
        for groups in parts:
            chosen = np.concatenate(groups)
            if not np.isin(asked, chosen).any():
                continue
            own = [rows[i] for i in chosen]
            own += [()] * (share * shards - len(own))
            batch = {
                "prompt": pad_rows(own, length, 0, "a prompt"),
                "lengths": np.array([len(row) for row in own], np.int32),
            }
            batch = jax.device_put(batch) if mesh is None else put_batch(batch, mesh)
            gates = prompt_gates(
                *weights, spec, batch["prompt"], batch["lengths"], execution=execution
            )
            if pending is not None:  # one batch late: the device never waits for the host
                read(*pending)
            pending = chosen, gates
    if pending is not None:
        read(*pending)
    return found[index]


def padded_lengths_of(
    rows: Sequence[Ids], cloud: DecoderConfig, edge: DecoderConfig, tokens_per_batch: int
) -> np.ndarray:
    """Lengths by which `deal` assigns prompts to batches.

    Prompts that fit into one batch are padded to one of a handful of lengths, so that calls with
    one prompt each compile few programs. More prompts keep their lengths, and `deal` pads them.
    """
    lengths = np.array([max(len(ids), 1) for ids in rows])
    if lengths.sum() > tokens_per_batch:
        return lengths
    room = cloud.max_position_embeddings - edge.num_hidden_layers
    return np.array([max(min(bucket(n), room), n) for n in lengths])


@overload
def specialize(
    prompt: str, cloud: Model, edge: Model, generator: Generator, **options: Any
) -> TaskCard: ...
@overload
def specialize(
    prompt: list[str] | tuple[str, ...],
    cloud: Model,
    edge: Model,
    generator: Generator,
    **options: Any,
) -> list[TaskCard]: ...
def specialize(
    prompt: str | Sequence[str],
    cloud: Model,
    edge: Model,
    generator: Generator,
    **options: Any,
) -> TaskCard | list[TaskCard]:
    """A task card for each prompt (one for a string, a list for several).

    A card does not depend on the other prompts: BatchNorm uses its running statistics and
    padding is masked.

    Args:
      options: `tokens_per_batch`, `mesh` and `progress` of `gates_of_prompts`.

    Raises UserError for an empty prompt, one longer than the cloud model's positions, or models
    that the generator was not trained with.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    encoder, rows = Encoder.of(cloud), []
    room = cloud.config.max_position_embeddings - edge.config.num_hidden_layers
    for text in prompts:
        if not text.strip():
            raise UserError("the prompt is empty; describe the task in a sentence or more")
        check_size(text, room, cloud.tokenizer, "a prompt")
        rows.append(encoder.ids(text))
        if len(rows[-1]) > room:
            raise UserError(
                f"a prompt of {len(rows[-1])} tokens is longer than the {room} positions that the "
                "cloud model has before its meta tokens; shorten it"
            )
    gates = gates_of_prompts(rows, cloud, edge, generator, **options)
    cards = [
        make_card(row, text, cloud, edge, generator)
        for row, text in zip(gates, prompts, strict=True)
    ]
    return cards[0] if isinstance(prompt, str) else cards
