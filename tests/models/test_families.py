"""A config.json means here what it means to transformers; what has no place is named."""

import dataclasses
import json
import re

import jax
import pytest

from lorax_gen.errors import UserError
from lorax_gen.models.config_json import read_config, write_config
from lorax_gen.models.decoder import abstract_params
from lorax_gen.models.families import family_of, tensor_names, tensor_shapes
from lorax_gen.models.rope import Rope, RopeScaling
from tests.models.configs import CONFIGS, LLAMA, as_transformers_reads

FULL, SLIDING = "full_attention", "sliding_attention"
ABSENT = object()  # as a field's value: not in the file
STRETCH = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
STRETCHED = {"rope_scaling": RopeScaling(**STRETCH)}
LLAMA3 = {"rope_type": "llama3", **STRETCH}
# What a config may be beside the plain ones.
VARIANTS = CONFIGS | {
    f"{name}-{what}": dataclasses.replace(CONFIGS[name], **changes)
    for name, what, changes in [
        ("llama", "gelu", {"hidden_act": "gelu_pytorch_tanh"}),
        ("gemma", "silu", {"hidden_act": "silu"}),
        ("gemma", "untied", {"tie_word_embeddings": False}),
        ("gemma2", "silu", {"hidden_act": "silu"}),
        ("gemma2", "no caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", "no window", {"sliding_window": None, "layer_types": ()}),
        ("gemma2", "float", {"query_pre_attn_scalar": 24.0}),
        ("gemma2", "llama3", {"rope_scaling": CONFIGS["llama3"].rope_scaling}),
        ("qwen2-window", "mixed", {"layer_types": (SLIDING, FULL, SLIDING)}),
        ("gemma3", "one rope", {"sliding_rope": None, "rope_scaling": None}),
        ("gemma3", "one scaled rope", {"sliding_rope": None}),
        ("gemma3", "both scaled", {"sliding_rope": Rope(45.0, RopeScaling(2.0))}),
        ("gemma3", "no window", {"sliding_window": None, "layer_types": (), "sliding_rope": None}),
        ("smollm3", "none", {"rope_layers": (False,) * 3}),
        ("smollm3", "biases", {"biases": ("q", "k", "v", "o", "gate", "up", "down")}),
        ("qwen2-window", "all", {"layer_types": (SLIDING,) * 3}),
    ]
}


@pytest.fixture
def write(tmp_path):
    """`write(raw, **changes)`: the path of a config.json."""

    def write(raw, **changes):
        raw = {key: value for key, value in (raw | changes).items() if value is not ABSENT}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(raw))
        return path

    return write


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_written_config_reads_back_as_it_was(name, write):
    assert read_config(write(write_config(VARIANTS[name]))) == VARIANTS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_a_written_config_as_we_do(name, write):
    assert as_transformers_reads(write(write_config(VARIANTS[name]))) == VARIANTS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_in_turn_reads_as_it_was(name, write, tmp_path):
    from transformers import AutoConfig

    path = write(write_config(CONFIGS[name]))
    AutoConfig.from_pretrained(path.parent).save_pretrained(tmp_path / "again")
    again = tmp_path / "again" / "config.json"
    rotates = CONFIGS[name].positions == "rotary"
    assert ("rope_parameters" in json.loads(again.read_text())) == rotates
    assert read_config(again) == CONFIGS[name]


def test_scores_divided_as_ever_are_written_out(write):
    """Gemma 2's field has another default than ours."""
    config = dataclasses.replace(CONFIGS["gemma2"], query_pre_attn_scalar=None)
    read = read_config(write(write_config(config)))
    assert read == dataclasses.replace(config, query_pre_attn_scalar=config.head_dim)


# --- old and new forms ---------------------------------------------------------------------------

