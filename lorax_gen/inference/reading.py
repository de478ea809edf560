"""Prompts read by a model: each distinct one once, in batches of few shapes, over a mesh if one is
given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lorax_gen.data.tokens import bucket, pad_rows
from lorax_gen.inference.choices import TOKENS_PER_BATCH
from lorax_gen.inference.packing import deal
from lorax_gen.mesh import hosts
from lorax_gen.mesh.kernels import execution_over
from lorax_gen.mesh.sharding import place, put_batch, row_shards, tree_shardings
from lorax_gen.models.decoder import Execution
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import check_ids

Ids = Sequence[int]


def read_prompts(
    prompts: Sequence[Ids],
    model: Model,
    read: Callable[..., jax.Array],
    weights: Any,
    shape: tuple[int, ...],
    *,
    room: int,
    extra: int = 0,
    dtype: Any = np.float32,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    wanted: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda prompts: None,
) -> np.ndarray:
    """What `read` gives for each prompt, `[P, *shape]`. Apart from it, memory does not grow with
    the number of prompts.

    Args:
      prompts: token ids of the model's tokenizer.
      read: `read(weights, prompt, lengths, execution)`, compiled, for prompts `[B, T]`.
      room: tokens of a prompt that are read, at most.
      extra: tokens that the model reads of each row beside the prompt.
      tokens_per_batch: rows times padded length of a batch, at most.
      wanted: indices of the prompts to read; None: all. Batches are made of all prompts, and those
        with a wanted one are read, so that a result does not depend on it. Those of others may be
        zero.
      mesh: prompts are sharded over its batch axes, weights as in training; None: no mesh.
      progress: called with the number of prompts finished since the last call.

    Raises UserError if a token is not in the model's vocabulary.
    """
    if not len(prompts):
        return np.zeros((0, *shape), dtype)
    distinct = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = list(distinct)
    for ids in rows:
        check_ids(ids, model.config.vocab_size, model.tokenizer)
    index = np.array([distinct[tuple(ids)] for ids in prompts])
    asked = index if wanted is None else index[np.array(wanted, int)]
    shards, execution = 1, Execution()
    if mesh is not None:
        shards, execution = row_shards(mesh), execution_over(mesh)
        weights = place(weights, tree_shardings(weights, mesh))
    found = np.zeros((len(rows), *shape), dtype)

    def keep(chosen: np.ndarray, values: jax.Array) -> None:
        found[chosen] = np.asarray(hosts.gather(values))[: len(chosen)]
        progress(int(np.isin(asked, chosen).sum()))

    pending = None
    lengths = padded_lengths_of(rows, room, tokens_per_batch)
    for length, share, parts in deal(lengths, lengths, tokens_per_batch, shards, extra):
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
            values = read(weights, batch["prompt"], batch["lengths"], execution)
            if pending is not None:  # one batch late: the device never waits for the host
                keep(*pending)
            pending = chosen, values
    if pending is not None:
        keep(*pending)
    return found[index]


def padded_lengths_of(rows: Sequence[Ids], room: int, tokens_per_batch: int) -> np.ndarray:
    """Lengths by which `deal` assigns prompts to batches.

    Prompts that fit into one batch are padded to one of a handful of lengths, so that calls with
    one prompt each compile few programs. More prompts keep their lengths, and `deal` pads them.
    """
    lengths = np.array([max(len(ids), 1) for ids in rows])
    if lengths.sum() > tokens_per_batch:
        return lengths
    return np.array([max(min(bucket(n), room), n) for n in lengths])
