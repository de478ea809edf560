"""Log-likelihoods of choices behind their contexts, in jitted batches of few shapes.

What lm-evaluation-harness computes with a call of the model for every choice is computed here from
rows that hold an item's choices together (`packing`): their shared context is read once, and only
the positions that predict a choice's tokens go through the head.

Dimensions: N items, C choices of an item, B rows, T time, S shards of a batch, P predictions of a
shard, L layers, D model, V vocabulary.
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
from lorax_gen.inference.packing import RowBatch, Text, make_batches, pack
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
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.attention import visible
from lorax_gen.models.decoder import Array, DecoderConfig, Execution, Params
from lorax_gen.models.model import Model

TOKENS_PER_BATCH = 4096
HEAD_CHUNK = 512  # predictions of a shard whose logits exist at a time: [chunk, V] is large

Ids = list[int]


@dataclasses.dataclass(frozen=True)
class ChoiceItem:
    """One question tokenised: for each choice the ids of its context and of its continuation."""

    choices: tuple[tuple[Ids, Ids], ...]
    name: str = ""
    """What errors call it."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChoiceScores:
    """What a model thinks of an item's choices.

    Attributes:
      loglikelihoods: `[C]` float64, summed over the tokens of each continuation.
      greedy: `[C]` bool: greedy decoding would write the continuation.
      truncated: tokens cut off on the left of the longest choice, where the model is too short.
      context_tokens: what is read before the continuation, of the choice with most of them.
    """

    loglikelihoods: np.ndarray
    greedy: np.ndarray
    truncated: int
    context_tokens: int


# --- text to tokens ------------------------------------------------------------------------------


def encode_pair(tokenizer: Any, context: str, continuation: str, bos: bool) -> tuple[Ids, Ids]:
    """Ids of a context and of its continuation, by the rule of lm-evaluation-harness.

    The continuation is what both, encoded together, have behind the token count of the context
    alone, whose trailing spaces belong to the continuation. With `bos` one BOS stands in front. An
    empty context is BOS, or the end of text in tokenizers that have none.
    """
    (pair,) = encode_pairs(tokenizer, [(context, continuation)], bos)
    return pair


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], bos: bool
) -> list[tuple[Ids, Ids]]:
    """As `encode_pair`, for many at a time: each text is tokenised once."""
    stripped = [context.rstrip() for context, _ in pairs]
    whole = [context + continuation for context, continuation in pairs]
    texts = list(dict.fromkeys([*stripped, *whole]))
    ids_of = dict(zip(texts, encode_texts(tokenizer, texts), strict=True))
    first = tokenizer.bos_token_id
    if bos and first is None:
        raise UserError("this tokenizer has no BOS token to put in front of a text")
    prefix = tokenizer.eos_token_id if first is None else first

    def ids(text: str) -> Ids:
        found = ids_of[text]
        return [first, *found] if bos and found[:1] != [first] else found

    out = []
    for context, together in zip(stripped, whole, strict=True):
        if context:
            out.append((ids(context), ids(together)[len(ids(context)) :]))
        else:
            found = ids_of[together]
            out.append(([prefix], found[1:] if found[:1] == [prefix] else found))
    return out


