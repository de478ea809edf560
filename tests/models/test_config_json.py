"""What a config.json says is used as it says, or refused in a line that names it."""

import dataclasses
import json
import math
import time

import pytest

from lorax_gen.errors import UserError
from lorax_gen.models.config_json import read_config, write_config
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.rope import Rope, RopeScaling
from tests.models.configs import CONFIGS, LLAMA, as_transformers_reads

FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
ABSENT = object()


@pytest.fixture
def write(tmp_path):
    """`write(name, **changes)`: the path of a config.json of that family."""

    def write(name, **changes):
        raw = write_config(CONFIGS[name]) | changes
        raw = {key: value for key, value in raw.items() if value is not ABSENT}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(raw))
        return path

    return write


def refusal(path):
    with pytest.raises(UserError) as error:
        read_config(path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(path))
    return message


# --- contradictions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, changes, both",
    [
        ("llama", {"rope_parameters": {"rope_theta": 5.0}},
         ["rope_theta=123.0", "rope_parameters has rope_theta=5.0"]),
        ("llama", {"rope_scaling": LLAMA3 | {"rope_theta": 5.0}},
         ["rope_theta=123.0", "rope_scaling has rope_theta=5.0"]),
        ("llama", {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 4.0}},
         ["rope_scaling", "rope_parameters"]),
        ("llama", {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
         ["rope_scaling", "rope_parameters"]),
        ("llama", {"rope_scaling": LLAMA3 | {"type": "linear"}}, ["'linear'", "'llama3'"]),
        ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 20},
         ["original_max_position_embeddings=20", "original_max_position_embeddings=40"]),
        ("llama", {"model_type": "qwen2"}, ["LlamaForCausalLM", "'qwen2'"]),
        ("llama", {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]},
         ["LlamaForCausalLM", "Qwen2ForCausalLM"]),
        ("llama", {"dtype": "bfloat16", "torch_dtype": "float32"},
         ["dtype='bfloat16'", "torch_dtype='float32'"]),
        ("llama", {"hidden_activation": "relu"}, ["hidden_activation='relu'", "hidden_act='silu'"]),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": ABSENT},
         ["hidden_size=16", "num_attention_heads=3"]),
        ("llama", {"num_key_value_heads": 8},
         ["num_key_value_heads=8", "num_attention_heads=4"]),
        ("gemma", {"hidden_activation": "silu"},
         ["hidden_activation='silu'", "hidden_act='gelu_pytorch_tanh'"]),
        ("gemma", {"hidden_activation": "silu", "hidden_act": ABSENT},
         ["hidden_activation='silu'", "hidden_act='gelu_pytorch_tanh'"]),
        ("gemma2", {"hidden_act": "silu"},
         ["hidden_activation='gelu_pytorch_tanh'", "hidden_act='silu'"]),
        ("gemma2", {"hidden_act": "silu", "hidden_activation": ABSENT},
         ["hidden_activation='gelu_pytorch_tanh'", "hidden_act='silu'"]),
        ("gemma2", {"sliding_window_pattern": 3}, ["sliding_window_pattern=3", "layer_types"]),
        ("gemma2", {"sliding_window_pattern": 2, "layer_types": [FULL, SLIDING, FULL]},
         ["sliding_window_pattern=2", "layer_types"]),
        ("gemma2", {"num_hidden_layers": 4}, ["3 layer_types", "num_hidden_layers=4"]),
        ("gemma2", {"layer_types": []}, ["0 layer_types", "num_hidden_layers=3"]),
        ("gemma2", {"sliding_window": None}, ["sliding_attention", "sliding_window"]),
        ("qwen2-window", {"use_sliding_window": False},
         ["layer_types", "use_sliding_window=False"]),
        ("qwen2-window", {"sliding_window": None}, ["layer_types", "sliding_window=None"]),
        ("gemma3", {"rope_parameters": {FULL: {"rope_theta": 5.0}}},
         ["rope_theta=123.0", "rope_parameters has rope_theta=5.0"]),
        ("gemma3", {"rope_parameters": {SLIDING: {"rope_theta": 5.0}}},
         ["rope_local_base_freq=45.0", "rope_parameters has rope_theta=5.0"]),
        ("gemma3", {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 4.0}}},
         ["rope_scaling", "rope_parameters"]),
        ("gemma3", {"sliding_window_pattern": 3}, ["sliding_window_pattern=3", "layer_types"]),
        ("gemma3", {"hidden_act": "silu"},
         ["hidden_activation='gelu_pytorch_tanh'", "hidden_act='silu'"]),
        ("smollm3", {"no_rope_layers": [1, 0]}, ["2 no_rope_layers", "num_hidden_layers=3"]),
        ("smollm3-window", {"use_sliding_window": False},
         ["layer_types", "use_sliding_window=False"]),
        ("opt", {"num_attention_heads": 3}, ["hidden_size=16", "num_attention_heads=3"]),
    ],
)  # fmt: skip
def test_two_statements_that_differ_are_refused_with_both_names(name, changes, both, write):
    message = refusal(write(name, **changes))
    assert all(each in message for each in both), message


