"""Meta tokens stand directly behind each row's last real token and touch nothing else."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.method import init_meta_tokens, insert_meta_tokens, read_meta_states

B, T, L, D = 4, 6, 3, 5
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles much faster than the default
LENGTHS = np.array([0, 2, 5, 6], np.int32)

inserted = jax.jit(insert_meta_tokens, static_argnums=3)
read_back = jax.jit(read_meta_states, static_argnums=2)


@pytest.fixture
def embeddings():
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


@pytest.fixture
def meta():
    return np.random.default_rng(1).normal(size=(L, D)).astype(np.float32)


def test_insert_puts_meta_tokens_behind_the_prompt_and_keeps_the_prompt(embeddings, meta):
    out = inserted(embeddings, LENGTHS, meta, L)
    chex.assert_shape(out, (B, T + L, D))
    for row, length in enumerate(LENGTHS):
        chex.assert_trees_all_equal(out[row, :length], embeddings[row, :length])
        chex.assert_trees_all_equal(out[row, length : length + L], meta)


def test_read_gives_back_what_insert_put_in(embeddings, meta):
    out = read_back(inserted(embeddings, LENGTHS, meta, L), LENGTHS, L)
    chex.assert_trees_all_equal(out, np.broadcast_to(meta, (B, L, D)))


def test_one_shared_vector_fills_every_position(embeddings, meta):
    out = read_back(inserted(embeddings, LENGTHS, meta[:1], L), LENGTHS, L)
    chex.assert_trees_all_equal(out, np.broadcast_to(meta[:1], (B, L, D)))


def test_insert_keeps_the_dtype_of_the_embeddings(embeddings, meta):
    assert inserted(embeddings.astype(jnp.bfloat16), LENGTHS, meta, L).dtype == jnp.bfloat16


def test_padding_reaches_nothing_up_to_the_last_meta_token(embeddings, meta):
    real = np.arange(T)[None, :, None] < LENGTHS[:, None, None]
    out, other = (
        inserted(np.where(real, embeddings, np.float32(fill)), LENGTHS, meta, L)
        for fill in (0.0, np.nan)
    )
    for row, length in enumerate(LENGTHS):
        chex.assert_trees_all_equal(out[row, : length + L], other[row, : length + L])


def test_gradient_of_each_meta_token_sums_over_the_batch(embeddings, meta):
    def loss(m):
        return read_back(inserted(embeddings, LENGTHS, m, L), LENGTHS, L).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(meta), np.full((L, D), B))


def test_init_is_the_embedding_plus_small_noise():
    embedding = np.arange(2000, dtype=np.float32)
    init = jax.jit(init_meta_tokens, static_argnums=(2, 3))
    per_layer = np.asarray(init(KEY, embedding, L, "per_layer"))
    shared = init(KEY, embedding, L, "shared")
    silent = init(KEY, embedding, L, "per_layer", noise=0.0)
    chex.assert_shape(per_layer, (L, 2000))
    chex.assert_shape(shared, (1, 2000))
    chex.assert_trees_all_equal(silent, np.broadcast_to(embedding, (L, 2000)))
    np.testing.assert_allclose((per_layer - embedding).std(-1), np.full(L, 0.02), rtol=0.1)
    assert not np.allclose(per_layer[0], per_layer[1], atol=1e-3)
