"""A GGUF file is the model that it was written from; what is damaged or beyond us is named."""

import dataclasses
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.mesh.sharding import MeshConfig, make_mesh, tree_shardings
from lorax_gen.models.families import FAMILIES, family_of
from lorax_gen.models.gguf_config import read_gguf_config
from lorax_gen.models.gguf_files import GGUFCheckpoint, open_gguf
from lorax_gen.models.gguf_format import Tensor, read_gguf
from lorax_gen.models.huggingface import load_model, load_reader, save_model
from lorax_gen.models.rope import Rope, RopeScaling, rope_frequencies
from tests.models.configs import CONFIGS, GEMMA, LLAMA, QWEN2
from tests.models.gguf_models import add_value, gguf, metadata_of, tensors_of, write_model

# Everything that a file can say. What llama.cpp has in its code is not in the file: the scale of
# Gemma 2's and 3's scores, and that every fourth layer of SmolLM3 rotates nothing.
SAID = {
    name: CONFIGS[name]
    for name in ("llama", "llama-tied", "llama-biases", "linear", "qwen2", "qwen3", "qwen3-biases",
                 "gemma", "gemma2", "gemma3", "smollm3")
}  # fmt: skip
for name in ("gemma2", "gemma3"):
    SAID[name] = dataclasses.replace(SAID[name], query_pre_attn_scalar=LLAMA.head_dim)
SAID["gemma3-one-rope"] = dataclasses.replace(
    SAID["gemma3"], sliding_rope=None, rope_scaling=None, rope_theta=1e4
)
SAID["gemma3-no-windows"] = dataclasses.replace(
    SAID["gemma3"], sliding_rope=None, sliding_window=None, layer_types=()
)
SAID["smollm3"] = dataclasses.replace(
    SAID["smollm3"], num_hidden_layers=5, rope_layers=(True, True, True, False, True)
)
WIDE = dataclasses.replace(
    LLAMA, hidden_size=256, intermediate_size=256, num_attention_heads=8, head_dim=32
)


@pytest.fixture
def written(tmp_path, random_params):
    """`written(config, kind='F32', **changes) -> path`, see `write_model`."""

    def written(config=LLAMA, kind="F32", **changes):
        return write_model(tmp_path / "model.gguf", config, random_params(config), kind, **changes)

    return written


def refusal(path):
    with pytest.raises(UserError) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", SAID)
def test_a_file_is_the_model_that_it_was_written_from(name, written, random_params):
    config, path = SAID[name], written(SAID[name])
    model, params = load_model(path), random_params(config)
    assert model.config == config
    # A norm's 1 is added before it is rounded to fp32.
    atol = 1e-7 if config.rms_norm_offset else 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
                 model.params, params)  # fmt: skip
    assert model.stop_ids == (2,) and model.bos


def test_the_reader_of_a_file_has_its_config_and_tokenizer(written):
    path = written()
    model, reader = load_model(path), load_reader(path)
    assert reader.is_abstract and reader.config == model.config
    assert reader.tokenizer_fingerprint == model.tokenizer_fingerprint
    assert reader.stop_ids == model.stop_ids


@pytest.mark.parametrize("kind", [each.name for each in gguf.GGMLQuantizationType])
def test_tensors_are_what_the_gguf_package_dequantises(kind, tmp_path, random_params):
    """All types that it knows, bit for bit, whichever part is read; others are refused by name."""
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (6, 2 * size), np.uint8)
    path = tmp_path / "model.gguf"
    path = write_model(path, WIDE, random_params(WIDE))
    file, name = open_gguf(path), "blk.0.ffn_up.weight"
    tensor = Tensor(kind, (6, 2 * block), raw)
    file = dataclasses.replace(file, tensors={**file.tensors, name: tensor})
    checkpoint = GGUFCheckpoint(file, WIDE)
    try:
        with np.errstate(invalid="ignore"):  # of random bytes some are NaN
            double = kind.name == "F64"
            expected = raw.view(np.float64) if double else gguf.quants.dequantize(raw, kind)
    except NotImplementedError:
        with pytest.raises(UserError, match=rf"{name} is of type {kind.name}, which the gguf"):
            checkpoint.dtype(name)
        return
    assert checkpoint.shape(name) == (6, 2 * block) == expected.shape
    for rows, columns in [(slice(None), slice(None)), (slice(1, 4), slice(block - 1, block + 1))]:
        value = checkpoint.read(name, (rows, columns))
        assert value.dtype == expected.dtype
        assert value.tobytes() == np.ascontiguousarray(expected[rows, columns]).tobytes()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "BF16", "F16"])
