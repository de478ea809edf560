"""Which attention a mesh has; splash is traced as a train step may ask for it, not run."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.mesh.kernels import BLOCK, cudnn, make_attention, splash
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.models.attention import attend
from lorax_gen.planning.topology import Absent

TIME, HEADS = 20, 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices("cpu")[:8])


def of(platform):
    """As much of a mesh as `make_attention` asks for."""
    return SimpleNamespace(devices=np.array([Absent(0, platform, platform)]))


def program(function, *rows):
    q = jax.ShapeDtypeStruct((*rows, TIME, HEADS, BLOCK), jnp.float32)
    return str(jax.make_jaxpr(function)(q))


def test_auto_is_what_the_platform_has():
    found = {name: make_attention("auto", of(name)) for name in ("cpu", "gpu", "tpu")}
    assert found["cpu"] is attend and found["gpu"] is cudnn and found["tpu"].func is splash


@pytest.mark.parametrize(
    "name, platform", [("cudnn", "cpu"), ("cudnn", "tpu"), ("splash", "cpu"), ("splash", "gpu")]
)
def test_a_kernel_of_other_devices_is_refused(name, platform):
    with pytest.raises(UserError, match=f"attention={name} does not run on a {platform}; auto"):
        make_attention(name, of(platform))


def test_rows_and_heads_are_split_over_the_mesh(mesh):
    found = program(lambda q: splash(q, q, q, mesh=mesh, scale=0.1), 8)
    assert "pallas_call" in found and "fsdp" in found


def test_under_pmap_each_device_has_its_own(mesh):
    attention = make_attention("splash", of("tpu"), "pmap")
    devices = mesh.devices.ravel().tolist()
    step = jax.pmap(lambda q: attention(q, q, q, scale=0.1), devices=devices)
    assert "pallas_call" in program(step, 8, 2)


@pytest.mark.parametrize("rows, size", [(6, BLOCK), (8, 64)])
def test_what_does_not_fit_is_left_to_xla(mesh, rows, size):
    """Six rows, such as those of a microbatch, are not to be split over four devices."""
    q = jax.random.normal(jax.random.key(0), (rows, TIME, HEADS, size))
    found = splash(q, q, q, mesh=mesh, scale=0.1)
    np.testing.assert_array_equal(found, attend(q, q, q, scale=0.1))
