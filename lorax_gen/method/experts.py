"""The pool of LoRA experts, and the gated sum that composes a task's LoRA from them (eq. 8).

A pool is a LoRA tree with an expert axis: `{name: {'a': [L, N, D, R], 'b': [L, N, R, F]}}` when
every edge layer has its own experts, `[N, D, R]` and `[N, R, F]` when the layers share them.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lorax_gen.errors import UserError
from lorax_gen.method.explicit import shards
from lorax_gen.method.lora import Tree, init_factors

Array = jax.Array

FIT = "use gates made for this pool"


def init_pool(
    key: Array,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    n_experts: int,
    layers: int | None,
) -> Tree:
    """A fp32 pool of experts with A B = 0, since B = 0; `layers=None`: one pool for all layers."""
    return init_factors(key, shapes, rank, (n_experts,) if layers is None else (layers, n_experts))


def _composed(pool: dict, gates: P, *_: object, **__: object) -> dict:
    """How a composed tree is sharded: its batch like the gates', its kernels like the pool's."""
    return {
        name: {k: P(gates[-2], *gates[:-2], *spec[-2:]) for k, spec in pair.items()}
        for name, pair in pool.items()
    }


@shards(_composed)
def compose(
    pool: Tree,
    gates: Array,
    composition: Literal["factors", "products"] = "factors",
    top_k: int | None = None,
) -> Tree:
    """Eq. 8: theta^i = sum_j G^i_j E^i_j, in one of its two readings.

    `factors` sums A and B separately, (sum_j G_j A_j)(sum_j G_j B_j): rank R. `products` sums the
    products, sum_j G_j A_j B_j: rank K R, the factors of the K experts concatenated and the gates
    folded into B. The two are different functions of the gates.

    Args:
      gates: `[L, N]`, or `[B, L, N]` for one LoRA per example.
      top_k: used by `products`, the number K of gates that it takes per row, the largest; None
        takes all N. Every row must have at most K non-zero gates, as `keep_top_k(logits, K)` has:
        others would be dropped. This is checked where the gates are known; under a transformation
        such as `jax.jit` they are not, and the caller must see to it.

    Returns:
      A fp32 tree with the layer axis first, since the decoder scans over it: `[L, D, R]` or
      `[L, B, D, R]`.

    Raises:
      UserError: an unknown composition, gates that do not fit the pool, K not between 1 and N, or
        more than K non-zero gates.
    """
    if composition not in ("factors", "products"):
        raise UserError(f"composition is {composition!r}: choose one of factors, products")
    for name, pair in pool.items():
        _check_fits(name, pair["a"].shape, gates.shape)
    if composition == "products" and top_k is not None:
        _check_top_k(gates, top_k)
    gates = jnp.moveaxis(gates, -2, 0).astype(jnp.float32)  # [L, ..., N]
    if composition == "factors":
        return {name: _sum_factors(pair, gates) for name, pair in pool.items()}
    kept, indices = jax.lax.top_k(gates, top_k or gates.shape[-1])  # [L, ..., K]
    return {name: _concat_products(pair, kept, indices) for name, pair in pool.items()}


def _check_fits(name: str, pool: tuple[int, ...], gates: tuple[int, ...]) -> None:
    """Raises UserError where gates `[..., L, N]` have other experts or layers than a pool."""
    wanted = pool[:-2]  # (N,) or (L, N)
    if gates[-len(wanted) :] != wanted:
        layers = f" in each of {wanted[0]} layers" if len(wanted) == 2 else ""
        raise UserError(
            f"the pool of {name!r} has {wanted[-1]} experts{layers}, but the gates are {gates}: "
            + FIT
        )


def _check_top_k(gates: Array, top_k: int) -> None:
    """Raises UserError where K gates per row cannot be taken or, of known gates, are too few."""
    n_experts = gates.shape[-1]
    if not 1 <= top_k <= n_experts:
        raise UserError(f"top_k is {top_k} for {n_experts} experts: choose 1 up to all of them")
    if isinstance(gates, jax.core.Tracer) or not getattr(gates, "is_fully_addressable", True):
        return
    found = np.count_nonzero(np.asarray(gates), axis=-1).max(initial=0)
    if found > top_k:
        raise UserError(
            f"top_k is {top_k}, but {found} gates of a row are not zero, and the others would be "
            f"dropped: choose {found}, or None for all experts"
        )


@shards(lambda x, pair, *_, **__: P(*x[:-1], pair["b"][-1]))
def apply_experts(
    x: Array,
    pair: Mapping[str, Array],
    gates: Array,
    composition: Literal["factors", "products"] = "factors",
) -> Array:
    """Applies to `x` the LoRA that `compose` returns for one kernel, without materialising it.

    All experts are multiplied, so each is read once, however many rows have their own gates: for
    few tokens of many tasks. Computed in the dtype of `x`.

    Args:
      x: `[B, T, D]`.
      pair: one layer's experts, `a` `[N, D, R]` and `b` `[N, R, F]`.
      gates: `[B, N]`.

    Returns:
      `[B, T, F]`.

    Raises:
      UserError: gates of another number of experts.
    """
    if gates.shape[-1] != (n_experts := pair["a"].shape[0]):
        raise UserError(f"the pool has {n_experts} experts, but the gates are {gates.shape}: {FIT}")
    a, b, gates = (value.astype(x.dtype) for value in (pair["a"], pair["b"], gates))
    inner = jnp.einsum("btd,ndr->btnr", x, a)
    if composition == "factors":
        inner = jnp.einsum("btnr,bn->btr", inner, gates)[:, :, None]
    return jnp.einsum("btnr,nrf->btf", inner * gates[:, None, :, None], b)


def _sum_factors(pair: dict[str, Array], gates: Array) -> dict[str, Array]:
    equation = "l...n,lnxy->l...xy" if pair["a"].ndim == 4 else "...n,nxy->...xy"
    exact = jax.lax.Precision.HIGHEST  # the LoRA must not depend on the accelerator
    return {
        k: jnp.einsum(equation, gates, jnp.asarray(factor, jnp.float32), precision=exact)
        for k, factor in pair.items()
    }


def _concat_products(pair: dict[str, Array], kept: Array, indices: Array) -> dict[str, Array]:
    a = _pick(pair["a"], indices)  # [L, ..., K, D, R]
    b = _pick(pair["b"], indices) * kept[..., None, None]  # [L, ..., K, R, F]
    *lead, k, d_in, rank = a.shape
    return {
        "a": jnp.moveaxis(a, -3, -2).reshape(*lead, d_in, k * rank),
        "b": b.reshape(*lead, k * rank, b.shape[-1]),
    }


def _pick(experts: Array, indices: Array) -> Array:
    """The chosen experts of each layer; with a shared pool, every layer indexes the same ones."""
    experts = jnp.asarray(experts, jnp.float32)
    if experts.ndim == 3:
        return experts[indices]
    return jax.vmap(lambda own, chosen: own[chosen])(experts, indices)
