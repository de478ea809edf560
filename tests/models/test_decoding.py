"""Decoding with a cache writes what recomputing everything for each token would write."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.models import decoder, decoding
from lorax_gen.models.decoder import kernel_shapes
from lorax_gen.models.decoding import Sampling, choose, restrict
from tests.models.configs import CONFIGS
from tests.tiny import adapter_of

B, T, N, R = 4, 6, 5, 3
LENGTHS = np.array([6, 1, 4, 3], np.int32)
LLAMA = CONFIGS["llama"]
# Caps that bite, and a window that most rows outgrow.
GEMMA2 = dataclasses.replace(
    CONFIGS["gemma2"], attn_logit_softcapping=0.5, final_logit_softcapping=1.0, sliding_window=3
)
QWEN2 = CONFIGS["qwen2-window"]
V, L = LLAMA.vocab_size, LLAMA.num_hidden_layers


def random_lora(config, *lead):
    rng = np.random.default_rng(1)
    return {
        name: {
            "a": rng.normal(0, d_in**-0.5, (*lead, d_in, R)).astype(np.float32),
            "b": rng.normal(0, 0.5, (*lead, R, d_out)).astype(np.float32),
        }
        for name, (d_in, d_out) in kernel_shapes(config).items()
    }


CASES = {
    "plain": (LLAMA, None),
    "shared LoRA": (LLAMA, random_lora(LLAMA, L)),
    "LoRA per example": (LLAMA, random_lora(LLAMA, L, B)),
    "gemma2": (GEMMA2, None),
    "qwen2": (QWEN2, random_lora(QWEN2, L, B)),
}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


@pytest.fixture(scope="module")
def params_of(random_params):
    """Parameters of a config, `layers` as the list that decoding wants."""

    def make(config):
        params = random_params(config)
        return {**params, "layers": decoder.unstack(params["layers"], L)}

    return make


@pytest.fixture(scope="module")
def params(params_of):
    return params_of(LLAMA)


# As `lorax_gen.models.decoding` has them, but compiled once for whatever the stop tokens are.
generate = partial(jax.jit, static_argnames=("config", "max_new_tokens"))(
    decoding.generate_tokens.__wrapped__
)
prefill = partial(jax.jit, static_argnames=("config", "slots"))(decoding.prefill)
advance = partial(jax.jit, static_argnames=("config", "steps"))(decoding.advance)


def stops(*ids):
    """Stop tokens as an array of three, filled up with one that no row ever writes."""
    return np.array([*ids, V, V, V][:3], np.int32)


def decode(params, tokens, lengths=LENGTHS, *, config=LLAMA, **options):
    options = {"max_new_tokens": N, "stop_ids": stops()} | options
    return np.asarray(generate(params, config, tokens, lengths, **options))


@partial(jax.jit, static_argnames="config")
def next_logits(params, config, tokens, lengths, lora):
    """Logits `[B, V]` behind `lengths` tokens, with no cache."""
    hidden = decoder.hidden_states(params, config, tokens, adapter=adapter_of(lora))
    return decoder.logits(params, config, hidden[jnp.arange(B), lengths - 1])


def decode_without_cache(params, config, tokens, lora=None, sampling=None, key=None):
    """What decoding writes, `[B, N]`: the whole text is read again for each token."""
    text = np.concatenate([tokens, np.zeros((B, N), np.int32)], axis=1)
    for step in range(N):
        scores = next_logits(params, config, text, LENGTHS + step, lora)
        text[np.arange(B), LENGTHS + step] = choose(scores, sampling, key, step)
    return np.stack([row[n : n + N] for row, n in zip(text, LENGTHS, strict=True)])


# --- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_cache_changes_no_token_of_rows_of_any_length(name, random_params, params_of, tokens):
    config, lora = CASES[name]
    expected = decode_without_cache(random_params(config), config, tokens, lora)
    found = decode(params_of(config), tokens, config=config, adapter=adapter_of(lora))
    np.testing.assert_array_equal(found, expected)


def test_nor_does_it_change_what_is_drawn(random_params, params_of, tokens):
    """Of logits that are capped, which greedy decoding could not tell from logits that are not."""
    sampling, key = Sampling(0.7, 20, 0.9), jax.random.key(3)
    expected = decode_without_cache(random_params(GEMMA2), GEMMA2, tokens, None, sampling, key)
    found = decode(params_of(GEMMA2), tokens, config=GEMMA2, sampling=sampling, key=key)
    np.testing.assert_array_equal(found, expected)


def test_the_cases_of_this_file_differ_in_what_is_written(params_of, random_params, tokens):
    """So that the matches above say something about LoRA, windows and caps."""
    plain, shared, own = (
        decode(params_of(LLAMA), tokens, adapter=adapter_of(CASES[name][1]))
        for name in ("plain", "shared LoRA", "LoRA per example")
    )
    assert (plain != shared).any()
    assert (shared != own).any()
    for config, changes in (
        (GEMMA2, {"attn_logit_softcapping": None}),
        (GEMMA2, {"sliding_window": T + N}),
        (QWEN2, {"sliding_window": T + N}),
    ):
        params, other = random_params(config), dataclasses.replace(config, **changes)
        written = decode_without_cache(params, config, tokens)
        assert (decode_without_cache(params, other, tokens) != written).any()


def test_layers_may_be_a_list_or_stacked(random_params, params, tokens):
    stacked = decode(random_params(LLAMA), tokens)
    np.testing.assert_array_equal(stacked, decode(params, tokens))


def test_what_stands_behind_a_rows_length_changes_nothing(params, tokens):
    padded = tokens.copy()
    padded[np.arange(T) >= LENGTHS[:, None]] = V - 1
    assert (padded != tokens).any()
    np.testing.assert_array_equal(decode(params, padded), decode(params, tokens))


# --- ends and chunks -----------------------------------------------------------------------------


def test_each_row_stops_at_its_first_stop_token(params, tokens):
    free = decode(params, tokens)
    written = np.unique(free).tolist()
    for ids in [(), *((i,) for i in written), *itertools.pairwise(written)]:
        found = decode(params, tokens, stop_ids=stops(*ids))
        for row, whole in zip(found, free, strict=True):
            ends = np.flatnonzero(np.isin(whole, ids))
            end = ends[0] if len(ends) else N - 1
            np.testing.assert_array_equal(row, [*whole[:end], *[whole[end]] * (N - end)])


def test_one_new_token_is_the_first_of_many(params, tokens):
    one = decode(params, tokens, max_new_tokens=1)
    np.testing.assert_array_equal(one, decode(params, tokens)[:, :1])


@pytest.mark.parametrize("sampling", [None, Sampling(1.5)], ids=["greedy", "sampled"])
def test_chunks_write_what_one_program_writes(sampling, params, tokens):
    """Chunk by chunk, with cache slots to spare and past the end of every row."""
    key = jax.random.key(0)
    free = decode(params, tokens, sampling=sampling, key=key)
    for ids in ((), free[:, 1][:3], free[:2, 3]):
        options = {"stop_ids": stops(*ids), "sampling": sampling, "key": key}
        state = prefill(params, LLAMA, tokens, LENGTHS, slots=T + N + 8, **options)
        chunks = [state.token[:, None]]
        for _ in range((N - 1) // 2):
            state, more = advance(params, LLAMA, state, steps=2, **options)
            chunks.append(more)
        expected = decode(params, tokens, **options)
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected)
        np.testing.assert_array_equal(
            state.finished, np.isin(expected, ids).any(1) if len(ids) else [False] * B
        )


def test_no_more_is_computed_once_all_rows_are_finished(params, tokens):
    state = prefill(params, LLAMA, tokens, LENGTHS, slots=T + N, stop_ids=stops())
    state = state._replace(finished=np.array([True] * B))
    after, more = advance(params, LLAMA, state, steps=2, stop_ids=stops())
    assert int(after.step) == int(state.step) == 1
    np.testing.assert_array_equal(more, np.stack([state.token] * 2, axis=1))


# --- what may be drawn ---------------------------------------------------------------------------


def numpy_restrict(row, top_k, top_p):
    """The tokens that may be drawn of one row of logits, likeliest first, one after the other."""
    order = sorted(range(len(row)), key=lambda i: -row[i])[:top_k]
    weights = np.exp(np.asarray(row, np.float64)[order] - max(row))
    kept, mass = [], 0.0
    for token, share in zip(order, weights / weights.sum(), strict=True):
        if kept and top_p is not None and mass >= top_p:
            break
        kept.append(token)
        mass += share
    return kept


RESTRICTIONS = [
    (None, None), (1, None), (7, None), (1000, None), (None, 1e-6), (None, 0.4), (None, 0.95),
    (5, 0.6), (20, 0.9), (1, 0.5),
]  # fmt: skip


@pytest.fixture(scope="module")
def scores():
    """Logits `[rows, 50]` from nearly even to nearly certain."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(12, 50)) * np.linspace(0.1, 8, 12)[:, None]).astype(np.float32)


