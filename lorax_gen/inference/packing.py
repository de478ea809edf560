"""Rows of tokens for texts to be scored: a shared prefix is read once, and batches have few shapes.

The texts of an item, each a context and a choice after it, mostly share a prefix. A row holds the
prefix once, and after it the rest of each text:

    tokens      the quick brown | fox | dog ran
    positions    0    1     2      3     3   4
    owners       0    0     0      1     2   2       0: all texts; c: the c-th of the row

A token attends to what is before it in its own text only, so packing does not change its scores.

Dims beyond the legend (`lorax_gen.method`): S shards of a batch, P predictions of a shard.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence

import numpy as np

MULTIPLE = 8  # lengths of rows are padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids, the last `predicted` of which are predicted from those before them."""

    ids: Sequence[int]
    predicted: int


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """Texts of one item.

    Attributes:
      item: index of the item; `choices: [P]` are the indices of the texts of each prediction.
      tokens, positions, owners: `[T]`, as in the module's docstring.
      indices, targets: `[P]`: index in the row whose output predicts a token, and that token.
    """

    item: int
    tokens: np.ndarray
    positions: np.ndarray
    owners: np.ndarray
    indices: np.ndarray
    targets: np.ndarray
    choices: np.ndarray

    @property
    def branched(self) -> bool:
        """Whether more than one text follows the prefix; if not, the causal mask suffices."""
        return len(np.unique(self.owners[self.owners > 0])) > 1


def pack(item: int, texts: Sequence[Text], longest: int) -> list[PackedRow]:
    """An item's texts in one row, or in one row each where that would be longer than `longest`."""
    row = make_row(item, range(len(texts)), texts)
    if len(row.tokens) <= longest or len(texts) == 1:
        return [row]
    return [make_row(item, [choice], [text]) for choice, text in enumerate(texts)]


def make_row(item: int, choices: Sequence[int], texts: Sequence[Text]) -> PackedRow:
    """One row of the texts of an item's `choices`. The last token of a text is never read."""
    read = [list(text.ids[:-1]) for text in texts]
    shared = common(read)
    tokens, positions, owners = [read[0][:shared]], [np.arange(shared)], [np.zeros(shared, int)]
    indices, end = [], shared
    for owner, (ids, text) in enumerate(zip(read, texts, strict=True), 1):
        own = len(ids) - shared
        tokens.append(ids[shared:])
        positions.append(np.arange(shared, len(ids)))
        owners.append(np.full(own, owner))
        index = np.arange(len(ids) - text.predicted, len(ids))
        indices.append(np.where(index < shared, index, index - shared + end))
        end += own
    predicted = [text.predicted for text in texts]
    joined = lambda parts: np.concatenate(parts).astype(np.int32)  # noqa: E731
    return PackedRow(
        item,
        joined(tokens),
        joined(positions),
        joined(owners),
        joined(indices),
        targets=joined([text.ids[-text.predicted :] for text in texts]),
        choices=np.repeat(np.asarray(choices), predicted),
    )


