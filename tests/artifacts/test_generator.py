"""A released generator comes back bit by bit, and only where it is whole and fits its models."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from lorax_gen import load_generator
from lorax_gen.artifacts.generator import save_generator
from lorax_gen.errors import UserError
from lorax_gen.tensors import flatten, write_tensors
from tests.tiny import make_generator, write_generator


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
    models = {"cloud": tiny_world_system.cloud.config, "edge": tiny_world_system.edge.config}
    assert generator.spec(**models).generator == generator.config
    models[role] = dataclasses.replace(models[role], **change)
    with pytest.raises(UserError, match=f"trained with the {role} model of .* pass the {role}"):
        generator.spec(**models)


@pytest.mark.parametrize("part", ["meta_tokens", "cloud_lora", "router", "pool"])
def test_a_missing_part_is_named(generator, directory, part):
    params = {name: tree for name, tree in generator.params.items() if name != part}
    (directory / "generator.safetensors").unlink()
    tensors = flatten({"params": params, "stats": generator.stats})
    write_tensors(directory / "generator.safetensors", tensors)
    with pytest.raises(UserError, match=f"lacks {part}"):
        load_generator(directory)


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
    ],
)
def test_a_foreign_config_is_refused(directory, change, message):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_generator(directory)


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
