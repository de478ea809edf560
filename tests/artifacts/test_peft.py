"""A LoRA tree is a PEFT adapter and comes back; foreign adapters mean here what they mean there."""

import dataclasses
import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorax_gen import load_adapter, save_adapter
from lorax_gen.artifacts.card import make_card
from lorax_gen.artifacts.peft import CONFIG, TENSORS
from lorax_gen.artifacts.peft_config import adapted_modules, read_config
from lorax_gen.errors import UserError
from lorax_gen.method.lora import deepened
from lorax_gen.models import decoder
from lorax_gen.models.decoder import kernel_shapes
from lorax_gen.models.huggingface import save_model
from lorax_gen.models.model import Model
from lorax_gen.tensors import read_tensors, write_tensors
from lorax_gen.tokenizers import word_level
from tests.models.configs import CONFIGS, LLAMA
from tests.tiny import adapter_of, make_generator

MODULES = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
RANKS = {"q": 3, "k": 5, "v": 2, "o": 4, "gate": 5, "up": 1, "down": 3}
LAYERS = range(LLAMA.num_hidden_layers)
TOKENS = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (3, 12))  # beyond every window
EXACT = {"rtol": 0, "atol": 2e-4}


def random_tree(config=LLAMA, ranks=RANKS, seed=0):
    """Of the kernels with a rank that the model has."""
    rng, layers, tree = np.random.default_rng(seed), config.num_hidden_layers, {}
    shapes = kernel_shapes(config)
    for name, rank in ranks.items():
        if name not in shapes:
            continue
        d_in, d_out = shapes[name]
        tree[name] = {
            "a": rng.normal(0, 0.3, (layers, d_in, rank)).astype(np.float32),
            "b": rng.normal(0, 0.3, (layers, rank, d_out)).astype(np.float32),
        }
    return tree


OPT_MODULES = {name: f"self_attn.{name}_proj" for name in ("q", "k", "v")} | {
    "o": "self_attn.out_proj", "up": "fc1", "down": "fc2",
}  # fmt: skip


def full_name(name, layer, family="llama"):
    if family.startswith("opt"):
        return f"model.decoder.layers.{layer}.{OPT_MODULES[name]}"
    return f"model.layers.{layer}.{MODULES[name]}"


@pytest.fixture(scope="module")
def edge_of(random_params):
    """`edge_of(family)`: a model of `CONFIGS` with a tokenizer."""
    tokenizer = word_level([f"word{i}" for i in range(LLAMA.vocab_size - 4)])

    @functools.cache
    def edge(family):
        config = CONFIGS[family]
        return Model(config, random_params(config), tokenizer, name=f"tiny/{family}")

    return edge


@pytest.fixture(scope="module")
def lora_of_card(tiny_world_system, edge_of):
    """`lora_of_card(family, **generator fields)`: the LoRA tree of a card of two experts."""

    def lora(family, **fields):
        system = tiny_world_system._replace(edge=edge_of(family))
        targets = tuple(kernel_shapes(system.edge.config))
        generator = make_generator(system, **{"edge_targets": targets, **fields})
        gates = np.zeros((system.edge.config.num_hidden_layers, 4), np.float32)
        gates[:, 3], gates[:, 1], gates[0, [0, 3]] = 0.7, 0.3, [0.7, 0]
        return make_card(gates, "a prompt", system.cloud, system.edge, generator).lora(generator)

    return lora


@functools.partial(jax.jit, static_argnums=1)
def logits(params, config, tokens, lora=None):
    return decoder.logits(
        params, config, decoder.hidden_states(params, config, tokens, adapter=adapter_of(lora))
    )


# --- ours, out and in ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "qwen2", "gemma3", "smollm3", "opt", "opt-350m"]
)
def test_all_kernels_of_any_ranks_come_back_bit_by_bit(name, tmp_path):
    config = CONFIGS[name]
    tree = random_tree(config)
    save_adapter(tmp_path / "adapter", tree, config)
    loaded = load_adapter(tmp_path / "adapter", config)
    assert loaded.keys() == tree.keys()
    chex.assert_trees_all_equal(loaded, tree)


