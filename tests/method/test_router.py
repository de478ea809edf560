"""Eq. 3-7: BatchNorm over the global batch, and gates that are exactly what the paper says."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.method import gumbel, init_router, keep_top_k, router_logits

B, L, D, H, N = 8, 3, 6, 10, 5
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles much faster than the default

init = jax.jit(init_router, static_argnums=(1, 2, 3, 4))
keep = jax.jit(keep_top_k, static_argnums=1)
gumbel_gates = jax.jit(gumbel)
logits_of = jax.jit(router_logits, static_argnames=("train", "use_batch_norm", "axis_name"))


def vmap(shard, **kwargs):
    return jax.jit(jax.vmap(shard, **kwargs))


def pmap(shard, **kwargs):
    return jax.pmap(shard, devices=jax.devices("cpu")[:4], **kwargs)


@pytest.fixture
def states():
    return np.random.default_rng(0).normal(0, 3, (B, L, D)).astype(np.float32)


def trained(layers):
    """Any numbers in the shapes of `init_router`: compiling its draws for each case is slow."""
    shapes = jax.eval_shape(lambda key: init_router(key, D, H, N, layers), KEY)
    rng = np.random.default_rng(2)
    params, stats = jax.tree.map(
        lambda leaf: rng.uniform(-1, 1, leaf.shape).astype(np.float32), shapes
    )
    return params, {"mean": stats["mean"], "var": np.abs(stats["var"]) + 0.5}


@pytest.fixture(params=[L, None], ids=["per_layer", "shared"])
def router(request):
    return trained(request.param)


def numpy_logits(params, states):
    """f2(SiLU(f1(T))), layer by layer."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    out = np.empty((B, L, N))
    for i in range(L):
        w = {k: v[i] for k, v in p.items()} if p["w1"].ndim == 3 else p
        h = np.asarray(states[:, i], np.float64) @ w["w1"] + w["b1"]
        out[:, i] = h / (1 + np.exp(-h)) @ w["w2"] + w["b2"]
    return out


def test_linear_layers_start_within_the_bound_of_their_fan_in():
    params, stats = jax.device_get(init(KEY, D, H, N, L))
    for name, fan_in in {"w1": D, "b1": D, "w2": H, "b2": H}.items():
        assert 0.8 * fan_in**-0.5 < np.abs(params[name]).max() <= fan_in**-0.5
    chex.assert_trees_all_equal(stats, {"mean": np.zeros((L, N)), "var": np.ones((L, N))})


def test_training_matches_a_numpy_batch_norm_over_the_logits(router, states):
    params, stats = router
    raw = numpy_logits(params, states)
    axes = (0,) if params["w1"].ndim == 3 else (0, 1)
    mean, var = raw.mean(axes), raw.var(axes)
    expected = (raw - mean) / np.sqrt(var + 1e-5) * params["bn_scale"] + params["bn_bias"]
    logits, new = logits_of(params, stats, states, train=True, momentum=0.8)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(new["mean"], 0.8 * stats["mean"] + 0.2 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.8 * stats["var"] + 0.2 * var, rtol=1e-5, atol=1e-6)


