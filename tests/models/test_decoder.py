"""The decoder against LLaMA written out in numpy, and what must hold for any of its configs."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.method import compose, merge, take_example
from lorax_gen.models import decoder
from lorax_gen.models.adapter import Adapter, LowRank, drop
from lorax_gen.models.decoder import DecoderConfig, Execution, kernel_shapes
from lorax_gen.models.rope import rope_tables, rotate
from tests.tiny import adapter_of

B, T, V, R, N, K = 3, 7, 40, 3, 4, 2
LLAMA = DecoderConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=100.0,
)
CONFIGS = {
    "llama-gqa-untied": LLAMA,
    "llama-mha-tied": dataclasses.replace(LLAMA, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2": dataclasses.replace(
        LLAMA, num_key_value_heads=1, biases=("q", "k", "v"), tie_word_embeddings=True
    ),
    "gemma": dataclasses.replace(
        LLAMA,
        head_dim=12,  # heads x head_dim is not hidden_size
        hidden_act="gelu_pytorch_tanh",
        rms_norm_offset=True,
        embedding_scale=True,
        tie_word_embeddings=True,
    ),
}


hidden_states = jax.jit(decoder.hidden_states, static_argnames=("config", "execution"))
composed = jax.jit(compose, static_argnums=(2, 3))
merged_with = jax.jit(merge)


@jax.jit
def logits(params, tokens, lora=None):
    return decoder.logits(
        params, LLAMA, decoder.hidden_states(params, LLAMA, tokens, adapter=adapter_of(lora))
    )


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(LLAMA)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


# --- the reference -------------------------------------------------------------------------------


def numpy_norm(x, weight, config):
    weight = weight + 1 if config.rms_norm_offset else weight
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight


def numpy_rope(x, config):
    """`x: [T, E]` of one head: the pair (x_i, x_{i + E/2}) is a complex number that turns."""
    half = config.head_dim // 2
    rates = config.rope_theta ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.outer(np.arange(len(x)), rates))
    return np.concatenate([turned.real, turned.imag], -1)


def numpy_activation(x, config):
    if config.hidden_act == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_attention(q, k, v, config):
    """`[T, heads * E]` each; query head h reads the key/value head h // (H / K)."""
    e, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    heads = []
    for h in range(config.num_attention_heads):
        mine, theirs = slice(h * e, (h + 1) * e), slice(h // shared * e, (h // shared + 1) * e)
        scores = numpy_rope(q[:, mine], config) @ numpy_rope(k[:, theirs], config).T / np.sqrt(e)
        scores[np.triu_indices(len(q), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, theirs])
    return np.concatenate(heads, -1)


def numpy_logits(params, config, row):
    """Logits `[T, V]` of one row of tokens `[T]`, float64, layer by layer."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = p["embed"][row] * (np.sqrt(config.hidden_size) if config.embedding_scale else 1)
    for i in range(config.num_hidden_layers):
        w = {name: leaf[i] for name, leaf in p["layers"].items()}
        h = numpy_norm(x, w["attn_norm"], config)
        q, k, v = (h @ w[n] + w.get(f"{n}_bias", 0) for n in ("q", "k", "v"))
        x = x + numpy_attention(q, k, v, config) @ w["o"]
        h = numpy_norm(x, w["mlp_norm"], config)
        x = x + (numpy_activation(h @ w["gate"], config) * (h @ w["up"])) @ w["down"]
    head = p["embed"].T if config.tie_word_embeddings else p["lm_head"]
    return numpy_norm(x, p["final_norm"], config) @ head


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_llama_written_out_in_numpy(name, random_params, tokens):
    config = CONFIGS[name]
    params = random_params(config)
    assert ("lm_head" in params) != config.tie_word_embeddings
    found = decoder.logits(params, config, hidden_states(params, config, tokens))
    expected = np.stack([numpy_logits(params, config, row) for row in tokens])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_every_switch_of_the_config_changes_the_logits(random_params, tokens):
    """So that the match above says something about each of them."""
    config = CONFIGS["gemma"]
    params = random_params(config)
    expected = numpy_logits(params, config, tokens[0])
    for field, value in {
        "hidden_act": "silu",
        "rms_norm_offset": False,
        "embedding_scale": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 0.1,
    }.items():
        other = numpy_logits(params, dataclasses.replace(config, **{field: value}), tokens[0])
        assert np.abs(other - expected).max() > 1e-3, field


# --- causality -----------------------------------------------------------------------------------


def test_a_state_depends_on_its_own_and_earlier_tokens_alone(params, tokens):
    """By gradient: d hidden[t] / d embedding[s] is zero exactly where s > t."""
    embeddings = decoder.embed(params, LLAMA, tokens[:1])
    direction = np.random.default_rng(1).normal(size=32).astype(np.float32)

    @jax.jit
    def sensitivity(embeddings):
        read = lambda x: decoder.hidden_states(params, LLAMA, embeddings=x)[0] @ direction  # noqa: E731
        return jnp.abs(jax.jacrev(read)(embeddings)[:, 0]).max(-1)

    reached = np.asarray(sensitivity(embeddings)) > 0
    np.testing.assert_array_equal(reached, np.tri(T, dtype=bool))


def test_padding_on_the_right_changes_no_real_state(params, tokens):
    padded = np.concatenate([tokens, np.zeros((B, 3), np.int32)], axis=1)
    otherwise = np.concatenate([tokens, np.full((B, 3), V - 1, np.int32)], axis=1)
    found = logits(params, padded)[:, :T]
    chex.assert_trees_all_equal(found, logits(params, otherwise)[:, :T])
    np.testing.assert_allclose(found, logits(params, tokens), rtol=1e-5, atol=1e-5)


def test_embeddings_as_input_equal_tokens_as_input(random_params, tokens):
    config = CONFIGS["gemma"]  # its embeddings are scaled: once, on either way
    params = random_params(config)
    from_tokens = hidden_states(params, config, tokens)
    from_embeddings = hidden_states(
        params, config, embeddings=decoder.embed(params, config, tokens)
    )
    np.testing.assert_allclose(from_embeddings, from_tokens, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 1, 1, 8)).astype(np.float32) for _ in range(2))

    @jax.jit
    def turned(x, position):
        return rotate(x, rope_tables(LLAMA.ropes[0], LLAMA.head_dim, position[None]))

    def score(q_position, k_position):
        return float((turned(q, np.int32(q_position)) * turned(k, np.int32(k_position))).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 3), abs=1e-2)
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)


# --- LoRA ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    """Experts on all seven kernels."""
    rng = np.random.default_rng(2)
    return {
        name: {
            "a": rng.normal(0, d_in**-0.5, (2, N, d_in, R)).astype(np.float32),
            "b": rng.normal(0, 0.3, (2, N, R, d_out)).astype(np.float32),
        }
        for name, (d_in, d_out) in kernel_shapes(LLAMA).items()
    }


@pytest.fixture(scope="module")
def gates():
    raw = np.random.default_rng(3).uniform(0.1, 1, (B, 2, N)).astype(np.float32)
    raw[raw < np.sort(raw)[..., -K, None]] = 0
    return raw / raw.sum(-1, keepdims=True)


def merged(params, tree):
    return {**params, "layers": merged_with(params["layers"], tree)}


@pytest.mark.parametrize("composition", ["factors", "products"])
def test_merged_weights_give_the_logits_of_a_shared_lora(params, tokens, pool, gates, composition):
    lora = composed(pool, gates[0], composition, K)
    applied, plain = logits(params, tokens, lora), logits(params, tokens)
    assert np.abs(applied - plain).max() > 0.1
    np.testing.assert_allclose(logits(merged(params, lora), tokens), applied, atol=1e-4)


@pytest.mark.parametrize("composition", ["factors", "products"])
def test_merged_weights_give_the_logits_of_each_examples_lora(
    params, tokens, pool, gates, composition
):
    lora = jax.device_get(composed(pool, gates, composition, K))
    applied = np.asarray(logits(params, tokens, lora))
    assert np.abs(applied - logits(params, tokens, take_example(lora, 0))).max() > 0.1
    for row in range(B):
        alone = logits(merged(params, take_example(lora, row)), tokens)
        np.testing.assert_allclose(applied[row], alone[row], atol=1e-4)


def test_a_lora_whose_b_is_zero_leaves_the_logits_as_they_are(params, tokens, pool, gates):
    lora = composed(pool, gates, "factors", K)
    zero = {name: {"a": pair["a"], "b": np.zeros_like(pair["b"])} for name, pair in lora.items()}
    np.testing.assert_allclose(logits(params, tokens, zero), logits(params, tokens), atol=1e-6)


def test_dropout_acts_on_the_lora_branch_alone_and_only_with_a_key(params, tokens, pool, gates):
    lora = composed(pool, gates[0], "factors", K)
    key = jax.random.key(0, impl="unsafe_rbg")

    def hidden(**options):
        return hidden_states(params, LLAMA, tokens, **options)

    still, dropping = Adapter(lora), Adapter(lora, apply=LowRank(dropout=0.5))
    chex.assert_trees_all_equal(
        hidden(adapter=Adapter(apply=LowRank(dropout=0.5)), dropout_key=key), hidden()
    )
    chex.assert_trees_all_equal(hidden(adapter=dropping), hidden(adapter=still))
    dropped = hidden(adapter=dropping, dropout_key=key)
    assert np.abs(dropped - hidden(adapter=still)).max() > 0.1


def test_dropout_keeps_the_mean():
    x = jnp.full(100_000, 3.0)
    dropped = drop(x, 0.25, jax.random.key(0, impl="unsafe_rbg"))
    assert set(np.unique(dropped)) == {0.0, 4.0}
    assert dropped.mean() == pytest.approx(3.0, rel=0.02)


# --- memory and numbers --------------------------------------------------------------------------


def test_remat_changes_neither_the_loss_nor_its_gradients(params, tokens, pool, gates):
    lora = composed(pool, gates, "factors", K)

    def loss(params, lora, remat):
        return jnp.sin(
            hidden_states(
                params, LLAMA, tokens, adapter=adapter_of(lora), execution=Execution(remat=remat)
            )
        ).sum()

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    expected = grad(params, lora, "none")
    for remat in ("full", "dots"):
        assert "remat" in str(jax.make_jaxpr(loss, static_argnums=2)(params, lora, remat))
        chex.assert_trees_all_close(grad(params, lora, remat), expected, rtol=1e-4, atol=1e-4)


def test_bf16_parameters_give_fp32_logits_close_to_the_exact_ones(params, tokens):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = logits(half, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, logits(params, tokens), atol=0.15)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 .* num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        (
            {"hidden_act": "tanh"},
            "hidden_act is 'tanh'; choose one of silu, gelu_pytorch_tanh, relu",
        ),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(LLAMA, **changes)