@pytest.mark.parametrize("alpha", [4.0, 7.0])
@pytest.mark.parametrize("composition", ["factors", "products"])
def test_the_lora_of_a_card_comes_back_bit_by_bit(composition, alpha, lora_of_card, tmp_path):
    tree = lora_of_card("llama", composition=composition, rank=3, alpha=alpha)
    save_adapter(tmp_path / "adapter", tree, LLAMA)
    chex.assert_trees_all_equal(load_adapter(tmp_path / "adapter", LLAMA), tree)
    raw = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert raw["r"] == raw["lora_alpha"] == {"factors": 3, "products": 6}[composition]


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "qwen2", "gemma3", "smollm3", "opt", "opt-350m"]
)
def test_factors_stand_as_torch_has_them_under_the_names_of_transformers(name, tmp_path):
    config, tree = CONFIGS[name], random_tree(CONFIGS[name])
    save_adapter(tmp_path / "adapter", tree, config)
    tensors = read_tensors(tmp_path / "adapter" / TENSORS)
    assert len(tensors) == 2 * len(kernel_shapes(config)) * config.num_hidden_layers
    for kernel, pair in tree.items():
        for i in range(config.num_hidden_layers):
            prefix = f"base_model.model.{full_name(kernel, i, name)}"
            for factor, letter in (("a", "A"), ("b", "B")):
                value = tensors[f"{prefix}.lora_{letter}.weight"]
                assert value.dtype == np.float32
                np.testing.assert_array_equal(value, pair[factor][i].T)


def test_the_config_says_all_that_peft_asks(tmp_path):
    ranks = {"q": 4, "down": 4, "up": 2}
    save_adapter(
        tmp_path / "adapter",
        random_tree(ranks=ranks),
        LLAMA,
        base_model="org/name",
        provenance={"pool": "0123"},
    )
    raw = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/name",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"up_proj": 2},
        "target_modules": ["down_proj", "q_proj", "up_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    assert {key: raw[key] for key in expected} == expected
    assert json.loads((tmp_path / "adapter" / "provenance.json").read_text()) == {"pool": "0123"}


def test_half_precision_is_kept_and_read_as_fp32(tmp_path):
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), random_tree())
    save_adapter(tmp_path / "adapter", tree, LLAMA)
    assert {x.dtype.name for x in read_tensors(tmp_path / "adapter" / TENSORS).values()} == {
        "bfloat16"
    }
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    chex.assert_trees_all_equal(load_adapter(tmp_path / "adapter", LLAMA), exact)