def test_a_quantised_model_is_the_one_of_its_dequantised_kernels(kind, written, random_params):
    """With q and k in Hugging Face's order again."""
    params = random_params(WIDE)
    quant = gguf.GGMLQuantizationType[kind]

    def rounded(kernel):  # blocks are along the input axis, and no block spans two rows
        return gguf.quants.dequantize(gguf.quants.quantize(np.asarray(kernel), quant), quant)

    model = load_model(written(WIDE, kind))
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        expected = [rounded(np.ascontiguousarray(layer.T)).T for layer in params["layers"][name]]
        np.testing.assert_array_equal(model.params["layers"][name], expected)
    np.testing.assert_array_equal(model.params["embed"], rounded(params["embed"]))
    stored = {"BF16": jnp.bfloat16, "F16": jnp.float16}.get(kind, jnp.float32)
    assert load_model(written(WIDE, kind), None).params["embed"].dtype == stored


def test_parameters_are_born_in_their_shards(written):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices("cpu")[:8])
    shardings, path = partial(tree_shardings, mesh=mesh), written(WIDE, "Q8_0")
    params = load_model(path, shardings=shardings).params
    jax.tree.map(np.testing.assert_array_equal, params, load_model(path).params)
    assert params["layers"]["q"].addressable_shards[0].data.shape == (3, 128, 128)


def test_a_converted_file_is_the_same_model(written, tmp_path):
    model = load_model(written(GEMMA))
    save_model(tmp_path / "directory", model)
    again = load_model(tmp_path / "directory")
    assert again.config == model.config and again.fingerprint == model.fingerprint
    assert again.tokenizer_fingerprint == model.tokenizer_fingerprint
    assert (again.stop_ids, again.bos) == (model.stop_ids, model.bos)


@pytest.mark.parametrize(
    ("name", "layers", "scalar"),
    [("gemma2", 45, 6), ("gemma2", 46, 4), ("gemma3", 61, 6), ("gemma3", 62, 4)],
)
def test_scores_of_the_27b_gemmas_have_the_scale_of_their_width(name, layers, scalar, written):
    """144 = 4608 / 32 and 168 = 5376 / 32 in the models themselves, head_dim in smaller ones."""
    keys = {f"{name}.block_count": layers, f"{name}.attention.sliding_window_pattern": 6}
    path = written(SAID[name], keys=keys)
    assert read_gguf_config(open_gguf(path)).query_pre_attn_scalar == scalar


@pytest.mark.parametrize(
    ("pattern", "full"),
    [(None, (5, 11)), (6, (5, 11)), (2, (1, 3, 5, 7, 9, 11)), (0, ()), (1, range(12)),
     ([True] * 3 + [False] + [True] * 8, (3,))],
)  # fmt: skip
def test_windows_of_gemma3_follow_the_pattern_of_its_file(pattern, full, written):
    """As `set_swa_pattern` of llama.cpp: n layers, the last of them full; 0 all with a window."""
    key = "gemma3.attention.sliding_window_pattern"
    path = written(SAID["gemma3"], keys={"gemma3.block_count": 12, key: pattern})
    windows = read_gguf_config(open_gguf(path)).windows
    assert windows == tuple(None if i in full else 5 for i in range(12))


@pytest.mark.parametrize("name", ["llama", "smollm3", "gemma3"])
def test_what_a_file_leaves_out_is_llama_cpps_default_not_that_of_the_family(name, written):
    arch, config = ("llama", LLAMA) if name == "llama" else (name, SAID[name])
    keys = dict.fromkeys(
        f"{arch}.{key}" for key in ("rope.freq_base", "rope.freq_base_swa",
                                     "attention.head_count_kv"))  # fmt: skip
    found = read_gguf_config(open_gguf(written(config, keys=keys)))
    assert found.rope_theta == 1e4
    assert found.num_key_value_heads == config.num_attention_heads == 4
    if name == "gemma3":
        assert found.sliding_rope == Rope(1e4) and found.rope_scaling == RopeScaling(8.0)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [({"factor": 8.0}, 8), ({"factor": 8.0, "type": "none"}, None), ({"linear": 4.0}, 4),
     ({"factor": 4.0, "linear": 4.0}, 4), ({"factor": 1.0}, None), ({"factor": 0.0}, None)],
)  # fmt: skip
def test_a_factor_of_rope_scales_unless_its_type_is_none(keys, factor, written):
    """As in llama.cpp, where a missing type is linear."""
    names = {"factor": "rope.scaling.factor", "type": "rope.scaling.type",
             "linear": "rope.scale_linear"}  # fmt: skip
    path = written(keys={f"llama.{names[key]}": value for key, value in keys.items()})
    scaling = read_gguf_config(open_gguf(path)).rope_scaling
    assert scaling == (None if factor is None else RopeScaling(factor))


