"""Eq. 8 in its two readings, held against numpy written out by hand."""

import chex
import jax
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.method import apply_experts, apply_lora, compose, init_pool, merge, take_example

B, L, N, K, D, F, R = 3, 2, 5, 2, 6, 7, 4
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles much faster than the default
SHAPES = {"up": (D, F), "down": (F, D)}

composed = jax.jit(compose, static_argnums=(2, 3))
merged_with = jax.jit(merge)
fresh_pool = jax.jit(lambda key, layers: init_pool(key, SHAPES, R, N, layers), static_argnums=1)


def top_k_gates(k):
    gates = np.random.default_rng(1).uniform(0.1, 1, (B, L, N)).astype(np.float32)
    gates[gates < np.sort(gates)[..., -k, None]] = 0
    return gates / gates.sum(-1, keepdims=True)


@pytest.fixture(params=["per_layer", "shared"])
def pool(request):
    rng = np.random.default_rng(0)
    lead = (L, N) if request.param == "per_layer" else (N,)
    return {
        name: {
            "a": rng.normal(size=(*lead, d_in, R)).astype(np.float32),
            "b": rng.normal(size=(*lead, R, d_out)).astype(np.float32),
        }
        for name, (d_in, d_out) in SHAPES.items()
    }


@pytest.fixture
def gates():
    return top_k_gates(K)


def numpy_delta(pair, gates, composition):
    """dW of eq. 8 for one example: gates [L, N] -> [L, D, F], expert by expert."""
    a, b, gates = (np.asarray(x, np.float64) for x in (pair["a"], pair["b"], gates))
    if a.ndim == 3:
        a, b = np.stack([a] * L), np.stack([b] * L)
    deltas = []
    for i in range(L):
        if composition == "factors":
            sum_a = sum(gates[i, j] * a[i, j] for j in range(N))
            sum_b = sum(gates[i, j] * b[i, j] for j in range(N))
            deltas.append(sum_a @ sum_b)
        else:
            deltas.append(sum(gates[i, j] * a[i, j] @ b[i, j] for j in range(N)))
    return np.stack(deltas)


@pytest.mark.parametrize("composition", ["factors", "products"])
def test_compose_matches_numpy_for_a_batch_and_for_one_task(pool, gates, composition):
    rank = R if composition == "factors" else K * R
    tree = jax.device_get(composed(pool, gates, composition, K))
    for name, (d_in, d_out) in SHAPES.items():
        chex.assert_shape(tree[name]["a"], (L, B, d_in, rank))
        chex.assert_shape(tree[name]["b"], (L, B, rank, d_out))
        for row in range(B):
            expected = numpy_delta(pool[name], gates[row], composition)
            delta = tree[name]["a"][:, row] @ tree[name]["b"][:, row]
            np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-4)
    alone = composed(pool, gates[1], composition, K)
    chex.assert_trees_all_close(alone, take_example(tree, 1), rtol=1e-5, atol=1e-6)


def test_the_two_compositions_differ_on_random_factors(pool, gates):
    factors, products = (
        numpy_delta(pool["up"], gates[0], composition) for composition in ("factors", "products")
    )
    assert np.linalg.norm(factors - products) > 0.1 * np.linalg.norm(products)


def test_the_two_compositions_agree_when_one_expert_has_gate_one(pool):
    gates = top_k_gates(1)
    assert set(np.unique(gates)) == {0.0, 1.0}
    factors, products = (composed(pool, gates, c, 1) for c in ("factors", "products"))
    chex.assert_trees_all_close(factors, products, rtol=1e-6)


