"""Model directories: config.json, tensors, their index, and the tokenizer.

A damaged directory is refused, or it is loaded as its files say: the config as transformers reads
it, all numbers finite and those of the file by a parser of the test's own, tokens by their ids.
"""

import json
import math
import struct
import warnings
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lorax_gen.models.huggingface import load_model, save_model
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import load_tokenizer
from tests.fuzz.damage import damaged_bytes, damaged_json, damaged_tensors, fuzz, refused
from tests.models.configs import CONFIGS, as_transformers_reads

FAMILIES = (
    "llama", "llama3", "qwen2", "qwen2-window", "qwen3", "gemma", "gemma2", "gemma3", "smollm3",
    "smollm3-window", "opt", "opt-350m",
)  # fmt: skip
VOCABULARY = 30
WORDS = [f"word{i}" for i in range(VOCABULARY - 4)]
# Their names of what is in a layer -> ours; biases have `_bias`. Gemma 2 has two norms more.
NAMES = {f"self_attn.{each}_proj": each for each in "qkvo"} | {
    f"mlp.{each}_proj": each for each in ("gate", "up", "down")
}
NAMES |= {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
NAMES |= {"self_attn.out_proj": "o", "fc1": "up", "fc2": "down"}
OPT_NORMS = {"self_attn_layer_norm": "attn_norm", "final_layer_norm": "mlp_norm"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
GEMMA2_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Fields that are numbers, and their least and largest values; none is NaN or infinite.
RANGES = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"), (1, 2**31),
) | dict.fromkeys(
    ("rope_theta", "rms_norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping",
     "final_logit_softcapping"), (1e-300, 1e30),
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory, random_params) -> dict[str, Path]:
    """A directory of each family, and one whose tensors are in several files."""
    from lorax_gen.tokenizers import word_level

    root, tokenizer = tmp_path_factory.mktemp("saved"), word_level(WORDS)
    for name in FAMILIES:
        model = Model(CONFIGS[name], random_params(CONFIGS[name]), tokenizer)
        save_model(root / name, model)
    save_model(root / "sharded", model, max_shard_size="4KB")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def load(saved, tmp_path_factory):
    """`load(name, {file: content})`: that directory with other files, loaded and checked where it
    is accepted; content None removes the file."""
    directory = tmp_path_factory.mktemp("damaged")

    def load(name: str, changed: dict[str, bytes | None]) -> None:
        for old in directory.iterdir():
            old.unlink()
        for path in saved[name].iterdir():
            if path.name not in changed:
                (directory / path.name).hardlink_to(path)
        for file, content in changed.items():
            if content is not None:
                (directory / file).write_bytes(content)
        models = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if refused(lambda: models.append(load_model(directory))) is None:
                check(models[0], directory)
        event("accepted" if models else "refused")

    return load


# --- what an accepted directory must be ----------------------------------------------------------


def check(model: Model, directory: Path) -> None:
    config = model.config
    for name, (least, largest) in RANGES.items():
        value = getattr(config, name)
        if value is not None:
            assert not isinstance(value, bool) and math.isfinite(value), name
            assert least <= value <= largest, name
    try:
        expected = as_transformers_reads(directory / "config.json")
    except Exception:  # transformers has types for keys that do not matter here
        expected = config
    assert config == expected
    check_tensors(model, directory)
    check_stop_ids(model, directory)
    check_tokenizer(model.tokenizer, directory)


def check_tensors(model: Model, directory: Path) -> None:
    """Every tensor of the files is the parameter of that name, and there are no others."""
    params, seen = model.params, 0
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    for key, value in read_files(directory).items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            np.testing.assert_array_equal(value, params["embed"])
            continue
        if key.endswith("rotary_emb.inv_freq"):
            continue
        ours = parameter(params, key, model.config.post_norms)
        np.testing.assert_array_equal(ours, value.astype(np.float32))
        seen += ours.size
    assert seen == sum(leaf.size for leaf in jax.tree.leaves(params))


def parameter(params: dict, key: str, has_post_norms: bool) -> np.ndarray:
    """Ours of a tensor's name, as the file has it."""
    opt, key = "model.decoder." in key, key.replace("model.decoder.", "model.")
    top = {"model.embed_tokens.weight": "embed", "model.norm.weight": "final_norm"}
    if opt:
        top |= {
            "model.embed_positions.weight": "positions",
            "model.final_layer_norm.weight": "final_norm",
            "model.final_layer_norm.bias": "final_norm_bias",
            "model.project_in.weight": "project_in",
            "model.project_out.weight": "project_out",
        }
    if key in top:
        ours = np.asarray(params[top[key]])
        return ours.T if top[key].startswith("project") else ours
    if key == "lm_head.weight":
        return np.asarray(params["lm_head"]).T
    model, layers, index, *middle, kind = key.split(".")
    assert (model, layers) == ("model", "layers") and index == str(int(index))
    norms = OPT_NORMS if opt else GEMMA2_NORMS if has_post_norms else NORMS
    ours = (NAMES | norms)[".".join(middle)] + {"weight": "", "bias": "_bias"}[kind]
    return np.asarray(params["layers"][ours][int(index)]).T


def read_files(directory: Path) -> dict[str, np.ndarray]:
    """The tensors by name; of several files those that the index names, each where it says."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return parse(single.read_bytes())
    weight_map = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
    files = {name: parse((directory / name).read_bytes()) for name in set(weight_map.values())}
    assert all(Path(name).name == name for name in files)
    found = {key: files[name][key] for key, name in weight_map.items()}
    assert len(found) == sum(map(len, files.values()))
    return found


def parse(data: bytes) -> dict[str, np.ndarray]:
    """The format: 8 bytes of length, a header in JSON, the numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    return {
        key: np.frombuffer(numbers[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for key, entry in header.items()
    }


def check_stop_ids(model: Model, directory: Path) -> None:
    """Those of generation_config.json, or of config.json, or the tokenizer's."""
    stated = []
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.exists():
            stated.append(json.loads(path.read_text(encoding="utf-8-sig")).get("eos_token_id"))
    stated = [ids for ids in stated if ids is not None]
    expected = stated[0] if stated else model.tokenizer.eos_token_id
    if expected is not None:
        assert list(model.stop_ids) == (expected if isinstance(expected, list) else [expected])
    assert all(type(i) is int and 0 <= i < model.config.vocab_size for i in model.stop_ids)


def check_tokenizer(tokenizer, directory: Path) -> None:
    """Every token of tokenizer.json has the id that stands there, and so have the special ones of
    tokenizer_config.json."""
    raw = json.loads((directory / "tokenizer.json").read_text())
    stated = dict(raw["model"]["vocab"])
    stated |= {token["content"]: token["id"] for token in raw["added_tokens"]}
    for token, number in stated.items():
        assert tokenizer.convert_tokens_to_ids(token) == number, token
    ids = tokenizer("word1 word2", add_special_tokens=False)["input_ids"]
    assert all(type(i) is int and i >= 0 for i in ids)
    path = directory / "tokenizer_config.json"
    names = json.loads(path.read_text()) if path.exists() else {}
    for name in ("bos_token", "eos_token"):
        if isinstance(names.get(name), str):
            assert getattr(tokenizer, name) == names[name]


# --- damage --------------------------------------------------------------------------------------


@fuzz
@given(data=st.data(), name=st.sampled_from(FAMILIES))
def test_a_config_with_a_changed_value(data, name, saved, load):
    raw = json.loads((saved[name] / "config.json").read_text())
    load(name, {"config.json": json.dumps(data.draw(damaged_json(raw))).encode()})


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 4.5,
    "original_max_position_embeddings": 40,
}  # fmt: skip
LINEAR, DEFAULT = {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 123.0}
FULL, SLIDING = "full_attention", "sliding_attention"
# Keys of any family and of others, with values that one of them could have.
STATEMENTS = {
    "rope_scaling": [LLAMA3, LINEAR, LINEAR | LLAMA3, DEFAULT, {}, None],
    "rope_parameters": [LLAMA3, LINEAR, DEFAULT, DEFAULT | {"rope_theta": 5.0}, {FULL: DEFAULT},
                        {FULL: LINEAR, SLIDING: DEFAULT}, {SLIDING: DEFAULT}, {SLIDING: LINEAR}],
    "rope_local_base_freq": [123.0, 5.0, 45.0, None], "no_rope_layer_interval": [1, 2, 4, None],
    "no_rope_layers": [[1, 0, 1], [0, 0, 0], [1, 1, 1, 0], [1, 0], None],
    "_sliding_window_pattern": [2, 6], "do_layer_norm_before": [True, False],
    "word_embed_proj_dim": [16, 8, None], "activation_function": ["relu", "silu", None],
    "enable_bias": [True, False],
    "rope_theta": [123.0, 5.0, 10000], "original_max_position_embeddings": [40, 80],
    "partial_rotary_factor": [0.5, 1.0], "attention_bias": [True, False, None],
    "mlp_bias": [True, False], "tie_word_embeddings": [True, False], "head_dim": [6, 4, None],
    "num_key_value_heads": [1, 2, 4, None], "hidden_act": ["silu", "gelu", "gelu_pytorch_tanh"],
    "hidden_activation": ["silu", "gelu", "gelu_pytorch_tanh", None],
    "sliding_window": [5, 7, None], "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 3], "sliding_window_pattern": [2, 3, None],
    "layer_types": [[FULL] * 3, [SLIDING] * 3, [SLIDING, FULL, SLIDING], None],
    "query_pre_attn_scalar": [24, 6, None], "attn_logit_softcapping": [20.0, None],
    "final_logit_softcapping": [10.0, None], "use_bidirectional_attention": [True, False],
    "rms_norm_eps": [3e-4, 1e-6], "max_position_embeddings": [77, 2048], "dtype": ["float16"],
    "model_type": ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "opt"],
    "architectures": [["LlamaForCausalLM"], ["Qwen2ForCausalLM"], ["GemmaForCausalLM"],
                      ["Gemma3ForCausalLM"], ["SmolLM3ForCausalLM"], ["OPTForCausalLM"]],
}  # fmt: skip


@fuzz
@given(data=st.data(), name=st.sampled_from(FAMILIES))
def test_a_config_with_other_statements(data, name, saved, load):
    """Among them contradictions, keys of other families, and keys that are left out."""
    raw = json.loads((saved[name] / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(STATEMENTS)), min_size=1, max_size=4)):
        if key in raw and data.draw(st.booleans()):
            del raw[key]
        else:
            raw[key] = data.draw(st.sampled_from(STATEMENTS[key]))
    load(name, {"config.json": json.dumps(raw).encode()})


