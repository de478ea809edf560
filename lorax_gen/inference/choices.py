"""Log-likelihoods of choices after their contexts, in jitted batches of few shapes.

lm-evaluation-harness calls the model once per choice. Here one row holds the choices of an item
(`packing`): their shared context is read once, and only the positions that predict a choice's
tokens go through the head.

Dims beyond the legend (`lorax_gen.method`): N items, C choices of an item, S shards of a batch,
P predictions of a shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lorax_gen.errors import UserError
from lorax_gen.inference.packing import RowBatch, Text, make_batches, needed, pack
from lorax_gen.mesh import hosts
from lorax_gen.mesh.kernels import execution_over
from lorax_gen.mesh.sharding import (
    place,
    place_adapter,
    put_batch,
    row_shards,
    tree_shardings,
)
from lorax_gen.models import decoder
from lorax_gen.models.adapter import Adapter, prefix_length
from lorax_gen.models.attention import visible
from lorax_gen.models.decoder import Array, DecoderConfig, Execution, Params
from lorax_gen.models.model import Model
from lorax_gen.models.scoring import score_tokens
from lorax_gen.prompts import check_text
from lorax_gen.tokenizers import check_ids

TOKENS_PER_BATCH = 4096
HEAD_CHUNK = 512  # predictions of a shard per call of the head: logits [chunk, V] are large

Ids = list[int]


@dataclasses.dataclass(frozen=True)
class ChoiceItem:
    """A tokenised question: for each choice the ids of its context and of its continuation."""

    choices: tuple[tuple[Ids, Ids], ...]
    name: str = ""
    """Its name in errors."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChoiceScores:
    """A model's scores of an item's choices.

    Attributes:
      loglikelihoods: `[C]` float64, summed over the tokens of each continuation.
      greedy: `[C]` bool, whether greedy decoding would generate the continuation.
      truncated: tokens truncated on the left of the longest choice.
      context_tokens: tokens read before the continuation, the most of any choice.
    """

    loglikelihoods: np.ndarray
    greedy: np.ndarray
    truncated: int
    context_tokens: int


# --- text to tokens ------------------------------------------------------------------------------


def encode_pair(tokenizer: Any, context: str, continuation: str, bos: bool) -> tuple[Ids, Ids]:
    """Ids of a context and of its continuation, by the rule of lm-evaluation-harness.

    Both are encoded together; the continuation is what follows as many tokens as the context has
    alone. Trailing spaces of the context belong to the continuation. `bos` prepends one BOS. An
    empty context is BOS, or EOS for tokenizers without BOS.
    """
    (pair,) = encode_pairs(tokenizer, [(context, continuation)], bos)
    return pair


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], bos: bool
) -> list[tuple[Ids, Ids]]:
    """`encode_pair` for many pairs; each distinct text is tokenised once."""
    stripped = [context.rstrip() for context, _ in pairs]
    joined = [context + continuation for context, continuation in pairs]
    texts = list(dict.fromkeys([*stripped, *joined]))
    ids_of = dict(zip(texts, encode_texts(tokenizer, texts), strict=True))
    first = tokenizer.bos_token_id
    if bos and first is None:
        raise UserError("this tokenizer has no BOS token to put before a text")

    def ids(text: str) -> Ids:
        found = ids_of[text]
        return [first, *found] if bos and found[:1] != [first] else found

    out = []
    for context, together in zip(stripped, joined, strict=True):
        if context:
            out.append((ids(context), ids(together)[len(ids(context)) :]))
        else:
            found, prefix = ids_of[together], prefix_id(tokenizer)
            out.append(([prefix], found[1:] if found[:1] == [prefix] else found))
    return out


def prefix_id(tokenizer: Any) -> int:
    """The token before a text without context: BOS, or the end of text.

    Raises UserError where the tokenizer has neither.
    """
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    if first is None:
        raise UserError("a text has no context, and this tokenizer no BOS or end of text for one")
    return first


