"""Splash attention is traced wherever a train step may ask for it; running it takes a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.models.attention import attend
from lorax_gen.training.attention import BLOCK, make_attention
from lorax_gen.training.sharding import MeshConfig, make_mesh

TIME, HEADS = 20, 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices("cpu")[:8])


def heads(rows, size=BLOCK):
    return jax.ShapeDtypeStruct((*rows, TIME, HEADS, size), jnp.float32)


def program(attention, q):
    return str(jax.make_jaxpr(lambda q: attention(q, q, q, scale=0.1))(q))


def test_rows_and_heads_are_split_over_the_mesh(mesh):
    found = program(make_attention("splash", mesh), heads((8,)))
    assert "shard_map" in found and "pallas_call" in found


def test_under_pmap_each_device_has_its_own(mesh):
    attention = make_attention("splash", mesh, "pmap")
    step = jax.pmap(lambda q: attention(q, q, q, scale=0.1), devices=mesh.devices.ravel().tolist())
    found = str(jax.make_jaxpr(step)(heads((8, 2))))
    assert "pallas_call" in found and "fsdp" not in found


@pytest.mark.parametrize("rows, size", [(6, BLOCK), (8, 64)])
def test_what_does_not_fit_is_left_to_xla(mesh, rows, size):
    """Six rows, such as those of a microbatch, are not to be split over four devices."""
    q = jax.random.normal(jax.random.key(0), (rows, TIME, HEADS, size))
    found = make_attention("splash", mesh)(q, q, q, scale=0.1)
    np.testing.assert_array_equal(found, attend(q, q, q, scale=0.1))
