"""What is written is read back bit for bit, by others too; what does not fit is named."""

import dataclasses
import json
import re
import shutil
import tracemalloc
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_gen.assets import ASSETS
from lorax_gen.errors import UserError
from lorax_gen.frames import PLAIN, Frame
from lorax_gen.mesh.sharding import MeshConfig, make_mesh, tree_shardings
from lorax_gen.models import checkpoint_files, huggingface
from lorax_gen.models.checkpoint_files import Checkpoint, read_params
from lorax_gen.models.families import tensor_shapes
from lorax_gen.models.huggingface import load_model, save_model
from lorax_gen.models.model import Model
from tests.models.configs import CONFIGS, LLAMA

TIED = CONFIGS["llama-tied"]
TABLE = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tokenizer(tiny_world_system):
    return tiny_world_system.edge.tokenizer


@pytest.fixture(scope="module")
def model(random_params, tokenizer):
    return Model(LLAMA, random_params(LLAMA), tokenizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model):
    directory = tmp_path_factory.mktemp("models") / "model"
    save_model(directory, model)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, model):
    directory = tmp_path_factory.mktemp("models") / "sharded"
    save_model(directory, model, max_shard_size="4KB")
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    """A directory of the test's own to break."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def sharded_copy(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "copy")


@pytest.fixture
def no_reading(monkeypatch):
    """Nothing of a tensor may be read, its name and shape aside."""
    monkeypatch.setattr(Checkpoint, "read", lambda self, key, index: pytest.fail(f"read {key}"))


def edit_json(path, **changes):
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(raw | changes))


def edit_tensors(directory, change):
    """`change` edits the dict of tensors of `model.safetensors` in place."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def assert_same(params, expected):
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal_dtypes(params, expected)


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_loads_bit_for_bit(name, dtype, tmp_path, random_params, tokenizer):
    config = CONFIGS[name]
    model = Model(config, cast(random_params(config), dtype), tokenizer)
    save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model", dtype=None)
    assert loaded.config == config
    assert_same(loaded.params, model.params)
    assert loaded.fingerprint == model.fingerprint
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in tensors.items()} == tensor_shapes(config)
    assert {tensor.dtype for tensor in tensors.values()} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "name, theirs, ours, transposed",
    [
        ("llama", "lm_head.weight", "lm_head", True),
        ("llama", "model.embed_tokens.weight", "embed", False),
        ("llama", "model.norm.weight", "final_norm", False),
        ("llama", DOWN, "down", True),
        ("llama", "model.layers.1.post_attention_layernorm.weight", "mlp_norm", False),
        ("qwen2", "model.layers.1.self_attn.k_proj.bias", "k_bias", False),
        ("gemma2", "model.layers.1.post_attention_layernorm.weight", "attn_post_norm", False),
        ("gemma2", "model.layers.1.pre_feedforward_layernorm.weight", "mlp_norm", False),
        ("gemma2", "model.layers.1.post_feedforward_layernorm.weight", "mlp_post_norm", False),
        ("gemma3", "model.layers.1.self_attn.k_norm.weight", "k_norm", False),
        ("opt", "model.decoder.embed_positions.weight", "positions", False),
        ("opt", "model.decoder.layers.1.self_attn_layer_norm.bias", "attn_norm_bias", False),
        ("opt", "model.decoder.layers.1.final_layer_norm.weight", "mlp_norm", False),
        ("opt", "model.decoder.final_layer_norm.bias", "final_norm_bias", False),
        ("opt", "model.decoder.layers.1.self_attn.out_proj.weight", "o", True),
        ("opt", "model.decoder.layers.1.fc1.weight", "up", True),
        ("opt", "model.decoder.layers.1.fc2.bias", "down_bias", False),
        ("opt-untied", "lm_head.weight", "lm_head", True),
    ],
)
def test_tensors_lie_as_transformers_wants_them(
    name, theirs, ours, transposed, tmp_path, random_params, tokenizer
):
    """One tensor for each layer, kernels `[out, in]`."""
    params = random_params(CONFIGS[name])
    save_model(tmp_path / "model", Model(CONFIGS[name], params, tokenizer))
    tensor = load_file(tmp_path / "model" / "model.safetensors")[theirs]
    leaf = params[ours] if ours in params else params["layers"][ours][1]
    np.testing.assert_array_equal(tensor, leaf.T if transposed else leaf)


