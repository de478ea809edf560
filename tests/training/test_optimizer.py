"""The schedule's corners, what is decayed, and that gradients are clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

PEAK, STEPS, WARMUP = 1e-2, 100, 20
CONFIG = OptimizerConfig(learning_rate=PEAK, warmup_steps=WARMUP, final_fraction=0.1)


# --- schedule ------------------------------------------------------------------------------------


def test_the_rate_rises_to_its_peak_and_falls_to_its_end():
    schedule = make_schedule(CONFIG, STEPS)
    rates = np.array([schedule(step) for step in range(STEPS + 1)])
    assert rates[0] == 0
    np.testing.assert_allclose(
        rates[: WARMUP + 1], PEAK * np.arange(WARMUP + 1) / WARMUP, rtol=1e-5
    )
    assert rates.argmax() == WARMUP
    assert (np.diff(rates[WARMUP:]) < 0).all()
    assert rates[(STEPS + WARMUP) // 2] == pytest.approx(PEAK * (1 + 0.1) / 2)  # half way down
    assert rates[STEPS] == pytest.approx(0.1 * PEAK)
    assert schedule(STEPS + 50) == pytest.approx(0.1 * PEAK)


def test_without_a_warm_up_the_first_step_is_at_the_peak():
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, warmup_steps=0), STEPS)
    assert schedule(0) == pytest.approx(PEAK)
    assert schedule(STEPS) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_run_shorter_than_its_warm_up_still_learns(steps):
    schedule = make_schedule(CONFIG, steps)
    rates = np.array([schedule(step) for step in range(steps)])
    assert np.isfinite(rates).all()
    assert rates.max() == pytest.approx(PEAK)


# --- the transformation --------------------------------------------------------------------------


def first_update(params, grads, **changes):
    """The update of one step at the peak rate."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=PEAK, warmup_steps=0, **changes), 10)

    @jax.jit
    def update(params, grads):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    return jax.device_get(update(params, grads))


def is_decayed(params):
    """With gradients of zero, weight decay alone moves a parameter: `{path: moved}`."""
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    updates = first_update(ones, jax.tree.map(jnp.zeros_like, ones), weight_decay=0.1)
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    for _, leaf in leaves:
        assert not leaf.any() or np.allclose(leaf, -PEAK * 0.1)
    return {"/".join(key.key for key in path): bool(leaf.any()) for path, leaf in leaves}


def test_decay_spares_the_routers_biases_and_batch_norm_and_no_lora(tiny_world_system):
    decayed = is_decayed(tiny_world_system.params)
    spared = {"router/b1", "router/b2", "router/bn_scale", "router/bn_bias"}
    assert {name for name, moved in decayed.items() if not moved} == spared
    assert decayed["pool/up/b"]
    assert decayed["cloud_lora/q/b"]


def test_decay_spares_the_norms_of_a_language_model(tiny_world_system):
    decayed = is_decayed(tiny_world_system.edge.params | {"q_bias": jnp.ones(3)})
    spared = {"final_norm", "layers/attn_norm", "layers/mlp_norm", "q_bias"}
    assert {name for name, moved in decayed.items() if not moved} == spared


def test_gradients_are_clipped_by_their_global_norm():
    """Seen in the second step: the first update of Adam has the same size for any gradient."""
    params, small = {"a": jnp.zeros(3), "b": jnp.zeros(4)}, {"a": jnp.ones(3), "b": jnp.ones(4)}
    config = OptimizerConfig(learning_rate=PEAK, warmup_steps=0, weight_decay=0.0, clip_norm=0.5)
    optimizer = make_optimizer(config, 10)

    @jax.jit
    def second_update(first, second):
        _, state = optimizer.update(first, optimizer.init(params), params)
        return optimizer.update(second, state, params)[0]

    clipped = jax.tree.map(lambda g: g * 0.5 / 7**0.5, small)
    expected = jax.device_get(second_update(clipped, jax.tree.map(jnp.negative, clipped)))
    found = second_update(small, jax.tree.map(lambda g: -1e6 * g, small))
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-9)
    unclipped = second_update(clipped, jax.tree.map(lambda g: -0.1 * g, clipped))
    assert not np.allclose(unclipped["a"], expected["a"])


@pytest.mark.parametrize("field", ["learning_rate", "clip_norm"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_rate_or_norm_that_is_not_positive_is_refused(field, value):
    with pytest.raises(UserError, match=rf"{field} is {value}; expected float > 0\.0"):
        OptimizerConfig(**{field: value})
