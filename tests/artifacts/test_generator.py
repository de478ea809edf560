"""A released generator comes back bit by bit, and only where it is whole and fits its models."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from lorax_gen import cli, load_card, load_generator, load_model, specialize
from lorax_gen import config as configs
from lorax_gen.artifacts import identity
from lorax_gen.artifacts.generator import digest, save_generator
from lorax_gen.artifacts.generator import make_generator as make
from lorax_gen.artifacts.identity import Identities, identify
from lorax_gen.errors import UserError
from lorax_gen.frames import IO, PLAIN
from lorax_gen.method import GeneratorConfig
from lorax_gen.models.huggingface import save_model
from lorax_gen.models.int8 import quantize_kernels
from lorax_gen.tensors import named_leaves, read_tensors, tree_hash, write_tensors
from lorax_gen.tokenizers import word_level
from tests.tiny import make_generator, write_generator, write_system


@pytest.fixture(scope="module")
def generator(tiny_world_system):
    return make_generator(tiny_world_system, edge_targets=("up", "down"), alpha=3.0)


@pytest.fixture
def directory(generator, tiny_world_system, tmp_path):
    write_generator(tmp_path / "generator", generator, tiny_world_system)
    return tmp_path / "generator"


def test_a_generator_comes_back_bit_by_bit(generator, directory):
    loaded = load_generator(directory)
    assert loaded.config == generator.config
    chex.assert_trees_all_equal(loaded.params, generator.params)
    chex.assert_trees_all_equal(loaded.stats, generator.stats)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded.params, generator.params)
    assert loaded.pool_hash == generator.pool_hash
    assert loaded.metadata["shapes"] == generator.metadata["shapes"]


def test_a_generator_of_the_last_layers_comes_back(tiny_world_system, tmp_path):
    made = make_generator(tiny_world_system, last_layers=1)
    save_generator(tmp_path / "made", made)
    loaded = load_generator(tmp_path / "made")
    assert loaded.config == made.config and loaded.fingerprint == made.fingerprint
    chex.assert_trees_all_equal(loaded.params, made.params)
    for name in ("meta_tokens", "router", "pool"):
        assert all(len(leaf) == 1 for leaf in jax.tree.leaves(made.params[name]))
    spec = loaded.spec(tiny_world_system.cloud, tiny_world_system.edge)
    assert spec.layers == 1


def test_a_generator_of_all_layers_is_stored_as_before(generator, directory):
    document = json.loads((directory / "config.json").read_text())
    assert "last_layers" not in document["generator"]
    assert configs.from_dict(GeneratorConfig, document["generator"], "") == generator.config


@pytest.mark.parametrize(
    "last, message",
    [
        (3, "last_layers is 3, but the edge model has 2 layers"),
        (1, r"meta_tokens is \(2, 48\), but its config.json makes it \(1, 48\)"),
    ],
)
def test_last_layers_that_do_not_fit_are_refused(last, message, directory):
    path = directory / "config.json"
    document = json.loads(path.read_text())
    document["generator"]["last_layers"] = last
    path.write_text(json.dumps({**document, "digest": digest(document)}))
    with pytest.raises(UserError, match=message):
        load_generator(directory)


def test_the_pool_hash_follows_the_pool_alone(generator):
    doubled = jax.tree.map(lambda leaf: 2 * leaf, generator.params)
    for name, part in doubled.items():
        changed = dataclasses.replace(generator, params={**generator.params, name: part})
        assert (changed.pool_hash != generator.pool_hash) == (name == "pool")


def test_it_says_what_it_was_trained_with(generator, tmp_path):
    save_generator(tmp_path / "made", generator, provenance={"metrics": {"loss": 0.5}})
    assert load_generator(tmp_path / "made").metadata["metrics"] == {"loss": 0.5}


@pytest.mark.parametrize(
    "role, change",
    [
        ("cloud", {"hidden_size": 32}),
        ("cloud", {"num_hidden_layers": 3}),
        ("edge", {"intermediate_size": 48}),
        ("edge", {"num_hidden_layers": 3}),
        ("edge", {"num_key_value_heads": 4}),
    ],
)
def test_models_of_another_shape_are_refused(generator, tiny_world_system, role, change):
    models = {"cloud": tiny_world_system.cloud, "edge": tiny_world_system.edge}
    assert generator.spec(**models).generator == generator.config
    config = dataclasses.replace(models[role].config, **change)
    models[role] = dataclasses.replace(models[role], config=config)
    with pytest.raises(
        UserError, match=f"trained with an? {role} model of .*, the given one has .*pass"
    ):
        generator.spec(**models)


# --- which models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing(generator, tiny_world_system):
    """The generator, knowing its models."""
    cloud, edge = tiny_world_system.cloud, tiny_world_system.edge
    models = Identities(cloud=identify(cloud, reads=True), edge=identify(edge, reads=False))
    return make(generator.config, generator.params, generator.stats,
                cloud=cloud.config, edge=edge.config, models=models)  # fmt: skip


def changed(model, name):
    layers = {**model.params["layers"], name: model.params["layers"][name] + 0.5}
    return dataclasses.replace(model, params={**model.params, "layers": layers}, name="org/other")


@pytest.mark.parametrize("role", ["cloud", "edge"])
@pytest.mark.parametrize("name", ["down", "mlp_norm"])
def test_another_model_of_the_same_shape_is_refused(
    knowing, tiny_world_system, role, name, tmp_path
):
    save_generator(tmp_path / "made", knowing)
    loaded = load_generator(tmp_path / "made")
    models = {"cloud": tiny_world_system.cloud, "edge": tiny_world_system.edge}
    spec = loaded.spec(**models)
    own = models[role].fingerprint
    models[role] = changed(models[role], name)
    with pytest.raises(
        UserError, match=f"with the {role} model .*{own}.*'org/other'.* allow_other"
    ):
        loaded.spec(**models)
    with pytest.raises(UserError, match="allow_other_models"):
        specialize("a prompt", *models.values(), loaded)
    other = load_generator(tmp_path / "made", allow_other_models=True)
    assert other.spec(**models) == spec and other.fingerprint == loaded.fingerprint


def test_the_command_has_the_same_way_out(knowing, tiny_world_system, tmp_path, capsys):
    write_system(tmp_path, tiny_world_system, knowing)
    save_model(tmp_path / "tuned", changed(tiny_world_system.edge, "down"))
    card = tmp_path / "card"
    words = ["specialize", "a prompt", "--output", str(card), "--edge", str(tmp_path / "tuned")]
    words += [f"--{name}={tmp_path / name}" for name in ("cloud", "generator")]
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert "(--allow-other-models) if it is meant" in capsys.readouterr().err
    assert not card.exists()
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--allow-other-models"])
    assert load_card(card).edge == load_model(tmp_path / "tuned").fingerprint


def test_a_cloud_with_another_tokenizer_or_bos_is_refused(knowing, tiny_world_system):
    cloud, edge = tiny_world_system.cloud, tiny_world_system.edge
    words = [f"word{i}" for i in range(len(cloud.tokenizer) - 4)]
    with pytest.raises(UserError, match="has another tokenizer, but"):
        knowing.spec(dataclasses.replace(cloud, tokenizer=word_level(words)), edge)
    with pytest.raises(UserError, match=f"has bos={not cloud.bos}, but"):
        knowing.spec(dataclasses.replace(cloud, bos=not cloud.bos), edge)
    other_edge = dataclasses.replace(edge, tokenizer=word_level(words))
    assert knowing.spec(cloud, other_edge)  # an edge reads no prompt


def test_a_cloud_in_int8_is_the_cloud_and_another_one_is_not(knowing, tiny_world_system):
    pytest.importorskip("qwix", reason="needs the extra: pip install 'lorax-gen[int8]'")
    cloud, edge = tiny_world_system.cloud, tiny_world_system.edge

    def in_int8(model):
        return dataclasses.replace(model, params=quantize_kernels(model.params))

    knowing.spec(in_int8(cloud), edge)
    with pytest.raises(UserError, match="trained with the cloud model"):
        knowing.spec(in_int8(changed(cloud, "mlp_norm")), edge)
    trained = Identities(
        cloud=identify(in_int8(cloud), reads=True), edge=identify(edge, reads=False)
    )
    assert trained.cloud.fingerprint is None
    metadata = {**knowing.metadata, "models": msgspec.to_builtins(trained)}
    dataclasses.replace(knowing, metadata=metadata).spec(cloud, edge)


def test_the_shipped_generator_knows_its_models():
    generator, cloud, edge = (
        load_generator("world/generator"), load_model("world/cloud"), load_model("world/edge")
    )  # fmt: skip
    assert generator.metadata["models"]["cloud"]["fingerprint"] == "10392ab8853ba3a4"
    assert generator.metadata["models"]["edge"]["fingerprint"] == "e1e8a0348d976b91"
    assert generator.pool_hash == "1d2697e834d087bb"
    assert (generator.name, generator.frame) == ("world/generator", PLAIN)
    generator.spec(cloud, edge)
    with pytest.raises(UserError, match="trained with the edge model 'edge'"):
        generator.spec(cloud, changed(edge, "down"))


def test_the_fingerprint_of_gathered_arrays_is_that_of_the_model(tiny_world_system):
    """As over several processes, where numpy cannot read an array by itself."""
    model = tiny_world_system.edge
    lazy = {name: identity._Gathered(leaf) for name, leaf in named_leaves(model.params)}
    assert tree_hash(lazy, jnp.bfloat16) == model.fingerprint == identity.fingerprint(model)


# --- what is refused -----------------------------------------------------------------------------


def rewritten(directory, change):
    """The directory with its tensors changed in place by `change`."""
    path = directory / "generator.safetensors"
    tensors = read_tensors(path)
    change(tensors)
    path.unlink()
    write_tensors(path, tensors)
    return directory


@pytest.mark.parametrize("part", ["meta_tokens", "cloud_lora", "router", "pool"])
def test_a_missing_part_is_named(directory, part):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith(f"params.{part}")]:
            del tensors[name]

    with pytest.raises(UserError, match=rf"lacks params\.{part}"):
        load_generator(rewritten(directory, drop))


@pytest.mark.parametrize(
    "name, new, message",
    [
        ("params.pool.up.a", lambda x: x[:, :2], r"up\.a is .* but its config\.json makes it"),
        ("params.router.w1", lambda x: x.T, r"router\.w1 is"),
        ("params.meta_tokens", lambda x: x.astype(np.float16), "params.meta_tokens is F16"),
        ("params.meta_tokens", lambda x: x.astype(np.int32), "params.meta_tokens is I32"),
        ("params.meta_tokens", lambda x: x * np.nan, r"params.meta_tokens holds nan at \[0, 0\]"),
        ("params.pool.up.b", lambda x: x * np.inf, "params.pool.up.b holds"),
        ("stats.var", lambda x: -x, "stats.var has a negative variance"),
        ("params.router.b1", lambda x: x + 1, "is damaged: its content has the fingerprint"),
        ("params.extra", lambda _: np.zeros(2, np.float32), "has params.extra, which no generator"),
        ("params.pool", lambda _: np.zeros(2, np.float32), "has params.pool, which no generator"),
    ],
)
def test_a_tensor_that_the_config_does_not_imply_is_named(name, new, message, directory):
    def change(tensors):
        tensors[name] = new(tensors.get(name))

    with pytest.raises(UserError, match=message):
        load_generator(rewritten(directory, change))


def test_nothing_that_cannot_be_read_is_written(generator, tmp_path):
    params = {**generator.params, "meta_tokens": generator.params["meta_tokens"] * np.nan}
    with pytest.raises(UserError, match="meta_tokens holds nan"):
        save_generator(tmp_path / "made", dataclasses.replace(generator, params=params))
    assert not list(tmp_path.iterdir())


def as_first_format(document):
    kept = {name: document[name] for name in ("generator", "shapes")}
    return {"format": "lorax-gen generator 1", **kept}


def test_a_generator_of_the_first_format_is_read(generator, directory):
    path = directory / "config.json"
    path.write_text(json.dumps(as_first_format(json.loads(path.read_text()))))
    assert load_generator(directory).fingerprint == generator.fingerprint


@pytest.mark.parametrize("size", [0, 200, -1])
def test_a_truncated_file_is_refused(directory, size):
    path = directory / "generator.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        load_generator(directory)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "lorax-gen lora 1"}, "is not a generator .*'lorax-gen lora 1'"),
        ({"format": None}, "is not a generator"),
        ({"generator": {"n_expert": 4}}, "unknown key n_expert; did you mean n_experts?"),
        ({"generator": {"n_experts": 1}}, "top_k is 2"),
        ({"generator": None}, "generator: expected object"),
        ({"generator": {"n_experts": 2**31}}, "n_experts is 2147483648; expected int <= 65536"),
        ({"generator": {"n_experts": 2**16, "rank": 2**24}}, r"is .* but its config\.json"),
        ({"generator": {"alpha": 0}}, "alpha is 0"),
        ({"generator": {"edge_targets": ["fc1"]}}, "edge_targets names 'fc1'"),
        ({"shapes": None}, "shapes: expected object"),
        ({"shapes": {}}, "shapes: .*missing required field cloud"),
        ({"shapes": {"cloud": {"layers": 2, "kernels": {}}, "edge": {"layers": 2, "kernels": {}}}},
         "lacks 'q'"),
        ({"shapes": {"cloud": {"layers": "2", "kernels": {}}}}, "layers: expected int"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", [1, 2])
def test_a_foreign_config_is_refused(directory, change, message, form):
    """Also one that says so consistently: with its own digest, or none as in the first format."""
    path = directory / "config.json"
    document = json.loads(path.read_text())
    document = as_first_format(document) | change if form == 1 else document | change
    if form == 2:
        document["digest"] = digest(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        load_generator(directory)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fingerprint": "0" * 16}, "was changed after it was written"),
        ({"digest": "0" * 16}, "was changed after it was written"),
        ({"digest": None}, "lacks the fingerprint or the digest"),
        ({"models": {}}, "models: .*missing required field"),
        ({"models": None}, None),
    ],
)
def test_a_changed_config_is_refused(knowing, change, message, tmp_path):
    save_generator(tmp_path / "made", knowing, {"metrics": {"loss": 1.0}})
    path = tmp_path / "made" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_generator(tmp_path / "made")


@pytest.mark.parametrize("name", ["config.json", "generator.safetensors"])
def test_a_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(UserError, match=f"no such file: .*{name}"):
        load_generator(directory)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no generator directory at .*/nowhere"):
        load_generator(tmp_path / "nowhere")


def test_no_directory_is_replaced(generator, tiny_world_system, directory):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    other = make_generator(tiny_world_system, seed=5)
    with pytest.raises(UserError, match="already exists"):
        write_generator(directory, other, tiny_world_system)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    np.testing.assert_equal([path.name for path in directory.parent.iterdir()], ["generator"])


# --- its frame -----------------------------------------------------------------------------------


def test_a_frame_comes_back_and_is_in_the_digest(generator, knowing, tiny_world_system, tmp_path):
    cloud, edge = tiny_world_system.cloud.config, tiny_world_system.edge.config
    framed = make(generator.config, generator.params, generator.stats,
                  cloud=cloud, edge=edge, frame=IO)  # fmt: skip
    save_generator(tmp_path / "framed", framed)
    loaded = load_generator(tmp_path / "framed")
    assert (loaded.frame, loaded.fingerprint) == (IO, generator.fingerprint)
    assert knowing.frame == PLAIN and "frame" not in knowing.metadata
    path = tmp_path / "framed" / "config.json"
    document = json.loads(path.read_text())
    changes = {
        "was changed": {"template": "Q: {input}"},
        "frame: unknown key x": IO.stored() | {"x": 1},
        "0 times": {"template": "none"},
        "frame: expected": "io",
    }
    for message, frame in changes.items():
        path.write_text(json.dumps(document | {"frame": frame}))
        with pytest.raises(UserError, match=message):
            load_generator(tmp_path / "framed")