def encode_texts(tokenizer: Any, texts: list[str]) -> list[Ids]:
    """Token ids of texts, without special tokens."""
    if not texts:
        return []
    texts = [check_text(text) for text in texts]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def encode_item(
    model: Model, contexts: Sequence[str], continuations: Sequence[str], name: str = ""
) -> ChoiceItem:
    """One tokenised question; see `encode_items`."""
    (item,) = encode_items(model, [(contexts, continuations)], [name])
    return item


def encode_items(
    model: Model,
    questions: Sequence[tuple[Sequence[str], Sequence[str]]],
    names: Sequence[str] | None = None,
) -> list[ChoiceItem]:
    """Tokenised questions.

    Args:
      questions: contexts, one for all choices or one for each, and the continuation of each choice.

    Raises UserError, naming the item, if a choice has no tokens.
    """
    pairs: list[tuple[str, str]] = []
    counts = []
    for contexts, continuations in questions:
        contexts = contexts if len(contexts) > 1 else list(contexts) * len(continuations)
        pairs += zip(contexts, continuations, strict=True)
        counts.append(len(continuations))
    encoded, items = iter(encode_pairs(model.tokenizer, pairs, bool(model.bos))), []
    for i, count in enumerate(counts):
        name = names[i] if names else f"item {i}"
        items.append(ChoiceItem(tuple(next(encoded) for _ in range(count)), name))
        for choice, (_, continuation) in enumerate(items[-1].choices):
            if not continuation:
                text = questions[i][1][choice]
                raise UserError(
                    f"{name}: choice {choice} ({text!r}) has no tokens to score after its context; "
                    "give it a text that begins with a space"
                )
    return items


# --- tokens to scores ----------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("config", "execution"))
def score_rows(
    params: Params,
    config: DecoderConfig,
    batch: dict[str, Array],
    adapter: Adapter | None = None,
    *,
    execution: Execution = Execution(),
) -> tuple[Array, Array]:
    """Log-likelihoods `[S, P]` fp32 of targets, and whether each is the argmax.

    Args:
      batch: `RowBatch.arrays`.
      adapter, execution: see `decoder.hidden_states`.
    """
    tokens, positions, mask = batch["tokens"], batch.get("positions"), None
    if positions is not None:
        queries, keys = batch["owners"][:, None, :, None], batch["owners"][:, None, None, :]
        mask = visible(positions, positions) & ((keys == 0) | (keys == queries))
    hidden = decoder.hidden_states(
        params,
        config,
        tokens,
        positions=positions,
        mask=mask,
        adapter=adapter,
        execution=execution,
    )
    indices, targets = batch["indices"], batch["targets"]
    # A shard gathers from its own rows.
    hidden = hidden.reshape(len(indices), -1, hidden.shape[-1])
    hidden = jnp.take_along_axis(hidden, indices[:, :, None], axis=1)

    return score_tokens(params, config, hidden, targets, chunk=HEAD_CHUNK)