ROPE_5 = {"rope_theta": ABSENT, "rope_scaling": ABSENT}  # what rope_parameters stand for
ROPES_5 = ROPE_5 | {"rope_local_base_freq": ABSENT}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ABSENT}


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        # The base of rotary embeddings, and what stretches them.
        ("llama", {"rope_theta": 55.0, "rope_scaling": None}, {"rope_theta": 55.0}),
        ("llama", {"rope_theta": ABSENT}, {"rope_theta": 10000.0}),
        ("llama", ROPE_5 | {"rope_parameters": {"rope_type": "default", "rope_theta": 55.0}},
         {"rope_theta": 55.0}),
        ("llama", ROPE_5 | {"rope_parameters": LLAMA3 | {"rope_theta": 55.0}},
         {"rope_theta": 55.0} | STRETCHED),
        ("llama", {"rope_scaling": LLAMA3}, STRETCHED),
        ("llama", {"rope_scaling": {"type": "llama3", **STRETCH}}, STRETCHED),
        ("llama", {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 123.0}},
         STRETCHED),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_scaling": RopeScaling(2.0)}),
        # Biases.
        ("llama", {"attention_bias": True}, {"biases": ("q", "k", "v", "o")}),
        ("llama", {"mlp_bias": True}, {"biases": ("gate", "up", "down")}),
        ("gemma2", {"attention_bias": True}, {"biases": ("q", "k", "v", "o")}),
        ("qwen3-biases", {"attention_bias": ABSENT}, {"biases": ()}),
        ("llama", {"hidden_act": "relu"}, {"hidden_act": "relu"}),
        ("qwen3", {"head_dim": ABSENT}, {"head_dim": 128}),
        ("qwen3", WINDOW | {"max_window_layers": 2},
         {"layer_types": (FULL, FULL, SLIDING), "sliding_window": 5}),
        # Two ropes, in one form or the other, and what stands for what is not there.
        ("gemma3", ROPES_5 | {"rope_parameters": {
            FULL: {"rope_type": "linear", "rope_theta": 55.0, "factor": 2.0},
            SLIDING: {"rope_type": "default", "rope_theta": 5.0}}},
         {"rope_theta": 55.0, "rope_scaling": RopeScaling(2.0), "sliding_rope": Rope(5.0)}),
        ("gemma3", ROPES_5 | {"rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 55.0},
            SLIDING: {"rope_type": "linear", "rope_theta": 55.0, "factor": 2.0}}},
         {"rope_theta": 55.0, "rope_scaling": None, "sliding_rope": Rope(55.0, RopeScaling(2.0))}),
        ("gemma3", ROPES_5 | {"rope_parameters": {FULL: {"rope_type": "default"}}},
         {"rope_theta": 1e6, "rope_scaling": None, "sliding_rope": Rope(1e4)}),
        ("gemma3", ROPES_5, {"rope_theta": 1e6, "rope_scaling": None, "sliding_rope": Rope(1e4)}),
        ("gemma3", {"rope_local_base_freq": ABSENT}, {"sliding_rope": Rope(1e4)}),
        ("gemma3", {"rope_local_base_freq": 123, "rope_scaling": None},
         {"rope_scaling": None, "sliding_rope": None}),
        ("gemma3", {"rope_scaling": LLAMA3}, STRETCHED),
        # Layers that rotate nothing.
        ("smollm3", {"no_rope_layers": ABSENT}, {"rope_layers": ()}),
        ("smollm3", {"no_rope_layers": ABSENT, "no_rope_layer_interval": 3},
         {"rope_layers": (True, True, False)}),
        ("smollm3", {"no_rope_layers": [0, 0, 0]}, {"rope_layers": (False,) * 3}),
        ("smollm3-window", {"layer_types": ABSENT},
         {"layer_types": (FULL, SLIDING, SLIDING)}),
        ("smollm3-window", WINDOW | {"use_sliding_window": False},
         {"layer_types": (), "sliding_window": None}),
        ("smollm3-window", WINDOW | {"sliding_window": None},
         {"layer_types": (), "sliding_window": None}),
        # What older configs leave out follows from other fields, or is what it was then.
        ("llama", {"head_dim": ABSENT, "num_key_value_heads": ABSENT},
         {"head_dim": 4, "num_key_value_heads": 4}),
        ("llama", {"head_dim": None, "num_key_value_heads": None},
         {"head_dim": 4, "num_key_value_heads": 4}),
        ("qwen2", {"head_dim": ABSENT}, {"head_dim": 4}),
        ("gemma", {"head_dim": ABSENT}, {"head_dim": 256}),
        ("gemma3", {"head_dim": ABSENT, "num_key_value_heads": ABSENT},
         {"head_dim": 256, "num_key_value_heads": 4}),
        ("smollm3", {"head_dim": ABSENT, "num_key_value_heads": ABSENT,
                     "tie_word_embeddings": ABSENT, "rope_theta": ABSENT},
         {"head_dim": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
          "rope_theta": 2e6}),
        ("opt", {"tie_word_embeddings": ABSENT, "activation_function": ABSENT,
                 "max_position_embeddings": ABSENT, "enable_bias": ABSENT},
         {"max_position_embeddings": 2048}),
        ("opt", {"activation_function": "silu"}, {"hidden_act": "silu"}),
        ("opt-350m", {"word_embed_proj_dim": ABSENT, "do_layer_norm_before": ABSENT},
         {"word_embed_proj_dim": None, "do_layer_norm_before": True}),
        ("llama", {"rms_norm_eps": ABSENT, "max_position_embeddings": ABSENT},
         {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
        ("llama-tied", {"tie_word_embeddings": ABSENT}, {"tie_word_embeddings": False}),
        ("qwen2", {"tie_word_embeddings": ABSENT}, {"tie_word_embeddings": False}),
        ("gemma-untied", {"tie_word_embeddings": ABSENT}, {"tie_word_embeddings": True}),
        # Gemma's activation has two names, and an old value that never meant what it says.
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, {}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": ABSENT}, {}),
        ("gemma2", {"hidden_act": ABSENT, "hidden_activation": ABSENT}, {}),
        # Gemma 2: null takes a cap away, absence leaves the default.
        ("gemma2", {"attn_logit_softcapping": None}, {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}, {"final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": ABSENT, "final_logit_softcapping": ABSENT},
         {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
        ("gemma2", {"query_pre_attn_scalar": ABSENT}, {"query_pre_attn_scalar": 256}),
        # Windows, by rules where layers are not listed.
        ("gemma2", {"layer_types": ABSENT}, {"layer_types": (SLIDING, FULL, SLIDING)}),
        ("gemma2", {"sliding_window": ABSENT}, {"sliding_window": 4096}),
        ("gemma3", {"layer_types": ABSENT}, {"layer_types": (SLIDING,) * 3}),
        ("gemma3", {"layer_types": ABSENT, "sliding_window_pattern": 3},
         {"layer_types": (SLIDING, SLIDING, FULL)}),
        ("gemma3", {"sliding_window": ABSENT}, {"sliding_window": 4096}),
        ("gemma3", {"layer_types": [FULL] * 3},
         {"layer_types": (), "sliding_window": None, "sliding_rope": None}),
        ("gemma3", {"query_pre_attn_scalar": ABSENT}, {"query_pre_attn_scalar": 256}),
        ("qwen2-window", WINDOW | {"max_window_layers": 2}, {"layer_types": (FULL, FULL, SLIDING)}),
        ("qwen2", WINDOW | {"max_window_layers": 0},
         {"layer_types": (SLIDING,) * 3, "sliding_window": 5}),
        ("qwen2", WINDOW | {"max_window_layers": 3}, {}),
        ("qwen2", WINDOW | {"max_window_layers": ABSENT}, {}),
        ("qwen2", WINDOW | {"max_window_layers": 0, "sliding_window": None}, {}),
        ("qwen2", WINDOW | {"max_window_layers": 0, "use_sliding_window": False}, {}),
        ("qwen2", WINDOW | {"max_window_layers": 0, "use_sliding_window": ABSENT}, {}),
    ],
)  # fmt: skip
def test_old_and_new_forms_mean_what_they_mean_to_transformers(name, changes, expected, write):
    path = write(write_config(VARIANTS[name]), **changes)
    read = read_config(path)
    assert read == dataclasses.replace(VARIANTS[name], **expected)
    assert read == as_transformers_reads(path)


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": None}, {"mlp_bias": False}, {"quantization_config": None},
     {"partial_rotary_factor": 1.0}, {"pretraining_tp": 1}, {"use_cache": False}],
)  # fmt: skip
def test_a_field_that_asks_for_nothing_is_passed_over(changes, write):
    assert read_config(write(write_config(LLAMA), **changes)) == LLAMA


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_name_and_every_name_is_its_own(name):
    config = CONFIGS[name]
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    ours = {"/".join(key.key for key in path): leaf.size for path, leaf in leaves}
    names = tensor_names(config)
    assert names.keys() == ours.keys()
    theirs = [key for keys in names.values() for key in keys]
    assert len(set(theirs)) == len(theirs)
    assert set(theirs) == set(tensor_shapes(config))


