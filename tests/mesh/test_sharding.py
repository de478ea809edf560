"""Where leaves of real trees land on a mesh of simulated devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_gen.errors import UserError
from lorax_gen.mesh.sharding import (
    MeshConfig,
    init_sharded,
    make_mesh,
    parallelize,
    put_batch,
    tree_shardings,
)
from lorax_gen.models.decoder import DecoderConfig, abstract_params
from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer
from lorax_gen.training.state import init_state


@pytest.fixture(scope="module")
def devices():
    return jax.devices("cpu")[:8]


@pytest.fixture(scope="module")
def mesh(devices):
    return make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), devices)


def specs(tree, mesh):
    """`{path: spec}`, trailing Nones cut."""
    shardings = jax.tree_util.tree_leaves_with_path(tree_shardings(tree, mesh))
    named = {}
    for path, sharding in shardings:
        spec = tuple(sharding.spec)
        while spec and spec[-1] is None:
            spec = spec[:-1]
        named["/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)] = spec
    return named


# --- the table -----------------------------------------------------------------------------------


def test_a_decoders_kernels_are_split_and_its_norms_are_not(mesh, tiny_world_system):
    found = specs(tiny_world_system.edge.params, mesh)
    by_columns, by_rows = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")
    for name in ("q", "k", "v", "gate", "up"):
        assert found[f"layers/{name}"] == by_columns
    for name in ("o", "down"):
        assert found[f"layers/{name}"] == by_rows
    for name in ("layers/attn_norm", "layers/mlp_norm", "final_norm"):
        assert found[name] == ()


def test_learned_positions_are_split_by_their_width_and_biases_are_not(mesh):
    config = DecoderConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=62, position_offset=2,
        mlp="plain", norm="layer", positions="learned", qk_norm=True,
        biases=("q", "o", "up", "down"), word_embed_proj_dim=16,
    )  # fmt: skip
    found = specs(abstract_params(config), mesh)
    assert found["positions"] == (None, "fsdp")
    assert found["embed"] == ("tensor", "fsdp")  # what they are added to is split alike
    assert found["project_in"] == ("fsdp", "tensor")
    assert found["project_out"] == ("tensor", "fsdp")
    small = [name for name in found if name.endswith(("norm", "bias"))]
    assert {"layers/q_bias", "layers/down_bias", "layers/attn_norm_bias", "final_norm_bias"} <= {
        *small
    }
    assert {found[name] for name in small} == {()}


def test_an_axis_that_does_not_divide_a_dimension_is_left_out(devices):
    leaf = jax.ShapeDtypeStruct((6, 8), jnp.float32)
    for shape, expected in {
        (1, 4, 2): P(None, "tensor"),  # 4 does not divide 6
        (1, 2, 4): P("fsdp", "tensor"),
        (1, 1, 8): P("fsdp", "tensor"),
        (1, 8, 1): P(None, "tensor"),
    }.items():
        mesh = make_mesh(MeshConfig(*shape), devices)
        assert tree_shardings({"up": leaf}, mesh)["up"].spec == expected
    odd = jax.ShapeDtypeStruct((841, 30), jnp.float32)
    mesh = make_mesh(MeshConfig(1, 4, 2), devices)
    assert tree_shardings({"embed": odd}, mesh)["embed"].spec == P(None, None)


def test_a_lora_sits_on_the_kernel_it_adapts(tiny_world_system, mesh):
    """A is split like the kernel's inputs, B like its outputs, the rank never."""
    system, axes = tiny_world_system, {"fsdp", "tensor"}
    kernels = specs(system.cloud.params, mesh) | specs(system.edge.params, mesh)
    found = specs(system.params, mesh)
    pairs = [("cloud_lora", name, 1) for name in ("q", "v")]
    pairs += [("pool", name, 2) for name in ("gate", "up", "down")]
    for tree, name, leading in pairs:
        _, d_in, d_out = kernels[f"layers/{name}"]
        assert {d_in, d_out} == axes
        assert found[f"{tree}/{name}/a"] == (None,) * leading + (d_in,)
        assert found[f"{tree}/{name}/b"] == (None,) * (leading + 1) + (d_out,)


