"""Any change of a value changes its checksum, and no sharding does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.training.checksums import checksums

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "float8_e4m3fn")


def expected(value):
    """The module's equation in numpy, with Python's integers."""
    words = np.ascontiguousarray(value).reshape(-1)
    words = words.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[value.dtype.itemsize])
    total = 0
    for i, word in enumerate(words.tolist()):
        x = (word + 0x9E3779B9 * i) % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        total += x ^ x >> 16
    return total % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_sum_of_mixed_words(dtype):
    value = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(jnp.dtype(dtype))
    assert checksums({"a": {"b": jnp.asarray(value)}}) == {"a.b": expected(value)}


def test_scalars_keys_booleans_and_complex_numbers_have_one():
    key = jax.random.key(3)
    tree = {
        "step": jnp.int32(7),
        "key": key,
        "yes": jnp.array([True, False]),
        "z": jnp.array([1 + 2j], jnp.complex64),
        "nothing": jnp.zeros((0, 4)),
    }
    found = checksums(tree)
    assert found["step"] == expected(np.array([7], np.int32))
    assert found["key"] == expected(np.asarray(jax.random.key_data(key)))
    assert found["yes"] == expected(np.array([1, 0], np.uint32))
    assert found["z"] == expected(np.array([1, 2], np.float32)) and found["nothing"] == 0


@pytest.mark.parametrize("spec", [P(), P("data"), P(None, "fsdp"), P("tensor", ("data", "fsdp"))])
def test_it_is_the_same_on_every_mesh(spec):
    value = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(value, NamedSharding(mesh, spec))
    assert checksums([placed]) == {"0": expected(value)}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sampled_from(DTYPES), st.integers(0, 59), st.integers(0, 31), st.integers(0, 2**32 - 1))
def test_a_flipped_bit_changes_it(dtype, at, bit, seed):
    data = np.random.default_rng(seed).bytes(60 * jnp.dtype(dtype).itemsize)
    value = np.frombuffer(data, jnp.dtype(dtype)).copy()
    before = checksums([jnp.asarray(value)])
    size = value.dtype.itemsize
    value.view(np.uint8)[at * size + bit // 8 % size] ^= 1 << bit % 8
    assert checksums([jnp.asarray(value)]) != before


def test_exchanged_moved_and_zeroed_values_change_it():
    value = np.arange(1024, dtype=np.float32)
    changed = [value[::-1], np.roll(value, 1), np.roll(value, 256), value * (value != 5)]
    changed += [np.concatenate([value[512:], value[:512]])]
    found = {checksums([jnp.asarray(each)])["0"] for each in [value, *changed]}
    assert len(found) == 1 + len(changed)