@pytest.mark.parametrize("top_k, top_p", RESTRICTIONS)
def test_the_likeliest_tokens_are_kept_as_they_are(top_k, top_p, scores):
    found = np.asarray(restrict(scores, top_k, top_p))
    for row, kept in zip(scores, found, strict=True):
        expected = np.full_like(row, -np.inf)
        tokens = numpy_restrict(row, top_k, top_p)
        expected[tokens] = row[tokens]
        np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("top_k, top_p", RESTRICTIONS)
def test_they_are_those_that_transformers_keeps(top_k, top_p, scores):
    torch = pytest.importorskip("torch")
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    expected = torch.tensor(scores)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    np.testing.assert_array_equal(restrict(scores, top_k, top_p), expected.numpy())


def test_ties_with_the_last_token_kept_stay():
    scores = np.array([1.0, 3.0, 2.0, 2.0, 0.0], np.float32)
    expected = np.array([-np.inf, 3.0, 2.0, 2.0, -np.inf], np.float32)
    np.testing.assert_array_equal(restrict(scores, top_k=2), expected)
    np.testing.assert_array_equal(restrict(scores, top_p=0.6), expected)


# --- drawing -------------------------------------------------------------------------------------


def chi_squared(counts, shares):
    """Pearson's statistic; about as large as there are cells where the shares are right."""
    expected = counts.sum() * shares
    return np.sum((counts - expected) ** 2 / expected)