def test_the_tokenizer_comes_along(saved, tokenizer):
    loaded, text = load_model(saved), "say the color of each thing"
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.tokenizer.eos_token_id == tokenizer.eos_token_id


def test_what_lies_beside_the_model(tmp_path, model):
    """Whatever else there is to write is in the directory before the directory has its name."""

    def extra(partial):
        assert not (tmp_path / "model").exists()
        (partial / "extra.txt").write_text("more")

    save_model(tmp_path / "model", model, {"made by": "a test"}, extra=extra)
    assert json.loads((tmp_path / "model/provenance.json").read_text()) == {"made by": "a test"}
    assert (tmp_path / "model/extra.txt").read_text() == "more"


def test_a_tied_head_that_is_stored_too_must_be_the_embeddings(copy, monkeypatch):
    """Compared in blocks; transformers 5 would not tie another one."""
    monkeypatch.setattr(checkpoint_files, "BLOCK", 7)
    edit_json(copy / "config.json", tie_word_embeddings=True)
    assert_refused(copy, "lm_head.weight differs from model.embed_tokens.weight, but config.json")

    def store(head):
        edit_tensors(copy, lambda t: t.update({"lm_head.weight": head(t[TABLE].copy())}))

    store(lambda table: table)
    assert "lm_head" not in load_model(copy).params
    store(lambda table: np.where(np.arange(30)[:, None] == 29, table + 1e-6, table))
    assert_refused(copy, "lm_head.weight differs")
    store(lambda table: table[:-1])
    assert_refused(copy, "lm_head.weight differs")