@pytest.mark.parametrize(
    "name, architecture",
    [("llama", "Llama"), ("llama3", "Llama"), ("gemma", "Gemma"), ("gemma2", "Gemma2"),
     ("llama-biases", "Llama"), ("qwen2", "Qwen2"), ("qwen2-window", "Qwen2"), ("qwen3", "Qwen3"),
     ("qwen3-biases", "Qwen3"), ("gemma3", "Gemma3"), ("gemma3-no window", "Gemma3"),
     ("smollm3", "SmolLM3"), ("smollm3-window", "SmolLM3"), ("opt", "OPT"), ("opt-untied", "OPT"),
     ("opt-350m", "OPT")],
)  # fmt: skip
def test_a_family_is_told_by_its_switches(name, architecture):
    family = family_of(VARIANTS[name])
    assert family.architecture == f"{architecture}ForCausalLM"
    assert family.model_type == {"Gemma3": "gemma3_text"}.get(architecture, architecture.lower())


@pytest.mark.parametrize(
    "name, changes",
    [
        ("llama", {"rms_norm_offset": True}),
        ("llama", {"embedding_scale": True}),
        ("llama", {"post_norms": True}),
        ("gemma", {"biases": ("q", "k", "v")}),
        ("gemma2", {"biases": ("q", "k", "v")}),
        ("llama", {"biases": ("q",)}),
        ("qwen2", {"biases": ("q", "k", "v", "gate", "up", "down")}),
        ("llama", {"norm": "layer"}),
        ("llama", {"positions": "learned", "position_offset": 2}),
        ("llama", {"mlp": "plain"}),
        ("qwen2", {"rope_layers": (True, True, False)}),
        ("gemma2", {"qk_norm": True}),
        ("gemma2", {"sliding_rope": Rope(10.0)}),
        ("qwen2", {"post_norms": True}),
        ("llama", {"sliding_window": 5, "layer_types": (SLIDING,) * 3}),
        ("gemma", {"final_logit_softcapping": 30.0}),
        ("qwen2", {"attn_logit_softcapping": 30.0}),
        ("llama3", {"query_pre_attn_scalar": 24.0}),
        ("gemma3", {"attn_logit_softcapping": 30.0}),
        ("gemma3", {"rope_layers": (True, False, True)}),
        ("gemma3", {"sliding_rope": Rope(None)}),
    ],
)
def test_what_no_family_has_together_is_named(name, changes):
    config = dataclasses.replace(CONFIGS[name], **changes)
    for use in (family_of, write_config, tensor_shapes):
        with pytest.raises(UserError, match="no Hugging Face family has") as error:
            use(config)
        assert all(field in str(error.value) for field in changes)


