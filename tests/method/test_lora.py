"""Eq. 1: applying a LoRA tree and merging it are the same function of the input."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.method import apply_lora, count_params, init_lora, merge, scaled, take_example

B, T, D, F, L, R = 3, 5, 6, 7, 2, 4
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles much faster than the default
SHAPES = {"up": (D, F), "down": (F, D)}

init = jax.jit(lambda key: init_lora(key, SHAPES, R, L))
apply = jax.jit(apply_lora)
merged_with = jax.jit(merge)


def layer_of(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree["up"])


def random_tree(*lead):
    rng = np.random.default_rng(0)
    return {
        name: {
            "a": rng.normal(size=(*lead, d_in, R)).astype(np.float32),
            "b": rng.normal(size=(*lead, R, d_out)).astype(np.float32),
        }
        for name, (d_in, d_out) in SHAPES.items()
    }


@pytest.fixture
def kernels():
    rng = np.random.default_rng(1)
    shapes = {**SHAPES, "q": (D, D)}
    return {k: rng.normal(size=(L, *s)).astype(np.float32) for k, s in shapes.items()}


@pytest.fixture
def x():
    return np.random.default_rng(2).normal(size=(B, T, D)).astype(np.float32)


def test_fresh_tree_adds_nothing_and_its_a_keeps_to_the_bound(x):
    tree = jax.device_get(init(KEY))
    for name, (d_in, d_out) in SHAPES.items():
        chex.assert_shape(tree[name]["a"], (L, d_in, R))
        chex.assert_shape(tree[name]["b"], (L, R, d_out))
        assert 0.5 * d_in**-0.5 < np.abs(tree[name]["a"]).max() <= d_in**-0.5
    assert not apply(x, layer_of(tree, 0)).any()


def test_init_does_not_depend_on_the_order_of_the_names():
    backwards = dict(reversed(SHAPES.items()))
    other = jax.jit(lambda key: init_lora(key, backwards, R, L))
    chex.assert_trees_all_equal(init(KEY), other(KEY))


def test_merge_equals_apply_for_a_shared_tree(kernels, x):
    tree = scaled(random_tree(L), 0.5)
    merged = jax.device_get(merged_with(kernels, tree))
    for i in range(L):
        applied = x @ kernels["up"][i] + apply(x, layer_of(tree, i))
        np.testing.assert_allclose(x @ merged["up"][i], applied, rtol=1e-5, atol=1e-4)


def test_merge_equals_apply_for_each_example_of_a_per_example_tree(kernels, x):
    tree = random_tree(L, B)
    applied = [x @ kernels["up"][i] + apply(x, layer_of(tree, i)) for i in range(L)]
    for row in range(B):
        merged = jax.device_get(merged_with(kernels, take_example(tree, row)))
        for i in range(L):
            np.testing.assert_allclose(
                x[row] @ merged["up"][i], applied[i][row], rtol=1e-5, atol=1e-4
            )


def test_merge_matches_numpy_and_leaves_other_kernels_alone(kernels):
    tree = random_tree(L)
    merged = merge(kernels, tree)
    assert merged["q"] is kernels["q"]
    for name, pair in tree.items():
        expected = kernels[name] + pair["a"] @ pair["b"]
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-5)


def test_merge_adds_in_fp32_and_rounds_once(kernels):
    half = {name: kernel.astype(jnp.bfloat16) for name, kernel in kernels.items()}
    tree = random_tree(L)
    exact = merged_with({k: kernel.astype(np.float32) for k, kernel in half.items()}, tree)
    expected = {k: np.asarray(kernel).astype(jnp.bfloat16) for k, kernel in exact.items()}
    chex.assert_trees_all_equal(merged_with(half, tree), expected)


def test_apply_computes_in_the_dtype_of_the_input(x):
    assert apply(x.astype(jnp.bfloat16), layer_of(random_tree(L), 0)).dtype == jnp.bfloat16


def test_scale_multiplies_the_product(x):
    tree = random_tree(L)
    tripled = apply(x, layer_of(scaled(tree, 3.0), 0))
    np.testing.assert_allclose(tripled, 3 * apply(x, layer_of(tree, 0)), rtol=1e-5, atol=1e-4)


def test_count_params_counts_both_factors():
    assert count_params(random_tree(L)) == 2 * L * R * (D + F)


def test_merge_refuses_what_does_not_fit(kernels):
    tree = random_tree(L)
    with pytest.raises(UserError, match="'gate' has no kernel"):
        merge(kernels, {"gate": tree["up"]})
    with pytest.raises(UserError, match=r"'up' .* do not fit"):
        merge(kernels, {"up": tree["down"]})
    with pytest.raises(UserError, match=r"'up' .* do not fit"):
        merge(kernels, {"up": {"a": tree["up"]["a"], "b": tree["up"]["b"][:, :1]}})
    with pytest.raises(UserError, match="take_example"):
        merge(kernels, random_tree(L, B))


def test_a_tree_per_group_serves_the_rows_of_its_group():
    """Three trees, six rows: as if each tree were repeated for its two rows."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 4, 8)), jnp.float32)
    pair = {
        "a": jnp.asarray(rng.normal(size=(3, 8, 2)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(3, 2, 5)), jnp.float32),
    }
    repeated = {name: jnp.repeat(factor, 2, axis=0) for name, factor in pair.items()}
    # The sums are the same; the order in which a matrix product rounds them need not be.
    chex.assert_trees_all_close(apply_lora(x, pair), apply_lora(x, repeated), rtol=0, atol=1e-5)
    alone = x[5] @ pair["a"][2] @ pair["b"][2]
    chex.assert_trees_all_close(apply_lora(x, pair)[5], alone, rtol=0, atol=1e-5)