def test_nothing_is_overwritten_or_left_behind(tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    save_adapter(path, random_tree(), LLAMA)
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    with pytest.raises(UserError, match="already exists"):
        save_adapter(path, random_tree(seed=1), LLAMA)
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before
    with pytest.raises(UserError, match="LoRA for 'q' has factors"):
        save_adapter(tmp_path / "other", {"q": random_tree()["down"]}, LLAMA)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("lorax_gen.files.write_json", full)
        save_adapter(tmp_path / "other", random_tree(), LLAMA)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


# --- theirs, in ----------------------------------------------------------------------------------


def random_pairs(config=LLAMA, ranks=RANKS):
    """`{module: (A [R, D], B [F, R])}` as PEFT holds them."""
    return {
        full_name(name, i): (pair["a"][i].T, pair["b"][i].T)
        for name, pair in random_tree(config, ranks).items()
        for i in range(config.num_hidden_layers)
    }


def write_adapter(directory, pairs, suffix="weight", extra=None, **config):
    """An adapter as others write it; a config field that is `...` is left out.

    Without fields for them, the config has the modules and ranks of the pairs.
    """
    tensors = {
        f"base_model.model.{module}.lora_{letter}.{suffix}": value
        for module, pair in pairs.items()
        for letter, value in zip("AB", pair, strict=True)
    }
    directory.mkdir()
    write_tensors(directory / TENSORS, tensors | (extra or {}), {"format": "pt"})
    ranks = {rf"{re.escape(name)}": len(a) for name, (a, _) in pairs.items()}
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": sorted(pairs)}
    raw |= {"rank_pattern": ranks} | config
    raw = {key: value for key, value in raw.items() if value is not ...}
    (directory / CONFIG).write_text(json.dumps(raw))
    return directory


def assert_deltas(tree, pairs, scale_of):
    """The tree adds scale B A where the adapter has a pair, and nothing elsewhere."""
    for name, factors in deepened(tree, len(LAYERS)).items():
        for i in LAYERS:
            delta = factors["a"][i] @ factors["b"][i]
            module = full_name(name, i)
            if module in pairs:
                a, b = pairs[module]
                np.testing.assert_allclose(delta.T, scale_of(module) * b @ a, rtol=0, atol=1e-5)
            else:
                assert not delta.any()
    assert set(pairs) <= {full_name(name, i) for name in tree for i in LAYERS}


@pytest.mark.parametrize(
    "config, scales",
    [
        ({"lora_alpha": 10}, {"": 10 / 4}),
        ({"lora_alpha": 1.5}, {"": 1.5 / 4}),
        ({"lora_alpha": ...}, {"": 8 / 4}),  # PEFT's default
        ({"lora_alpha": 10, "use_rslora": True}, {"": 10 / 2}),
        ({"lora_alpha": 10, "alpha_pattern": {"up_proj": 3}}, {"up_proj": 3 / 4, "": 10 / 4}),
        (
            {"alpha_pattern": {r"layers\.[02]\.self_attn\.q_proj": 6, "q_proj": 2, "mlp.*": 12}},
            {"0.self_attn.q_proj": 1.5, "2.self_attn.q_proj": 1.5, "q_proj": 0.5, "mlp": 3, "": 1},
        ),
        ({"alpha_pattern": {"q_proj": 6}, "use_rslora": True}, {"q_proj": 3, "": 2}),
        ({"modules_to_save": None, "use_dora": False, "alpha_pattern": None}, {"": 1}),
        ({"layer_replication": None, "trainable_token_indices": None, "lora_bias": False}, {"": 1}),
        ({"init_lora_weights": True}, {"": 1}),
        ({"init_lora_weights": "gaussian"}, {"": 1}),
    ],
)  # fmt: skip
def test_the_scale_is_that_of_peft(config, scales, tmp_path):
    pairs = random_pairs(ranks=dict.fromkeys(MODULES, 4))
    tree = load_adapter(write_adapter(tmp_path / "adapter", pairs, **config), LLAMA)
    assert tree.keys() == MODULES.keys()
    assert_deltas(tree, pairs, lambda name: next(v for part, v in scales.items() if part in name))


def test_alpha_is_divided_by_the_rank_that_each_module_has(tmp_path):
    pairs = random_pairs()
    patterns = {f"{name}_proj": rank for name, rank in RANKS.items()}
    path = write_adapter(tmp_path / "adapter", pairs, r=8, lora_alpha=6, rank_pattern=patterns)
    assert_deltas(load_adapter(path, LLAMA), pairs, lambda module: 6 / len(pairs[module][0]))


def test_layers_that_are_left_out_add_nothing(tmp_path):
    pairs = {full_name("q", 2): random_pairs()[full_name("q", 2)]}
    path = write_adapter(
        tmp_path / "adapter", pairs, target_modules=["q_proj"], layers_to_transform=[2]
    )
    tree = load_adapter(path, LLAMA)
    assert tree.keys() == {"q"} and len(tree["q"]["a"]) == 1
    assert_deltas(tree, pairs, lambda module: 4 / 3)


def test_a_layer_after_the_first_adapted_one_that_is_left_out_adds_nothing(tmp_path):
    pairs = {full_name("q", i): random_pairs()[full_name("q", i)] for i in (0, 2)}
    path = write_adapter(
        tmp_path / "adapter", pairs, target_modules=["q_proj"], layers_to_transform=[0, 2]
    )
    tree = load_adapter(path, LLAMA)
    assert len(tree["q"]["a"]) == 3 and not tree["q"]["b"][1].any()
    assert_deltas(tree, pairs, lambda module: 4 / 3)


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_a_lora_of_the_last_layers_names_them_and_comes_back_bit_by_bit(name, last, tmp_path):
    config = CONFIGS[name]
    tree = jax.tree.map(lambda leaf: leaf[-last:], random_tree(config))
    save_adapter(tmp_path / "adapter", tree, config)
    raw = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert raw["layers_to_transform"] == [0, 1, 2][-last:]
    tensors = read_tensors(tmp_path / "adapter" / TENSORS)
    assert len(tensors) == 2 * last * len(tree)
    chex.assert_trees_all_equal(load_adapter(tmp_path / "adapter", config), tree)


def test_ranks_that_differ_between_layers_are_filled_up(tmp_path):
    first, last = full_name("up", 0), full_name("up", 2)
    pairs = {first: random_pairs()[first], last: random_pairs(ranks={"up": 4})[last]}
    tree = load_adapter(write_adapter(tmp_path / "adapter", pairs), LLAMA)
    chex.assert_shape(tree["up"]["a"], (3, LLAMA.hidden_size, 4))
    chex.assert_shape(tree["up"]["b"], (3, 4, LLAMA.intermediate_size))
    assert_deltas(tree, pairs, lambda module: 4 / len(pairs[module][0]))


def test_keys_with_the_name_of_an_adapter_are_read_too(tmp_path):
    pairs = random_pairs()
    path = write_adapter(tmp_path / "adapter", pairs, suffix="default.weight")
    assert_deltas(load_adapter(path, LLAMA), pairs, lambda module: 4 / len(pairs[module][0]))


# --- theirs, refused -----------------------------------------------------------------------------


def refused(directory, config=LLAMA):
    """The one line that says why."""
    with pytest.raises(UserError) as error:
        load_adapter(directory, config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "use_dora=True, which is not a plain LoRA"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication="),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters="),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens="),
        ({"use_something_new": True}, "use_something_new=True"),
        ({"kasa_config": {"rank": 1}}, "kasa_config="),
        ({"bias": True}, "bias=True"),
        ({"peft_type": "LOHA"}, "is of a LOHA adapter; expected LORA"),
        ({"peft_type": ...}, "is of a None adapter; expected LORA"),
        # These start from kernels that they change: a plain LoRA only after PEFT's conversion.
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
    ],
)
def test_what_is_no_plain_lora_is_refused(changes, message, tmp_path):
    path = write_adapter(tmp_path / "adapter", random_pairs(), **changes)
    assert message in refused(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_alpha": "many"}, "lora_alpha: expected float"),
        ({"lora_alpha": 0}, "lora_alpha: expected float > 0"),
        ({"lora_alpha": -4}, "lora_alpha: expected float > 0"),
        ({"lora_alpha": 1e300}, "lora_alpha: expected float <= 1e"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern[...]: expected float"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern[...]: expected float > 0"),
        ({"alpha_pattern": {"(": 4}}, "invalid regular expression"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: expected object"),
        ({"alpha_pattern": {"p_proj": 3}}, "alpha_pattern has 'p_proj', which applies to no"),
        ({"alpha_pattern": {"_proj": 3, "lm_head": 2}}, "alpha_pattern has '_proj', which applies"),
        ({"r": 0}, "r: expected int >= 1"),
        ({"r": True}, "r: expected int"),
        ({"r": 4.5}, "r: expected int"),
        ({"rank_pattern": None}, "q_proj has rank 3, but r and rank_pattern"),
        ({"rank_pattern": {".*": 3, "k_proj": 5}}, "rank_pattern has 'k_proj', which applies"),
        ({"use_rslora": "yes"}, "use_rslora: expected bool"),
        ({"target_modules": ...}, "missing required field target_modules"),
        ({"target_modules": []}, "target_modules is [], which fits no kernel"),
        ({"target_modules": ["proj"]}, "target_modules has 'proj', which is no kernel"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj', which fits no kernel"),
        ({"target_modules": "*"}, "invalid regular expression"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has 'lm_head'"),
        ({"target_modules": ".*", "layers_pattern": "layers"}, "target_modules is a string"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": [0, 3]}, "layers_to_transform has layer 3, but the model has 3"),
        ({"layers_to_transform": -1}, "layers_to_transform: expected int >= 0"),
        ({"layers_to_transform": 1, "layers_pattern": "blocks"}, "fits no kernel"),
        # What the config does not name, and what it names and the tensors lack.
        ({"target_modules": ["q_proj"], "rank_pattern": {".*": 3}}, "proj.lora_A.weight, which is"),
        ({"target_modules": "model.*[qk]_proj", "rank_pattern": {"q_proj": 3, "k_proj": 5}},
         "which is not a LoRA of this model's kernels that adapter_config.json names"),
        ({"exclude_modules": ["q_proj"]}, "q_proj', which applies to no adapted module"),
        ({"layers_to_transform": 2}, "which applies to no adapted module"),
    ],
)  # fmt: skip
def test_a_config_that_is_wrong_or_disagrees_with_the_tensors_is_refused(
    changes, message, tmp_path
):
    path = write_adapter(tmp_path / "adapter", random_pairs(), **changes)
    found = refused(path)
    assert message in found and CONFIG in found


def test_a_target_without_tensors_is_named(tmp_path):
    pairs = random_pairs(ranks={"q": 4})
    names = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {}}
    path = write_adapter(tmp_path / "adapter", pairs, **names)
    assert f"lacks the tensor {full_name('v', 0)}.lora_A.weight" in refused(path)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"target_modules": ["q_proj", "mlp.up_proj"]}, "q0 q1 q2 up0 up1 up2"),
        ({"target_modules": ["model.layers.1.self_attn.q_proj", "k_proj"]}, "q1 k0 k1 k2"),
        ({"target_modules": r".*\.[01]\.self_attn\.[qk]_proj"}, "q0 q1 k0 k1"),
        ({"target_modules": "ALL-linear", "exclude_modules": r".*(mlp|self_attn\.[kvo]).*"},
         "q0 q1 q2"),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
         "q0 q2 k0 k1 k2"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, "q0"),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, "q0 q1 q2"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
         "q2"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "l.*"]},
         "q1"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []}, "q1"),
    ],
)  # fmt: skip
def test_the_modules_are_those_of_peft(options, expected, tmp_path):
    chosen = [re.fullmatch(r"([a-z]+)(\d)", text).groups() for text in expected.split()]
    every = [full_name(name, layer) for name in MODULES for layer in LAYERS]
    found = adapted_modules(
        read_config({"peft_type": "LORA", **options}, "here"), every, len(LAYERS), "here"
    )
    assert set(found) == {full_name(name, int(layer)) for name, layer in chosen}
    peft = pytest.importorskip("peft", reason="needs peft: pip install -e '.[parity]'")
    from peft.tuners.tuners_utils import check_target_module_exists

    if str(options["target_modules"]).lower() == "all-linear":
        options = options | {"target_modules": ".*"}  # what peft makes of it, for these names
    theirs = [x for x in every if check_target_module_exists(peft.LoraConfig(**options), x)]
    assert sorted(found) == sorted(theirs)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_number_that_is_not_finite_is_named(number, dtype, tmp_path):
    pairs = random_pairs()
    a, b = (value.astype(jnp.dtype(dtype)) for value in pairs[full_name("v", 1)])
    b[2, 1] = number
    pairs[full_name("v", 1)] = a, b
    message = refused(write_adapter(tmp_path / "adapter", pairs))
    assert f"{full_name('v', 1)}.lora_B.weight holds {number} at [2, 1]" in message


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "float64", "float8_e4m3fn"])
def test_a_dtype_of_no_adapter_is_named(dtype, tmp_path):
    pairs = random_pairs()
    a, b = pairs[full_name("v", 1)]
    pairs[full_name("v", 1)] = a.astype(jnp.dtype(dtype)), b
    message = refused(write_adapter(tmp_path / "adapter", pairs))
    assert f"{full_name('v', 1)}.lora_A.weight is " in message and "expected F32 or" in message


