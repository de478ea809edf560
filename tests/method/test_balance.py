"""Eq. 9 against numpy, at its extremes, and over shards of a batch."""

import functools

import jax
import numpy as np
import pytest

from lorax_gen.method import balance_loss, expert_load, gate_entropy, keep_top_k
from lorax_gen.method.balance import gate_distance

B, L, N, K = 8, 3, 6, 2

loss_of = jax.jit(balance_loss)


def vmap(shard, **kwargs):
    return jax.jit(jax.vmap(shard, **kwargs))


def pmap(shard, **kwargs):
    return jax.pmap(shard, devices=jax.devices("cpu")[:4], **kwargs)


@pytest.fixture
def gates():
    raw = np.random.default_rng(0).uniform(size=(B, L, N)).astype(np.float32)
    raw[raw < np.sort(raw)[..., -K, None]] = 0
    return raw / raw.sum(-1, keepdims=True)


def test_loss_is_zero_when_every_expert_carries_the_same_load():
    each_its_own = np.tile(np.eye(N, dtype=np.float32)[:, None], (1, L, 1))
    assert loss_of(each_its_own) == 0
    assert loss_of(np.full((B, L, N), 1 / N, np.float32)) == pytest.approx(0, abs=1e-9)


def test_loss_is_c_times_n_minus_one_when_one_expert_carries_all():
    one = np.zeros((B, L, N), np.float32)
    one[..., 2] = 1
    assert loss_of(one, 0.5) == pytest.approx(0.5 * (N - 1), rel=1e-5)


def test_loss_matches_numpy_with_the_coefficient_applied_once(gates):
    importance = np.asarray(gates, np.float64).sum(0)
    squared_cv = [(load.std() / load.mean()) ** 2 for load in importance]
    assert loss_of(gates) == pytest.approx(0.01 * np.mean(squared_cv), rel=1e-5)
    assert loss_of(gates, 1.0) == pytest.approx(np.mean(squared_cv), rel=1e-5)


def test_loss_weighs_the_batch_not_its_rows():
    """Two rows that each use one expert are balanced together, though neither is alone."""
    rows = np.eye(2, dtype=np.float32)[:, None]
    assert loss_of(rows) == 0
    assert loss_of(rows[:1]) > 0


@pytest.mark.parametrize("map_shards", [vmap, pmap])
def test_shards_of_a_batch_give_the_loss_and_the_gradient_of_the_whole(map_shards):
    logits = np.random.default_rng(1).normal(size=(B, L, N)).astype(np.float32)
    shift = np.zeros((L, N), np.float32)

    def loss(shift, logits, axis_name=None):
        return balance_loss(keep_top_k(logits + shift, K), 1.0, axis_name)

    def shard(shift, logits):
        on_shards = functools.partial(loss, axis_name="shards")
        return jax.lax.pmean(jax.value_and_grad(on_shards)(shift, logits), "shards")

    sharded = map_shards(shard, in_axes=(None, 0), axis_name="shards")
    values, grads = sharded(shift, logits.reshape(4, 2, L, N))
    value, grad = jax.jit(jax.value_and_grad(loss))(shift, logits)
    np.testing.assert_allclose(values, np.full(4, value), rtol=1e-5)
    np.testing.assert_allclose(grads, np.stack([grad] * 4), rtol=1e-4, atol=1e-6)


def test_entropy_is_zero_for_one_expert_and_log_n_for_all_alike():
    assert gate_entropy(np.eye(N, dtype=np.float32)) == 0
    assert gate_entropy(np.full((B, L, N), 1 / N, np.float32)) == pytest.approx(np.log(N), rel=1e-6)


def test_load_is_each_experts_share_of_the_gate_mass(gates):
    load = expert_load(gates)
    np.testing.assert_allclose(load, np.asarray(gates).sum(0) / B, rtol=1e-6)
    np.testing.assert_allclose(load.sum(-1), np.ones(L), rtol=1e-6)


# --- how differently prompts are routed ----------------------------------------------------------


def test_distance_is_zero_for_prompts_alike_and_one_where_no_two_share_an_expert(gates):
    assert gate_distance(np.repeat(gates[:1], B, axis=0)) == pytest.approx(0, abs=1e-6)
    assert gate_distance(gates[:1]) == 0
    own = np.tile(np.eye(N, dtype=np.float32)[:, None], (1, L, 1))
    assert gate_distance(own) == pytest.approx(1, rel=1e-6)


def test_distance_is_the_mean_total_variation_over_pairs_and_layers(gates):
    pairs = [(i, j) for i in range(B) for j in range(i)]
    expected = np.mean([np.abs(gates[i] - gates[j]).sum(-1) / 2 for i, j in pairs])
    assert gate_distance(gates) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("map_shards", [vmap, pmap])
def test_shards_of_a_batch_give_the_distance_of_the_whole(map_shards, gates):
    shard = functools.partial(gate_distance, axis_name="shards")
    found = map_shards(shard, axis_name="shards")(gates.reshape(4, 2, L, N))
    np.testing.assert_allclose(found, np.full(4, gate_distance(gates)), rtol=1e-5)