@pytest.mark.parametrize(
    "changes",
    [{"position_offset": 0}, {"mlp": "gated"}, {"biases": ()}, {"rms_norm_eps": 1e-6},
     {"head_dim": 8}, {"num_key_value_heads": 2}, {"word_embed_proj_dim": 16}],
)  # fmt: skip
def test_what_opt_cannot_write_down_is_refused(changes):
    with pytest.raises(UserError, match="no Hugging Face family has"):
        family_of(dataclasses.replace(CONFIGS["opt"], **changes))


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, "of architecture GPT2LMHeadModel; "),
        ("llama", {"architectures": ABSENT}, "architecture none; supported are LlamaForCausalLM"),
        ("llama", {"architectures": []}, "architecture none; supported are LlamaForCausalLM"),
        ("llama", {"architectures": 5}, "architecture"),
        ("llama", {"hidden_size": ABSENT}, "incomplete: it lacks hidden_size"),
        ("llama", {"vocab_size": None}, "incomplete: it lacks vocab_size"),
        # Beyond the decoder.
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_type 'linear' without factor"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
         "rope_type 'dynamic'"),
        ("gemma2", {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 5.0}}},
         "rope_parameters"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"attention_bias": "some"}, "attention_bias='some'; expected true or false"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"hidden_act": "tanh"}, "hidden_act.*tanh"),
        ("gemma2", {"layer_types": ["chunked_attention", FULL, FULL]}, "layer_types"),
        ("gemma2", {"layer_types": [FULL]}, "layer_types"),
        ("gemma2", {"layer_types": [SLIDING]}, "layer_types"),
        # Numbers that make no model.
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("llama", {"vocab_size": -1}, "vocab_size"),
        ("llama", {"head_dim": 5}, "head_dim=5"),
        ("llama", {"head_dim": 0}, "head_dim"),
        # Values of another kind.
        *[("llama", {field: "many"}, field) for field in
          ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
           "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
           "rope_theta", "rms_norm_eps", "tie_word_embeddings")],
        ("llama", {"hidden_size": 16.5}, "hidden_size"),
        ("llama", {"hidden_size": "16", "head_dim": ABSENT}, "hidden_size"),
        ("llama", {"vocab_size": [30]}, "vocab_size"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": None}}, "factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": "many"}}, "factor"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta"),
        ("gemma2", {"num_hidden_layers": "3"}, "num_hidden_layers"),
        ("gemma2", {"layer_types": 5}, "layer_types"),
        ("gemma2", {"sliding_window": "wide"}, "sliding_window"),
        ("qwen2", WINDOW | {"max_window_layers": "1"}, "max_window_layers"),
        ("qwen2", WINDOW | {"max_window_layers": None}, "max_window_layers"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_names_the_culprit(name, changes, message, write):
    path = write(write_config(CONFIGS[name]), **changes)
    with pytest.raises(UserError, match=message) as error:
        read_config(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("field", STRETCH)
def test_a_stretched_rope_without_one_of_its_fields_is_refused(field, write):
    rope = {name: value for name, value in LLAMA3.items() if name != field}
    with pytest.raises(UserError, match=f"rope_type 'llama3' without {field}"):
        read_config(write(write_config(LLAMA), rope_scaling=rope))


@pytest.mark.parametrize(
    "text, message",
    [('{"architectures": [', "is not valid JSON"), ("[]", "must hold a JSON object")],
)
def test_a_broken_config_is_named(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{re.escape(str(path))} {message}"):
        read_config(path)