def test_a_scale_beyond_fp32_is_refused(tmp_path):
    pairs = random_pairs(ranks={"q": 4})
    pairs = {name: (a, np.full_like(b, 1e20)) for name, (a, b) in pairs.items()}
    message = refused(write_adapter(tmp_path / "adapter", pairs, lora_alpha=1e20))
    assert "lora_B.weight, times its scale 2.5e+19, holds inf" in message


def test_the_tensors_of_two_adapters_are_refused(tmp_path):
    pairs = random_pairs(ranks={"q": 4})
    key = f"base_model.model.{full_name('q', 1)}.lora_A.other.weight"
    path = write_adapter(tmp_path / "adapter", pairs, extra={key: pairs[full_name("q", 1)][0]})
    assert "of a second adapter; keep one adapter" in refused(path)


A, B = (f"{full_name('q', 1)}.lora_{letter}.weight" for letter in "AB")


@pytest.mark.parametrize(
    "key, shape, message",
    [
        (A, None, f"lacks the tensor {A}"),
        (B, None, f"lacks the tensor {B}"),
        (A, (3, 17), "has factors (3, 17) and (24, 3), which do not fit its kernel (24, 16)"),
        (B, (24, 2), "has factors (3, 16) and (24, 2), which do not fit its kernel (24, 16)"),
        (B, (3, 24), "has factors (3, 16) and (3, 24), which do not fit its kernel (24, 16)"),
        (A, (3,), "has factors (3,)"),
        (A, (), "has factors ()"),
        (A, (2, 16), "has factors (2, 16) and (24, 3)"),
        (A, (0, 16), "has factors (0, 16)"),
        (
            "lm_head.lora_A.weight",
            (3, 16),
            "holds lm_head.lora_A.weight, which is not a LoRA of this",
        ),
        ("model.embed_tokens.lora_embedding_A", (3, 30), "model.embed_tokens.lora_embedding_A"),
        (f"{full_name('q', 3)}.lora_A.weight", (3, 16), "holds model.layers.3.self_attn.q_proj"),
        (f"{full_name('q', 1)}.lora_magnitude_vector", (24,), "lora_magnitude_vector"),
        ("transformer.h.0.attn.c_attn.lora_A.weight", (3, 16), "holds transformer.h.0.attn.c_attn"),
    ],
)
def test_a_tensor_that_is_missing_misshapen_or_foreign_is_named(key, shape, message, tmp_path):
    path = write_adapter(tmp_path / "adapter", random_pairs())
    tensors = read_tensors(path / TENSORS)
    tensors.pop(f"base_model.model.{key}", None)
    if shape is not None:
        tensors[f"base_model.model.{key}"] = np.zeros(shape, np.float32)
    if shape == (0, 16):  # an empty pair
        tensors[f"base_model.model.{B}"] = np.zeros((24, 0), np.float32)
    save_file(tensors, path / TENSORS)
    assert message in refused(path)


