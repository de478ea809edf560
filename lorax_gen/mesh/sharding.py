"""Shardings of arrays on the mesh.

Axes: `data` replicates weights and shards the batch, `fsdp` shards both, `tensor` shards the
kernels' heads or feed-forward width. A table maps the name of a leaf to the axes of its last
dimensions; a LoRA is sharded like its kernel. A dimension that an axis does not divide is
replicated over it.

Dims beyond the legend (`lorax_gen.method`): S cache slots, K key/value heads, E head size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from msgspec import Meta

from lorax_gen.config import check
from lorax_gen.errors import UserError
from lorax_gen.models.adapter import Adapter

BATCH_AXES = ("data", "fsdp")

# Kernels by name: the axes of (d_in, d_out).
KERNELS = {
    "q": ("fsdp", "tensor"),
    "k": ("fsdp", "tensor"),
    "v": ("fsdp", "tensor"),
    "o": ("tensor", "fsdp"),
    "gate": ("fsdp", "tensor"),
    "up": ("fsdp", "tensor"),
    "down": ("tensor", "fsdp"),
    "embed": ("tensor", "fsdp"),
    "positions": (None, "fsdp"),
    "project_in": ("fsdp", "tensor"),
    "project_out": ("tensor", "fsdp"),
    "lm_head": ("fsdp", "tensor"),
    "w1": ("fsdp", "tensor"),
    "w2": ("tensor", None),
}


Axis = Annotated[int, Meta(ge=-1, le=2**31 - 1)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices of each axis; one may be -1, for all that are left."""

    data: Axis = -1
    fsdp: Axis = 1
    tensor: Axis = 1
    mode: Literal["jit", "pmap"] = "jit"
    """jit: arrays sharded over the mesh. pmap: weights replicated, the batch sharded by device."""

    def __post_init__(self):
        check(self, "mesh.")
        if 0 in (self.data, self.fsdp, self.tensor):
            raise UserError("a mesh axis has size 0; choose 1 or more, or -1 for all that are left")


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh `('data', 'fsdp', 'tensor')` over all devices, or over those given.

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    given = math.prod(size for size in sizes if size != -1)
    free = sizes.count(-1)
    if free > 1 or len(devices) % max(given, 1):
        raise UserError(
            f"a mesh of data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} does not "
            f"fit {len(devices)} devices; sizes must multiply to that, one may be -1"
        )
    sizes = [len(devices) // given if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"a mesh of data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} uses "
            f"{math.prod(sizes)} of {len(devices)} devices; set one of them to -1"
        )
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * 3, devices=devices)


def serving_mesh(fsdp: int = 1, tensor: int = 1) -> Mesh | None:
    """The mesh over all devices, `data` being the remaining axis; None for a single device.

    Raises UserError if there are fewer devices than the two axes need.
    """
    if len(jax.devices()) == fsdp == tensor == 1:
        return None
    return make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor))


def spec_for(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The `PartitionSpec` of one leaf, from the names on its path and its shape."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    if names[-1] in ("qvalue", "scale"):  # an int8 kernel, and its scales of one row
        names.pop()
    leaf, parent = names[-1], names[-2] if len(names) > 1 else ""
    tail: Sequence[str | None]
    if leaf in ("a", "b") and parent in KERNELS:  # a LoRA pair, its parent named like the kernel
        d_in, d_out = KERNELS[parent]
        tail = (d_in, None) if leaf == "a" else (None, d_out)
    elif leaf in KERNELS and len(shape) >= 2:
        tail = KERNELS[leaf]
    else:
        return P()
    tail = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(tail, shape[-2:], strict=True)
    ]
    return P(*[None] * (len(shape) - 2), *tail)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of parameters, pool, router or optimizer state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path, leaf.shape, mesh)), tree
    )


def init_sharded(init: Callable[[], Any], mesh: Mesh) -> Any:
    """Runs `init` under jit, so that its arrays are created sharded."""
    shardings = tree_shardings(jax.eval_shape(init), mesh)
    return jax.jit(init, out_shardings=shardings)()