def test_tokens_are_drawn_as_often_as_the_softmax_says():
    """At right shares the statistic has a mean of 4; hardly one seed in ten million exceeds 40."""
    logits = np.array([0.3, 1.9, -4.0, 0.9, 1.2, -0.2, 0.7, -3.0], np.float32)
    sampling = Sampling(0.7, top_k=7, top_p=0.97)

    def shares(temperature):
        kept = [1, 4, 3, 6, 0]
        assert numpy_restrict(logits / 0.7, 7, 0.97) == kept
        weights = np.zeros(len(logits))
        weights[kept] = np.exp(np.float64(logits[kept]) / temperature)
        return weights / weights.sum()

    rows, steps = 64, 256
    draw = jax.jit(
        jax.vmap(
            lambda step: choose(jnp.tile(logits, (rows, 1)), sampling, jax.random.key(0), step)
        )
    )
    counts = np.bincount(np.ravel(draw(jnp.arange(steps))), minlength=len(logits))
    drawn = shares(0.7) > 0
    assert counts[~drawn].sum() == 0
    assert chi_squared(counts[drawn], shares(0.7)[drawn]) < 40
    for wrong in (0.6, 0.8, 1.0):
        assert chi_squared(counts[drawn], shares(wrong)[drawn]) > 80


@pytest.mark.parametrize("axis", [0, 1], ids=["steps", "rows"])
def test_steps_and_rows_draw_independently(axis):
    """Neighbours draw all 16 pairs equally often."""
    draw = jax.jit(
        jax.vmap(lambda step: choose(jnp.zeros((64, 4)), Sampling(), jax.random.key(0), step))
    )
    drawn = np.asarray(draw(jnp.arange(64)))
    pairs = 4 * drawn + np.roll(drawn, 1, axis)
    assert chi_squared(np.bincount(pairs.ravel(), minlength=16), np.full(16, 1 / 16)) < 60


def test_a_temperature_near_zero_is_greedy(params, tokens):
    cold = decode(params, tokens, sampling=Sampling(1e-6), key=jax.random.key(0))
    np.testing.assert_array_equal(cold, decode(params, tokens))


def test_of_one_token_there_is_no_choice(params, tokens):
    for sampling in (Sampling(5.0, top_k=1), Sampling(5.0, top_p=1e-6)):
        drawn = decode(params, tokens, sampling=sampling, key=jax.random.key(0))
        np.testing.assert_array_equal(drawn, decode(params, tokens))


def test_the_key_decides_what_is_drawn(params, tokens):
    first, again, other = (
        decode(params, tokens, sampling=Sampling(2.0), key=jax.random.key(seed))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_a_row_draws_the_same_whatever_stands_beside_it(params, tokens):
    options = {"sampling": Sampling(2.0), "key": jax.random.key(0)}
    batch = decode(params, tokens, **options)
    alone = decode(params, tokens[:1], LENGTHS[:1], **options)
    np.testing.assert_array_equal(alone, batch[:1])
    mates = tokens.copy()
    mates[1:] = tokens[:1]
    same = decode(params, mates, np.full_like(LENGTHS, LENGTHS[0]), **options)
    np.testing.assert_array_equal(same[0], batch[0])
    assert len({tuple(row) for row in same}) == B  # the same text, yet each row its own draw


def test_sampling_without_a_key_is_refused(params, tokens):
    with pytest.raises(UserError, match="sampling needs a key"):
        decode(params, tokens, sampling=Sampling(0.7))
