"""The decoder against `transformers` on torch, as `tests/golden/make.py` has written it down."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lorax_gen.models.checkpoint_files import read_params
from lorax_gen.models.config_json import read_config
from lorax_gen.tensors import read_tensors
from tests.golden.compare import TOLERANCE, assert_matches, logits

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.safetensors"))


def read(name):
    directory = GOLDEN / name
    config = read_config(directory / "config.json")
    return config, read_params(directory, config), read_tensors(directory / "expected.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_every_layer_gives_what_transformers_gives(name):
    config, params, expected = read(name)
    assert_matches(params, config, expected)


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("llama-mha", "rms_norm_eps", 1e-5),
        ("llama-gqa2-tied", "rope_theta", 10000.0),
        ("llama3-rope", "rope_scaling", None),
        ("gemma", "hidden_act", "silu"),
        ("gemma", "rms_norm_offset", False),
        ("gemma", "embedding_scale", False),
        ("gemma2", "query_pre_attn_scalar", None),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "sliding_window", 7),
        ("gemma2", "layer_types", ()),
        ("llama-biases", "biases", ("q", "k", "v")),
        ("llama-biases", "biases", ("o", "gate", "up", "down")),
        ("qwen3", "qk_norm", False),
        ("gemma3", "qk_norm", False),
        ("gemma3", "rms_norm_offset", False),
        ("gemma3", "rope_scaling", None),
        ("gemma3", "sliding_rope", None),
        ("gemma3", "sliding_window", 7),
        ("gemma3-wide-window", "query_pre_attn_scalar", 12.0),
        ("gemma3-wide-window", "sliding_rope", None),
        ("smollm3", "rope_layers", ()),
        ("smollm3-window", "rope_layers", (False, True, False, True)),
        ("smollm3-window", "sliding_window", 7),
        ("opt", "norm", "rms"),
        ("opt", "hidden_act", "silu"),
        ("opt-350m", "norm", "rms"),
        *[("opt", "biases", tuple({"q", "k", "v", "o", "up", "down"} - {each}))
          for each in ("q", "v", "o", "up", "down")],
        ("qwen2-window", "sliding_window", 7),
        ("qwen2-window", "layer_types", ("sliding_attention",) * 3),
    ],
)  # fmt: skip
def test_the_match_says_something_about_each_setting(name, field, value):
    config, params, expected = read(name)
    assert getattr(config, field) != value
    found = logits(params, dataclasses.replace(config, **{field: value}), expected["tokens"])
    assert np.abs(found - expected["logits"]).max() > 20 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_a_config_of_transformers_4_reads_the_same(name, tmp_path):
    """Most checkpoints on the Hub were written by it: other names, and fields left out."""
    path = GOLDEN / name / "config.json"
    raw = json.loads(path.read_text())
    raw["torch_dtype"] = raw.pop("dtype")
    if scaling := raw.pop("rope_parameters", None):
        if raw["model_type"] == "gemma3_text":
            raw["rope_local_base_freq"] = scaling["sliding_attention"]["rope_theta"]
            raw["sliding_window_pattern"] = raw.pop("_sliding_window_pattern")
            scaling = scaling["full_attention"]
        raw["rope_theta"] = scaling.pop("rope_theta")
        raw["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    raw.pop("layer_types", None)  # they follow from the family and max_window_layers
    if raw["model_type"] == "gemma3_text":
        del raw["hidden_activation"], raw["attention_bias"]
    elif raw["model_type"] == "smollm3":
        raw["no_rope_layer_interval"] = 2
        del raw["no_rope_layers"]
    elif raw["model_type"] == "opt":
        del raw["_remove_final_layer_norm"], raw["enable_bias"]
        if name != "opt-350m":
            del raw["word_embed_proj_dim"], raw["do_layer_norm_before"]
    elif raw["model_type"].startswith("gemma"):
        del raw["tie_word_embeddings"]
        raw["hidden_act"] = "gelu"  # meant is the tanh approximation
    elif raw["model_type"] == "qwen2":
        raw["sliding_window"] = raw["sliding_window"] or 131072  # even where it is not in use
    elif raw["head_dim"] * raw["num_attention_heads"] == raw["hidden_size"]:
        del raw["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path / "config.json") == read_config(path)
