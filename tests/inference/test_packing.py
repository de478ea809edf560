"""Rows hold all texts, read what they share once, and come in few shapes."""

import numpy as np
import pytest

from lorax_gen.inference.packing import MULTIPLE, Text, make_batches, pack, padded_lengths


def random_texts(rng, choices=4):
    """Texts as of a question: one context, choices that may begin alike."""
    context = rng.integers(0, 9, rng.integers(1, 60)).tolist()
    count = rng.integers(1, choices + 1)
    behind = [rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(count)]
    return [Text([*context, *choice], len(choice)) for choice in behind]


def unpacked(row):
    """`{choice: (tokens that are read, [(position, target), ...])}` of a row, by its owners."""
    found = {}
    for owner, choice in enumerate(dict.fromkeys(row.choices.tolist()), 1):
        own = (row.owners == 0) | (row.owners == owner)
        indices = row.indices[row.choices == choice]
        assert own[indices].all()
        predictions = zip(row.positions[indices], row.targets[row.choices == choice], strict=True)
        np.testing.assert_array_equal(row.positions[own], np.arange(own.sum()))
        found[choice] = row.tokens[own].tolist(), list(predictions)
    return found


def test_a_row_holds_the_common_beginning_once():
    the, quick, brown, fox, dog, ran = range(6)
    texts = [Text([the, quick, brown, fox, ran], 2), Text([the, quick, brown, dog, ran, fox], 3)]
    (row,) = pack(7, texts, longest=100)
    assert row.item == 7
    assert row.tokens.tolist() == [the, quick, brown, fox, dog, ran]
    assert row.positions.tolist() == [0, 1, 2, 3, 3, 4]
    assert row.owners.tolist() == [0, 0, 0, 1, 2, 2]
    assert row.indices.tolist() == [2, 3, 2, 4, 5]
    assert row.targets.tolist() == [fox, ran, dog, ran, fox]
    assert row.choices.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("longest", [1000, 40])
def test_every_text_can_be_read_out_of_its_row(longest):
    rng = np.random.default_rng(0)
    split = 0
    for _ in range(50):
        texts = random_texts(rng)
        rows = pack(0, texts, longest)
        split += len(rows) > 1
        found = {choice: value for row in rows for choice, value in unpacked(row).items()}
        for choice, text in enumerate(texts):
            last = range(len(text.ids) - text.predicted, len(text.ids))
            expected = [(place - 1, text.ids[place]) for place in last]
            assert found[choice] == (list(text.ids[:-1]), expected)
    assert (split > 0) == (longest == 40)


def test_choices_of_one_token_need_no_branch():
    context = [5, 3, 8]
    (row,) = pack(0, [Text([*context, 1], 1), Text([*context, 2], 1)], longest=100)
    assert row.tokens.tolist() == context and not row.branched
    (row,) = pack(0, [Text([*context, 1], 1), Text([*context, 2, 2], 2)], longest=100)
    assert row.tokens.tolist() == [*context, 2] and not row.branched
    (row,) = pack(0, [Text([*context, 1, 1], 2), Text([*context, 2, 2], 2)], longest=100)
    assert row.branched


# --- batches -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(1)
    return [row for i in range(203) for row in pack(i, random_texts(rng), longest=50)]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("tokens", [64, 500])
def test_batches_hold_every_row_once_in_few_shapes(rows, shards, tokens):
    batches = make_batches(rows, tokens, shards)
    held = [row for batch in batches for shard in batch.shards for row in shard]
    assert sorted(map(id, held)) == sorted(map(id, rows))
    lengths = [batch.length for batch in batches]
    assert lengths == sorted(lengths, reverse=True)  # what is too long fails at once
    shapes = {}
    for batch in batches:
        assert len(batch.shards) == shards and batch.rows % shards == 0
        assert batch.rows * batch.length <= max(tokens, shards * batch.length)
        arrays = batch.arrays()
        shape = {name: value.shape for name, value in arrays.items() if name != "owners"}
        shapes.setdefault(batch.length, set()).add((shape["tokens"], shape["indices"]))
        assert batch.items().shape == (batch.rows,)
    assert all(len(of_length) == 1 for of_length in shapes.values())
    assert len(shapes) <= 7


def test_arrays_of_a_batch_are_its_rows_padded(rows):
    for batch in make_batches(rows, 500, shards=3):
        arrays = batch.arrays()
        flat = arrays["tokens"].reshape(3, -1)
        items = iter(batch.items())
        count = 0
        for row, (indices, targets) in batch.split(arrays["indices"], arrays["targets"]):
            shard = next(s for s, own in enumerate(batch.shards) if any(r is row for r in own))
            np.testing.assert_array_equal(targets, row.targets)
            np.testing.assert_array_equal(flat[shard][indices], row.tokens[row.indices])
            count += 1
        assert count == sum(map(len, batch.shards))
        share = batch.rows // 3
        for shard in batch.shards:
            own = [next(items) for _ in range(share)]
            assert own[: len(shard)] == [row.item for row in shard]


def test_lengths_are_worth_their_programs():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1500, 10_000)
    sizes = padded_lengths(lengths, tokens_per_batch=4096)
    assert sizes == sorted(sizes) and all(size % MULTIPLE == 0 for size in sizes)
    assert 2 < len(sizes) <= 10
    padded = np.array(sizes)[np.searchsorted(sizes, lengths)]
    assert (padded >= lengths).all() and padded.sum() < 1.2 * lengths.sum()
    assert len(padded_lengths(lengths[:20], tokens_per_batch=20_000)) == 1
    assert padded_lengths(np.full(9, 17), tokens_per_batch=1) == [24]
