"""A GGUF adapter holds what llama.cpp's loader asks for, and nothing that it would misread."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.artifacts.gguf import save_gguf_lora
from lorax_gen.errors import UserError
from lorax_gen.method.lora import merge
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.models.rope import Rope
from tests.models.configs import CONFIGS

gguf = pytest.importorskip("gguf", reason="needs the extra: pip install 'lorax-gen[gguf]'")

LLAMA = DecoderConfig(
    vocab_size=16,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
GEMMA = dataclasses.replace(
    LLAMA,
    hidden_act="gelu_pytorch_tanh",
    rms_norm_offset=True,
    embedding_scale=True,
    tie_word_embeddings=True,
)
GEMMA2 = dataclasses.replace(
    GEMMA,
    post_norms=True,
    query_pre_attn_scalar=6.0,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    sliding_window=8,
    layer_types=("sliding_attention", "full_attention"),
)
QWEN2 = dataclasses.replace(LLAMA, biases=("q", "k", "v"))
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    qk_norm=True,
    sliding_rope=Rope(5.0),
)
SMOLLM3 = dataclasses.replace(LLAMA, rope_layers=(True, False))
ARCHITECTURES = {
    "llama": LLAMA, "gemma": GEMMA, "gemma2": GEMMA2, "gemma3": GEMMA3, "qwen2": QWEN2,
    "qwen3": QWEN3, "smollm3": SMOLLM3,
}  # fmt: skip
RANKS = {"q": 3, "k": 5, "v": 2, "o": 4, "gate": 5, "up": 1, "down": 3}


def random_tree(config=LLAMA, names=tuple(RANKS), rank=4, seed=0):
    """`rank` is one for all or `{name: rank}`."""
    rng, layers, tree = np.random.default_rng(seed), config.num_hidden_layers, {}
    for name in names:
        d_in, d_out = kernel_shapes(config)[name]
        r = rank if isinstance(rank, int) else rank[name]
        tree[name] = {
            "a": rng.normal(size=(layers, d_in, r)).astype(np.float32),
            "b": rng.normal(size=(layers, r, d_out)).astype(np.float32),
        }
    return tree


def read(path):
    """Metadata and tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    return metadata, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def round_trip(tmp_path, tree, config=LLAMA, **options):
    path = tmp_path / "lora.gguf"
    save_gguf_lora(path, tree, config, **options)
    return read(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_metadata_is_what_the_loader_asks_for(architecture, tmp_path):
    config = ARCHITECTURES[architecture]
    metadata, _ = round_trip(
        tmp_path,
        random_tree(config),
        config,
        name="grades",
        provenance={"pool": "0123", "prompt": "abcd"},
    )
    kept = {key: value for key, value in metadata.items() if not key.startswith("GGUF.")}
    assert kept == {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": "grades",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
        "lorax_gen.pool": "0123",
        "lorax_gen.prompt": "abcd",
    }


def test_a_file_needs_neither_name_nor_provenance(tmp_path):
    metadata, _ = round_trip(tmp_path, random_tree())
    assert "general.name" not in metadata
    assert not any(key.startswith("lorax_gen.") for key in metadata)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_have_the_names_of_the_converted_model(architecture, tmp_path):
    config = ARCHITECTURES[architecture]
    _, tensors = round_trip(tmp_path, random_tree(config), config)
    layers = config.num_hidden_layers
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, layers)
    projections = [f"self_attn.{name}_proj" for name in "qkvo"]
    projections += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = {
        f"{names.get_name(f'model.layers.{i}.{projection}')}.weight.lora_{side}"
        for i in range(layers)
        for projection in projections
        for side in "ab"
    }
    assert set(tensors) == expected and len(tensors) == layers * 7 * 2


def test_a_lora_of_the_last_layers_is_in_their_blocks(tmp_path):
    tree = random_tree(names=("q", "down"))
    _, every = round_trip(tmp_path, tree)
    last = jax.tree.map(lambda leaf: leaf[1:], tree)
    _, found = round_trip(tmp_path / "last", last)
    kernels = ("attn_q", "ffn_down")
    names = {f"blk.1.{name}.weight.lora_{letter}" for name in kernels for letter in "ab"}
    assert found.keys() == names
    for name, value in found.items():
        np.testing.assert_array_equal(value, every[name])


