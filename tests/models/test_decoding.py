"""Greedy decoding with a cache writes what recomputing everything for each token would write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.models import decoder
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.models.decoding import generate_text, greedy

B, T, N, V, L, R = 4, 6, 5, 30, 2, 3
LENGTHS = np.array([6, 1, 4, 3], np.int32)
NEVER = V + 1  # an end of text that no row ever writes
CONFIG = DecoderConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=L,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=100.0,
)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


def random_lora(*lead):
    rng = np.random.default_rng(1)
    return {
        name: {
            "a": rng.normal(0, d_in**-0.5, (*lead, d_in, R)).astype(np.float32),
            "b": rng.normal(0, 0.5, (*lead, R, d_out)).astype(np.float32),
        }
        for name, (d_in, d_out) in kernel_shapes(CONFIG).items()
    }


# As `greedy`, but compiled once for every `eos_id`.
greedy_for_any_eos = jax.jit(greedy.__wrapped__, static_argnames=("config", "max_new_tokens"))
LORAS = {"none": None, "shared": random_lora(L), "per-example": random_lora(L, B)}


@jax.jit
def next_logits(params, tokens, lengths, lora):
    """Logits `[B, V]` behind `lengths` tokens, with no cache."""
    hidden = decoder.hidden_states(params, CONFIG, tokens, lora=lora)
    return decoder.logits(params, CONFIG, hidden[jnp.arange(B), lengths - 1])


@pytest.fixture(scope="module", params=LORAS)
def lora(request):
    return LORAS[request.param]


@pytest.fixture(scope="module")
def expected(params, tokens, lora):
    """What greedy decoding writes, `[B, N]`: the whole text is read again for each token."""
    text = np.concatenate([tokens, np.zeros((B, N), np.int32)], axis=1)
    for step in range(N):
        best = np.asarray(next_logits(params, text, LENGTHS + step, lora)).argmax(-1)
        text[np.arange(B), LENGTHS + step] = best
    return np.stack([row[n : n + N] for row, n in zip(text, LENGTHS, strict=True)])


def decode(params, tokens, lora=None, **options):
    options = {"max_new_tokens": N, "eos_id": NEVER} | options
    return np.asarray(greedy_for_any_eos(params, CONFIG, tokens, LENGTHS, lora=lora, **options))


def test_the_cache_changes_no_token_of_rows_of_any_length(params, tokens, lora, expected):
    np.testing.assert_array_equal(decode(params, tokens, lora), expected)


def test_the_loras_of_this_file_change_what_is_written(params, tokens):
    """So that the match above says something about them."""
    plain, shared, own = (decode(params, tokens, lora) for lora in LORAS.values())
    assert (plain != shared).any()
    assert (shared != own).any()


def test_what_stands_behind_a_rows_length_changes_nothing(params, tokens):
    padded = tokens.copy()
    padded[np.arange(T) >= LENGTHS[:, None]] = V - 1
    assert (padded != tokens).any()
    np.testing.assert_array_equal(decode(params, padded), decode(params, tokens))


def test_each_row_stops_at_its_first_end_of_text(params, tokens):
    free = decode(params, tokens)
    for eos in np.unique(free):
        ended = np.cumsum(free == eos, axis=1) > 0
        found = decode(params, tokens, eos_id=eos)
        np.testing.assert_array_equal(found, np.where(ended, eos, free))


def test_one_new_token_is_the_first_of_many(params, tokens):
    one = decode(params, tokens, max_new_tokens=1)
    np.testing.assert_array_equal(one, decode(params, tokens)[:, :1])


def test_text_is_continued_row_by_row_without_special_tokens(tiny_world_system):
    model = tiny_world_system.edge
    texts = ["apple", "say the color of the bell", "five"]
    expected = []
    logits = jax.jit(model)
    for text in texts:
        ids = model.tokenizer(text)["input_ids"]
        start = len(ids)
        while len(ids) < start + 3 and model.tokenizer.eos_token_id not in ids:
            padded = np.array([ids + [0] * (12 - len(ids))], np.int32)
            ids.append(int(logits(padded)[0, len(ids) - 1].argmax()))
        expected.append(model.tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert generate_text(model, texts, max_new_tokens=3) == expected
    assert all(expected)
