"""Task cards, generators and PEFT adapters, each damaged in its bytes, its tensors and its JSON.

What is accepted must be valid by the checks here, which share no code with the package's own.
"""

import dataclasses
import json
import re
import tempfile
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lorax_gen import load_adapter, load_card, load_generator, load_model, save_adapter, save_card
from lorax_gen.artifacts.card import TaskCard
from lorax_gen.artifacts.generator import digest
from lorax_gen.artifacts.identity import Names
from lorax_gen.assets import resolve
from lorax_gen.frames import PLAIN, Frame
from lorax_gen.models.decoder import kernel_shapes
from tests.fuzz.damage import damaged_bytes, damaged_json, damaged_tensors, fuzz, refused

HASH, SHA256 = "0123456789abcdef", "ab" * 32
FLOATS = {np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16)}
WAYS = st.sampled_from(["bytes", "tensors", "json"])


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for name in sorted(tree) for leaf in leaves(tree[name])]
    return [np.asarray(tree)]


def same(one, other):
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def write(path, tensors, metadata=None):
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path, metadata)


# --- cards ---------------------------------------------------------------------------------------

CARD = TaskCard(
    np.array([[3, 1], [2, 0], [7, 5]], np.uint8),
    np.array([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]], np.float32),
    pool=HASH, edge=HASH[::-1], prompt=SHA256, composition="products",
    generator=HASH, cloud=HASH, tokenizer=HASH,
    frame=Frame("[user] {input} [bot]", "", turn=True),
    names=Names("runs/a/released", "org/cloud", "../edge"),
)  # fmt: skip


def card_fields(card):
    return {name: getattr(card, name) for name in CARD.__dataclass_fields__}


def check_card(card):
    """The invariants of a card, and that it has no more than the file."""
    indices, gates = card.indices, card.gates
    assert indices.dtype in (np.uint8, np.uint16) and gates.dtype == np.float32
    assert indices.ndim == 2 and indices.shape == gates.shape and indices.size
    assert (gates > 0).all() and np.isfinite(gates).all()
    assert abs(gates.astype(float).sum(1) - 1).max() < 1e-5
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    assert re.fullmatch("[0-9a-f]{64}", card.prompt)
    assert card.composition in ("factors", "products")
    for text in (card.pool, card.edge):
        assert re.fullmatch("[0-9a-f]{16}", text)
    for text in (card.generator, card.cloud, card.tokenizer):
        assert re.fullmatch("([0-9a-f]{16})?", text)
    frame, names = card.frame, card.names
    assert frame.template.count("{input}") == 1 and isinstance(frame.separator, str)
    assert type(frame.turn) is type(frame.benchmarks) is bool
    for text in (names.generator, names.cloud, names.edge):
        assert isinstance(text, str) and not text.startswith(("/", "~")) and "://" not in text


@fuzz
@given(data=st.data(), way=WAYS, version=st.sampled_from([1, 2, 3, 4]))
def test_a_damaged_card_is_refused_or_still_a_card(data, way, version):
    """One of a format with a digest is refused or the original."""
    digested = CARD if version == 4 else dataclasses.replace(CARD, frame=PLAIN, names=Names())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "card"
        save_card(path, CARD)
        tensors, whole = load_file(path), path.read_bytes()
        names = {key: getattr(CARD, key) for key in ("pool", "edge", "prompt", "composition")}
        if version > 1:
            names |= {key: getattr(CARD, key) for key in ("generator", "cloud", "tokenizer")}
        if version > 2:
            names["digest"] = digested.digest
        if version == 4:
            names |= {"frame": CARD.frame.stored(), "names": msgspec.to_builtins(CARD.names)}
        names = {"format": f"lorax-gen card {version}", **names}
        if version < 4:
            write(path, tensors, {"card": json.dumps(names)})
            whole = path.read_bytes()
        if way == "bytes":
            path.write_bytes(data.draw(damaged_bytes(whole)))
        elif way == "tensors":
            write(path, data.draw(damaged_tensors(tensors)), {"card": json.dumps(names)})
        else:
            text = json.dumps(data.draw(damaged_json(names)))
            more = data.draw(st.sampled_from([{}, {}, {}, {"format": "pt"}]))
            write(path, tensors, {"card": text} | more)
        found = []
        if refused(lambda: found.append(load_card(path))) is None:
            check_card(found[0])
            kept = re.search(b"lorax-gen card [34]", path.read_bytes())
            assert not kept or same(card_fields(found[0]), card_fields(digested))