@pytest.mark.parametrize(
    "name, changes",
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123}}),
        ("llama", {"rope_scaling": {"type": "default"}}),
        ("llama3", {"original_max_position_embeddings": 40}),
        ("llama", {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ("llama", {"model_type": "llama", "hidden_activation": "silu"}),
        ("llama", {"layer_types": [FULL] * 3}),
        ("gemma2", {"sliding_window_pattern": 2}),
        ("gemma3", {"sliding_window_pattern": 2}),
        ("gemma3", {"_sliding_window_pattern": 6}),  # transformers writes it, and reads it no more
        ("gemma3", {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0}}}),
        ("smollm3", {"no_rope_layer_interval": 4}),  # replaced by no_rope_layers
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
        ("opt", {"word_embed_proj_dim": None}),
        ("qwen2-window", {"max_window_layers": 2}),  # replaced by layer_types, as in transformers
    ],
)
def test_what_is_said_twice_alike_is_read(name, changes, write):
    path = write(name, **changes)
    assert read_config(path) == CONFIGS[name] == as_transformers_reads(path)


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "key, value",
    [("attention_dropout", 0.1), ("use_cache", False), ("pretraining_tp", 4), ("pad_token_id", -1),
     ("quantization_config", None), ("partial_rotary_factor", 1.0), ("num_experts", 0),
     ("use_bidirectional_attention", False), ("use_mrope", False), ("qk_norm", False),
     ("transformers_version", "5.0"), ("_name_or_path", "x"),
     ("_model_name_or_path", "x"), ("unsloth_fixed", True),
     ("max_window_layers", 2), ("bos_token_id", 1)],
)  # fmt: skip
def test_keys_that_ask_for_nothing_are_passed_over(name, key, value, write):
    written = write_config(CONFIGS[name])
    if key not in written:
        assert read_config(write(name, **{key: value})) == CONFIGS[name]


@pytest.mark.parametrize("value", [True, False])
def test_qwen2_has_its_biases_whatever_attention_bias_says(value, write):
    """As in transformers, which has no such key for it; conversions write it."""
    path = write("qwen2", attention_bias=value)
    assert read_config(path) == CONFIGS["qwen2"] == as_transformers_reads(path)


