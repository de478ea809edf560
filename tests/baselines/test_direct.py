"""Direct generation: no LoRA at first, one for each prompt, and its network as plain products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.baselines.direct import DirectConfig, direct_spec, init_direct, units_of_states
from lorax_gen.errors import UserError
from lorax_gen.method import lora_from_gates
from lorax_gen.models import decoder
from lorax_gen.system import gated_pool

CONFIG = DirectConfig(units=5, rank=3, alpha=6.0, cloud_rank=2)
NETWORKS = ("shared", "per_layer")


def made(system, network, filled=True):
    """`(spec, params)`; filled: with no part at zero."""
    config = dataclasses.replace(CONFIG, network=network)
    spec = direct_spec(config, system.cloud.config, system.edge.config)
    params = init_direct(jax.random.key(0), spec, system.cloud.params["embed"][3])
    rng = np.random.default_rng(0)
    if filled:
        fill = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32)  # noqa: E731
        for part in ("network", "pool"):
            params[part] = jax.tree.map(fill, params[part])
    return spec, params


@pytest.fixture(scope="module")
def states(tiny_world_system):
    shape = 3, tiny_world_system.edge.config.num_hidden_layers, 48
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_lora_is_zero_at_first_and_the_network_can_learn(tiny_world_system, network, states):
    spec, params = made(tiny_world_system, network, filled=False)

    def loras(network, pool):
        return lora_from_gates(pool, units_of_states(network, states), spec.generator)

    tree = loras(params["network"], params["pool"])
    for pair in tree.values():
        assert not pair["b"].any() and pair["a"].any(axis=(-1, -2)).all()
    # The gradient of the weights reaches B of each unit, the biases included.
    grads = jax.grad(
        lambda pool: sum(x.sum() for x in jax.tree.leaves(loras(params["network"], pool)))
    )
    for pair in grads(params["pool"]).values():
        assert (np.abs(pair["b"]).sum((-1, -2)) > 0).all()


@pytest.mark.parametrize("network", NETWORKS)
def test_the_factors_are_those_of_a_network_written_out(tiny_world_system, network, states):
    """numpy, one prompt and one layer at a time: W h + bias, of the matrix that all factors are."""
    spec, params = made(tiny_world_system, network)
    found = lora_from_gates(
        params["pool"], units_of_states(params["network"], states), spec.generator
    )
    for p in range(3):
        for i in range(spec.edge.num_hidden_layers):
            own = lambda x, i=i: np.asarray(x[i] if network == "per_layer" else x)  # noqa: E731
            w1, b1 = own(params["network"]["w1"]), own(params["network"]["b1"])
            z = np.asarray(states[p, i]) @ w1 + b1
            h = z / (1 + np.exp(-z))
            for name, pair in params["pool"].items():
                for factor, scale in (("a", 1.0), ("b", 2.0)):  # alpha / rank
                    units = own(pair[factor])
                    flat = units.reshape(len(units), -1)
                    expected = scale * (flat[:-1].T @ h + flat[-1]).reshape(units.shape[1:])
                    np.testing.assert_allclose(found[name][factor][i, p], expected, atol=1e-5)


def test_a_prompt_does_not_depend_on_the_others(tiny_world_system, states):
    _, params = made(tiny_world_system, "shared")
    found = units_of_states(params["network"], states)
    changed = units_of_states(params["network"], states.at[1].add(1.0))
    np.testing.assert_array_equal(changed[::2], found[::2])
    assert np.abs(changed[1] - found[1])[..., :-1].max() > 0.1
    assert found.shape == (3, 2, 6) and (found[..., -1] == 1).all()


@pytest.mark.parametrize("network", NETWORKS)
def test_the_decoder_applies_to_each_row_the_lora_of_its_prompt(tiny_world_system, network, states):
    spec, params = made(tiny_world_system, network)
    edge, units = tiny_world_system.edge, units_of_states(params["network"], states)
    tokens = jnp.arange(4, 19, dtype=jnp.int32).reshape(3, 5)
    run = jax.jit(decoder.hidden_states, static_argnums=1)
    adapter = gated_pool(params["pool"], np.asarray(units), spec.generator)
    found = run(edge.params, edge.config, tokens, adapter=adapter)
    tree = lora_from_gates(params["pool"], units, spec.generator)
    for i in range(3):
        merged = edge.merged(jax.tree.map(lambda x, i=i: x[:, i], tree))
        alone = run(merged.params, edge.config, tokens[i : i + 1])[0]
        np.testing.assert_allclose(found[i], alone, atol=1e-3)


def test_a_value_out_of_range_and_an_unknown_target_are_refused(tiny_world_system):
    with pytest.raises(UserError, match="units is 0"):
        DirectConfig(units=0)
    config = dataclasses.replace(CONFIG, edge_targets=("fc1",))
    with pytest.raises(UserError, match="edge_targets names 'fc1', which the edge model lacks"):
        direct_spec(config, tiny_world_system.cloud.config, tiny_world_system.edge.config)