def test_an_adapter_of_another_size_is_refused(tmp_path):
    other = dataclasses.replace(LLAMA, hidden_size=20)
    save_adapter(tmp_path / "adapter", random_tree(other), other)
    assert "is the adapter for another model?" in refused(tmp_path / "adapter")
    deeper = dataclasses.replace(LLAMA, num_hidden_layers=4)
    save_adapter(tmp_path / "deeper", random_tree(deeper), deeper)
    assert "which is not a LoRA of this model's kernels" in refused(tmp_path / "deeper")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_or_broken_file_is_named(name, tmp_path):
    path = write_adapter(tmp_path / "adapter", random_pairs())
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:40])
    assert name in refused(path)
    (path / name).unlink()
    assert f"no such file: {path / name}" in refused(path)


def test_a_pickle_in_place_of_the_tensors_is_not_read(tmp_path):
    path = write_adapter(tmp_path / "adapter", random_pairs())
    (path / TENSORS).rename(path / "adapter_model.bin")
    assert f"no such file: {path / TENSORS}; expected a safetensors file" in refused(path)


def test_a_missing_directory_is_named(tmp_path):
    assert "no adapter directory at" in refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "file is a file; expected" in refused(tmp_path / "file")


# --- beside PEFT ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch", reason="needs torch and peft: pip install -e '.[parity]'")
    return pytest.importorskip("peft", reason="needs torch and peft: pip install -e '.[parity]'")


