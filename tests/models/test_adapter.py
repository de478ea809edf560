"""The seam carries what the decoder does not know: rows of gates, LoRAMoE, MixLoRA, in sketches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.method import compose, scaled
from lorax_gen.method.experts import apply_experts
from lorax_gen.method.generator import GeneratorConfig
from lorax_gen.method.lora import apply_lora
from lorax_gen.models import decoder, decoding
from lorax_gen.models.adapter import Adapter, Apply
from lorax_gen.models.decoder import kernel_shapes
from lorax_gen.system import gated_pool
from tests.models.configs import LLAMA

MLP = ("gate", "up", "down")
L, N, R = LLAMA.num_hidden_layers, 4, 3


@pytest.fixture(scope="module")
def params():
    return jax.jit(decoder.init_params, static_argnums=1)(jax.random.key(0), LLAMA)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 7), 0, LLAMA.vocab_size)


def draw(seed, *lead, names=MLP, rank=R):
    """Factors of no meaning `{name: {'a': [*lead, D, R], 'b': [*lead, R, F]}}`."""
    rng = np.random.default_rng(seed)
    return {
        name: {
            "a": jnp.asarray(rng.normal(0, d_in**-0.5, (*lead, d_in, rank)), jnp.float32),
            "b": jnp.asarray(rng.normal(0, 0.3, (*lead, rank, d_out)), jnp.float32),
        }
        for name, (d_in, d_out) in kernel_shapes(LLAMA).items()
        if name in names
    }


hidden_and_aux = jax.jit(decoder.hidden_and_aux, static_argnames=("config", "execution"))


def hidden(params, tokens, adapter=None, **options):
    return hidden_and_aux(params, LLAMA, tokens, adapter=adapter, **options)[0]


# --- LoRAs ---------------------------------------------------------------------------------------


def test_a_lora_for_all_and_one_of_each_rows_own_add_up(params, tokens):
    shared, rows = draw(0, L), draw(1, L, len(tokens))
    both = hidden(params, tokens, Adapter(shared, rows))
    merged = {**params, "layers": {**params["layers"]}}
    for name, pair in shared.items():
        merged["layers"][name] = params["layers"][name] + pair["a"] @ pair["b"]
    np.testing.assert_allclose(both, hidden(merged, tokens, Adapter(rows=rows)), atol=2e-5)
    assert np.abs(both - hidden(params, tokens, Adapter(shared))).max() > 0.1


def test_rows_are_taken_and_repeated(params, tokens):
    rows = draw(1, L, 3)
    taken = Adapter(draw(0, L), rows).take_rows(np.array([2, 2, 0]))
    expected = hidden(params, tokens[jnp.array([2, 2, 0])], taken)
    one = hidden(params, tokens, Adapter(draw(0, L), rows))
    np.testing.assert_allclose(expected[0], one[2], atol=2e-5)


# --- gates as rows over a pool -------------------------------------------------------------------


@pytest.fixture(scope="module", params=["factors", "products"])
def pool_and_gates(request):
    gates = np.zeros((3, L, N), np.float32)
    gates[0, :, :2], gates[1, :, 2:] = 0.5, (0.25, 0.75)  # the last row is not specialised
    config = GeneratorConfig(n_experts=N, top_k=2, composition=request.param, rank=R, alpha=6.0)
    return draw(2, L, N), gates, config


def test_gates_as_rows_are_the_loras_that_they_compose(params, tokens, pool_and_gates):
    pool, gates, config = pool_and_gates
    loras = scaled(compose(pool, jnp.asarray(gates), config.composition, 2), 6.0 / R)
    found = hidden(params, tokens, gated_pool(pool, gates, config))
    np.testing.assert_allclose(found, hidden(params, tokens, Adapter(rows=loras)), atol=2e-5)
    np.testing.assert_allclose(found[2], hidden(params, tokens)[2], atol=1e-6)
    assert np.abs(found[:2] - hidden(params, tokens)[:2]).max() > 0.1


def test_decoding_multiplies_the_pool_and_writes_the_same(params, tokens, pool_and_gates):
    pool, gates, config = pool_and_gates
    lengths = jnp.array([7, 5, 6])
    write = jax.jit(decoding.generate_tokens, static_argnames=("config", "max_new_tokens"))
    options = {"config": LLAMA, "max_new_tokens": 8}
    loras = scaled(compose(pool, jnp.asarray(gates), config.composition, 2), 6.0 / R)
    expected = write(params, tokens=tokens, lengths=lengths, adapter=Adapter(rows=loras), **options)
    found = write(
        params, tokens=tokens, lengths=lengths, adapter=gated_pool(pool, gates, config), **options
    )
    np.testing.assert_array_equal(found, expected)


@dataclasses.dataclass(frozen=True)
class LaidOut(Apply):
    """The pool as two wide kernels, A_cat `[D, N R]` and B_cat `[N R, F]`, gates between them."""

    def kernel(self, name, x, shared, rows, key):
        if name not in shared:
            return None
        inner = (x @ shared[name]["a"]).reshape(*x.shape[:2], N, -1) * rows["gates"][
            :, None, :, None
        ]
        return inner.reshape(*x.shape[:2], -1) @ shared[name]["b"]


def test_a_pool_laid_out_once_serves_any_rows(params, tokens, pool_and_gates):
    pool, gates, config = pool_and_gates
    if config.composition != "products":
        x = jax.random.normal(jax.random.key(3), (3, 5, LLAMA.hidden_size))
        own = {"up": jax.tree.map(lambda leaf: leaf[0], pool["up"])}
        lora = compose(own, jnp.asarray(gates[:, 0]), "factors")["up"]
        found = apply_experts(x, own["up"], jnp.asarray(gates[:, 0]), "factors")
        np.testing.assert_allclose(found, apply_lora(x, lora), atol=1e-4)
        return
    wide = {
        name: {
            "a": pair["a"].swapaxes(1, 2).reshape(L, pair["a"].shape[2], -1),
            "b": 6.0 / R * pair["b"].reshape(L, -1, pair["b"].shape[-1]),
        }
        for name, pair in pool.items()
    }
    found = hidden(params, tokens, Adapter(wide, {"gates": gates.swapaxes(0, 1)}, LaidOut()))
    expected = hidden(params, tokens, gated_pool(pool, gates, config))
    np.testing.assert_allclose(found, expected, atol=2e-5)


# --- token-routed mixtures -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LoraMoe(Apply):
    """LoRAMoE: at each kernel a router of its own, dense softmax gates over N LoRAs, per token."""

    def kernel(self, name, x, shared, rows, key):
        if name not in shared:
            return None
        pair = shared[name]
        gates = jax.nn.softmax(x.astype(jnp.float32) @ pair["router"])  # [B, T, N]
        inner = jnp.einsum("btd,ndr->btnr", x, pair["a"]) * gates[..., None]
        return jnp.einsum("btnr,nrf->btf", inner, pair["b"])


def test_loramoe_is_a_kernel(params, tokens):
    tree = draw(4, L, N)
    for pair in tree.values():
        pair["router"] = jnp.zeros((L, pair["a"].shape[2], N))
    found = hidden(params, tokens, Adapter(tree, apply=LoraMoe()))
    # Uniform gates are the mean of the experts' products: one LoRA of rank N R.
    flat = {
        name: {
            "a": pair["a"].swapaxes(1, 2).reshape(L, pair["a"].shape[2], -1),
            "b": pair["b"].reshape(L, -1, pair["b"].shape[-1]) / N,
        }
        for name, pair in tree.items()
    }
    np.testing.assert_allclose(found, hidden(params, tokens, Adapter(flat)), atol=2e-5)


@dataclasses.dataclass(frozen=True)
class MixLora(Apply):
    """MixLoRA: one router a layer, each token through 2 of N networks with LoRAs of their own."""

    def feed_forward(self, x, mlp, shared, rows, key):
        weights = jax.nn.softmax(x.astype(jnp.float32) @ shared["router"])  # [B, T, N]
        kept, chosen = jax.lax.top_k(weights, 2)
        picked = jax.nn.one_hot(chosen, N).sum(-2)
        gates = weights * picked / kept.sum(-1, keepdims=True)
        y = 0.0
        for n in range(N):
            own = jax.tree.map(lambda leaf, n=n: leaf[n], shared["experts"])
            y += gates[..., n, None] * mlp(x, lambda name, h, own=own: apply_lora(h, own[name]))
        balance = N * jnp.sum(picked.mean((0, 1)) * weights.mean((0, 1)))
        return y.astype(x.dtype), {"balance": balance}


def test_mixlora_is_a_feed_forward_network_with_a_loss_of_its_own(params, tokens):
    one = draw(5, L)
    experts = jax.tree.map(lambda x: jnp.repeat(x[:, None], N, 1), one)
    router = jnp.asarray(np.random.default_rng(6).normal(size=(L, LLAMA.hidden_size, N)), "f")
    adapter = Adapter({"router": router, "experts": experts}, apply=MixLora())
    found, aux = hidden_and_aux(params, LLAMA, tokens, adapter=adapter)
    # Experts that are all alike are one LoRA, however tokens are routed.
    np.testing.assert_allclose(found, hidden(params, tokens, Adapter(one)), atol=2e-5)
    assert aux["balance"].shape == (L,) and (aux["balance"] > 1).all()
    flat = dataclasses.replace(adapter, shared=adapter.shared | {"router": 0 * router})
    _, aux = hidden_and_aux(params, LLAMA, tokens, adapter=flat)
    np.testing.assert_allclose(aux["balance"], 2.0, atol=1e-5)  # two choices, in equal parts


# --- a prefix ------------------------------------------------------------------------------------


def test_a_prefix_is_the_tokens_whose_embeddings_it_holds(params, tokens):
    prefix = decoder.embed(params, LLAMA, tokens[:, :3])
    expected = hidden(params, tokens)[:, 3:]
    np.testing.assert_allclose(hidden(params, tokens[:, 3:], prefix=prefix), expected, atol=1e-5)
    write = jax.jit(decoding.generate_tokens, static_argnames=("config", "max_new_tokens"))
    options = {"config": LLAMA, "max_new_tokens": 5}
    entire = write(params, tokens=tokens, lengths=jnp.array([7, 5, 6]), **options)
    found = write(
        params, tokens=tokens[:, 3:], lengths=jnp.array([4, 2, 3]), prefix=prefix, **options
    )
    np.testing.assert_array_equal(found, entire)


def test_texts_that_share_a_row_all_see_the_prefix(params, tokens):
    """Two texts in one row, as choices are packed, after the same prefix."""
    prefix = decoder.embed(params, LLAMA, tokens[:, :2])
    first, second = tokens[:, 2:4], tokens[:, 4:7]
    row = jnp.concatenate([first, second], axis=1)
    positions = jnp.broadcast_to(jnp.array([0, 1, 0, 1, 2]), row.shape)
    owners = jnp.array([0, 0, 1, 1, 1])
    own = (owners[:, None] == owners) & (jnp.arange(5)[:, None] >= jnp.arange(5))
    mask = jnp.broadcast_to(own, (len(tokens), 1, 5, 5))
    found = hidden(params, row, prefix=prefix, positions=positions, mask=mask)
    for part, text in ((found[:, :2], first), (found[:, 2:], second)):
        np.testing.assert_allclose(part, hidden(params, text, prefix=prefix), atol=1e-5)


def test_a_prefix_of_the_adapter_is_one_of_the_forward_pass(tiny_world_system):
    edge = tiny_world_system.edge
    tokens = jnp.arange(4, 16, dtype=jnp.int32).reshape(2, 6)
    prefix = jax.random.normal(jax.random.key(0), (2, 3, edge.config.hidden_size))
    run = jax.jit(decoder.hidden_states, static_argnums=1)
    expected = run(edge.params, edge.config, tokens, prefix=prefix)
    own = Adapter(prefix=prefix)
    found = run(edge.params, edge.config, tokens, adapter=own)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected - run(edge.params, edge.config, tokens)).max() > 0.1
    chosen = run(edge.params, edge.config, tokens[:1], adapter=own.take_rows(np.array([1])))
    swapped = run(edge.params, edge.config, tokens[:1], prefix=prefix[1:])
    np.testing.assert_array_equal(chosen, swapped)
    with pytest.raises(ValueError, match="a prefix of its own"):
        decoder.hidden_states(edge.params, edge.config, tokens, adapter=own, prefix=prefix)
