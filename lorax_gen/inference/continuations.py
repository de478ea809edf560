"""Continuations of many texts: longest first, in batches of few shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lorax_gen.data.tokens import bucket
from lorax_gen.errors import UserError
from lorax_gen.inference.generation import generate_text
from lorax_gen.mesh.sharding import place, tree_shardings
from lorax_gen.models.adapter import Adapter, prefix_length
from lorax_gen.models.model import Model

TOKENS_PER_BATCH = 8192


def continue_texts(
    model: Model,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    most_rows: int | None = None,
    adapter: Adapter | None = None,
    wanted: Sequence[int] | None = None,
    on_batch: Callable[[list[int], list[str]], None] = lambda indices, texts: None,
    seed: int = 0,
    mesh: Mesh | None = None,
    **options: Any,
) -> list[str]:
    """The continuation of each row of token ids, in their order; empty where it is not wanted.

    Args:
      tokens_per_batch: rows of a batch times cache slots of a row, at most, unless a single row
        has more.
      most_rows: rows of a batch, at most.
      adapter: see `models.adapter`; its rows, and its prefix, are one per text.
      wanted: indices of the rows to continue; None: all. Batches are made of all rows, and those
        with a wanted one are computed, so that a continuation does not depend on it.
      on_batch: called with the indices and continuations of each finished batch.
      seed: of sampling; each batch derives its own.
      mesh: rows are sharded over its batch axes, weights as in training; None: no mesh.
      options: of `generation.stream_text`.
    """
    texts, asked = [""] * len(rows), set(range(len(rows)) if wanted is None else wanted)
    if mesh is not None:  # once for all batches
        params = place(model.params, tree_shardings(model.params, mesh))
        model = dataclasses.replace(model, params=params)
    for number, indices in enumerate(
        batches(
            [len(row) for row in rows],
            max_new_tokens,
            tokens_per_batch,
            most_rows,
            before=prefix_length(adapter),
        )
    ):
        if asked.isdisjoint(indices):
            continue
        written = generate_text(
            model,
            [rows[i] for i in indices],
            max_new_tokens=max_new_tokens,
            adapter=adapter and adapter.take_rows(np.array(indices)),
            mesh=mesh,
            seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]),
            **options,
        )
        done = {i: text for i, text in zip(indices, written, strict=True) if i in asked}
        for i, text in done.items():
            texts[i] = text
        on_batch(list(done), list(done.values()))
    return texts


def batches(
    lengths: Sequence[int],
    new_tokens: int,
    tokens_per_batch: int,
    most_rows: int | None = None,
    *,
    before: int = 0,
) -> Iterator[list[int]]:
    """Indices of rows by falling length, in batches of a power of two; the last may be smaller.
    `before` are the slots of a prefix."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        slots = before + bucket(lengths[order[start]]) + bucket(new_tokens)
        count = max(tokens_per_batch // slots, 1)
        count = 1 << (min(count, most_rows or count).bit_length() - 1)
        yield order[start : start + count]
        start += count


def room_for(model: Model, new_tokens: int, max_length: int | None = None) -> int:
    """Longest prompt before `new_tokens` new ones, where the model reads `max_length` tokens.

    Raises UserError if there is no room for any.
    """
    positions = model.config.max_position_embeddings
    limit = min(max_length or positions, positions)
    if new_tokens >= limit:
        raise UserError(
            f"{new_tokens} new tokens leave no room for a text in the {limit} positions of the "
            "model; ask for fewer"
        )
    return limit - new_tokens
