"""LoraHub: what is summed, what is minimised, and within which bounds."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.baselines.lorahub import combine, search, stack_loras
from lorax_gen.errors import UserError

NEEDS = "needs nevergrad: pip install -e '.[lorahub]'"


def loras(count=3, rank=2):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    shapes = {"q": (5, 4), "up": (5, 7)}
    return [
        {name: {"a": draw(2, d, rank), "b": draw(2, rank, f)} for name, (d, f) in shapes.items()}
        for _ in range(count)
    ]


def test_a_and_b_are_each_summed():
    trees, weights = loras(), np.array([0.5, -1.5, 0.25], np.float32)
    found = combine(stack_loras(trees, "abc"), weights)
    for name in ("q", "up"):
        for factor in ("a", "b"):
            expected = sum(
                w * np.asarray(t[name][factor]) for w, t in zip(weights, trees, strict=True)
            )
            np.testing.assert_allclose(found[name][factor], expected, atol=1e-6)
    # Not the weighted sum of the products: twice the weights are four times the product.
    product = lambda tree: np.asarray(tree["q"]["a"] @ tree["q"]["b"])  # noqa: E731
    twice = combine(stack_loras(trees, "abc"), 2 * weights)
    np.testing.assert_allclose(product(twice), 4 * product(found), rtol=1e-4)


def test_one_with_weight_one_is_itself_and_none_is_nothing():
    stacked = stack_loras(loras(), "abc")
    alone = combine(stacked, np.array([0.0, 1.0, 0.0], np.float32))
    np.testing.assert_array_equal(alone["q"]["b"], loras()[1]["q"]["b"])
    assert not combine(stacked, np.zeros(3, np.float32))["up"]["a"].any()


def test_a_lora_of_fewer_layers_is_zero_below_the_last():
    first, second = loras(2)
    short = {name: {k: v[1:] for k, v in pair.items()} for name, pair in second.items()}
    found = stack_loras([first, short], ["first", "second"])
    np.testing.assert_array_equal(found["q"]["a"][0], first["q"]["a"])
    np.testing.assert_array_equal(found["q"]["a"][1, 1], second["q"]["a"][1])
    assert not found["q"]["b"][1, 0].any()


def test_loras_of_other_shapes_are_named():
    with pytest.raises(
        UserError, match=r"second has a factor a of 'q' of shape \(2, 5, 3\), first"
    ):
        stack_loras([*loras(1), *loras(1, rank=3)], ["first", "second"])
    fewer = [{"q": loras(1)[0]["q"]}]
    with pytest.raises(UserError, match="second has a factor a of 'up' of shape None"):
        stack_loras([*loras(1), *fewer], ["first", "second"])


def test_what_is_minimised_is_the_loss_and_a_share_of_the_weights():
    asked = []

    def minimise(score, count, budget, seed):
        asked.append((count, budget, seed, score(np.array([1.0, -0.5])), score(np.zeros(2))))
        return np.array([1.0, -0.5])

    found = search(lambda w: 3.0 + w.sum(), 2, budget=7, seed=5, minimise=minimise)
    assert asked == [(2, 7, 5, pytest.approx(3.5 + 0.05 * 0.75), pytest.approx(3.0))]
    assert found.dtype == np.float32 and found.tolist() == [1.0, -0.5]


def test_the_search_finds_a_known_optimum_within_its_budget():
    pytest.importorskip("nevergrad", reason=NEEDS)
    best, asked = np.array([0.8, -0.6]), []

    def loss(weights):
        asked.append(weights.copy())
        return 20 * float(((weights - best) ** 2).sum())

    found = search(loss, 2)
    np.testing.assert_allclose(found, best, atol=0.01)
    assert len(asked) == 40
    assert search(loss, 2, budget=40).tolist() == search(loss, 2, budget=40).tolist()


def test_no_weight_leaves_the_bounds():
    pytest.importorskip("nevergrad", reason=NEEDS)
    asked = []

    def loss(weights):
        asked.append(weights.copy())
        return float(((weights - 5.0) ** 2).sum())

    found = search(loss, 3)
    assert len(asked) == 40 and np.abs([*asked, found]).max() <= 1.5
    assert found.min() > 0.5


def test_without_nevergrad_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(UserError, match=r"not installed; pip install 'lorax-gen\[lorahub\]'$"):
        search(lambda w: 0.0, 2)