def test_llama3_scaling_is_read_from_the_factors(written):
    config = dataclasses.replace(LLAMA, rope_theta=5e5, head_dim=64, max_position_embeddings=2**17)
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    plain = rope_frequencies(Rope(5e5), 64)
    factors = plain / rope_frequencies(Rope(5e5, scaling), 64)
    assert load_model(written(config, tensors={"rope_freqs.weight": factors})).config == (
        dataclasses.replace(config, rope_scaling=scaling)
    )
    ones = np.ones(32, np.float32)
    assert load_model(written(config, tensors={"rope_freqs.weight": ones})).config == config
    message = refusal(written(config, tensors={"rope_freqs.weight": 2 * factors}))
    assert "rope_freqs.weight is not that of rope_type llama3 with factor 16" in message


def test_a_file_holds_what_the_gguf_packages_reader_finds(written):
    keys = {"general.tags": ["é", ""], "x.floats": [0.5, 2.0], "x.bools": [True, False],
            "x.text": "ü\n", "x.yes": True, "x.many": [2**31 - 1, -3]}  # fmt: skip
    path = written(WIDE, "Q5_1", keys=keys)
    metadata, tensors = read_gguf(path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert metadata == {key: value for key, value in fields.items() if key[:5] != "GGUF."}
    assert metadata.items() >= keys.items()
    assert list(tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        ours = tensors[theirs.name]
        assert (ours.kind, ours.shape) == (theirs.tensor_type, tuple(theirs.shape[::-1]))
        assert ours.data.tobytes() == theirs.data.tobytes()


@pytest.mark.parametrize("name", ["general.type", "blk.0.ffn_up.weight"])
def test_a_name_that_is_there_twice_is_refused(name, written, tmp_path):
    data = written(keys={"general.typo": 1}).read_bytes()
    other = {"general.type": "general.typo", "blk.0.ffn_up.weight": "blk.1.ffn_up.weight"}[name]
    (tmp_path / "twice.gguf").write_bytes(data.replace(other.encode(), name.encode()))
    assert f"{name} twice" in refusal(tmp_path / "twice.gguf")


# --- parts ---------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path, random_params):
    """A model in three files."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=12)
    for key, value in metadata_of(LLAMA).items():
        add_value(writer, key, value)
    for name, value in tensors_of(LLAMA, random_params(LLAMA)).items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in found] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_any_part_stands_for_all(parts, random_params):
    for part in parts:
        params = load_model(part).params
        jax.tree.map(np.testing.assert_array_equal, params, random_params(LLAMA))


def test_parts_that_do_not_go_together_are_named(parts, tmp_path):
    parts[1].rename(tmp_path / "kept")
    assert "m-00002-of-00003.gguf is missing" in refusal(parts[0])
    shutil.copy(parts[2], parts[1])
    assert "m-00002-of-00003.gguf is not part 2 of 3, as its name says" in refusal(parts[0])
    alone = parts[0].rename(tmp_path / "alone.gguf")
    assert "alone.gguf is one of 3 parts; expected a name such as model-00001-of-00003" in refusal(
        alone
    )


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "is of architecture 'mamba'; supported are llama, qwen2"),
        ({"keys": {"general.type": "adapter"}}, "general.type 'adapter'; expected a model"),
        ({"keys": {"llama.block_count": None}}, "its metadata lacks llama.block_count"),
        ({"keys": {"llama.block_count": "two"}}, "llama.block_count: expected int, got str"),
        ({"keys": {"llama.block_count": 2}}, "holds the tensor blk.2.attn_k.weight, which its "
         "metadata does not ask for"),
        ({"keys": {"llama.block_count": 4}}, "lacks the tensor blk.3.attn_norm.weight, which its "
         "metadata asks for"),
        ({"keys": {"llama.embedding_length": 18}}, "token_embd.weight has shape (30, 16), but its "
         "metadata asks for (30, 18)"),
        ({"keys": {"llama.vocab_size": 31}}, "tokens has 30 tokens, token_embd.weight 30 rows, and "
         "llama.vocab_size is 31"),
        ({"keys": {"llama.rope.dimension_count": 4}}, "llama.rope.dimension_count is 4, but heads "
         "have 6 features"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type is 'yarn'; expected"),
        ({"keys": {"llama.rope.scaling.type": "linear"}}, "expected one factor"),
        ({"keys": {"llama.rope.scaling.attn_factor": 0.5}}, "attn_factor is 0.5; expected 1"),
        ({"keys": {"llama.attention.key_length": None, "llama.attention.head_count": 6}},
         "has no llama.attention.key_length, and embedding_length 16 is not a multiple of the 6"),
        ({"keys": {"llama.expert_count": 8}}, "num_local_experts=8, which is not supported"),
        ({"keys": {"llama.attention.sliding_window": 4}}, "sliding_window=4, which is not supp"),
        ({"keys": {"llama.attention.clamp_kqv": 8.0}}, "clamp_kqv=8.0, which is not supported"),
        ({"keys": {"llama.attention.causal": False}}, "attention.causal=False, which is not supp"),
        ({"keys": {"llama.rope.local.freq_base": 9.5}}, "rope.local.freq_base=9.5, which is not"),
        ({"keys": {"llama.rope.dimension_sections": [1, 2] * 40}}, "=[1, 2, 1, 2, 1, 2, 1, 2, 1, "),
        ({"keys": {"llama.rope.freq_base_swa": 1e4}}, "rope.freq_base_swa=10000.0, which is not"),
        ({"config": QWEN2, "keys": {"qwen2.attention.sliding_window": 4}}, "window=4, which is no"),
        ({"config": SAID["smollm3"], "keys": {"smollm3.attention.sliding_window": 4}},
         "smollm3.attention.sliding_window=4, which is not supported"),
        ({"config": SAID["gemma2"], "keys": {"gemma2.rope.freq_base_swa": 9.5}},
         "gemma2.rope.freq_base_swa is 9.5, but rope.freq_base 123; expected the same"),
        ({"config": SAID["gemma3"], "keys": {"gemma3.attention.sliding_window_pattern": [True]}},
         "gemma3.attention.sliding_window_pattern has 1 values for 3 layers; expected one each"),
        ({"config": SAID["gemma3"], "keys": {"gemma3.attention.sliding_window_pattern": 6.0}},
         "gemma3.attention.sliding_window_pattern: expected int, got float"),
        ({"config": SAID["gemma3"], "keys": {"gemma3.attention.key_length_swa": 4}},
         "gemma3.attention.key_length_swa is 4, but heads have 6 features"),
        ({"config": SAID["gemma3"], "keys": {"gemma3.final_logit_softcapping": 30.0}},
         "final_logit_softcapping=30.0, which is not supported"),
        ({"config": QWEN2, "tensors": {"blk.0.ffn_up.bias": np.ones(24)}},
         "holds the tensor blk.0.ffn_up.bias, which its metadata does not ask for"),
        ({"tensors": {"blk.1.attn_q.bias": np.ones(24)}}, "holds the tensor blk.1.attn_q.bias"),
        ({"tensors": {"output.bias": np.ones(30)}}, "holds the tensor output.bias, which its"),
        ({"tensors": {"output.weight": np.ones((31, 16))}}, "output.weight has shape (31, 16)"),
        ({"tensors": {"token_embd.weight": np.ones((31, 16))}}, "tokens has 30 tokens, token_embd."
         "weight 31 rows"),
        ({"keys": {"llama.attention.head_count": [4, 4, 2]}}, "llama.attention.head_count: expect"),
        ({"keys": {"llama.attention.scale": 0.5}}, "attention.scale is 0.5; expected 0.408248"),
        ({"keys": {"tokenizer.ggml.tokens": None}}, "has no tokenizer.ggml.tokens"),
        ({"keys": {"tokenizer.ggml.model": "rwkv"}}, "tokenizer.ggml.model is 'rwkv'; supported"),
        ({"keys": {"tokenizer.ggml.scores": [0.0] * 29}}, "scores has 29 values for 30 tokens"),
        ({"keys": {"tokenizer.ggml.bos_token_id": 30}}, "bos_token_id is 30, but there are 30 tok"),
        ({"keys": {"tokenizer.ggml.bos_token_id": None}}, "adds BOS or EOS to each text"),
        ({"keys": {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "abc"}}, "pre is 'abc'"),
        ({"keys": {"tokenizer.ggml.token_type": [7] * 30}}, "token_type has 7; expected 1 to 6"),
        ({"keys": {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
                   "tokenizer.ggml.merges": ["a zz"]}}, "its tokenizer cannot be read ("),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"tensors": {"blk.0.ffn_norm.weight": np.full(16, np.nan)}}, "ffn_norm.weight holds NaN"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(24)}}, "lacks the tensor blk.1.attn_q.bias"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes, message, written):
    found = refusal(written(**changes))
    assert re.search(re.escape(message), found), found


@pytest.mark.parametrize("name", ["opt", "mamba", "gemma3_text"])
def test_an_architecture_that_is_not_there_is_named(name, written):
    """llama.cpp has no OPT, and `gemma3_text` is Hugging Face's word for `gemma3`."""
    found = refusal(written(architecture=name))
    assert f"is of architecture {name!r}; supported are llama, qwen2, qwen3, gemma, gemma2, " in (
        found
    )
    assert found.endswith("gemma3, smollm3")


def test_a_key_that_asks_for_nothing_is_no_obstacle(written, recwarn):
    keys = {"llama.expert_used_count": 0, "llama.attention.causal": True, "llama.expert_count": 0}
    assert load_model(written(keys=keys)).config == LLAMA
    assert not [str(each.message) for each in recwarn if "unknown" in str(each.message)]


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_a_head_of_its_own_is_used_in_every_architecture(name, written, random_params):
    """Nothing in a file says that its head is tied but that there is none."""
    config = SAID[name]
    head = np.random.default_rng(1).normal(size=(30, 16)).astype(np.float32)
    model = load_model(written(config, tensors={"output.weight": head}))
    assert model.config == dataclasses.replace(config, tie_word_embeddings=False)
    np.testing.assert_array_equal(model.params["lm_head"], head.T)
    assert "lm_head" not in load_model(written(config)).params


def test_a_token_twice_is_named(written):
    tokens = metadata_of(LLAMA)["tokenizer.ggml.tokens"]
    keys = {"tokenizer.ggml.tokens": [*tokens[:-1], "a"]}
    assert "tokenizer.ggml.tokens has 'a' twice" in refusal(written(keys=keys))


def test_an_unknown_key_of_the_architecture_is_warned_about(written):
    with pytest.warns(UserWarning, match=r"keys that are unknown, and not used: llama\.new"):
        load_model(written(keys={"llama.new": 1, "general.other": 1}))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"PK\3\4" + bytes(20), "is not a GGUF file: it does not begin with GGUF"),
        (b"", "is not a GGUF file"),
        (b"GGUF\3\0\0\0", "is not a complete GGUF file"),
        (b"GGUF\1\0\0\0" + bytes(16), "is GGUF of version 1; supported are 2 and 3"),
        (b"GGUF\0\0\0\3" + bytes(16), "is a GGUF file for big-endian machines"),
        (b"GGUF\3\0\0\0" + b"\xff" * 16, "is not a complete GGUF file"),
    ],
)
def test_another_format_or_version_is_named(header, message, tmp_path):
    (tmp_path / "model.gguf").write_bytes(header)
    assert message in refusal(tmp_path / "model.gguf")