def test_the_router_is_split_by_its_width_and_the_rest_lies_everywhere(tiny_world_system, mesh):
    found = specs(tiny_world_system.params, mesh)
    assert found["router/w1"] == (None, "fsdp", "tensor")
    assert found["router/w2"] == (None, "tensor")
    for name in ("meta_tokens", "router/b1", "router/b2", "router/bn_scale", "router/bn_bias"):
        assert found[name] == (), name  # b1 and b2 are biases, no LoRA factors
    assert set(specs(tiny_world_system.stats, mesh).values()) == {()}


def test_moments_of_the_optimizer_lie_where_their_parameters_do(tiny_world_system, mesh):
    params = tiny_world_system.params
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = jax.eval_shape(lambda: init_state(params, tiny_world_system.stats, optimizer, 0))
    shardings = tree_shardings(state, mesh)
    adam = shardings["opt_state"][1][0]
    assert adam.mu == adam.nu == shardings["params"] == tree_shardings(params, mesh)
    replicated = NamedSharding(mesh, P())
    assert {shardings["step"], shardings["key"], adam.count} == {replicated}


# --- arrays on a mesh ----------------------------------------------------------------------------


def test_arrays_are_born_in_their_shards(tiny_world_system, mesh):
    params = tiny_world_system.params
    born = init_sharded(lambda: jax.tree.map(lambda leaf: leaf + 0, params), mesh)
    chex.assert_trees_all_equal(born, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, born) == tree_shardings(params, mesh)
    up = born["pool"]["up"]["a"]  # [L, N, D, R], D over fsdp
    layers, experts, width, rank = up.shape
    shapes = {shard.data.shape for shard in up.addressable_shards}
    assert shapes == {(layers, experts, width // 4, rank)}


def test_a_batch_is_split_by_rows_over_data_and_fsdp(devices):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    batch = {"tokens": np.arange(24).reshape(8, 3), "answer": np.ones((4, 3), bool)}
    placed = put_batch(batch, mesh)
    chex.assert_trees_all_equal(jax.device_get(placed), batch)
    assert {s.data.shape for s in placed["tokens"].addressable_shards} == {(2, 3)}
    assert {s.data.shape for s in placed["answer"].addressable_shards} == {(1, 3)}


def test_a_mesh_takes_all_devices_and_one_size_may_be_left_open(devices):
    for config, sizes in {
        MeshConfig(): (8, 1, 1),
        MeshConfig(data=2, fsdp=-1, tensor=2): (2, 2, 2),
        MeshConfig(data=1, fsdp=1, tensor=-1): (1, 1, 8),
        MeshConfig(data=8): (8, 1, 1),
    }.items():
        assert tuple(make_mesh(config, devices).shape.values()) == sizes
    assert make_mesh(MeshConfig()).size == len(jax.devices())
    assert make_mesh(MeshConfig(), devices[:1]).axis_names == ("data", "fsdp", "tensor")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, 1, 1), "data=3, fsdp=1, tensor=1 .* 8 devices"),
        ((-1, 3, 1), "data=-1, fsdp=3, tensor=1 does not fit 8 devices"),
        ((-1, -1, 1), "does not fit 8 devices.* one may be -1"),
        ((2, 2, 1), "uses 4 of 8 devices; set one of them to -1"),
        ((4, 4, 1), "8 devices"),
        ((0, 1, 1), "a mesh axis has size 0"),
        ((-2, 1, 1), "mesh.data is -2; expected int >= -1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message, devices):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(*sizes), devices)


def test_a_batch_that_cannot_be_split_is_refused(devices):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    with pytest.raises(UserError, match=r"6 rows cannot be split over 4 devices.* multiple of 4"):
        put_batch({"tokens": np.zeros((8, 3)), "prompt": np.zeros((6, 3))}, mesh)
    step = parallelize(lambda *_, axis_name: None, {}, mesh, "pmap")
    with pytest.raises(UserError, match=r"12 rows cannot be split over 8 devices.* multiple of 8"):
        step({}, {}, {"tokens": np.zeros((12, 3))})
