"""What is written is read back bit for bit, by others too; what does not fit is named."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_gen.errors import UserError
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.huggingface import Model, load_model, read_config, save_model

UNTIED = DecoderConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=77,
    rope_theta=123.0,
    rms_norm_eps=3e-4,
)
TIED = dataclasses.replace(UNTIED, tie_word_embeddings=True, num_key_value_heads=4)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def tokenizer(tiny_world_system):
    return tiny_world_system.edge.tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory, random_params, tokenizer):
    directory = tmp_path_factory.mktemp("models") / "model"
    save_model(directory, Model(UNTIED, random_params(UNTIED), tokenizer))
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    """A directory of the test's own to break."""
    return shutil.copytree(saved, tmp_path / "copy")


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_a_saved_model_loads_bit_for_bit(config, dtype, tmp_path, random_params, tokenizer):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config))
    model = Model(config, params, tokenizer)
    save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model", dtype)
    assert loaded.config == config
    assert ("lm_head" in loaded.params) != config.tie_word_embeddings
    chex.assert_trees_all_equal(loaded.params, params)
    chex.assert_trees_all_equal_dtypes(loaded.params, params)
    assert loaded.fingerprint == model.fingerprint
    text = "say the color of each thing"
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.tokenizer.eos_token_id == tokenizer.eos_token_id


def test_kernels_lie_as_transformers_wants_them(saved, random_params):
    """One tensor per layer, `[out, in]`; embeddings `[V, D]`."""
    tensors, params = load_file(saved / "model.safetensors"), random_params(UNTIED)
    np.testing.assert_array_equal(tensors[DOWN], params["layers"]["down"][1].T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed"])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["lm_head"].T)
    assert len(tensors) == 3 + 9 * UNTIED.num_hidden_layers


def test_transformers_reads_the_config(saved):
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(saved)
    assert (read.model_type, read.hidden_act) == ("llama", "silu")
    for field in dataclasses.fields(UNTIED):
        if field.name not in ("rope_theta", "rms_norm_offset", "embedding_scale"):
            assert getattr(read, field.name) == getattr(UNTIED, field.name), field.name
    assert read.rope_parameters["rope_theta"] == UNTIED.rope_theta


def test_provenance_lies_beside_the_model(tmp_path, random_params, tokenizer):
    model = Model(TIED, random_params(TIED), tokenizer)
    save_model(tmp_path / "model", model, {"made by": "a test"})
    assert json.loads((tmp_path / "model/provenance.json").read_text()) == {"made by": "a test"}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 55.0}},
        {"rope_theta": 55.0, "rope_scaling": None},
    ],
    ids=["transformers-5", "transformers-4"],
)
def test_the_rope_base_is_read_where_each_transformers_writes_it(copy, changes):
    edit_config(copy, **changes)
    assert load_model(copy).config.rope_theta == 55.0


def test_fields_that_older_configs_leave_out_follow_from_others(saved):
    raw = json.loads((saved / "config.json").read_text())
    del raw["head_dim"], raw["num_key_value_heads"]
    config, _ = read_config(raw, saved)
    assert (config.head_dim, config.num_key_value_heads) == (4, 4)


# --- nothing is overwritten ----------------------------------------------------------------------


def test_saving_onto_a_directory_refuses_and_leaves_it_as_it_was(copy, random_params, tokenizer):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(UserError, match=f"{copy} already exists"):
        save_model(copy, Model(TIED, random_params(TIED), tokenizer))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert list(copy.parent.iterdir()) == [copy]


def test_a_failed_save_leaves_nothing_behind(tmp_path, random_params, tokenizer):
    params = random_params(TIED)  # without the head that the config promises
    with pytest.raises(KeyError):
        save_model(tmp_path / "model", Model(UNTIED, params, tokenizer))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["attention_bias", "rms_norm_offset", "embedding_scale"])
def test_what_llama_has_no_place_for_is_not_written(field, tmp_path, random_params, tokenizer):
    config = dataclasses.replace(TIED, **{field: True})
    with pytest.raises(UserError, match=f"cannot write a model with {field}"):
        save_model(tmp_path / "model", Model(config, random_params(config), tokenizer))
    assert not list(tmp_path.iterdir())


# --- errors --------------------------------------------------------------------------------------


def assert_refused(directory, message):
    with pytest.raises(UserError, match=message) as error:
        load_model(directory)
    assert "\n" not in str(error.value)


def test_a_missing_directory_is_named(tmp_path):
    assert_refused(tmp_path / "nowhere", "no model directory at .*nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert_refused(copy, f"no (such file: .*)?{name}")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel; supported are"),
        ({"architectures": None}, "architecture none; supported are"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"mlp_bias": True}, "has mlp_bias"),
        ({"attention_bias": True}, "has attention_bias"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_size": None}, "config.json is incomplete: .*hidden_size"),
        ({"num_attention_heads": None, "num_key_value_heads": None}, "config.json is incomplete"),
    ],
)
def test_a_config_that_does_not_fit_names_the_culprit(copy, changes, message):
    edit_config(copy, **changes)
    assert_refused(copy, message)


def test_a_broken_config_is_named(copy):
    (copy / "config.json").write_text('{"architectures": [')
    assert_refused(copy, "config.json is not valid JSON")


@pytest.mark.parametrize("key", [DOWN, "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(copy, key):
    edit_tensors(copy, lambda tensors: tensors.pop(key))
    assert_refused(copy, f"lacks the tensor {key}")


def test_an_unknown_tensor_is_named(copy):
    edit_tensors(copy, lambda tensors: tensors.update({"model.extra": np.zeros(3)}))
    assert_refused(copy, "unknown tensor model.extra")


@pytest.mark.parametrize(
    "key, expected",
    [
        (DOWN, (16, 24)),
        ("model.embed_tokens.weight", (29, 16)),
        ("model.layers.0.input_layernorm.weight", (16,)),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(copy, key, expected):
    misshapen = (expected[0] + 1, *expected[1:])
    edit_tensors(copy, lambda tensors: tensors.update({key: np.zeros(misshapen, np.float32)}))
    shapes = rf"\({misshapen[0]},.*\), .* asks for \({expected[0]},.*\)"
    assert_refused(copy, f"{key} has shape {shapes}")


def test_a_tied_head_that_is_stored_all_the_same_is_passed_over(copy):
    edit_config(copy, tie_word_embeddings=True)
    assert "lm_head" not in load_model(copy).params


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file_of_tensors_is_named(copy, kept):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(copy, "model.safetensors is not a whole safetensors file")