def test_dense_gates_use_every_expert(pool):
    gates = np.random.default_rng(3).uniform(0.1, 1, (L, N)).astype(np.float32)
    tree = jax.device_get(composed(pool, gates, "products", None))
    chex.assert_shape(tree["up"]["a"], (L, D, N * R))
    expected = numpy_delta(pool["up"], gates, "products")
    np.testing.assert_allclose(tree["up"]["a"] @ tree["up"]["b"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("composition", ["factors", "products"])
def test_merged_weights_equal_the_applied_lora_of_each_example(pool, gates, composition):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(B, 4, D)).astype(np.float32)
    kernels = {k: rng.normal(size=(L, *s)).astype(np.float32) for k, s in SHAPES.items()}
    tree = jax.device_get(composed(pool, gates, composition, K))
    layer = jax.tree.map(lambda leaf: leaf[1], tree["up"])
    applied = x @ kernels["up"][1] + np.asarray(apply_lora(x, layer))
    for row in range(B):
        merged = np.asarray(merged_with(kernels, take_example(tree, row))["up"])[1]
        np.testing.assert_allclose(x[row] @ merged, applied[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [L, None])
def test_a_fresh_pool_composes_to_zero(layers, gates):
    pool = jax.device_get(fresh_pool(KEY, layers))
    lead = (N,) if layers is None else (L, N)
    chex.assert_shape(pool["down"]["a"], (*lead, F, R))
    assert np.abs(pool["down"]["a"]).max() <= F**-0.5
    for composition in ("factors", "products"):
        tree = jax.device_get(composed(pool, gates, composition, K))
        assert not (tree["up"]["a"] @ tree["up"]["b"]).any()


@pytest.mark.parametrize("composition", ["factors", "products"])
def test_gradient_reaches_the_kept_experts_alone_and_the_gates(pool, gates, composition):
    def loss(pool, gates):
        tree = compose(pool, gates, composition, K)
        return sum(((pair["a"] @ pair["b"]) ** 2).sum() for pair in tree.values())

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(pool, gates)
    pool_grads, gate_grads = jax.device_get(grads)
    used = (gates > 0).any(0)
    if pool["up"]["a"].ndim == 3:
        used = used.any(0)
    for leaf in jax.tree.leaves(pool_grads):
        np.testing.assert_array_equal((leaf != 0).any((-1, -2)), used)
    assert (gate_grads[gates > 0] != 0).all()


@pytest.mark.parametrize("composition", ["factors", "products"])
def test_vmap_over_tasks_equals_the_batched_call(pool, gates, composition):
    over_tasks = jax.vmap(lambda g: compose(pool, g, composition, K), out_axes=1)
    chex.assert_trees_all_close(
        jax.jit(over_tasks)(gates), composed(pool, gates, composition, K), rtol=1e-5, atol=1e-6
    )


def test_an_unknown_composition_is_refused(pool, gates):
    with pytest.raises(UserError, match="'sum': choose one of factors, products"):
        compose(pool, gates, "sum", K)


def test_gates_of_other_experts_or_layers_are_refused_with_both_sizes(pool, gates):
    layers = " in each of 2 layers" if pool["up"]["a"].ndim == 4 else ""
    expected = rf"'down' has 5 experts{layers}, but the gates are \(3, 2, 4\)"
    for composition in ("factors", "products"):
        with pytest.raises(UserError, match=expected):
            compose(dict(sorted(pool.items())), gates[..., :4], composition)
    if layers:
        with pytest.raises(UserError, match=r"5 experts in each of 2 layers, .* are \(3, 1, 5\)"):
            composed(pool, gates[:, :1])
    pair = {"a": np.zeros((N, D, R)), "b": np.zeros((N, R, F))}
    with pytest.raises(UserError, match=r"5 experts, but the gates are \(3, 4\)"):
        apply_experts(np.zeros((B, 1, D)), pair, gates[:, 0, :4])


def test_products_refuse_gates_that_top_k_would_drop(pool, gates):
    with pytest.raises(UserError, match=r"top_k is 1, but 2 gates of a row are not zero.*choose 2"):
        compose(pool, gates, "products", 1)
    for k in (K, K + 1, None):  # more is not wrong, but in the rank
        assert compose(pool, gates, "products", k)["up"]["b"].shape[-2] == (k or N) * R


@pytest.mark.parametrize("k", [0, N + 1])
def test_a_top_k_that_the_pool_does_not_have_is_refused(pool, gates, k):
    with pytest.raises(UserError, match=f"top_k is {k} for 5 experts: choose 1 up to all"):
        composed(pool, gates, "products", k)
