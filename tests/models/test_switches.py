"""Each switch of the decoder against a plain computation in numpy; decoding, int8, LoRA with it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.method import merge
from lorax_gen.models import decoder, int8
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.models.decoding import forward_with_cache, init_cache
from lorax_gen.models.rope import Rope, RopeScaling

B, T, V, L, D = 3, 9, 40, 3, 32
FULL, SLIDING = "full_attention", "sliding_attention"
PLAIN = DecoderConfig(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=48,
    num_hidden_layers=L,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=16,
    rope_theta=100.0,
)
LEARNED = dataclasses.replace(
    PLAIN,
    biases=("q", "k", "v", "o", "up", "down"),
    mlp="plain",
    norm="layer",
    positions="learned",
    position_offset=2,
    hidden_act="relu",
    tie_word_embeddings=True,
)
TWO_ROPES = dataclasses.replace(
    PLAIN,
    qk_norm=True,
    rms_norm_offset=True,
    rope_scaling=RopeScaling(3.0),
    sliding_rope=Rope(7.0),
    sliding_window=4,
    layer_types=(SLIDING, FULL, SLIDING),
)
AFTER = dataclasses.replace(
    LEARNED, word_embed_proj_dim=24, do_layer_norm_before=False, tie_word_embeddings=False
)
LEARNED_NAME = "learned positions, LayerNorm, plain MLP, biases"
CASES = {
    "norms of q and k": dataclasses.replace(PLAIN, qk_norm=True),
    LEARNED_NAME: LEARNED,
    "norms after, narrower embeddings": AFTER,
    "narrower embeddings, tied, scaled": dataclasses.replace(
        PLAIN, word_embed_proj_dim=8, tie_word_embeddings=True, embedding_scale=True
    ),
    "two ropes": TWO_ROPES,
    "layers without rope": dataclasses.replace(PLAIN, rope_layers=(True, False, True)),
    "gated MLP with all biases": dataclasses.replace(PLAIN, biases=tuple(kernel_shapes(PLAIN))),
    "LayerNorm of heads": dataclasses.replace(PLAIN, norm="layer", qk_norm=True),
}
SWITCHES = [
    ("norms of q and k", {"qk_norm": False}),
    (LEARNED_NAME, {"norm": "rms"}),
    (LEARNED_NAME, {"positions": "rotary"}),
    (LEARNED_NAME, {"position_offset": 0}),
    (LEARNED_NAME, {"do_layer_norm_before": False}),
    (LEARNED_NAME, {"hidden_act": "silu"}),
    *[(LEARNED_NAME, {"biases": (name,)}) for name in ("q", "k", "v", "o", "up", "down")],
    ("two ropes", {"sliding_rope": None}),
    ("two ropes", {"sliding_rope": Rope(7.0, RopeScaling(3.0))}),
    ("two ropes", {"rope_scaling": None}),
    ("two ropes", {"sliding_window": 5}),
    ("layers without rope", {"rope_layers": ()}),
]

hidden_states = jax.jit(decoder.hidden_states, static_argnames=("config", "execution"))
step = partial(jax.jit, static_argnames="config")(forward_with_cache)


@pytest.fixture(params=CASES)
def config(request):
    return CASES[request.param]


@pytest.fixture
def params(config, random_params):
    return random_params(config)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


# --- the reference -------------------------------------------------------------------------------


def reference_norm(x, w, name, config):
    weight = w[name] + (1 if config.rms_norm_offset else 0)
    if config.norm == "layer":
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + config.rms_norm_eps) * weight + w[f"{name}_bias"]
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight


def reference_turned(x, config, layer):
    """`x: [T, heads, E]`: the pair (x_i, x_{i + E/2}) is a complex number that turns."""
    rope = config.rope_theta, config.rope_scaling
    if config.sliding_rope and config.layer_types[layer] == SLIDING:
        rope = config.sliding_rope.theta, config.sliding_rope.scaling
    if config.positions == "learned" or (config.rope_layers and not config.rope_layers[layer]):
        return x
    half = config.head_dim // 2
    rates = rope[0] ** (-np.arange(half) / half) / (rope[1].factor if rope[1] else 1)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * np.outer(np.arange(len(x)), rates)[:, None]
    )
    return np.concatenate([turned.real, turned.imag], -1)


def reference_attention(q, k, v, window):
    """`[T, heads, E]` each; query head h reads the key/value head h // (H / K)."""
    shared = q.shape[1] // k.shape[1]
    distance = np.subtract.outer(np.arange(len(q)), np.arange(len(q)))
    seen = (distance >= 0) & (distance < (window or len(q)))
    out = np.empty_like(q)
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // shared].T / np.sqrt(q.shape[-1])
        weights = np.where(seen, np.exp(scores), 0)
        out[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, h // shared]
    return out.reshape(len(q), -1)


def reference_logits(params, config, row):
    """Logits `[T, V]` of one row of tokens `[T]`, float64, layer by layer."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    act = {"silu": lambda x: x / (1 + np.exp(-x)), "relu": lambda x: np.maximum(x, 0)}
    act = act[config.hidden_act]
    x = p["embed"][row] @ p.get("project_in", np.eye(p["embed"].shape[1]))
    x = x * np.sqrt(D) if config.embedding_scale else x
    before = config.do_layer_norm_before
    if config.positions == "learned":
        x = x + p["positions"][np.arange(len(row)) + config.position_offset]
    for i in range(config.num_hidden_layers):
        w = {name: leaf[i] for name, leaf in p["layers"].items()}

        def through(h, name, w=w):
            return h @ w[name] + (w[f"{name}_bias"] if name in config.biases else 0)

        h = reference_norm(x, w, "attn_norm", config) if before else x
        q, k, v = (through(h, n).reshape(len(row), -1, config.head_dim) for n in "qkv")
        if config.qk_norm:
            q, k = (reference_norm(y, w, n, config) for y, n in ((q, "q_norm"), (k, "k_norm")))
        q, k = reference_turned(q, config, i), reference_turned(k, config, i)
        x = x + through(reference_attention(q, k, v, config.windows[i]), "o")
        x = x if before else reference_norm(x, w, "attn_norm", config)
        h = reference_norm(x, w, "mlp_norm", config) if before else x
        wide = act(through(h, "up"))
        if config.mlp == "gated":
            wide = act(through(h, "gate")) * through(h, "up")
        x = x + through(wide, "down")
        x = x if before else reference_norm(x, w, "mlp_norm", config)
    head = p["embed"].T if config.tie_word_embeddings else p["lm_head"]
    x = reference_norm(x, p, "final_norm", config) if before else x
    return x @ p.get("project_out", np.eye(x.shape[1])) @ head


def test_logits_match_the_reference(config, params, tokens):
    found = decoder.logits(params, config, hidden_states(params, config, tokens))
    expected = np.stack([reference_logits(params, config, row) for row in tokens])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, changes", SWITCHES)
def test_every_switch_changes_the_logits(name, changes, random_params, tokens):
    """So that the match above says something about each of them."""
    config, params = CASES[name], random_params(CASES[name])
    other = reference_logits(params, dataclasses.replace(config, **changes), tokens[0])
    assert np.abs(other - reference_logits(params, config, tokens[0])).max() > 1e-3


def test_a_plain_mlp_has_no_gate_and_only_the_named_biases(random_params):
    assert "gate" not in kernel_shapes(LEARNED)
    layers = random_params(LEARNED)["layers"]
    assert {name for name in layers if name.endswith("_bias") and "norm" not in name} == {
        "q_bias", "k_bias", "v_bias", "o_bias", "up_bias", "down_bias"
    }  # fmt: skip
    assert not {name for name in layers if "gate" in name}


# --- caches, packed rows, prefixes, embeddings ---------------------------------------------------


def test_a_cache_gives_the_states_of_the_entire_sequence(config, params, tokens):
    """Rows of several lengths: what is padding in the prompt is overwritten token by token."""
    expected = np.asarray(hidden_states(params, config, tokens))
    lengths, rows = np.array([4, 1, 3]), np.arange(B)
    prompt = np.where(np.arange(4) < lengths[:, None], tokens[:, :4], 0)
    cache = init_cache(config, B, T, jnp.float32)
    found, cache = step(params, config, prompt, cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], atol=1e-5)
    for offset in range(T - 4):
        where = lengths + offset
        found, cache = step(
            params, config, tokens[rows, where][:, None], cache, positions=where[:, None]
        )
        np.testing.assert_allclose(found[:, 0], expected[rows, where], atol=1e-5)


def test_texts_that_share_a_row_do_not_see_each_other(config, params, tokens):
    """Positions begin anew with each text."""
    first, second = tokens[:1, :4], tokens[1:2, :5]
    text = np.array([0] * 4 + [1] * 5)
    mask = (text[:, None] == text) & np.tri(T, dtype=bool)
    found = hidden_states(
        params,
        config,
        np.concatenate([first, second], axis=1),
        positions=np.concatenate([np.arange(4), np.arange(5)])[None],
        mask=mask[None, None],
    )
    alone = [hidden_states(params, config, tokens) for tokens in (first, second)]
    np.testing.assert_allclose(found, np.concatenate(alone, axis=1), atol=1e-5)


def test_a_prefix_takes_the_first_positions(config, params, tokens):
    """Embeddings, such as meta tokens, take positions as tokens do."""
    embeddings = decoder.embed(params, config, tokens)
    entire = hidden_states(params, config, tokens)
    np.testing.assert_allclose(
        hidden_states(params, config, embeddings=embeddings), entire, atol=1e-5
    )
    after = hidden_states(params, config, tokens[:, 2:], prefix=embeddings[:, :2])
    np.testing.assert_allclose(after, entire[:, 2:], atol=1e-5)
    cache = init_cache(config, B, T, jnp.float32)
    after, _ = step(params, config, tokens[:, 2:], cache, prefix=embeddings[:, :2])
    np.testing.assert_allclose(after, entire[:, 2:], atol=1e-5)


# --- kernels -------------------------------------------------------------------------------------


def test_int8_kernels_give_the_logits_of_the_values_they_hold(config, params, tokens):
    pairs = int8.quantize_kernels(params)
    held = {name for name, leaf in pairs["layers"].items() if int8.is_quantized(leaf)}
    assert held == set(kernel_shapes(config))
    layers = {
        name: leaf["qvalue"] * leaf["scale"] if name in held else leaf
        for name, leaf in pairs["layers"].items()
    }
    expected = hidden_states({**params, "layers": layers}, config, tokens)
    np.testing.assert_allclose(hidden_states(pairs, config, tokens), expected, atol=1e-5)


def test_merged_weights_give_the_states_of_a_lora_on_every_kernel(config, params, tokens):
    rng = np.random.default_rng(1)
    lora = {
        name: {
            "a": rng.normal(0, d_in**-0.5, (L, d_in, 2)).astype(np.float32),
            "b": rng.normal(0, 0.3, (L, 2, d_out)).astype(np.float32),
        }
        for name, (d_in, d_out) in kernel_shapes(config).items()
    }
    applied = hidden_states(params, config, tokens, adapter=Adapter(lora))
    assert np.abs(applied - hidden_states(params, config, tokens)).max() > 0.1
    merged = {**params, "layers": merge(params["layers"], lora)}
    np.testing.assert_allclose(hidden_states(merged, config, tokens), applied, atol=1e-5)


# --- errors --------------------------------------------------------------------------------------


def test_a_sequence_beyond_the_learned_positions_is_refused(random_params):
    params, longer = random_params(LEARNED), np.zeros((1, 17), np.int32)
    assert params["positions"].shape == (18, D)
    hidden_states(params, LEARNED, longer[:, :16])
    with pytest.raises(UserError, match=r"17 positions.* 16 learned positions"):
        hidden_states(params, LEARNED, longer)
    with pytest.raises(UserError, match=r"17 positions.* 16 learned positions"):
        step(params, LEARNED, longer, init_cache(LEARNED, 1, 17, jnp.float32))
    hidden_states(random_params(PLAIN), PLAIN, longer)  # rotary positions have no end


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm": "batch"}, "norm is 'batch'; choose one of rms, layer"),
        ({"positions": "none"}, "positions is 'none'; choose one of rotary, learned"),
        ({"mlp": "none"}, "mlp is 'none'; choose one of gated, plain"),
        ({"mlp": "plain", "biases": ("gate",)}, "biases names 'gate'"),
        ({"rope_layers": (True,)}, "rope_layers has 1 entries for 3 layers"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
    ],
)
def test_switches_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **changes)


def test_learned_positions_do_not_need_even_heads():
    assert dataclasses.replace(LEARNED, head_dim=7).head_dim == 7


def test_biases_mean_the_same_in_any_order():
    assert dataclasses.replace(PLAIN, biases=("v", "q")) == dataclasses.replace(
        PLAIN, biases=("q", "v")
    )


def test_a_scaling_is_of_one_kind():
    with pytest.raises(UserError, match="neither of rope_type linear"):
        RopeScaling(8.0, 1.0)
