"""The interface between a frozen decoder and its adapters. The decoder depends on no adapter.

An adapter is two trees and the function that applies them:

    shared    [L, ...]       one for the entire batch; sharded like the weights
    rows      [L, B, ...]    one for each row, sharded like the batch; [L, P, ...] with B = P Q is
                             one for each Q consecutive rows
    prefix    [B, S, D]      embeddings before the tokens of each row, a soft prompt; or None
    apply     static and hashable: what is added at a kernel, what the feed-forward network becomes

The decoder scans `shared` and `rows` together with its layers and calls `apply` with the slices of
one layer. The default is the LoRA of eq. 1: `Adapter(shared=tree)` for all rows,
`Adapter(rows=tree)` for one LoRA per row. A subclass of `Apply` implements any other adapter, such
as gates over a pool of experts or a mixture that routes tokens.

Trees of m < L entries are those of the last m layers. The layers before them run without an
adapter, and no gradient is computed in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_gen.errors import UserError
from lorax_gen.method.lora import apply_lora

Array = jax.Array
Tree = Mapping[str, Any]
Delta = Callable[[str, Array], "Array | None"]
"""`(kernel name, its input [B, T, D]) -> what is added to its output [B, T, F]`, or None."""


class Mlp(NamedTuple):
    """The frozen feed-forward network of a layer, as a function and in its two parts.

    Attributes:
      inner: `inner(x, delta)`, `[B, T, D] -> [B, T, F]`: act(gate x) * up x, or act(up x). A delta
        with further leading axes gives them to the result.
      down: `down(h, delta)`, `[B, T, F] -> [B, T, D]`.
    """

    inner: Callable[[Array, Delta], Array]
    down: Callable[[Array, Delta], Array]

    def __call__(self, x: Array, delta: Delta) -> Array:
        return self.down(self.inner(x, delta), delta)


class Apply:
    """What an adapter does in one layer; this one does nothing. Subclasses are frozen dataclasses:
    static arguments of compiled programs."""

    def kernel(
        self, name: str, x: Array, shared: Tree, rows: Tree, key: Array | None
    ) -> Array | None:
        """What is added to the output of kernel `name` for its input `x: [B, T, D]`; None: nothing.

        Args:
          shared, rows: one layer's slices.
          key: of this layer's dropout; None at inference.
        """
        return None

    def feed_forward(
        self,
        x: Array,
        mlp: Mlp,
        shared: Tree,
        rows: Tree,
        key: Array | None,
    ) -> tuple[Array, dict[str, Array]]:
        """The feed-forward network's output `[B, T, D]`, and auxiliary values of the layer by name,
        such as losses.

        Args:
          mlp: `mlp(x, delta)` is the frozen network with `delta` added at its kernels. It may be
            called several times, as in a mixture whose experts are full networks.
        """
        return mlp(x, lambda name, h: self.kernel(name, h, shared, rows, key)), {}


@dataclasses.dataclass(frozen=True)
class LowRank(Apply):
    """LoRA, eq. 1: (x A) B at every kernel that a tree names, `{name: {'a', 'b'}}`."""

    dropout: float = 0.0
    """Rate on the input of the LoRA branch, if a key is given; the frozen branch has none."""

    def kernel(self, name, x, shared, rows, key):
        pairs = [tree[name] for tree in (shared, rows) if name in tree]
        if not pairs:
            return None
        if key is not None:
            key = jax.random.fold_in(key, sorted({*shared, *rows}).index(name))
        x = drop(x, self.dropout, key)
        return sum(apply_lora(x, pair) for pair in pairs)


def drop(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; `x` itself without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """See the module's docstring. A pytree with static `apply`."""

    shared: Tree = dataclasses.field(default_factory=dict)
    rows: Tree = dataclasses.field(default_factory=dict)
    apply: Apply = dataclasses.field(default=LowRank(), metadata={"static": True})
    prefix: Any = None

    def kernel(self, name: str, x: Array, key: Array | None) -> Array | None:
        """See `Apply.kernel`; for an adapter sliced to one layer."""
        return self.apply.kernel(name, x, self.shared, self.rows, key)

    def feed_forward(self, x: Array, mlp: Mlp, key: Array | None) -> tuple[Array, dict[str, Array]]:
        """See `Apply.feed_forward`; for an adapter sliced to one layer."""
        return self.apply.feed_forward(x, mlp, self.shared, self.rows, key)

    def depth(self, layers: int) -> int:
        """How many of a decoder's last layers it adapts.

        Raises UserError where its trees have unequal numbers of layers, or more than the decoder.
        """
        found = {leaf.shape[0] for leaf in jax.tree.leaves((self.shared, self.rows))}
        if len(found) > 1 or max(found, default=0) > layers:
            raise UserError(
                f"the adapter has trees of {sorted(found)} layers, the model has {layers}: all "
                "must be of the same number of its last layers"
            )
        return found.pop() if found else layers

    def take_rows(self, indices: Any) -> Adapter:
        """The adapter of the rows at `indices`, which may repeat."""
        rows = jax.tree.map(lambda x: x[:, indices], self.rows)
        prefix = None if self.prefix is None else self.prefix[indices]
        return dataclasses.replace(self, rows=rows, prefix=prefix)


def prefix_length(adapter: Adapter | None) -> int:
    """Positions S of a row that an adapter's prefix takes."""
    return 0 if adapter is None or adapter.prefix is None else adapter.prefix.shape[1]


def by_layer(adapter: Adapter | None, layers: int) -> list[Adapter | None]:
    """What an adapter is in each layer of a decoder; None below those that it adapts."""
    if adapter is None:
        return [None] * layers
    depth = adapter.depth(layers)
    own = [jax.tree.map(lambda leaf, i=i: leaf[i], adapter) for i in range(depth)]
    return [None] * (layers - depth) + own


def without_prefix(
    adapter: Adapter | None, prefix: Array | None = None
) -> tuple[Adapter | None, Array | None]:
    """What the layers apply, and the embeddings before each row: the adapter's own, or `prefix`.

    Raises ValueError where both are given.
    """
    if adapter is None or adapter.prefix is None:
        return adapter, prefix
    if prefix is not None:
        raise ValueError("the adapter has a prefix of its own; give one of the two")
    return dataclasses.replace(adapter, prefix=None), adapter.prefix
