"""Eq. 3-8 together: what the whole generator keeps, whatever its switches say."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.method import (
    GeneratorConfig,
    apply_lora,
    balance_loss,
    cloud_lora,
    gates_from_states,
    generate,
    init_generator,
    lora_from_gates,
    merge,
    scaled,
    take_example,
)

B, L, D, F, CLOUD_D = 4, 3, 6, 8, 5
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles much faster than the default
EDGE = {"q": (D, D), "gate": (D, F), "up": (D, F), "down": (F, D)}
CLOUD = {"q": (CLOUD_D, CLOUD_D), "v": (CLOUD_D, CLOUD_D)}
CONFIG = GeneratorConfig(
    n_experts=4, top_k=2, rank=3, alpha=6.0, router_width=7, cloud_rank=2, cloud_alpha=3.0
)
# Every pair of values of two switches stands in one of the four.
VARIANTS = [
    dataclasses.replace(CONFIG, composition=composition, pool=pool, router=router)
    for composition, pool, router in [
        ("factors", "per_layer", "per_layer"),
        ("factors", "shared", "shared"),
        ("products", "per_layer", "shared"),
        ("products", "shared", "per_layer"),
    ]
]

generated = jax.jit(generate, static_argnames=("config", "train"))
gated = jax.jit(gates_from_states, static_argnames=("config", "train"))


@functools.partial(jax.jit, static_argnums=1)
def init(key, config):
    return init_generator(
        key,
        config,
        edge_layers=L,
        edge_shapes=EDGE,
        cloud_layers=2,
        cloud_shapes=CLOUD,
        cloud_embedding=jnp.ones(CLOUD_D),
    )


def trained(config=CONFIG):
    """As if after training: any numbers in the shapes of `init`, no factor zero."""
    params, stats = jax.eval_shape(init, KEY, config)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    stats = jax.tree.map(lambda leaf: rng.uniform(1, 2, leaf.shape).astype(np.float32), stats)
    return params, stats


def variant_id(config):
    return f"{config.composition}-pool_{config.pool}-router_{config.router}"


@pytest.fixture
def states():
    return np.random.default_rng(2).normal(size=(B, L, CLOUD_D)).astype(np.float32)


def test_init_takes_the_targets_and_follows_the_switches():
    params, stats = jax.eval_shape(init, KEY, CONFIG)
    assert set(params["pool"]) == {"gate", "up", "down"}
    assert set(params["cloud_lora"]) == {"q", "v"}
    chex.assert_shape(params["meta_tokens"], (L, CLOUD_D))
    chex.assert_shape(params["router"]["w1"], (L, CLOUD_D, 7))
    chex.assert_shape(params["pool"]["up"]["a"], (L, 4, D, 3))
    chex.assert_shape(stats["mean"], (L, 4))
    shared = dataclasses.replace(CONFIG, meta_tokens="shared", router="shared", pool="shared")
    params, stats = jax.eval_shape(init, KEY, shared)
    chex.assert_shape(params["meta_tokens"], (1, CLOUD_D))
    chex.assert_shape(params["router"]["w1"], (CLOUD_D, 7))
    chex.assert_shape(params["pool"]["up"]["a"], (4, D, 3))
    chex.assert_shape(stats["mean"], (4,))


def test_a_fresh_generator_changes_nothing(states):
    params, stats = init(KEY, CONFIG)
    lora = jax.device_get(generated(params, stats, states, CONFIG, train=True).lora)
    for pair in lora.values():
        assert pair["a"].any()
        assert not (pair["a"] @ pair["b"]).any()


def test_layers_that_share_a_router_and_a_pool_get_one_lora_for_one_state(states):
    config = VARIANTS[1]
    alike = np.broadcast_to(states[:, :1], states.shape)
    lora = jax.device_get(generated(*trained(config), alike, config).lora)
    for leaf in jax.tree.leaves(lora):
        np.testing.assert_allclose(leaf, np.broadcast_to(leaf[:1], leaf.shape), rtol=1e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=variant_id)
def test_merged_weights_equal_the_applied_lora_of_each_example(config, states):
    lora = jax.device_get(generated(*trained(config), states, config).lora)
    rng = np.random.default_rng(3)
    kernels = {name: rng.normal(size=(L, *s)).astype(np.float32) for name, s in EDGE.items()}
    x = rng.normal(size=(B, 2, D)).astype(np.float32)
    merged = [merge(kernels, take_example(lora, row)) for row in range(B)]
    for i in range(L):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], lora["gate"])
        applied = x @ kernels["gate"][i] + apply_lora(x, layer)
        for row in range(B):
            weight = np.asarray(merged[row]["gate"])[i]
            np.testing.assert_allclose(x[row] @ weight, applied[row], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("config", VARIANTS, ids=variant_id)
def test_gradient_reaches_states_router_and_pool_under_jit(config, states):
    params, stats = trained(config)

    def loss(params, states):
        out = generate(params, stats, states, config, train=True)
        lm = sum(jnp.sin(pair["a"] @ pair["b"]).mean() for pair in out.lora.values())
        return lm + balance_loss(out.gates, config.balance_coefficient)

    grads, state_grads = jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, states))
    assert (np.abs(state_grads).max(-1) > 0).all()  # every example, every layer
    for name in ("w1", "w2", "bn_scale", "bn_bias"):  # BatchNorm cancels b2
        assert np.abs(grads["router"][name]).max() > 0
    for leaf in jax.tree.leaves(grads["pool"]):
        assert np.abs(leaf).max() > 0
    chex.assert_tree_all_finite((grads, state_grads))


def test_generate_is_its_two_halves(states):
    params, stats = trained()
    whole = generated(params, stats, states, CONFIG, train=True)
    gates, new_stats = gated(params, stats, states, CONFIG, train=True)
    lora = jax.jit(lora_from_gates, static_argnums=2)
    parts = (lora(params["pool"], gates, CONFIG), gates, new_stats)
    chex.assert_trees_all_close(tuple(whole), parts, rtol=1e-5, atol=1e-6)
    gates = np.asarray(gates)
    assert ((gates > 0).sum(-1) == CONFIG.top_k).all()
    first = take_example(jax.device_get(whole.lora), 1)
    chex.assert_trees_all_close(lora(params["pool"], gates[1], CONFIG), first, rtol=1e-5, atol=1e-6)


def test_scales_are_folded_into_the_trees(states):
    params, stats = trained()
    plain = dataclasses.replace(CONFIG, alpha=float(CONFIG.rank))
    lora, unit = (jax.device_get(generated(params, stats, states, c).lora) for c in (CONFIG, plain))
    chex.assert_trees_all_close(lora, scaled(unit, 2.0), rtol=1e-5)
    chex.assert_trees_all_equal(cloud_lora(params, CONFIG), scaled(params["cloud_lora"], 1.5))


def test_batch_mates_change_no_lora_at_inference_and_vmap_equals_the_batch(states):
    params, stats = trained()

    def one_prompt(state):
        return take_example(generate(params, stats, state[None], CONFIG).lora, 0)

    batched = generated(params, stats, states, CONFIG).lora
    mapped = jax.jit(jax.vmap(one_prompt, out_axes=1))(states)
    chex.assert_trees_all_close(mapped, batched, rtol=1e-4, atol=1e-4)


def test_gumbel_draws_in_training_and_is_still_at_inference(states):
    config = dataclasses.replace(CONFIG, strategy="gumbel", composition="products")
    params, stats = trained(config)
    key = jax.random.key(5)
    noisy = generated(params, stats, states, config, train=True, key=key)
    chex.assert_shape(noisy.lora["up"]["a"], (L, B, D, config.n_experts * config.rank))
    quiet, keyed = (gated(params, stats, states, config, key=k) for k in (None, key))
    chex.assert_trees_all_equal(quiet, keyed)
    assert not np.allclose(quiet[0], noisy.gates)
    with pytest.raises(UserError, match="key"):
        generated(params, stats, states, config, train=True)


def test_batch_norm_switch_and_constants_reach_the_router(states):
    params, stats = trained()
    off = dataclasses.replace(CONFIG, batch_norm=False)
    chex.assert_trees_all_equal(gated(params, stats, states, off, train=True)[1], stats)
    no_memory = dataclasses.replace(CONFIG, bn_momentum=0.0)
    _, new = gated(params, stats, states, no_memory, train=True)
    _, again = gated(params, new, states, no_memory, train=True)
    chex.assert_trees_all_close(new, again)


@pytest.mark.parametrize(
    "field, value",
    [
        ("n_experts", 0),
        ("n_experts", 2.5),
        ("n_experts", True),
        ("top_k", 0),
        ("top_k", 9),
        ("rank", -1),
        ("alpha", 0.0),
        ("alpha", float("nan")),
        ("alpha", "16"),
        ("strategy", "topk"),
        ("composition", "sum"),
        ("pool", "global"),
        ("router", None),
        ("router_width", 0),
        ("batch_norm", 1),
        ("bn_momentum", 1.0),
        ("bn_eps", 0.0),
        ("meta_tokens", "none"),
        ("balance_coefficient", -0.01),
        ("cloud_rank", 0),
        ("cloud_alpha", float("inf")),
        ("cloud_dropout", 1.0),
        ("cloud_targets", ()),
        ("edge_targets", "gate"),
        ("edge_targets", ("up", "up")),
    ],
)
def test_a_bad_config_names_its_field_in_one_line(field, value):
    with pytest.raises(UserError, match=f"^{field} is ") as error:
        GeneratorConfig(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["edge_targets", "cloud_targets"])
def test_a_target_that_the_model_lacks_is_named(field):
    with pytest.raises(UserError, match=f"{field} names 'fc1'"):
        init(KEY, dataclasses.replace(CONFIG, **{field: ("q", "fc1")}))


def test_the_defaults_are_the_papers():
    config = GeneratorConfig()
    assert (config.n_experts, config.top_k, config.rank, config.alpha) == (8, 2, 16, 16.0)
    assert (config.balance_coefficient, config.cloud_dropout) == (0.01, 0.05)
