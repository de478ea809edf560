"""A checksum of each leaf of a state, the same on every mesh.

A leaf is read as 32-bit words w_i (narrower elements one by one, wider ones in parts):

    checksum = sum_i mix(w_i + 0x9E3779B9 i)  mod 2^32

Integer sums do not depend on the order, so not on the sharding. `mix` is a bijection of 32-bit
words (MurmurHash3's finaliser): a change of one word always changes the sum, and other changes go
unnoticed once in 2^32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(leaf) for leaf in leaves]


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each leaf, by its path such as `params.up`; waits for the device."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named]
    found = jax.device_get(_checksums([leaf for _, leaf in named]))
    return {name: int(value) for name, value in zip(names, found, strict=True)}


def _checksum(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = _mix(words + index * np.uint32(0x9E3779B9))
    return jnp.sum(mixed, dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of a leaf as uint32."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], -1)
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint32)
    size = leaf.dtype.itemsize
    words = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32))
    return words.astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))