def test_inference_uses_the_running_statistics_and_returns_them_unchanged(router, states):
    params, stats = router
    normal = (numpy_logits(params, states) - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    logits, new = logits_of(params, stats, states, train=False)
    expected = normal * params["bn_scale"] + params["bn_bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(new, stats)


def test_batch_mates_change_nothing_at_inference(router, states):
    together, _ = logits_of(*router, states, train=False)
    alone, _ = logits_of(*router, states[:1], train=False)
    states[1:] = 100.0
    among_others, _ = logits_of(*router, states, train=False)
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(among_others[0], together[0])


@pytest.mark.parametrize("map_shards", [vmap, pmap])
def test_shards_of_a_batch_train_like_the_whole_batch(router, states, map_shards):
    params, stats = router
    weights = np.random.default_rng(3).normal(size=(B, L, N)).astype(np.float32)

    def loss(params, states, weights, axis_name=None):
        logits, new = router_logits(params, stats, states, train=True, axis_name=axis_name)
        return (logits * weights).mean(), (logits, new)

    grad = functools.partial(jax.grad, has_aux=True)

    def shard(params, states, weights):
        grads, aux = grad(functools.partial(loss, axis_name="shards"))(params, states, weights)
        return jax.lax.pmean(grads, "shards"), aux

    def split(x):
        return x.reshape(4, 2, *x.shape[1:])

    sharded = map_shards(shard, in_axes=(None, 0, 0), axis_name="shards")
    grads, (logits, new) = sharded(params, split(states), split(weights))
    whole_grads, (whole_logits, whole_new) = jax.jit(grad(loss))(params, states, weights)
    np.testing.assert_allclose(logits.reshape(B, L, N), whole_logits, rtol=1e-5, atol=1e-5)
    for k in stats:
        np.testing.assert_allclose(new[k], np.stack([whole_new[k]] * 4), rtol=1e-5, atol=1e-6)
    for k in params:
        expected = np.stack([whole_grads[k]] * 4)
        np.testing.assert_allclose(grads[k], expected, rtol=1e-4, atol=1e-5, err_msg=k)


def test_batch_norm_survives_logits_that_hardly_vary(states):
    params, stats = trained(L)
    params["b2"] = params["b2"] + 100
    params["w2"] = params["w2"] / 10
    raw = numpy_logits(params, states)
    _, new = logits_of(params, stats, states, train=True, momentum=0.0)
    np.testing.assert_allclose(new["var"], raw.var(0), rtol=1e-2)


def test_batch_norm_off_gives_the_raw_logits(router, states):
    params, stats = router
    logits, new = logits_of(params, stats, states, train=True, use_batch_norm=False)
    np.testing.assert_allclose(logits, numpy_logits(params, states), rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(new, stats)


def test_logits_are_fp32_for_bf16_states(router, states):
    logits, _ = logits_of(*router, states.astype(jnp.bfloat16), train=False)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("k", [1, 2, N])
def test_keep_top_k_follows_eq_6_and_7_step_by_step(k):
    logits = np.random.default_rng(0).normal(size=(40, N)).astype(np.float32)
    soft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)  # eq. 7
    kept = soft >= np.sort(soft)[:, -k, None]
    expected = np.where(kept, soft, 0) / (soft * kept).sum(-1, keepdims=True)  # eq. 6
    gates = np.asarray(keep(logits, k))
    np.testing.assert_allclose(gates, expected, rtol=1e-5)
    np.testing.assert_allclose(gates.sum(-1), np.ones(40), rtol=1e-6)
    assert ((gates > 0).sum(-1) == k).all()


@pytest.mark.parametrize("k", [-1, 0, N + 1])
def test_keep_top_k_refuses_more_or_fewer_experts_than_there_are(k):
    with pytest.raises(UserError, match=f"k is {k} for 5 experts: choose 1 up to all of them"):
        keep(np.zeros(N, np.float32), k)


def test_keep_top_k_equals_a_softmax_over_the_kept_logits():
    gates = keep(np.array([1.0, -3.0, 2.5, 0.0, -1.0], np.float32), 2)
    one, two = np.exp(1.0), np.exp(2.5)
    np.testing.assert_allclose(gates, np.array([one, 0, two, 0, 0]) / (one + two), rtol=1e-6)


def test_ties_keep_the_lower_index():
    np.testing.assert_array_equal(keep(np.zeros(N, np.float32), 2), [0.5, 0.5, 0, 0, 0])
    tied = np.array([0, 1, 3, 1, 1], np.float32)
    np.testing.assert_array_equal(np.flatnonzero(keep(tied, 2)), [1, 2])


slopes_of_top_3 = jax.jit(jax.jacobian(lambda logits: keep_top_k(logits, 3)))


@pytest.mark.parametrize(
    "logits",
    [
        [1e30, -1e30, 0.0, -1e30, 1.0],
        [500.0, 0.0, -500.0, 0.0, 0.0],
        [-1e38] * 4 + [3e38],
        [-np.inf, -np.inf, 0.0, -np.inf, -np.inf],
        [1e30] * 5,
    ],
)
def test_extreme_logits_still_give_exactly_k_gates_and_finite_gradients(logits):
    logits = np.array(logits, np.float32)
    gates = np.asarray(keep(logits, 3))
    assert np.isfinite(gates).all()
    assert (gates > 0).sum() == 3
    assert gates.sum() == pytest.approx(1)
    assert np.isfinite(slopes_of_top_3(logits)).all()


def test_gradient_of_the_gates_touches_kept_logits_only():
    logits = np.array([0.3, 2.0, -1.0, 1.0, 0.9], np.float32)
    jacobian = np.asarray(slopes_of_top_3(logits))
    dropped, kept = [0, 2], [1, 3, 4]
    assert not jacobian[:, dropped].any()
    assert not jacobian[dropped].any()
    assert (jacobian[kept, kept] > 0).all()


def test_gumbel_without_a_key_is_the_softmax():
    logits = np.random.default_rng(0).normal(size=(B, L, N)).astype(np.float32)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(gumbel_gates(None, logits), expected, rtol=1e-5)


def test_gumbel_gates_are_dense_sum_to_one_and_differ_between_rows_and_keys():
    logits = np.zeros((B, L, N), np.float32)
    gates, again, other = (
        np.asarray(gumbel_gates(jax.random.key(seed), logits)) for seed in (0, 0, 1)
    )
    np.testing.assert_allclose(gates.sum(-1), np.ones((B, L)), rtol=1e-6)
    assert (gates > 0).all()
    chex.assert_trees_all_equal(gates, again)
    assert not np.allclose(gates, other)
    assert len(np.unique(gates[..., 0])) == B * L


def test_the_largest_gumbel_gate_is_a_sample_from_the_softmax():
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5], np.float32)
    gates = gumbel_gates(KEY, np.broadcast_to(logits, (20000, N)))
    expected = np.exp(logits) / np.exp(logits).sum()
    shares = np.bincount(np.argmax(gates, -1), minlength=N) / 20000
    np.testing.assert_allclose(shares, expected, atol=0.015)