@pytest.mark.parametrize(
    "name, key, value",
    [
        *[(name, "mlp_bias", True) for name in ("qwen2", "qwen3", "gemma", "gemma2", "gemma3")],
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gemma3", "final_logit_softcapping", 30.0),
        ("opt", "_remove_final_layer_norm", True),
        ("opt", "enable_bias", False),
        ("opt", "layer_norm_elementwise_affine", False),
        ("gemma", "use_bidirectional_attention", True),
        ("llama", "quantization_config", {"quant_method": "gptq"}),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("llama", "sliding_window", 4096),
        ("gemma", "sliding_window", 4096),
        ("llama", "use_sliding_window", True),
        ("llama", "layer_types", [FULL, SLIDING, FULL]),
        ("llama", "attn_logit_softcapping", 30.0),
        ("gemma", "final_logit_softcapping", 30.0),
        ("qwen2", "query_pre_attn_scalar", 24),
        ("llama", "attention_multiplier", 0.1),
        ("llama", "residual_multiplier", 0.2),
        ("llama", "logit_scale", 0.06),
        ("llama", "clip_qkv", 8.0),
        ("llama", "use_qk_norm", True),
        ("qwen2", "num_experts", 60),
        ("llama", "num_local_experts", 8),
        ("llama", "rope_interleaved", True),
        ("llama", "no_rope_layers", [0, 1, 0]),
        ("llama", "is_encoder_decoder", True),
        ("llama", "pruned_heads", {"0": [1]}),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(name, key, value, write):
    found = key if key != "rope_scaling" else "partial_rotary_factor"
    assert f"has {found}=" in refusal(write(name, **{key: value}))


def test_a_window_that_is_not_used_is_none(write):
    path = write("llama", sliding_window=4096, use_sliding_window=False)
    assert read_config(path) == LLAMA


def test_keys_that_nobody_knows_are_named_in_one_warning(write):
    path = write(
        "llama",
        rope_scaling={"rope_type": "default", "turns": 2},
        some_key=1,
        auto_map={},
        old=None,
    )
    with pytest.warns(UserWarning) as warned:
        assert read_config(path) == LLAMA
    assert [str(each.message) for each in warned] == [
        f"{path} has keys that are unknown, and not used: some_key, auto_map, turns (of the rope)"
    ]


def test_ropes_of_a_family_that_has_none_are_named_in_a_warning(write):
    path = write("opt", rope_theta=5.0, rope_scaling={"rope_type": "yarn"}, hidden_act="silu")
    with pytest.warns(UserWarning, match="not used: rope_theta, rope_scaling, hidden_act"):
        assert read_config(path) == CONFIGS["opt"]


def test_a_text_model_within_another_is_refused_in_one_line(write):
    path = write("gemma3", architectures=["Gemma3ForConditionalGeneration"], text_config={"a": 1})
    assert "Gemma3ForConditionalGeneration, a model with a text model within it" in refusal(path)


# --- numbers -------------------------------------------------------------------------------------

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
POSITIVE = ("rope_theta", "rms_norm_eps")
CAPS = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar")
OUT_OF_RANGE = [
    *[("llama", name, value) for name in SIZES for value in (0, -1, True, 2**31, 10**18, 8.0, "8")],
    *[("llama", name, value) for name in POSITIVE for value in (0, -1.0, 1e40, True, "1e4", None)],
    *[("gemma2", name, value) for name in CAPS for value in (0, -1.0, True, 1e300)],
    *[("gemma2", "sliding_window", value) for value in (0, -1, True, 2**31)],
    *[("llama", "tie_word_embeddings", value) for value in (0, 1, "false", None)],
    *[("llama", "attention_bias", value) for value in (0, 1, "true")],
    *[("qwen2-window", "use_sliding_window", value) for value in (1, "true", None)],
    *[("qwen2-window", "max_window_layers", value) for value in (-1, True, 1.5)],
    *[("gemma3", "rope_local_base_freq", value) for value in (0, -1.0, 1e40, True, "1e4")],
    *[("gemma3", "sliding_window_pattern", value) for value in (0, -1, True, 2.0, "2")],
    *[("smollm3", "no_rope_layer_interval", value) for value in (0, -1, True, 2.0, "2")],
    *[("smollm3", "no_rope_layers", value) for value in (1, [1, 0, 2], [1, "0", 1], "101")],
    *[("opt", "ffn_dim", value) for value in (0, -1, True, 2**31, 8.0, "8", None)],
    *[("opt", "activation_function", value) for value in ("tanh", 5, None)],
    *[("llama", name, value) for name in ("dtype", "torch_dtype") for value in ("int8", 5, "fp8")],
]


@pytest.mark.parametrize("name, key, value", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name_at_once(name, key, value, write):
    path, start = write(name, **{key: value}), time.monotonic()
    assert key in refusal(path)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "change", [{"factor": 0.0}, {"factor": -2.0}, {"low_freq_factor": 0}, {"high_freq_factor": 1.0},
               {"original_max_position_embeddings": 0}, {"factor": True}],
)  # fmt: skip
def test_a_scaling_out_of_range_is_refused_by_name(change, write):
    assert next(iter(change)) in refusal(write("llama", rope_scaling=LLAMA3 | change))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_config_made_in_python_checks_itself_too(number):
    for field in ("rope_theta", "rms_norm_eps", "final_logit_softcapping"):
        with pytest.raises(UserError, match=field):
            dataclasses.replace(LLAMA, **{field: number})
    with pytest.raises(UserError, match="theta"):
        Rope(number)
    with pytest.raises(UserError, match="factor"):
        RopeScaling(number)
    with pytest.raises(UserError, match="hidden_size"):
        dataclasses.replace(LLAMA, hidden_size=True)


def test_heads_are_no_wider_than_any_model():
    with pytest.raises(UserError, match="num_attention_heads=65536 of head_dim=1024"):
        DecoderConfig(8, 8, 8, 1, 65536, 1, 1024)