@fuzz
@given(data=st.data(), name=st.sampled_from(FAMILIES))
def test_a_config_with_damaged_bytes(data, name, saved, load):
    text = (saved[name] / "config.json").read_bytes()
    load(name, {"config.json": data.draw(damaged_bytes(text))})


@fuzz
@given(data=st.data(), name=st.sampled_from(FAMILIES))
def test_tensors_of_other_names_shapes_dtypes_and_numbers(data, name, saved, load, tmp_path):
    tensors = load_file(saved[name] / "model.safetensors")
    path = tmp_path / "tensors"
    save_file(
        {
            key: np.ascontiguousarray(value)
            for key, value in data.draw(damaged_tensors(tensors)).items()
        },
        path,
    )
    load(name, {"model.safetensors": path.read_bytes()})


@fuzz
@given(data=st.data(), name=st.sampled_from(FAMILIES), header=st.booleans())
def test_a_file_of_tensors_with_damaged_bytes(data, name, header, saved, load):
    content = (saved[name] / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    if header:
        content = data.draw(damaged_bytes(content[: 8 + length])) + content[8 + length :]
    else:
        content = data.draw(damaged_bytes(content))
    load(name, {"model.safetensors": content})


@fuzz
@given(data=st.data(), name=st.sampled_from(FAMILIES))
def test_a_header_of_tensors_with_a_changed_value(data, name, saved, load):
    content = (saved[name] / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(data.draw(damaged_json(json.loads(content[8 : 8 + length])))).encode()
    header += b" " * (-len(header) % 8)
    load(
        name, {"model.safetensors": struct.pack("<Q", len(header)) + header + content[8 + length :]}
    )


@fuzz
@given(data=st.data(), changed=st.booleans())
def test_a_damaged_index_of_several_files(data, changed, saved, load):
    text = (saved["sharded"] / "model.safetensors.index.json").read_bytes()
    if changed:
        text = json.dumps(data.draw(damaged_json(json.loads(text)))).encode()
    else:
        text = data.draw(damaged_bytes(text))
    load("sharded", {"model.safetensors.index.json": text})


@fuzz
@given(data=st.data())
def test_one_of_several_files_with_damaged_tensors(data, saved, load, tmp_path):
    path = data.draw(st.sampled_from(sorted(saved["sharded"].glob("*.safetensors"))))
    tensors = data.draw(damaged_tensors(load_file(path)))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "tensors")
    load("sharded", {path.name: (tmp_path / "tensors").read_bytes()})


@fuzz
@given(data=st.data(), changed=st.booleans())
def test_a_damaged_generation_config(data, changed, saved, load):
    text = (saved["llama"] / "generation_config.json").read_bytes()
    if changed:
        text = json.dumps(data.draw(damaged_json(json.loads(text)))).encode()
    else:
        text = data.draw(damaged_bytes(text))
    load("llama", {"generation_config.json": text})


@fuzz
@given(
    data=st.data(),
    changed=st.booleans(),
    file=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]),
)
def test_a_damaged_tokenizer(data, changed, file, saved, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((saved["llama"] / name).read_bytes())
    text = (directory / file).read_bytes()
    if changed:
        text = json.dumps(data.draw(damaged_json(json.loads(text)))).encode()
    else:
        text = data.draw(damaged_bytes(text))
    (directory / file).write_bytes(text)
    tokenizers = []
    if refused(lambda: tokenizers.append(load_tokenizer(directory))) is None:
        check_tokenizer(tokenizers[0], directory)
    event("accepted" if tokenizers else "refused")