def row_shards(mesh: Mesh) -> int:
    """Number of shards that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_rows(batch: Any, mesh: Mesh) -> None:
    """Raises UserError if the rows of a batch, arrays or shapes, cannot be split over the mesh."""
    shards = row_shards(mesh)
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[0] % shards:
            raise UserError(
                f"a batch of {leaf.shape[0]} rows cannot be split over {shards} devices; "
                f"make it a multiple of {shards}"
            )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a host batch on the devices, rows sharded over `data` and `fsdp`.

    Every process makes the full batch, a function of (seed, step), and places its own rows.
    """
    check_rows(batch, mesh)
    rows = NamedSharding(mesh, P(BATCH_AXES))
    return place(batch, jax.tree.map(lambda _: rows, batch))


def keep_rows(mesh: Mesh, axis: int = 0) -> Callable[[jax.Array], jax.Array]:
    """A function that constrains activations to be sharded by row, replicated in all other axes.

    Without it XLA shards hidden states like the weights that they meet, and reshards them back and
    forth. Rows that do not divide over the devices are left to XLA.
    """
    shards = row_shards(mesh)
    spec = NamedSharding(mesh, P(*[None] * axis, BATCH_AXES))

    def constrain(x: jax.Array) -> jax.Array:
        divides = x.ndim > axis and x.shape[axis] % shards == 0
        return jax.lax.with_sharding_constraint(x, spec) if divides else x

    return constrain


@lru_cache  # equal meshes give the same object, so that jit finds its compiled programs
def keep_decoding(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """`keep_rows` for decoding, whose caches `[B, S, K, E]` are also sharded by head."""
    rows, heads = keep_rows(mesh), P(BATCH_AXES, None, "tensor")

    def constrain(x: jax.Array) -> jax.Array:
        if x.ndim != 4 or x.shape[2] % mesh.shape["tensor"] or x.shape[0] % row_shards(mesh):
            return rows(x)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, heads))

    return constrain


def place(tree: Any, shardings: Any) -> Any:
    """Places host arrays, or arrays with another sharding, on the devices.

    With several processes, each places the shards of its own devices from its own full copy.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)  # free if it has this sharding already
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def place_adapter(adapter: Adapter | None, mesh: Mesh) -> Adapter | None:
    """Places an adapter on the devices, `shared` sharded like weights, `rows` and `prefix` like the
    batch."""
    if adapter is None:
        return None
    by_row = NamedSharding(mesh, P(None, BATCH_AXES))
    prefix = None if adapter.prefix is None else NamedSharding(mesh, P(BATCH_AXES))
    shared = tree_shardings(adapter.shared, mesh)
    rows = jax.tree.map(lambda _: by_row, adapter.rows)
    return place(adapter, dataclasses.replace(adapter, shared=shared, rows=rows, prefix=prefix))


def jit_step(train_step: Callable, state: Any, mesh: Mesh) -> jax.stages.Wrapped:
    """`train_step` jitted: the state, arrays or shapes, keeps its shardings and is donated."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    replicated = NamedSharding(mesh, P())
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated))


def parallelize(train_step: Callable, state: Any, mesh: Mesh, mode: str) -> Callable:
    """`step(state, frozen, host_batch) -> (state, metrics)` on the mesh, compiled once.

    With `mode="jit"` it is that of `jit_step`. With `mode="pmap"` the state is replicated and the
    batch sharded by device; the results are the same.
    """
    if mode == "jit":
        jitted = jit_step(train_step, state, mesh)
        return lambda state, frozen, batch: jitted(state, frozen, put_batch(batch, mesh))

    devices = mesh.devices.ravel().tolist()
    pmapped = jax.pmap(
        partial(train_step, axis_name="data"),
        axis_name="data",
        in_axes=(None, None, 0),
        out_axes=None,
        devices=devices,
    )

    def split(x: np.ndarray) -> np.ndarray:
        if x.shape[0] % len(devices):
            raise UserError(
                f"a batch of {x.shape[0]} rows cannot be split over {len(devices)} devices; "
                f"make it a multiple of {len(devices)}"
            )
        return x.reshape(len(devices), -1, *x.shape[1:])

    # pmap makes its own mesh and refuses to run inside another one, such as the loop's.
    own = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))

    def step(state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        with jax.set_mesh(own):
            # Free if they have this sharding already; another mesh would compile a second program.
            state, frozen = jax.device_put((state, frozen), NamedSharding(own, P()))
            return pmapped(state, frozen, jax.tree.map(split, batch))

    return step
