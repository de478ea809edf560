"""Explicit meshes: arrays whose types carry their sharding, the default of `jax.make_mesh`.

There JAX refuses an operation whose result it could shard in several ways: to index or sort along a
split axis, or to multiply matrices both split along it. The functions of the method say how their
results are sharded, and leave the communication inside to XLA, as it is under an Auto mesh.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def shards(
    rule: Callable[..., Any],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """A decorator for functions of arrays, and of values that are none.

    Args:
      rule: takes the function's arguments, with the `PartitionSpec` of each array instead, as long
        as its shape; returns those of the results. A mesh axis that it names twice is kept where it
        is first. Called only where an argument has an explicit sharding; else the function is
        called as it is.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            leaves, tree = jax.tree.flatten((args, kwargs))
            mesh = next(filter(None, map(_explicit_mesh, leaves)), None)
            if mesh is None:
                return function(*args, **kwargs)
            specs, named = jax.tree.unflatten(tree, map(_spec, leaves))
            results = jax.tree.map(
                lambda spec: NamedSharding(mesh, _each_axis_once(spec)), rule(*specs, **named)
            )
            where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

            def of_arrays(*arrays: jax.Array) -> Any:
                every = leaves.copy()
                for i, array in zip(where, arrays, strict=True):
                    every[i] = array
                args, kwargs = jax.tree.unflatten(tree, every)
                return function(*args, **kwargs)

            automatic = jax.sharding.auto_axes(of_arrays, out_sharding=results)
            return automatic(*(leaves[i] for i in where))

        return call

    return decorate


def _explicit_mesh(leaf: Any) -> jax.sharding.AbstractMesh | None:
    mesh = jax.typeof(leaf).sharding.mesh if isinstance(leaf, jax.Array) else None
    return mesh if mesh is not None and mesh.explicit_axes else None


def _spec(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    spec = jax.typeof(leaf).sharding.spec if _explicit_mesh(leaf) else ()
    return P(*spec, *[None] * (leaf.ndim - len(spec)))


def _each_axis_once(spec: P) -> P:
    used: set[str] = set()
    kept = []
    for axes in spec:
        axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
        kept.append(tuple(axis for axis in axes if axis not in used))
        used.update(axes)
    return P(*(axes or None for axes in kept))