def score_items(
    model: Model,
    items: Sequence[ChoiceItem],
    *,
    adapter: Adapter | None = None,
    max_length: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    longest_row: int | None = None,
    wanted: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda items: None,
    on_batch: Callable[[list[int], list[ChoiceScores]], None] = lambda indices, scores: None,
) -> list[ChoiceScores]:
    """Scores of items, in their order.

    Args:
      adapter: see `models.adapter`; its rows `[L, N, ...]` and its prefix `[N, S, D]`, one per
        item, may stay on the host.
      max_length: tokens that the model reads of a choice, at most; longer ones are truncated on the
        left. None: the model's number of positions, less those of the prefix.
      tokens_per_batch: B T at most, unless a single row is longer.
      longest_row: choices that do not fit into a row of this length get one row each; None:
        `tokens_per_batch`.
      wanted: indices of the items to score; None: all. Batches are made of all items, and those
        with a wanted one are computed, so that a score does not depend on what else is wanted.
      mesh: rows are sharded over its batch axes, weights as in training; None: no mesh.
      progress: called with the number of items finished since the last call.
      on_batch: called with the indices and scores of finished items, while the device computes the
        next batch.

    Raises UserError if an item has no choices, a context or a continuation has no tokens, a
    continuation is longer than `max_length`, `max_length` exceeds the model's positions, or a token
    is not in the model's vocabulary.
    """
    before = prefix_length(adapter)
    positions = model.config.max_position_embeddings - before
    limit = positions if max_length is None else max_length
    if not 0 < limit <= positions:
        after = f" after a prefix of {before}" if before else ""
        raise UserError(
            f"max_length={limit}: choose from 1 to the model's {positions} positions{after}"
        )
    for context, continuation in (pair for item in items for pair in item.choices):
        check_ids([*context, *continuation], model.config.vocab_size, model.tokenizer)
    results = [Pending(item, item.name or f"item {i}", limit) for i, item in enumerate(items)]
    rows = [
        row
        for i, result in enumerate(results)
        for row in pack(i, result.texts, longest_row or tokens_per_batch)
    ]
    chosen = range(len(items)) if wanted is None else wanted
    if not rows or not chosen:
        return []
    params, execution, shards = model.params, Execution(), 1
    if mesh is not None:
        shards, execution = row_shards(mesh), execution_over(mesh)
        params = place(params, tree_shardings(params, mesh))
        if adapter is not None:  # once; rows are placed with each batch
            weights = place(adapter.shared, tree_shardings(adapter.shared, mesh))
            adapter = dataclasses.replace(adapter, shared=weights)

    def dispatch(batch: RowBatch) -> tuple[Array, Array]:
        arrays, own = batch.arrays(), adapter and adapter.take_rows(batch.items())
        if mesh is None:
            arrays = jax.device_put(arrays)
        else:
            arrays, own = put_batch(arrays, mesh), place_adapter(own, mesh)
        return score_rows(params, model.config, arrays, own, execution=execution)

    def read(batch: RowBatch, found: tuple[Array, Array]) -> None:
        done = []
        for row, values in batch.split(*map(np.asarray, hosts.gather(found))):
            if results[row.item].add(row.choices, *values) and row.item in asked:
                done.append(row.item)
        if done:
            on_batch(done, [results[i].scores() for i in done])
            progress(len(done))

    pending, asked = None, set(chosen)
    for batch in needed(make_batches(rows, tokens_per_batch, shards, before), asked):
        found = dispatch(batch)
        if pending is not None:  # one batch late: the device never waits for the host
            read(*pending)
        pending = batch, found
    if pending is not None:
        read(*pending)
    return [results[i].scores() for i in chosen]


class Pending:
    """An item whose rows may be scored in several batches."""

    def __init__(self, item: ChoiceItem, name: str, limit: int):
        if not item.choices:
            raise UserError(f"{name} has no choices; give it one or more")
        for choice, (context, continuation) in enumerate(item.choices):
            if not context or not continuation:
                what = "continuation" if context else "context"
                raise UserError(f"{name}: choice {choice} has a {what} without tokens")
            if len(continuation) > limit:
                raise UserError(
                    f"{name}: choice {choice} has {len(continuation)} tokens, more than the "
                    f"{limit} that the model reads; shorten it"
                )
        self.texts = [  # the last token is predicted, never read
            Text([*context, *continuation][-(limit + 1) :], len(continuation))
            for context, continuation in item.choices
        ]
        lengths = [sum(map(len, choice)) for choice in item.choices]
        self.truncated = max(max(lengths) - limit - 1, 0)
        self.context_tokens = max(len(text.ids) - text.predicted for text in self.texts)
        self.missing = sum(text.predicted for text in self.texts)
        self.loglikelihoods = np.zeros(len(self.texts))
        self.greedy = np.ones(len(self.texts), bool)

    def add(self, choices: np.ndarray, loglikelihoods: np.ndarray, greedy: np.ndarray) -> bool:
        """Adds predictions `[P]` of tokens; returns whether the item is complete."""
        np.add.at(self.loglikelihoods, choices, loglikelihoods.astype(np.float64))
        np.logical_and.at(self.greedy, choices, greedy)
        self.missing -= len(choices)
        return self.missing == 0

    def scores(self) -> ChoiceScores:
        return ChoiceScores(self.loglikelihoods, self.greedy, self.truncated, self.context_tokens)