@fuzz
@given(data=st.data(), layers=st.integers(1, 4), kept=st.integers(1, 9))
def test_python_makes_no_card_that_is_none(data, layers, kept):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    gates = -np.sort(-rng.dirichlet(np.ones(kept), layers).astype(np.float32))
    indices = np.stack([rng.permutation(16)[:kept] for _ in range(layers)]).astype(np.uint8)
    good = card_fields(CARD) | {"gates": gates, "indices": indices}
    if (gates > 0).all():
        check_card(TaskCard(**good))
    tensors = data.draw(damaged_tensors({"gates": gates, "indices": indices}))
    found = []
    if {"gates", "indices"} <= tensors.keys():
        fields = good | {name: tensors[name] for name in ("gates", "indices")}
        if refused(lambda: found.append(TaskCard(**fields))) is None:
            check_card(found[0])


# --- generators ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator():
    """The shipped one: its files and what they load as."""
    directory = resolve("world/generator")
    document = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "generator.safetensors")
    return document, tensors, load_generator("world/generator")


@fuzz
@given(data=st.data(), way=WAYS, version=st.sampled_from([1, 2]))
def test_a_damaged_generator_is_refused_or_its_numbers_fit_its_config(
    generator, data, way, version
):
    """One of the present format is refused or has the original's numbers, config and models."""
    document, tensors, original = generator
    used = {key: document[key] for key in ("format", "generator", "shapes")}
    if version == 2:
        used |= {key: document[key] for key in ("models", "fingerprint", "digest")}
        if data.draw(st.booleans()):
            used["frame"] = CARD.frame.stored()
            used["digest"] = digest(used)
    else:
        used["format"] = "lorax-gen generator 1"
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        config, weights = directory / "config.json", directory / "generator.safetensors"
        config.write_text(json.dumps(used))
        write(weights, tensors)
        if way == "bytes":
            path = data.draw(st.sampled_from([config, weights]))
            path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
        elif way == "tensors":
            write(weights, data.draw(damaged_tensors(tensors)))
        else:
            config.write_text(json.dumps(data.draw(damaged_json(used))))
        found = []
        if refused(lambda: found.append(load_generator(directory))) is not None:
            return
        [loaded] = found
        check_generator(loaded)
        if "generator 2" in config.read_text():
            assert loaded.config == original.config
            assert same(loaded.params, original.params) and same(loaded.stats, original.stats)
            for name in ("shapes", "models"):
                assert loaded.metadata[name] == original.metadata[name]
            assert loaded.frame == (CARD.frame if "frame" in used else PLAIN)


def check_generator(generator):
    """Shapes and ranges by the paper's equations."""
    config, shapes = generator.config, generator.metadata["shapes"]
    cloud, edge = shapes["cloud"], shapes["edge"]
    n, hidden, rank = config.n_experts, cloud["kernels"]["q"][0], config.rank
    assert 1 <= config.top_k <= n and config.alpha > 0 and config.cloud_alpha > 0
    assert 0 < config.bn_eps <= 1 and 0 <= config.bn_momentum < 1
    one = () if config.router == "shared" else (edge["layers"],)
    wanted = {
        "w1": (*one, hidden, config.router_width), "b1": (*one, config.router_width),
        "w2": (*one, config.router_width, n), "b2": (*one, n),
        "bn_scale": (*one, n), "bn_bias": (*one, n),
    }  # fmt: skip
    params = generator.params
    assert params.keys() == {"meta_tokens", "cloud_lora", "router", "pool"}
    assert {name: x.shape for name, x in params["router"].items()} == wanted
    assert {name: x.shape for name, x in generator.stats.items()} == {
        "mean": (*one, n), "var": (*one, n)
    }  # fmt: skip
    rows = 1 if config.meta_tokens == "shared" else edge["layers"]
    assert params["meta_tokens"].shape == (rows, hidden)
    pool = (n,) if config.pool == "shared" else (edge["layers"], n)
    for part, targets, lead, r, kernels in (
        ("pool", config.edge_targets, pool, rank, edge["kernels"]),
        ("cloud_lora", config.cloud_targets, (cloud["layers"],), config.cloud_rank,
         cloud["kernels"]),
    ):  # fmt: skip
        assert params[part].keys() == set(targets)
        for name, pair in params[part].items():
            d_in, d_out = kernels[name]
            assert pair["a"].shape == (*lead, d_in, r) and pair["b"].shape == (*lead, r, d_out)
    for leaf in leaves({"params": params, "stats": generator.stats}):
        assert leaf.dtype == np.float32 and np.isfinite(leaf).all()
    assert (np.asarray(generator.stats["var"]) >= 0).all()


