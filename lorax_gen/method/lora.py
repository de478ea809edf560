"""LoRA trees: the low-rank update of the cloud's adapter, the generated LoRA and the baselines
(eq. 1 of the paper).

A tree is `{name: {'a': [..., D, R], 'b': [..., R, F]}}`, one pair per adapted kernel `[D, F]` of a
decoder layer. The layer axis is first: `[L, D, R]` when the entire batch shares the tree,
`[L, B, D, R]` when every example has its own. With fewer layers than the model has, m < L, it is
one of the last m. The scale s of eq. 1 is folded into `b` (`scaled`)
before a tree is used, so that applying or merging it needs no other number.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lorax_gen.errors import UserError
from lorax_gen.method.explicit import shards

Array = jax.Array
Tree = dict[str, dict[str, Array]]


def init_factors(
    key: Array, shapes: Mapping[str, tuple[int, int]], rank: int, leading: tuple[int, ...]
) -> Tree:
    """Pairs of fp32 factors with any leading axes: A ~ U(+-1/sqrt(D)), B = 0, so that AB = 0.

    Args:
      shapes: kernel name -> (D, F).
    """
    names = sorted(shapes)  # the draw must not depend on the order of the mapping
    tree = {}
    for name, name_key in zip(names, jax.random.split(key, len(names)), strict=True):
        d_in, d_out = shapes[name]
        bound = d_in**-0.5
        a = jax.random.uniform(name_key, (*leading, d_in, rank), jnp.float32, -bound, bound)
        tree[name] = {"a": a, "b": jnp.zeros((*leading, rank, d_out), jnp.float32)}
    return tree


def init_lora(key: Array, shapes: Mapping[str, tuple[int, int]], rank: int, layers: int) -> Tree:
    """A shared tree `{name: {'a': [L, D, R], 'b': [L, R, F]}}` in fp32 whose product is zero."""
    return init_factors(key, shapes, rank, (layers,))


def scaled(tree: Tree, s: float) -> Tree:
    """The tree with the scale s = alpha / r of eq. 1 folded into every `b`."""
    return {name: {"a": pair["a"], "b": pair["b"] * s} for name, pair in tree.items()}


def deepened(tree: Tree, layers: int) -> Tree:
    """A shared tree of the last m layers as one of `layers`, zero in those before."""
    return jax.tree.map(lambda x: jnp.pad(x, ((layers - len(x), 0), (0, 0), (0, 0))), tree)


@shards(lambda x, pair: P(*x[:-1], pair["b"][-1]))
def apply_lora(x: Array, pair: Mapping[str, Array]) -> Array:
    """The low-rank term of eq. 1, (x A) B, for one layer's pair, in the dtype of `x`.

    Args:
      x: `[B, T, D]`.
      pair: `a` `[D, R]` and `b` `[R, F]` for the entire batch, or `[P, D, R]` and `[P, R, F]` with
        B = P Q: one for Q consecutive rows each, so one per row where P = B.

    Returns:
      `[B, T, F]`.
    """
    a, b = pair["a"].astype(x.dtype), pair["b"].astype(x.dtype)
    if a.ndim == 2:
        return (x @ a) @ b
    grouped = x.reshape(a.shape[0], -1, x.shape[-1])  # rows of a group share one A, no copies
    return ((grouped @ a) @ b).reshape(*x.shape[:-1], b.shape[-1])


def check_fits(tree: Tree, shapes: Mapping[str, tuple[int, int]], layers: int) -> int:
    """The number of layers of a shared LoRA, the last ones of the model.

    Raises UserError if a tree is not one of kernels name -> (D, F) in the last of `layers`, the
    same of each.
    """
    if not tree:
        raise UserError("the LoRA is empty; it must adapt at least one kernel")
    own = max((leaf.shape[0] for leaf in jax.tree.leaves(tree) if leaf.shape), default=0)
    for name, pair in tree.items():
        if name not in shapes:
            raise UserError(
                f"LoRA for {name!r} has no kernel in the model; the kernels are {sorted(shapes)}: "
                "use a LoRA made for this model"
            )
        (d_in, d_out), a, b = shapes[name], pair["a"].shape, pair["b"].shape
        if len(a) == 4:
            raise UserError(
                f"LoRA for {name!r} is per example, a {a}, but a kernel takes one LoRA: "
                "pick an example with take_example(tree, index)"
            )
        rank = a[-1] if a else 0
        fits = rank and a == (own, d_in, rank) and b == (own, rank, d_out)
        if not fits or not 0 < own <= layers:
            raise UserError(
                f"LoRA for {name!r} has factors {a} and {b}, which do not fit the kernels "
                f"{(layers, d_in, d_out)}: use a LoRA made for this model"
            )
    return own


@shards(lambda kernels, tree: kernels)
def merge(kernels: Mapping[str, Array], tree: Tree) -> dict[str, Array]:
    """Eq. 1: kernels with W~ = W + A B, added in fp32 and rounded once to the kernel's dtype.

    Args:
      kernels: name -> `[L, D, F]`; kernels that are not in the tree are returned unchanged.
      tree: a shared tree with its scale folded in; one of m < L layers changes the last m.

    Raises:
      UserError: a name or a shape of the tree does not fit, or the tree is per example.
    """
    stacked = {name: kernel.shape for name, kernel in kernels.items() if kernel.ndim == 3}
    layers = max((shape[0] for shape in stacked.values()), default=0)
    shapes = {name: (d_in, d_out) for name, (_, d_in, d_out) in stacked.items()}
    first = layers - check_fits(tree, shapes, layers)
    # The default precision of an accelerator rounds the factors to fewer bits than fp32.
    exact, fp32 = jax.lax.Precision.HIGHEST, jnp.float32
    merged = dict(kernels)
    for name, pair in tree.items():
        delta = jnp.matmul(pair["a"].astype(fp32), pair["b"].astype(fp32), precision=exact)
        last = kernels[name][first:]
        last = (last.astype(fp32) + delta).astype(last.dtype)
        merged[name] = jnp.concatenate([kernels[name][:first], last]) if first else last
    return merged


@shards(lambda tree, index: jax.tree.map(lambda leaf: P(leaf[0], *leaf[2:]), tree))
def take_example(tree: Tree, index: int) -> Tree:
    """One example's shared tree from a per-example one: `[L, B, ...] -> [L, ...]`."""
    return jax.tree.map(lambda leaf: leaf[:, index], tree)


def count_params(tree: Any) -> int:
    """The number of scalars in a tree of arrays (or `ShapeDtypeStruct`s)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