def common(texts: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix of all texts."""
    columns = enumerate(zip(*texts, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, texts)))


# --- batches -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """The rows of a batch by shard, some of which may have fewer than B / S, and its shape."""

    shards: tuple[tuple[PackedRow, ...], ...]
    rows: int  # B
    length: int  # T
    predictions: int  # P

    def arrays(self) -> dict[str, np.ndarray]:
        """`tokens: [B, T]`; `indices`, `targets: [S, P]`, indices into a shard's flattened rows.

        If a row is branched, also `positions` and `owners: [B, T]`.
        """
        share = self.rows // len(self.shards)
        over_rows, over_shards = (self.rows, self.length), (len(self.shards), self.predictions)
        out = {name: np.zeros(over_rows, np.int32) for name in ("tokens", "positions")}
        out["owners"] = np.full(over_rows, -1, np.int32)
        out |= {name: np.zeros(over_shards, np.int32) for name in ("indices", "targets")}
        for s, rows in enumerate(self.shards):
            start = 0
            for i, row in enumerate(rows):
                for name in ("tokens", "positions", "owners"):
                    out[name][s * share + i, : len(row.tokens)] = getattr(row, name)
                part = slice(start, start + len(row.targets))
                out["indices"][s, part] = row.indices + i * self.length
                out["targets"][s, part] = row.targets
                start = part.stop
        if not any(row.branched for rows in self.shards for row in rows):
            del out["positions"], out["owners"]
        return out

    def items(self) -> np.ndarray:
        """`[B]`: the item of each row; padding rows repeat one."""
        share = self.rows // len(self.shards)
        filled = [
            [row.item for row in rows] + [self.shards[0][0].item] * (share - len(rows))
            for rows in self.shards
        ]
        return np.concatenate(filled)

    def split(self, *values: np.ndarray) -> Iterator[tuple[PackedRow, list[np.ndarray]]]:
        """Each row with its part of values `[S, P]`."""
        for s, rows in enumerate(self.shards):
            start = 0
            for row in rows:
                stop = start + len(row.targets)
                yield row, [value[s, start:stop] for value in values]
                start = stop


def make_batches(
    rows: Sequence[PackedRow], tokens_per_batch: int, shards: int = 1, before: int = 0
) -> list[RowBatch]:
    """All rows in batches of few shapes, the longest first, so that one too large fails at once.
    `before` are the positions of a prefix, which count as tokens of every row."""
    lengths = np.array([len(row.tokens) for row in rows])
    counts = np.array([len(row.targets) for row in rows])
    batches = []
    for length, share, parts in deal(lengths, counts, tokens_per_batch, shards, before):
        predictions = max(int(counts[group].sum()) for groups in parts for group in groups)
        for groups in parts:
            own = tuple(tuple(rows[i] for i in group) for group in groups)
            batches.append(RowBatch(own, share * shards, length, predictions))
    return batches


def needed(batches: Sequence[RowBatch], wanted: Collection[int]) -> list[RowBatch]:
    """The batches that hold a row of one of the wanted items."""
    return [
        batch
        for batch in batches
        if any(row.item in wanted for rows in batch.shards for row in rows)
    ]


def deal(
    lengths: np.ndarray,
    weights: np.ndarray,
    tokens_per_batch: int,
    shards: int = 1,
    before: int = 0,
) -> Iterator[tuple[int, int, list[list[np.ndarray]]]]:
    """Assigns rows to batches: yields `(length, share, parts)`, the longest first.

    `parts` are the batches whose rows are padded to `length`, one of `padded_lengths`. Each lists
    the row indices of every shard: at most `share` of them, of about equal total weight. `before`
    are further tokens of every row.
    """
    sizes = [0, *padded_lengths(lengths, tokens_per_batch)]
    for shorter, length in reversed(list(itertools.pairwise(sizes))):
        chosen = np.flatnonzero((lengths > shorter) & (lengths <= length))
        chosen = chosen[np.argsort(-weights[chosen], kind="stable")]
        most = max(tokens_per_batch // (before + length) // shards, 1)  # rows of a shard
        count = -(-len(chosen) // (most * shards))
        groups = [chosen[i :: count * shards] for i in range(count * shards)]
        yield length, len(groups[0]), [groups[i::count] for i in range(count)]


def padded_lengths(lengths: np.ndarray, tokens_per_batch: int) -> list[int]:
    """The few lengths that rows are padded to, ascending.

    Each is one more program to compile, worth it if it saves a batch of padding and a fiftieth of
    all tokens.
    """
    sizes, counts = np.unique(-(-lengths // MULTIPLE) * MULTIPLE, return_counts=True)
    worth = max(tokens_per_batch, int(lengths.sum()) // 50)
    rows = np.concatenate([[0], np.cumsum(counts)])
    best: list[tuple[int, list[int]]] = [(0, [])]  # for the first 0, 1, 2 ... sizes
    for j, size in enumerate(sizes.tolist(), 1):
        ways = (
            (best[i][0] + int(rows[j] - rows[i]) * size + worth, [*best[i][1], size])
            for i in range(j)
        )
        best.append(min(ways))
    return best[-1][1]