@pytest.fixture(scope="module")
def in_torch(edge_of, tmp_path_factory):
    """`in_torch(family)`: transformers' model of the saved edge, a new one each time."""

    def load(family):
        import torch
        from transformers import AutoModelForCausalLM

        directory = tmp_path_factory.getbasetemp() / f"edge-{family}"
        if not directory.exists():
            save_model(directory, edge_of(family))
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )

    return load


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize(
    "family, fields",
    [
        ("llama", {"composition": "factors", "rank": 4, "alpha": 4.0}),
        ("llama", {"composition": "factors", "rank": 2, "alpha": 5.0, "edge_targets": ("up", "k")}),
        ("llama", {"composition": "products", "rank": 3, "alpha": 7.0}),
        ("gemma2", {"composition": "products", "rank": 4, "alpha": 2.0}),
        ("qwen2", {"composition": "factors", "rank": 3, "alpha": 1.5}),
        ("gemma3", {"composition": "factors", "rank": 3, "alpha": 1.5}),
        ("smollm3", {"composition": "factors", "rank": 3, "alpha": 1.5}),
        ("opt", {"composition": "products", "rank": 3, "alpha": 7.0}),
        (
            "opt",
            {"composition": "factors", "rank": 4, "alpha": 4.0, "edge_targets": ("up", "down")},
        ),
    ],
    ids=str,
)
def test_peft_answers_as_the_merged_edge(
    family, fields, edge_of, in_torch, lora_of_card, peft, tmp_path
):
    edge, tree = edge_of(family), lora_of_card(family, **fields)
    save_adapter(tmp_path / "adapter", tree, edge.config, base_model=edge.name)
    theirs = torch_logits(peft.PeftModel.from_pretrained(in_torch(family), tmp_path / "adapter"))
    ours = logits(edge.merged(tree).params, edge.config, TOKENS)
    np.testing.assert_allclose(ours, theirs, **EXACT)
    assert np.abs(ours - logits(edge.params, edge.config, TOKENS)).max() > 0.1