def test_values_come_back_transposed(tmp_path):
    tree = random_tree(names=("v", "gate", "down"))
    _, tensors = round_trip(tmp_path, tree)
    for name, theirs in {"v": "attn_v", "gate": "ffn_gate", "down": "ffn_down"}.items():
        for i in range(LLAMA.num_hidden_layers):
            for side in "ab":
                value = tensors[f"blk.{i}.{theirs}.weight.lora_{side}"]
                assert value.dtype == np.float32
                np.testing.assert_array_equal(value, tree[name][side][i].T)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rotated_features_stand_as_the_rotary_embedding_pairs_them(architecture, tmp_path):
    """llama.cpp turns rows 2 i and 2 i + 1 of a LLaMA's head, which are i and i + E/2 here.

    In a SmolLM3 that converters write it does so in every layer, also where none is turned: what
    both q and k have in another order leaves the scores as they are.
    """
    config = ARCHITECTURES[architecture]
    tree = random_tree(config, names=("q", "k", "v"))
    _, tensors = round_trip(tmp_path, tree, config)
    half = config.head_dim // 2
    for name in tree:
        a, b = (tensors[f"blk.1.attn_{name}.weight.lora_{side}"] for side in "ab")
        np.testing.assert_array_equal(a, tree[name]["a"][1].T)
        order = np.arange(b.shape[0])
        if architecture in ("llama", "smollm3") and name != "v":
            for head in range(b.shape[0] // config.head_dim):
                for i in range(half):
                    first = head * config.head_dim
                    order[first + 2 * i : first + 2 * i + 2] = first + i, first + i + half
        np.testing.assert_array_equal(b, tree[name]["b"][1].T[order])


@pytest.mark.parametrize("rank", [4, RANKS], ids=["one rank", "many ranks"])
def test_alpha_over_rank_leaves_the_product_as_it_is(rank, tmp_path):
    """What llama.cpp adds is what `merge` adds, though one alpha serves every rank."""
    tree = random_tree(GEMMA, rank=rank)
    metadata, tensors = round_trip(tmp_path, tree, GEMMA)
    kernels = {
        name: jnp.zeros((GEMMA.num_hidden_layers, *shape))
        for name, shape in kernel_shapes(GEMMA).items()
    }
    merged = merge(kernels, tree)
    for name, theirs in {"q": "attn_q", "o": "attn_output", "up": "ffn_up"}.items():
        for i in range(GEMMA.num_hidden_layers):
            a, b = (tensors[f"blk.{i}.{theirs}.weight.lora_{side}"] for side in "ab")
            delta = metadata["adapter.lora.alpha"] / b.shape[1] * b @ a
            np.testing.assert_allclose(delta.T, merged[name][i], rtol=1e-5, atol=1e-5)


def test_half_precision_is_written_as_fp32(tmp_path):
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), random_tree(names=("up",)))
    _, tensors = round_trip(tmp_path, tree)
    value = tensors["blk.0.ffn_up.weight.lora_a"]
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, np.asarray(tree["up"]["a"][0].T, np.float32))


def test_nothing_is_overwritten_or_left_behind(tmp_path):
    path = tmp_path / "deep" / "lora.gguf"
    save_gguf_lora(path, random_tree(), LLAMA)
    before = path.read_bytes()
    with pytest.raises(UserError, match="already exists"):
        save_gguf_lora(path, random_tree(seed=1), LLAMA)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["lora.gguf"]


@pytest.mark.parametrize(
    "tree, message",
    [
        ({}, "the LoRA is empty"),
        ({"embed": random_tree()["q"]}, "LoRA for 'embed' has no kernel in the model"),
        ({"q": random_tree()["down"]}, "LoRA for 'q' has factors .* which do not fit the kernels"),
        ({"up": {"a": np.zeros((3, 24, 4)), "b": np.zeros((3, 4, 40))}}, "do not fit the kernels"),
        ({"up": {"a": np.zeros((2, 24, 4)), "b": np.zeros((2, 3, 40))}}, "do not fit the kernels"),
        ({"up": {"a": np.zeros((2, 24, 0)), "b": np.zeros((2, 0, 40))}}, "do not fit the kernels"),
        ({"up": {"a": np.zeros((2, 7, 24, 4)), "b": np.zeros((2, 7, 4, 40))}}, "per example"),
    ],
)  # fmt: skip
def test_a_tree_that_does_not_fit_is_refused(tree, message, tmp_path):
    with pytest.raises(UserError, match=message):
        save_gguf_lora(tmp_path / "lora.gguf", tree, LLAMA)
    assert not list(tmp_path.iterdir())


def test_a_family_that_llama_cpp_lacks_is_refused(tmp_path):
    known = "llama, qwen2, qwen3, gemma, gemma2, gemma3, smollm3"
    tree = random_tree(CONFIGS["opt"], names=("up", "down"))
    with pytest.raises(UserError, match=f"no GGUF adapter for the family 'opt'; known are {known}"):
        save_gguf_lora(tmp_path / "lora.gguf", tree, CONFIGS["opt"])
    assert not list(tmp_path.iterdir())


def test_the_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'lorax-gen\[gguf\]'"):
        save_gguf_lora(tmp_path / "lora.gguf", random_tree(), LLAMA)