def test_a_truncated_file_is_refused_wherever_it_ends(written, tmp_path):
    data = written().read_bytes()
    for size in [*range(0, 1000, 111), len(data) // 2, len(data) - 33]:
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        assert re.search(
            r"cut\.gguf is not a (complete )?GGUF file", refusal(tmp_path / "cut.gguf")
        )


def test_a_type_of_tensors_that_is_unknown_is_no_damage(written, tmp_path):
    data = bytearray(written().read_bytes())
    at = data.index(name := b"blk.0.ffn_up.weight") + len(name) + 4 + 2 * 8  # axes and sizes
    assert data[at : at + 4] == bytes(4)  # F32
    data[at] = 99
    (tmp_path / "new.gguf").write_bytes(data)
    assert (
        "new.gguf holds blk.0.ffn_up.weight of type 99, which the gguf package does not know"
        in refusal(tmp_path / "new.gguf")
    )


def test_a_missing_file_is_named_with_how_to_name_one_on_the_hub(tmp_path):
    message = refusal(tmp_path / "no.gguf")
    assert "no.gguf; one on the hub is named org/name::file.gguf" in message
    assert "has no file no.gguf" in refusal(f"{tmp_path}::no.gguf")
    assert "expected a file's name" in refusal(f"{tmp_path}::../no.gguf")


def test_configs_of_all_families_are_known_to_the_file_reader(written):
    families = {family_of(config).model_type for config in SAID.values()}
    known = {family.model_type for family in FAMILIES if family.neighbours is not None}
    assert families == known and len(known) == 7
    assert read_gguf_config(open_gguf(written())) == LLAMA