def test_peft_gives_each_module_the_rank_and_scale_that_it_has(edge_of, in_torch, peft, tmp_path):
    edge, tree = edge_of("llama"), random_tree()
    save_adapter(tmp_path / "adapter", tree, edge.config)
    theirs = torch_logits(peft.PeftModel.from_pretrained(in_torch("llama"), tmp_path / "adapter"))
    np.testing.assert_allclose(logits(edge.params, edge.config, TOKENS, tree), theirs, **EXACT)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_peft_adapts_the_last_layers_alone(family, edge_of, in_torch, peft, tmp_path):
    edge = edge_of(family)
    tree = jax.tree.map(lambda leaf: leaf[-2:], random_tree(edge.config))
    save_adapter(tmp_path / "adapter", tree, edge.config)
    model = peft.PeftModel.from_pretrained(in_torch(family), tmp_path / "adapter")
    ours = logits(edge.params, edge.config, TOKENS, tree)
    np.testing.assert_allclose(ours, torch_logits(model), **EXACT)
    model.save_pretrained(tmp_path / "theirs")
    chex.assert_trees_all_equal(load_adapter(tmp_path / "theirs", edge.config), tree)


@pytest.mark.parametrize(
    "family, fields",
    [
        ("llama", {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": "all-linear"}),
        ("gemma2", {"r": 3, "lora_alpha": 7, "target_modules": ["k_proj", "o_proj", "down_proj"]}),
        ("gemma3", {"r": 3, "lora_alpha": 7, "target_modules": ["k_proj", "q_proj", "up_proj"]}),
        ("smollm3", {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}),
        ("opt", {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}),
        (
            "opt",
            {
                "r": 4,
                "lora_alpha": 6,
                "target_modules": ["fc1", "out_proj", "v_proj"],
                "rank_pattern": {r"layers\.2\.fc1": 2},
            },
        ),
        (
            "qwen2",
            {
                "r": 4,
                "lora_alpha": 6,
                "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj"],
                "layers_to_transform": [0, 2],
                "rank_pattern": {r"layers\.2\.self_attn\.q_proj": 2, "up_proj": 5},
                "alpha_pattern": {r"self_attn\..*": 3, "gate_proj": 9},
            },
        ),
    ],
    ids=str,
)
def test_an_adapter_made_by_peft_answers_the_same_here(
    family, fields, edge_of, in_torch, peft, tmp_path
):
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    model = peft.get_peft_model(in_torch(family), config)
    model.save_pretrained(tmp_path / "adapter")
    edge = edge_of(family)
    tree = load_adapter(tmp_path / "adapter", edge.config)
    ours = logits(edge.params, edge.config, TOKENS, tree)
    np.testing.assert_allclose(ours, torch_logits(model), **EXACT)
    assert np.abs(ours - logits(edge.params, edge.config, TOKENS)).max() > 0.01