def encode_texts(tokenizer: Any, texts: list[str]) -> list[Ids]:
    """Ids of texts, with nothing put around them."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def encode_item(
    model: Model, contexts: Sequence[str], continuations: Sequence[str], name: str = ""
) -> ChoiceItem:
    """One question tokenised; see `encode_items`."""
    (item,) = encode_items(model, [(contexts, continuations)], [name])
    return item


def encode_items(
    model: Model,
    questions: Sequence[tuple[Sequence[str], Sequence[str]]],
    names: Sequence[str] | None = None,
) -> list[ChoiceItem]:
    """Questions tokenised: of each the contexts, one for all choices or one for each, and what
    continues them in each choice.

    Raises UserError, which calls the item by its name, where a choice has no tokens.
    """
    pairs, counts = [], []
    for contexts, continuations in questions:
        contexts = contexts if len(contexts) > 1 else list(contexts) * len(continuations)
        pairs += zip(contexts, continuations, strict=True)
        counts.append(len(continuations))
    encoded, items = iter(encode_pairs(model.tokenizer, pairs, model.bos)), []
    for i, count in enumerate(counts):
        name = names[i] if names else f"item {i}"
        items.append(ChoiceItem(tuple(next(encoded) for _ in range(count)), name))
        for choice, (_, continuation) in enumerate(items[-1].choices):
            if not continuation:
                text = questions[i][1][choice]
                raise UserError(
                    f"{name}: choice {choice} ({text!r}) has no tokens to score; give it a text"
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
    """Log-likelihoods `[S, P]` fp32 of targets, and whether each is the likeliest token.

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
    places, targets = batch["places"], batch["targets"]
    shards, count = places.shape
    hidden = hidden.reshape(shards, -1, hidden.shape[-1])  # a shard gathers from its own rows
    hidden = jnp.take_along_axis(hidden, places[:, :, None], axis=1)

    def score(hidden: Array, targets: Array) -> tuple[Array, Array]:
        scores = decoder.logits(params, config, hidden)
        found = jnp.take_along_axis(scores, targets[:, :, None], axis=-1)[:, :, 0]
        likeliest = jnp.argmax(scores, axis=-1)
        return found - jax.nn.logsumexp(scores, axis=-1), likeliest == targets

    if count <= HEAD_CHUNK:
        return score(hidden, targets)
    padding = -count % HEAD_CHUNK

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(shards, -1, HEAD_CHUNK, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(lambda part: score(*part), (chunks(hidden), chunks(targets)))
    return tuple(x.swapaxes(0, 1).reshape(shards, -1)[:, :count] for x in parts)


def score_items(
    model: Model,
    items: Sequence[ChoiceItem],
    *,
    adapter: Adapter | None = None,
    max_length: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    longest_row: int | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda items: None,
    on_batch: Callable[[list[int], list[ChoiceScores]], None] = lambda indices, scores: None,
) -> list[ChoiceScores]:
    """Scores of items, in their order.

    Args:
      adapter: see `models.adapter`; of its rows `[L, N, ...]`, which may stay on the host, there is
        one for each item.
      max_length: most tokens that the model reads of a choice; what is more is cut off on the left.
        None: as many as it has positions.
      tokens_per_batch: B T at most, where a single row is not longer.
      longest_row: choices that do not fit into a row of this length get one each; None: a batch.
      mesh: rows are split over its batch axes, weights as training splits them; None: no mesh.
      progress: called with the number of items finished since the last call.
      on_batch: called with finished items, their indices and scores, while the device computes the
        next batch.

    Raises UserError where an item has no choices, a context or a continuation has no tokens, a
    continuation is longer than the model, or `max_length` is.
    """
    positions = model.config.max_position_embeddings
    limit = positions if max_length is None else max_length
    if not 0 < limit <= positions:
        raise UserError(f"max_length={limit}: choose from 1 to the model's {positions} positions")
    results = [Pending(item, item.name or f"item {i}", limit) for i, item in enumerate(items)]
    rows = [
        row
        for i, result in enumerate(results)
        for row in pack(i, result.texts, longest_row or tokens_per_batch)
    ]
    if not rows:
        return []
    params, execution, shards = model.params, Execution(), 1
    if mesh is not None:
        shards, execution = row_shards(mesh), execution_over(mesh)
        params = place(params, tree_shardings(params, mesh))
        if adapter is not None:  # once; rows follow with each batch
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
            if results[row.item].add(row.choices, *values):
                done.append(row.item)
        if done:
            on_batch(done, [results[i].scores() for i in done])
            progress(len(done))

    before = None
    for batch in make_batches(rows, tokens_per_batch, shards):
        found = dispatch(batch)
        if before is not None:  # one batch late: the device never waits for the host
            read(*before)
        before = batch, found
    read(*before)
    return [result.scores() for result in results]


class Pending:
    """An item whose rows may come back in several batches."""

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

    def add(self, choices: np.ndarray, loglikelihoods: np.ndarray, right: np.ndarray) -> bool:
        """Takes predictions `[P]` of tokens in; whether these were the last ones."""
        np.add.at(self.loglikelihoods, choices, loglikelihoods.astype(np.float64))
        np.logical_and.at(self.greedy, choices, right)
        self.missing -= len(choices)
        return self.missing == 0

    def scores(self) -> ChoiceScores:
        return ChoiceScores(self.loglikelihoods, self.greedy, self.truncated, self.context_tokens)