# --- adapters ------------------------------------------------------------------------------------

EDGE = load_model("world/edge").config
PARTS = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "up": "mlp.up_proj"}
EVERY = {
    f"model.layers.{i}.{part}.{kernel}_proj": kernel
    for i in range(EDGE.num_hidden_layers)
    for part, kernels in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for kernel in kernels
}
# Options that peft reads without changing what the adapter computes, and their harmless values.
CONFIGS = (
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    {"r": 2, "lora_alpha": 8, "target_modules": ".*(q|v|up)_proj", "rank_pattern": {".*": 4}},
    {"r": 4, "lora_alpha": 8, "target_modules": ["self_attn.q_proj", "v_proj", "mlp.up_proj"],
     "alpha_pattern": {"q_proj": 2.5, r"layers\.1\.mlp\.up_proj": 1}, "use_rslora": True,
     "exclude_modules": ["lm_head"], "layers_to_transform": [0, 1, 2, 3]},
)  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The tensors of an adapter of rank 4."""
    rng, tree = np.random.default_rng(0), {}
    for name in PARTS:
        (d_in, d_out), layers = kernel_shapes(EDGE)[name], EDGE.num_hidden_layers
        tree[name] = {
            "a": rng.normal(size=(layers, d_in, 4)).astype(np.float32),
            "b": rng.normal(size=(layers, 4, d_out)).astype(np.float32),
        }
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(folder, tree, EDGE)
    return json.loads((folder / "adapter_config.json").read_text()), load_file(
        folder / "adapter_model.safetensors"
    )


@fuzz
@given(data=st.data(), way=WAYS, changes=st.sampled_from(CONFIGS))
def test_a_damaged_adapter_is_refused_or_adds_what_its_files_say(adapter, data, way, changes):
    config = {**adapter[0], "rank_pattern": {}, "alpha_pattern": {}, **changes}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        settings = directory / "adapter_config.json"
        weights = directory / "adapter_model.safetensors"
        settings.write_text(json.dumps(config))
        write(weights, adapter[1], {"format": "pt"})
        if way == "bytes":
            path = data.draw(st.sampled_from([settings, weights]))
            path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
        elif way == "tensors":
            write(weights, data.draw(damaged_tensors(adapter[1])))
        else:
            settings.write_text(json.dumps(data.draw(damaged_json(config))))
        found = []
        if refused(lambda: found.append(load_adapter(directory, EDGE))) is None:
            check_adapter(found[0], json.loads(settings.read_text("utf-8-sig")), weights)


def check_adapter(tree, config, weights):
    """Every targeted module, and no other, adds scale B A of the file's own tensors."""
    tensors, used = load_file(weights), set()
    assert config["peft_type"] == "LORA" and not config.get("use_dora")
    assert config.get("bias", "none") in ("none", None, "")
    for name, kernel in EVERY.items():
        layer = int(name.split(".")[2])
        delta = 0
        if kernel in tree:
            delta = np.asarray(tree[kernel]["a"][layer]) @ np.asarray(tree[kernel]["b"][layer])
            assert delta.dtype == np.float32
        if not targeted(config, name, layer):
            assert not np.any(delta)
            continue
        keys = [key for key in tensors if f"{name}.lora_" in key]
        assert len(keys) == 2 and not used & set(keys)
        used |= set(keys)
        a, b = (tensors[key] for key in sorted(keys))
        assert a.dtype in FLOATS and b.dtype in FLOATS
        rank = chosen(config, "rank_pattern", "r", name, 8)
        alpha = chosen(config, "alpha_pattern", "lora_alpha", name, 8)
        assert type(rank) is int and rank == len(a) and alpha > 0 and np.isfinite(alpha)
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        a, b = a.astype(np.float32), b.astype(np.float32)
        np.testing.assert_allclose(delta.T, scale * b @ a, rtol=1e-3, atol=1e-3 * scale)
    assert used == set(tensors)
    assert all(np.isfinite(leaf).all() for leaf in leaves(tree))


def targeted(config, name, layer):
    def fits(names):
        if isinstance(names, str):
            return bool(re.fullmatch(names, name))
        return any(f".{name}".endswith(f".{each}") for each in names)

    excluded, layers = config.get("exclude_modules"), config.get("layers_to_transform")
    if excluded and fits(excluded):
        return False
    chosen_layers = [layers] if isinstance(layers, int) else layers
    return fits(config["target_modules"]) and (not chosen_layers or layer in chosen_layers)


def chosen(config, patterns, default, name, otherwise):
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config.get(default, otherwise)
