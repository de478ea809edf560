"""Rows of tokens for texts to be scored: what texts share is read once, and few shapes hold all.

The texts of an item, each a context and a choice behind it, mostly begin alike. A row holds the
beginning once and behind it what each of them goes on with:

    tokens      the quick brown | fox | dog ran
    positions    0    1     2      3     3   4
    owners       0    0     0      1     2   2       0: all texts; c: the c-th of the row

A token sees what stands before it in its own text, so nothing tells a text that it has company.

Dimensions: B rows, T time, S shards of a batch (devices that rows are split over), P predictions of
a shard.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

MULTIPLE = 8  # of which lengths of rows are


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids, the last `predicted` of which are to be predicted from what is before them."""

    ids: Sequence[int]
    predicted: int


@dataclasses.dataclass(frozen=True)
class Row:
    """Texts of one item.

    Attributes:
      item: which item; `choices: [P]` says for each prediction which of its texts it is of.
      tokens, positions, owners: `[T]`, as in the module's docstring.
      places, targets: `[P]`: in the row, where a token is predicted, and which.
    """

    item: int
    tokens: np.ndarray
    positions: np.ndarray
    owners: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    choices: np.ndarray

    @property
    def branched(self) -> bool:
        """Whether more than one text goes on behind the beginning; if not, causality will do."""
        return len(np.unique(self.owners[self.owners > 0])) > 1


def pack(item: int, texts: Sequence[Text], longest: int) -> list[Row]:
    """An item's texts in one row, or in one row each where that would be longer than `longest`."""
    row = make_row(item, range(len(texts)), texts)
    if len(row.tokens) <= longest or len(texts) == 1:
        return [row]
    return [make_row(item, [choice], [text]) for choice, text in enumerate(texts)]


def make_row(item: int, choices: Sequence[int], texts: Sequence[Text]) -> Row:
    """One row of texts, which are the `choices` of an item. No text's last token is ever read."""
    read = [list(text.ids[:-1]) for text in texts]
    shared = common(read)
    tokens, positions, owners = [read[0][:shared]], [np.arange(shared)], [np.zeros(shared, int)]
    places, end = [], shared
    for owner, (ids, text) in enumerate(zip(read, texts, strict=True), 1):
        own = len(ids) - shared
        tokens.append(ids[shared:])
        positions.append(np.arange(shared, len(ids)))
        owners.append(np.full(own, owner))
        place = np.arange(len(ids) - text.predicted, len(ids))
        places.append(np.where(place < shared, place, place - shared + end))
        end += own
    predicted = [text.predicted for text in texts]
    return Row(
        item,
        *(np.concatenate(part).astype(np.int32) for part in (tokens, positions, owners, places)),
        targets=np.concatenate([text.ids[-text.predicted :] for text in texts]).astype(np.int32),
        choices=np.repeat(np.asarray(choices), predicted),
    )


def common(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts have in common at their beginning."""
    columns = enumerate(zip(*texts, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, texts)))


# --- batches -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """Rows of a batch, of which some shards may have fewer than their share, and its shape."""

    shards: tuple[tuple[Row, ...], ...]
    rows: int  # B
    length: int  # T
    predictions: int  # P

    def arrays(self) -> dict[str, np.ndarray]:
        """`tokens: [B, T]`; `places`, `targets: [S, P]`, places counted through a shard's rows.

        Where a row is branched, also `positions` and `owners: [B, T]`.
        """
        share = self.rows // len(self.shards)
        over_rows, over_shards = (self.rows, self.length), (len(self.shards), self.predictions)
        out = {name: np.zeros(over_rows, np.int32) for name in ("tokens", "positions")}
        out["owners"] = np.full(over_rows, -1, np.int32)
        out |= {name: np.zeros(over_shards, np.int32) for name in ("places", "targets")}
        for s, rows in enumerate(self.shards):
            start = 0
            for i, row in enumerate(rows):
                for name in ("tokens", "positions", "owners"):
                    out[name][s * share + i, : len(row.tokens)] = getattr(row, name)
                part = slice(start, start + len(row.targets))
                out["places"][s, part] = row.places + i * self.length
                out["targets"][s, part] = row.targets
                start = part.stop
        if not any(row.branched for rows in self.shards for row in rows):
            del out["positions"], out["owners"]
        return out

    def items(self) -> np.ndarray:
        """`[B]`: the item of each row; rows that fill up repeat one."""
        share = self.rows // len(self.shards)
        filled = [
            [row.item for row in rows] + [self.shards[0][0].item] * (share - len(rows))
            for rows in self.shards
        ]
        return np.concatenate(filled)

    def split(self, *values: np.ndarray) -> Iterator[tuple[Row, list[np.ndarray]]]:
        """Each row with its part of values `[S, P]`."""
        for s, rows in enumerate(self.shards):
            start = 0
            for row in rows:
                stop = start + len(row.targets)
                yield row, [value[s, start:stop] for value in values]
                start = stop


def make_batches(rows: Sequence[Row], tokens_per_batch: int, shards: int = 1) -> list[RowBatch]:
    """All rows in batches of few shapes, the longest first: what does not fit fails at once."""
    lengths = np.array([len(row.tokens) for row in rows])
    counts = np.array([len(row.targets) for row in rows])
    batches = []
    for length, share, parts in deal(lengths, counts, tokens_per_batch, shards):
        predictions = max(int(counts[group].sum()) for groups in parts for group in groups)
        for groups in parts:
            own = tuple(tuple(rows[i] for i in group) for group in groups)
            batches.append(RowBatch(own, share * shards, length, predictions))
    return batches


def deal(
    lengths: np.ndarray, weights: np.ndarray, tokens_per_batch: int, shards: int = 1
) -> Iterator[tuple[int, int, list[list[np.ndarray]]]]:
    """Deals rows out to batches: yields `(length, share, parts)`, the longest first.

    `parts` are the batches whose rows are padded to `length`, one of `padded_lengths`; of each, the
    indices of the rows of every shard, at most `share` of them and all of about the same weight.
    """
    sizes = [0, *padded_lengths(lengths, tokens_per_batch)]
    for shorter, length in reversed(list(itertools.pairwise(sizes))):
        chosen = np.flatnonzero((lengths > shorter) & (lengths <= length))
        chosen = chosen[np.argsort(-weights[chosen], kind="stable")]
        most = max(tokens_per_batch // length // shards, 1)  # rows of a shard
        count = -(-len(chosen) // (most * shards))
        groups = [chosen[i :: count * shards] for i in range(count * shards)]
        yield length, len(groups[0]), [groups[i::count] for i in range(count)]


def padded_lengths(lengths: np.ndarray, tokens_per_batch: int) -> list[int]:
    """The few lengths that rows are padded to, ascending.

    Each is one more program to compile. It is worth it where it saves a batch of padding, and one
    part in fifty of all tokens.
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