def test_buffers_that_old_versions_stored_are_passed_over(copy, model):
    key = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    buffers = {key.format(i): np.ones(3, np.float32) for i in range(LLAMA.num_hidden_layers)}
    edit_tensors(copy, lambda tensors: tensors.update(buffers))
    assert_same(load_model(copy).params, model.params)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_parameters_are_of_the_dtype_that_is_asked_for(dtype, saved, model):
    assert_same(load_model(saved, dtype).params, cast(model.params, dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_saving_in_a_dtype_casts_once(dtype, tmp_path, model):
    from transformers import AutoConfig

    save_model(tmp_path / "model", model, dtype=dtype)
    assert_same(load_model(tmp_path / "model", None).params, cast(model.params, dtype))
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert str(AutoConfig.from_pretrained(tmp_path / "model").dtype).endswith(dtype)


def test_the_fingerprint_is_of_the_numbers_not_of_their_dtype(saved, model, tmp_path):
    fingerprint = load_model(saved, jnp.float32).fingerprint
    assert load_model(saved, jnp.bfloat16).fingerprint == fingerprint
    save_model(tmp_path / "half", model, dtype="bfloat16")
    assert load_model(tmp_path / "half", jnp.float32).fingerprint == fingerprint


@pytest.mark.parametrize("leaf", ["embed", "final_norm", "lm_head"])
def test_other_numbers_have_another_fingerprint(leaf, model):
    changed = {**model.params, leaf: model.params[leaf].at[(0,) * model.params[leaf].ndim].add(1)}
    assert dataclasses.replace(model, params=changed).fingerprint != model.fingerprint


# --- several files -------------------------------------------------------------------------------


def test_a_large_model_is_split_and_indexed(sharded, model):
    paths = sorted(sharded.glob("*.safetensors"))
    n = len(paths)
    assert n > 3
    assert [p.name for p in paths] == [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    files = {path.name: load_file(path) for path in paths}
    assert all(sum(tensor.nbytes for tensor in file.values()) <= 4000 for file in files.values())

    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"] == {key: name for name, file in files.items() for key in file}
    assert sum(len(file) for file in files.values()) == len(tensor_shapes(LLAMA))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert index["metadata"]["total_size"] == total
    assert_same(load_model(sharded).params, model.params)


def test_a_cast_counts_in_the_size_of_a_file(sharded, tmp_path, model):
    save_model(tmp_path / "half", model, dtype="bfloat16", max_shard_size="4KB")
    whole, half = (json.loads((d / INDEX).read_text()) for d in (sharded, tmp_path / "half"))
    assert half["metadata"]["total_size"] == whole["metadata"]["total_size"] // 2
    assert len(set(half["weight_map"].values())) < len(set(whole["weight_map"].values()))


def test_each_file_is_opened_once(sharded, monkeypatch):
    opened, really_open = [], checkpoint_files.open_safetensors
    monkeypatch.setattr(
        checkpoint_files, "open_safetensors", lambda path: opened.append(path) or really_open(path)
    )
    Checkpoint(sharded)
    assert sorted(opened) == sorted(sharded.glob("*.safetensors"))


def test_beside_a_single_file_the_index_does_not_count(copy, model):
    (copy / INDEX).write_text("{")
    assert_same(load_model(copy).params, model.params)


# --- on a mesh -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shardings():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices("cpu")[:8])
    return partial(tree_shardings, mesh=mesh)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_born_in_their_shards(
    name, dtype, shardings, tmp_path, random_params, tokenizer
):
    model = Model(CONFIGS[name], cast(random_params(CONFIGS[name]), jnp.float16), tokenizer)
    save_model(tmp_path / "model", model)
    params = load_model(tmp_path / "model", dtype, shardings=shardings).params
    assert_same(params, cast(model.params, dtype or jnp.float16))
    jax.tree.map(lambda leaf, place: chex.assert_equal(leaf.sharding, place),
                 params, shardings(params))  # fmt: skip
    width = params["layers"]["q"].shape[-1]
    assert params["layers"]["q"].addressable_shards[0].data.shape == (3, 8, width // 2)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_each_number_is_read_once(on_mesh, sharded, shardings, monkeypatch):
    """Devices that hold the same part, such as all of a norm, share what was read."""
    reads, really_read = [], Checkpoint.read

    def read(self, key, index):
        value = really_read(self, key, index)
        reads.append((key, str(index), value.size))
        return value

    monkeypatch.setattr(Checkpoint, "read", read)
    params = read_params(sharded, LLAMA, shardings=shardings if on_mesh else None)
    assert len(set(reads)) == len(reads)
    assert sum(size for *_, size in reads) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("on_mesh", [False, True])
def test_the_host_holds_one_leaf_at_a_time(
    on_mesh, shardings, tmp_path, random_params, tokenizer, monkeypatch
):
    """In place of devices stands what forgets its parts: what is left is held by the reader."""
    config = dataclasses.replace(LLAMA, num_hidden_layers=16, hidden_size=64, intermediate_size=512)
    params = random_params(config)
    save_model(tmp_path / "model", Model(config, params, tokenizer), dtype="bfloat16")
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))

    def forget(shape, sharding, part):
        for index in sharding.addressable_devices_indices_map(shape).values():
            part(index)

    def read(self, key, index, really_read=Checkpoint.read):
        if not tracemalloc.is_tracing():  # all before is names and shapes
            tracemalloc.start()
        return really_read(self, key, index)

    monkeypatch.setattr(jax, "make_array_from_callback", forget)
    monkeypatch.setattr(jnp, "asarray", lambda value: None)
    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(checkpoint_files, "check_finite", lambda *_: None)
    try:
        read_params(tmp_path / "model", config, shardings=shardings if on_mesh else None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest < peak < 1.3 * largest  # the leaf, and one layer of it as it is in the file


# --- what a model is called, and what ends its texts ---------------------------------------------


def test_a_model_is_called_as_it_was_given_without_an_absolute_path(saved, monkeypatch):
    assert load_model(saved).name == load_model(str(saved)).name == saved.name
    assert load_model(f"{saved}/").name == saved.name
    monkeypatch.chdir(saved.parent)
    assert load_model(saved.name).name == load_model(f"./{saved.name}/").name == saved.name
    monkeypatch.chdir(saved.parent.parent)
    path = f"{saved.parent.name}/{saved.name}"
    assert load_model(path).name == load_model(f"./{path}").name == f"./{path}"
    monkeypatch.chdir(saved)
    assert load_model(".").name == saved.name
    assert load_model(f"../{saved.name}").name == f"../{saved.name}"


def test_a_shipped_model_is_called_by_its_name():
    assert load_model("world/edge").name == "world/edge"
    assert load_model(ASSETS / "world" / "edge").name == "edge"


def test_the_frame_of_a_model_comes_back_and_changes_no_fingerprint(model, tmp_path):
    frame = Frame("[user] {input} [bot]", "", turn=True)
    framed = dataclasses.replace(model, frame=frame)
    save_model(tmp_path / "bare", framed)
    save_model(tmp_path / "told", framed, {"made_with": "us"})
    for name in ("bare", "told"):
        loaded = load_model(tmp_path / name)
        assert (loaded.frame, loaded.fingerprint) == (frame, model.fingerprint)
    assert json.loads((tmp_path / "told" / "provenance.json").read_text()) == {
        "made_with": "us",
        "frame": {"template": "[user] {input} [bot]", "separator": "", "turn": True},
    }


def test_a_model_without_a_frame_says_nothing_of_it(saved, model, tmp_path):
    assert not (saved / "provenance.json").exists()
    save_model(tmp_path / "told", model, {"made_with": "us"})
    assert json.loads((tmp_path / "told" / "provenance.json").read_text()) == {"made_with": "us"}
    assert load_model(saved).frame == load_model(tmp_path / "told").frame == PLAIN


@pytest.mark.parametrize("frame", ["io", {"template": "none"}, {"template": "{input}", "x": 1}])
def test_a_damaged_frame_is_named(frame, copy):
    (copy / "provenance.json").write_text(json.dumps({"frame": frame}))
    assert_refused(copy, r"provenance\.json: frame|has \{input\} 0 times")


def test_a_model_of_the_hub_is_called_by_its_name(saved, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface, "find_directory", lambda name, revision: asked.append(revision) or saved
    )
    assert load_model("org/some-1b", revision="v2").name == "org/some-1b"
    assert asked == ["v2"]


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({"eos_token_id": [5, 7]}, 9, (5, 7)),
        ({"eos_token_id": 5}, [8, 9], (5,)),
        ({"eos_token_id": 0}, 9, (0,)),
        ({"eos_token_id": None}, 9, (9,)),
        ({}, [8, 9], (8, 9)),
        (None, 9, (9,)),
        (None, None, None),
        ({}, None, None),
    ],
)
def test_a_text_ends_where_the_checkpoint_says(generation, config, expected, copy, tokenizer):
    (copy / "generation_config.json").unlink()
    if generation is not None:
        edit_json(copy / "generation_config.json", **generation)
    edit_json(copy / "config.json", eos_token_id=config)
    assert load_model(copy).stop_ids == (expected or (tokenizer.eos_token_id,))


@pytest.mark.parametrize("stop_ids, written", [((5, 7), [5, 7]), ((5,), 5)])
def test_what_ends_a_text_is_written(stop_ids, written, tmp_path, model):
    from transformers import GenerationConfig

    save_model(tmp_path / "model", dataclasses.replace(model, stop_ids=stop_ids))
    assert load_model(tmp_path / "model").stop_ids == stop_ids
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == written


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
        save_model(tmp_path / "model", Model(LLAMA, params, tokenizer))
    assert not list(tmp_path.iterdir())


def test_what_no_family_has_a_place_for_is_not_written(tmp_path, random_params, tokenizer):
    config = dataclasses.replace(TIED, embedding_scale=True)
    with pytest.raises(UserError, match="no Hugging Face family has embedding_scale"):
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


def test_a_config_that_does_not_fit_is_refused(copy):
    edit_json(copy / "config.json", architectures=["GPT2LMHeadModel"])
    assert_refused(copy, f"{re.escape(str(copy))}/config.json is of architecture GPT2LMHeadModel")


@pytest.mark.parametrize("key", [DOWN, "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(copy, key, no_reading):
    edit_tensors(copy, lambda tensors: tensors.pop(key))
    assert_refused(copy, f"lacks the tensor {key}")


def test_an_unknown_tensor_is_named(copy, no_reading):
    edit_tensors(copy, lambda tensors: tensors.update({"model.extra": np.zeros(3)}))
    assert_refused(copy, "holds the tensor model.extra, which its config.json does not ask for")


@pytest.mark.parametrize(
    "key, expected",
    [
        (DOWN, (16, 24)),
        ("model.embed_tokens.weight", (30, 16)),
        ("model.layers.0.input_layernorm.weight", (16,)),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(copy, key, expected, no_reading):
    misshapen = (expected[0] + 1, *expected[1:])
    edit_tensors(copy, lambda tensors: tensors.update({key: np.zeros(misshapen, np.float32)}))
    shapes = rf"\({misshapen[0]},.*\), .* asks for \({expected[0]},.*\)"
    assert_refused(copy, f"{key} has shape {shapes}")


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file_of_tensors_is_named(copy, kept):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(copy, "model.safetensors is not a complete safetensors file")


def test_a_missing_or_truncated_file_of_several_is_named(sharded_copy, no_reading):
    path = sorted(sharded_copy.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(sharded_copy, f"{path.name} is not a complete safetensors file")
    path.unlink()
    assert_refused(sharded_copy, f"no such file: .*{path.name}")


def test_a_tensor_that_only_the_index_knows_is_named(sharded_copy, no_reading):
    name = json.loads((sharded_copy / INDEX).read_text())["weight_map"][DOWN]
    tensors = load_file(sharded_copy / name)
    del tensors[DOWN]
    save_file(tensors, sharded_copy / name)
    assert_refused(sharded_copy, f"says that {DOWN} is in {name}, but no file holds it")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"weight_map": {', "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"metadata": {}}', "has no weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "has no weight_map"),
        ('{"weight_map": {"model.norm.weight": 5}}', "says that model.norm.weight is in 5; expect"),
        ('{"weight_map": {}}', "lacks the tensor model.embed_tokens.weight"),
    ],
)
def test_a_broken_index_is_named(text, message, sharded_copy, no_reading):
    (sharded_copy / INDEX).write_text(text)
    assert_refused(sharded_copy, f"{INDEX} {message}")


# --- nothing in silence --------------------------------------------------------------------------

K_BIAS = "model.layers.0.self_attn.k_proj.bias"


@pytest.mark.parametrize("key", ["model.layers.3.mlp.down_proj.weight", K_BIAS, "score.weight"])
def test_tensors_beyond_the_config_are_named(copy, key, no_reading):
    """A layer more than it has, a bias that it has not, a head of another task."""
    edit_tensors(copy, lambda tensors: tensors.update({key: np.zeros((4, 4), np.float32)}))
    assert_refused(copy, f"holds the tensor {key}, which its config.json does not ask for")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.safetensors", "model.gguf"])
def test_files_of_other_formats_beside_the_model_are_not_read(copy, file, model):
    (copy / file).write_bytes(b"?")
    assert_same(load_model(copy).params, model.params)


@pytest.mark.parametrize(
    "name, message",
    [
        ("../other/model.safetensors", "expected a .safetensors file beside it"),
        ("/etc/model.safetensors", "expected a .safetensors file beside it"),
        ("sub/model.safetensors", "expected a .safetensors file beside it"),
        ("config.json", "expected a .safetensors file beside it"),
        ("a\0.safetensors", "expected a .safetensors file beside it"),
        ("x" * 300 + ".safetensors", "expected a .safetensors file beside it"),
        (["a.safetensors"], "expected a .safetensors file beside it"),
        (None, "expected a .safetensors file beside it"),
        ("missing.safetensors", "no such file"),
        ("folder.safetensors", "no such file"),
    ],
)
def test_an_index_names_files_beside_it(name, message, sharded_copy, no_reading):
    (sharded_copy / "folder.safetensors").mkdir()
    raw = json.loads((sharded_copy / INDEX).read_text())
    raw["weight_map"][DOWN] = name
    (sharded_copy / INDEX).write_text(json.dumps(raw))
    assert_refused(sharded_copy, message)


def test_files_may_be_links_as_in_the_cache_of_the_hub(sharded, tmp_path, model):
    (tmp_path / "snapshot").mkdir()
    for path in sharded.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_same(load_model(tmp_path / "snapshot").params, model.params)


def test_an_index_and_its_files_must_agree(sharded_copy, no_reading):
    weight_map = json.loads((sharded_copy / INDEX).read_text())["weight_map"]
    files = list(weight_map.values())
    here = max(files, key=files.count)  # holds several tensors
    key = next(key for key, file in weight_map.items() if file == here)
    other = next(file for file in files if file != here)
    assert files.count(here) > 1

    edit_json(sharded_copy / INDEX, weight_map=weight_map | {key: other})
    assert_refused(sharded_copy, f"says that {key} is in {other}, but it is in {here}")
    without = {name: file for name, file in weight_map.items() if name != key}
    edit_json(sharded_copy / INDEX, weight_map=without)
    assert_refused(sharded_copy, f"does not name {key}, which {here} holds")
    edit_json(sharded_copy / INDEX, weight_map=weight_map)
    tensors = load_file(sharded_copy / other)
    save_file(tensors | {key: np.zeros(3, np.float32)}, sharded_copy / other)
    first, second = sorted([here, other])
    assert_refused(sharded_copy, f"{key} is in both {first} and {second}")


def test_the_total_size_in_an_index_is_for_others(sharded_copy, model):
    edit_json(sharded_copy / INDEX, metadata={"total_size": 5})
    assert_same(load_model(sharded_copy).params, model.params)


@pytest.mark.parametrize("key", [DOWN, "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize(
    "dtype, name",
    [(np.int8, "I8"), (np.uint8, "U8"), (np.int32, "I32"), (bool, "BOOL"), (np.complex64, "C64"),
     (jnp.float8_e4m3fn, "F8_E4M3"), (jnp.float8_e5m2, "F8_E5M2")],
)  # fmt: skip
def test_numbers_that_are_not_floating_point_are_named(copy, key, dtype, name, no_reading):
    edit_tensors(copy, lambda tensors: tensors.update({key: tensors[key].astype(dtype)}))
    assert_refused(copy, f"{key} is stored as {name}; expected one of F64, F32, F16, BF16")


@pytest.mark.parametrize(
    "part, kind",
    [("qweight", "GPTQ or AWQ"), ("weight_packed", "compressed-tensors"), ("SCB", "bitsandbytes"),
     ("weight.absmax", "bitsandbytes"), ("weight_scale_inv", "FP8")],
)  # fmt: skip
def test_a_quantized_checkpoint_is_called_so(copy, part, kind, no_reading):
    key = DOWN.replace("weight", part)

    def change(tensors):
        del tensors[DOWN]
        tensors[key] = np.zeros((2, 2), np.int32)

    edit_tensors(copy, change)
    assert_refused(copy, f"is quantized: it holds {key} of {kind}")


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, bool, jnp.complex64])
def test_parameters_are_floating_point(dtype, copy):
    with pytest.raises(UserError, match=f"parameters cannot be {jnp.dtype(dtype).name}; choose"):
        load_model(copy, dtype)


def test_double_precision_is_rounded_to_what_jax_has(copy, model):
    edit_tensors(
        copy,
        lambda tensors: tensors.update({k: v.astype(np.float64) for k, v in tensors.items()}),
    )
    assert_same(load_model(copy).params, model.params)
    assert_same(load_model(copy, None).params, model.params)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", [DOWN, "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("how", ["plain", "bfloat16", "mesh", "int8"])
def test_a_number_that_is_not_finite_is_named(copy, key, number, how, shardings):
    options = {"plain": {}, "bfloat16": {"dtype": jnp.bfloat16}, "mesh": {"shardings": shardings},
               "int8": {"in_int8": True}}[how]  # fmt: skip

    def change(tensors):
        tensors[key] = tensors[key].copy()
        tensors[key].flat[5] = number

    edit_tensors(copy, change)
    with pytest.raises(UserError, match=f"{key} holds NaN or an infinity"):
        load_model(copy, **options)


def test_a_number_beyond_the_dtype_that_is_asked_for_is_named(copy):
    edit_tensors(copy, lambda tensors: tensors.update({DOWN: tensors[DOWN] * 1e6}))
    assert np.isfinite(load_model(copy).params["layers"]["down"]).all()
    with pytest.raises(UserError, match=f"{DOWN} holds .* or a number that float16 cannot hold"):
        load_model(copy, jnp.float16)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [-1, 30, 2**40, True, "3", 3.0, [], [[3]], [3, "4"], {"a": 3}])
def test_what_ends_a_text_must_be_in_the_vocabulary(copy, file, ids):
    edit_json(copy / file, eos_token_id=ids)
    assert_refused(copy, f"{file}: eos_token_id: ")


# --- tokens that a model has no embedding for ----------------------------------------------------


def test_an_id_beyond_the_vocabulary_is_refused_wherever_it_is_known(model):
    for ids in ([[1, 30]], [[-1]], np.array([[2**40]]), jnp.array([[1, 31]])):
        with pytest.raises(UserError, match="the model's vocabulary has 30 ids from 0"):
            model(ids)
    with pytest.raises(UserError, match="expected integers"):
        model([[1.0]])
    logits = jax.jit(lambda tokens: model(tokens))(np.array([[1, 29]]))  # traced: not looked at
    np.testing.assert_allclose(logits, model([[1, 29]]), atol=1e-6)


def test_a_text_with_a_token_beyond_the_vocabulary_is_refused_when_it_is_encoded(model, tokenizer):
    word = tokenizer.convert_ids_to_tokens(30)
    known = tokenizer.convert_ids_to_tokens(29)
    assert model.encode(known)[-1] == 29
    with pytest.raises(UserError, match=f"the token '{word}' has the id 30, but .* has 30 ids"):
        model.encode(f"{known} {word}")


def test_a_text_cannot_end_with_a_token_beyond_the_vocabulary(model):
    with pytest.raises(UserError, match="has the id 31, but"):
        dataclasses.replace(model, stop_ids=(3, 31))
