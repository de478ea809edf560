"""Token-routed adapters: what they are when fresh, how they route, and what their losses count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.baselines import loramoe, mixlora
from lorax_gen.baselines.loramoe import LoraMoeConfig, localized_balance, token_gates
from lorax_gen.baselines.mixlora import MixLoraConfig, balance_loss
from lorax_gen.errors import UserError
from lorax_gen.method import scaled
from lorax_gen.models import decoding
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import hidden_and_aux, hidden_states, logits

MOE = LoraMoeConfig(n_experts=4, rank=2, alpha=4.0)
MIX = MixLoraConfig(n_experts=4, top_k=2, rank=2, alpha=4.0)
METHODS = {
    "loramoe": (loramoe.init_loramoe, loramoe.loramoe_adapter, MOE),
    "mixlora": (mixlora.init_mixlora, mixlora.mixlora_adapter, MIX),
}
TOKENS = np.random.default_rng(0).integers(4, 60, (3, 7)).astype(np.int32)
REAL = np.arange(7) < np.array([[7], [4], [2]])


@pytest.fixture(scope="module")
def edge(tiny_world_system):
    return tiny_world_system.edge


def make(method, edge, filled=True):
    init, adapter, config = METHODS[method]
    params = jax.jit(lambda: init(jax.random.key(0), config, edge.config))()
    if filled:
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda x: x + jnp.float32(rng.normal(0, 0.3, x.shape)), params)
    return params, lambda params, **options: adapter(params, config, **options)


def run(edge, adapter, tokens=TOKENS, key=None):
    return jax.jit(
        lambda params, adapter: hidden_and_aux(
            params, edge.config, tokens, adapter=adapter, dropout_key=key
        )
    )(edge.params, adapter)


@pytest.mark.parametrize("method", METHODS)
def test_fresh_it_is_the_base_model_with_dropout_on(method, edge):
    params, adapter = make(method, edge, filled=False)
    found, _ = run(edge, adapter(params, dropout=0.5), key=jax.random.key(1))
    base, _ = run(edge, None)
    np.testing.assert_allclose(found, base, atol=1e-5)
    changed, _ = run(edge, make(method, edge)[1](make(method, edge)[0]))
    assert np.abs(changed - base).max() > 0.1


def test_loramoe_uses_every_expert_with_gates_that_sum_to_one(edge):
    x = jax.random.normal(jax.random.key(0), (2, 5, 8)).astype(jnp.bfloat16)
    gates = token_gates(x, jax.random.normal(jax.random.key(1), (8, 4)))
    assert gates.dtype == jnp.float32 and (gates > 0).all()
    np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-6)
    params, adapter = make("loramoe", edge)
    _, sums = run(edge, adapter(params, real=REAL))
    assert set(sums) == {"gate", "up", "down"}
    for name in sums:  # [L, B, N]: over a row's real tokens
        np.testing.assert_allclose(sums[name].sum(-1), np.tile(REAL.sum(1), (2, 1)), rtol=1e-5)


def test_mixlora_gives_a_token_two_experts_with_gates_that_sum_to_one(edge):
    """Experts that are all alike are one LoRA then, however tokens are routed."""
    params, adapter = make("mixlora", edge)
    one = jax.tree.map(lambda x: x[:, 0], params["experts"])
    alike = jax.tree.map(lambda x: jnp.repeat(x[:, None], MIX.n_experts, 1), one)
    found, aux = run(edge, adapter(params | {"experts": alike}, real=REAL))
    s = MIX.alpha / MIX.rank
    expected, _ = run(edge, Adapter(scaled(one | params["attention"], s)))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    of_rows = np.tile(REAL.sum(1), (2, 1))
    np.testing.assert_allclose(aux["chosen"].sum(-1), 2 * of_rows)
    np.testing.assert_allclose(aux["probability"].sum(-1), of_rows, rtol=1e-5)
    assert (aux["chosen"] <= of_rows[..., None]).all()  # two different ones


def test_the_largest_are_those_of_top_k_equal_ones_included():
    values = jnp.round(4 * jax.random.uniform(jax.random.key(0), (50, 6)))
    _, indices = jax.lax.top_k(values, 3)
    np.testing.assert_array_equal(mixlora.largest(values, 3).argmax(-1), indices)


def test_mixloras_balance_loss_is_two_when_balanced_and_more_otherwise():
    real, even = jnp.ones((2, 8), bool), jnp.full((1, 2, 4), 8.0)  # one layer, two rows
    balanced = {"chosen": even / 2, "probability": even / 4}
    np.testing.assert_allclose(balance_loss(balanced, real), 2.0)
    uneven = jnp.array([[[8.0, 6, 2, 0], [6, 4, 4, 2]]])
    found = balance_loss({"chosen": uneven, "probability": uneven / 2}, real)
    sums = np.array([14, 10, 6, 2])
    np.testing.assert_allclose(found, 4 * (sums**2).sum() / 2 / 16**2, rtol=1e-6)
    assert found > 2


def test_loramoes_balance_loss_is_zero_when_equal_and_scales_groups():
    sums = {"up": jnp.ones((2, 3, 4)), "down": jnp.ones((2, 3, 4))}
    np.testing.assert_allclose(localized_balance(sums), 0, atol=1e-7)
    group = jnp.array([True, False, False])
    found = localized_balance(sums, group, 0.5)
    z = np.where(np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]), 1.5, 0.5)
    np.testing.assert_allclose(found, z.var(ddof=1) / z.mean() ** 2, rtol=1e-5)
    matched = {name: jnp.array(np.broadcast_to(1 / z, (2, 3, 4))) for name in sums}
    np.testing.assert_allclose(localized_balance(matched, group, 0.5), 0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_padding_does_not_count_in_a_balance_loss(method, edge):
    params, adapter = make(method, edge)
    noise = np.where(REAL, TOKENS, 61 - TOKENS // 2)
    assert (noise != TOKENS).any()
    found, expected = (run(edge, adapter(params, real=REAL), own)[1] for own in (noise, TOKENS))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    for name in (every := run(edge, adapter(params, real=np.ones_like(REAL)))[1]):
        assert np.abs(every[name] - expected[name]).max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_decoding_with_a_cache_is_the_full_forward_pass(method, edge):
    params, adapter = make(method, edge)
    made, lengths, new = adapter(params), REAL.sum(1).astype(np.int32), 5
    found = decoding.generate_tokens(
        edge.params, edge.config, TOKENS, lengths, max_new_tokens=new, adapter=made
    )
    rows = np.zeros((3, 7 + new), np.int32)
    rows[:, :7] = TOKENS
    forward = jax.jit(
        lambda rows: logits(
            edge.params,
            edge.config,
            hidden_states(edge.params, edge.config, rows, adapter=made),
        )
    )
    for i in range(new):  # what is to the right of a token does not change it
        last = forward(rows)[np.arange(3), lengths + i - 1]
        rows[np.arange(3), lengths + i] = np.argmax(last, -1)
    written = [row[n : n + new] for row, n in zip(rows, lengths, strict=True)]
    np.testing.assert_array_equal(found, written)
    assert len(np.unique(written)) > 3


def test_more_experts_of_a_token_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"adapter.top_k is 5, but there are 4 experts"):
        dataclasses.replace(MIX, top_k=5)
