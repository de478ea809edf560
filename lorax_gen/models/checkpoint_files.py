"""The tensors of a model directory, from its safetensors files to parameters and back.

    model.safetensors               one tensor per layer and kernel, or
    model.safetensors.index.json    `weight_map`, from tensors to several files

As in transformers, a single file has precedence over an index beside it, and `total_size` in the
index is for its readers: each file of tensors says itself how long it is. All that the files hold
is used, is in `HARMLESS`, or is refused by name. Layers are stacked when read and unstacked when
written, one leaf at a time: the host holds at most one leaf besides the arrays on the devices.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import NamedSharding, PartitionSpec

from lorax_gen import files
from lorax_gen.documents import read_json
from lorax_gen.errors import UserError
from lorax_gen.models import int8
from lorax_gen.models.config import DecoderConfig
from lorax_gen.models.decoder import Params, abstract_params
from lorax_gen.models.families import (
    family_of,
    is_transposed,
    leaf_at,
    tensor_names,
    tensor_shapes,
)
from lorax_gen.models.gguf_files import GGUFCheckpoint
from lorax_gen.tensors import open_safetensors, write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_NAME = re.compile(r"[^/\\\0]{1,200}\.safetensors")  # in the directory itself
# The frequencies of rotary embeddings, which old versions of transformers saved. They follow from
# config.json, and newer versions pass them over too.
HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# In the names that safetensors gives dtypes.
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# What quantized checkpoints call the parts of a kernel.
QUANTIZED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "scales": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_scale": "FP8 or compressed-tensors",
    "weight_scale_inv": "FP8",
}
BLOCK = 4096  # rows of a table that are compared at once

# --- in ------------------------------------------------------------------------------------------


class Checkpoint:
    """The tensors of a directory by name, from one or more files; read on demand.

    Raises UserError where a file is missing or damaged, a tensor is in two files, or an index and
    its files disagree.
    """

    described_by = "its config.json"

    def __init__(self, directory: Path):
        single, index = directory / SINGLE, directory / INDEX
        weight_map = None
        if index.is_file() and not single.is_file():
            weight_map = read_weight_map(index)
        self.source = str(single if weight_map is None else index)
        names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        self.file_of: dict[str, Any] = {}
        found: dict[str, str] = {}
        for name in names:
            file = open_safetensors(directory / name)
            for key in file.keys():  # noqa: SIM118
                if key in found:
                    raise UserError(f"{self.source}: {key} is in both {found[key]} and {name}")
                self.file_of[key], found[key] = file, name
        if weight_map is not None:
            self._compare(weight_map, found)

    def _compare(self, weight_map: dict[str, str], found: dict[str, str]) -> None:
        for key in sorted(weight_map.keys() | found.keys()):
            said, actual = weight_map.get(key), found.get(key)
            if said == actual or HARMLESS.fullmatch(key):
                continue
            if said is None:
                raise UserError(f"{self.source} does not name {key}, which {actual} holds")
            raise UserError(
                f"{self.source} says that {key} is in {said}, but "
                f"{'no file holds it' if actual is None else f'it is in {actual}'}; get them again"
            )

    def names(self, config: DecoderConfig) -> dict[str, list[str]]:
        """Our path of each leaf -> the names of its tensors: one, or one for each layer."""
        return tensor_names(config)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.file_of[key].get_slice(key).get_shape())

    def dtype(self, key: str) -> np.dtype:
        """Raises UserError where it is none of floating-point numbers."""
        name = self.file_of[key].get_slice(key).get_dtype()
        if name not in DTYPES:
            raise UserError(
                f"{self.source}: {key} is stored as {name}; expected one of {', '.join(DTYPES)}: "
                "quantized weights are not supported"
            )
        return np.dtype(DTYPES[name])

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.file_of[key].get_slice(key)[index]


def read_weight_map(index: Path) -> dict[str, str]:
    """Which file each tensor is in. Raises UserError for anything but names of files beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map of tensors to files; get it again")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise UserError(
                f"{index} says that {key} is in {name!r}; expected a .safetensors file beside it"
            )
    return weight_map


def read_params(
    source: Path | GGUFCheckpoint,
    config: DecoderConfig,
    dtype: Any = jnp.float32,
    *,
    in_int8: bool = False,
    shardings: Callable[[Params], Any] | None = None,
) -> Params:
    """Parameters from a directory's safetensors or a GGUF file; see `huggingface.load_model`.

    Names, shapes and dtypes of all tensors are checked before the first is read, and their numbers
    when all are on the devices.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"parameters cannot be {jnp.dtype(dtype).name}; choose such as bfloat16")
    checkpoint = source if isinstance(source, GGUFCheckpoint) else Checkpoint(Path(source))
    check_tensors(checkpoint, config)
    shapes = abstract_params(config)
    kept = jax.eval_shape(int8.quantize_kernels, shapes) if in_int8 else shapes
    wanted = shardings(kept) if shardings else None
    params: Params = {"layers": {}}
    names = checkpoint.names(config)
    for ours, keys in names.items():
        sharding = leaf_at(wanted, ours) if wanted else None
        pair = int8.is_quantized(leaf_at(kept, ours))
        read_to = sharding["qvalue"] if pair and sharding else sharding
        leaf = read_leaf(checkpoint, ours, keys, leaf_at(shapes, ours).shape, dtype, read_to)
        if pair:
            leaf = jax.jit(int8.quantize, out_shardings=sharding)(leaf)
        (params["layers"] if ours.startswith("layers/") else params)[ours.split("/")[-1]] = leaf
    check_finite(params, names, checkpoint.source)
    return params


def check_tensors(checkpoint: Checkpoint | GGUFCheckpoint, config: DecoderConfig) -> None:
    """Raises UserError that names the first tensor that is missing, not used, or of a wrong shape
    or dtype."""
    names, source = checkpoint.names(config), checkpoint.source
    described_by, expected = checkpoint.described_by, tensor_shapes(config, names)
    for key in checkpoint.file_of:
        kind = QUANTIZED.get(key.rpartition(".")[2])
        if kind:
            raise UserError(
                f"{source} is quantized: it holds {key} of {kind}; get the original model"
            )
    for key, shape in expected.items():
        if key not in checkpoint.file_of:
            raise UserError(f"{source} lacks the tensor {key}, which {described_by} asks for")
        if checkpoint.shape(key) != shape:
            raise UserError(
                f"{source}: {key} has shape {checkpoint.shape(key)}, but {described_by} asks for "
                f"{shape}"
            )
        checkpoint.dtype(key)
    others = sorted(checkpoint.file_of.keys() - expected.keys())
    others = [key for key in others if not HARMLESS.fullmatch(key)]
    head = family_of(config).names["lm_head"]
    if isinstance(checkpoint, Checkpoint) and config.tie_word_embeddings and head in others:
        check_tied_head(checkpoint, head, names["embed"][0])
        others.remove(head)
    if others:
        raise UserError(
            f"{source} holds the tensor {others[0]}, which {described_by} does not ask for; is it "
            "of another family, or of more layers or biases?"
        )


def check_tied_head(checkpoint: Checkpoint, head: str, table: str) -> None:
    """Raises UserError where a head is stored although it is tied, and is not the embeddings.

    transformers 5 would use such a head, earlier versions the embeddings.
    """
    checkpoint.dtype(head)
    shape = checkpoint.shape(table)
    starts = range(0, shape[0], BLOCK)
    parts = ((slice(start, min(start + BLOCK, shape[0])),) for start in starts)
    if checkpoint.shape(head) != shape or not all(
        np.array_equal(checkpoint.read(head, part), checkpoint.read(table, part)) for part in parts
    ):
        raise UserError(
            f"{checkpoint.source}: {head} differs from {table}, but config.json says "
            "tie_word_embeddings=true; make it false to use the head, or remove the tensor"
        )


def check_finite(params: Params, names: dict[str, list[str]], source: str) -> None:
    """Raises UserError that names a tensor with NaN or an infinity, if any.

    Each leaf is looked at where it is and sharded as it is, and the results are read together.
    """
    leaves = {ours: leaf_at(params, ours) for ours in names}
    # A kernel in int8 has the NaN or infinity in its scales.
    leaves = {
        ours: leaf["scale"] if int8.is_quantized(leaf) else leaf for ours, leaf in leaves.items()
    }
    found = {ours: _finite(leaf, ours.startswith("layers/")) for ours, leaf in leaves.items()}
    for ours, finite in jax.device_get(found).items():
        if not finite.all():
            key = names[ours][int(finite.argmin())]
            raise UserError(
                f"{source}: {key} holds NaN or an infinity, or a number that "
                f"{leaves[ours].dtype.name} cannot hold"
            )


def _finite(leaf: jax.Array, stacked: bool) -> jax.Array:
    """Whether all numbers of a leaf are finite, or `[L]` for each layer of one; on all devices."""
    everywhere = None  # of several hosts each reads the result
    if isinstance(leaf.sharding, NamedSharding):
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    axes = tuple(range(1, leaf.ndim)) if stacked else None
    return jax.jit(_no_nan, static_argnums=1, out_shardings=everywhere)(leaf, axes)


def _no_nan(leaf: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    """0 x is NaN where x is NaN or an infinity, and so is a sum with it, over shards as well, where
    max may lose a NaN. XLA fuses this on CPU too; `isfinite(leaf).all()` is a temporary there."""
    return jnp.sum(0 * leaf, axes) == 0


def read_leaf(
    checkpoint: Checkpoint | GGUFCheckpoint,
    ours: str,
    keys: list[str],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """One leaf, its layers stacked; each device's shard is read separately.

    Without a sharding it is on the default device and uncommitted.
    """
    stacked, transposed = ours.startswith("layers/"), is_transposed(ours)
    if dtype is None:  # layers of several dtypes: promote to a common one
        dtype = functools.reduce(jnp.promote_types, {checkpoint.dtype(key) for key in keys})
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # float64 only where JAX has it
    parts: dict[str, np.ndarray] = {}  # devices with equal shards share it

    def part(index: Any) -> np.ndarray:  # a slice for each axis
        if str(index) not in parts:
            chosen, own = (keys[index[0]], index[1:]) if stacked else (keys, index)
            size = [len(range(n)[i]) for n, i in zip(shape, index, strict=True)]
            out = np.empty(size, dtype)
            for i, key in enumerate(chosen):
                value = checkpoint.read(key, own[::-1] if transposed else own)
                with np.errstate(over="ignore", invalid="ignore"):  # see `check_finite`
                    out[i if stacked else ...] = value.T if transposed else value
            parts[str(index)] = out
        return parts[str(index)]

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, part)


# --- out -----------------------------------------------------------------------------------------


def write_params(
    directory: Path, params: Params, config: DecoderConfig, dtype: Any, max_shard_size: str
) -> None:
    """Writes the files of tensors, one in memory at a time, and an index if there are several."""
    leaves = {
        key: (ours, leaf_at(params, ours), i)
        for ours, keys in tensor_names(config).items()
        for i, key in enumerate(keys)
    }

    def size(entry: tuple[str, jax.Array, int]) -> int:
        ours, leaf, _ = entry
        count = leaf.size // (leaf.shape[0] if ours.startswith("layers/") else 1)
        return count * np.dtype(dtype or leaf.dtype).itemsize

    def tensor(key: str) -> np.ndarray:
        ours, leaf, i = leaves[key]
        value = np.asarray(leaf[i] if ours.startswith("layers/") else leaf)
        value = value.astype(dtype or value.dtype, copy=False)
        return value.T if is_transposed(ours) else value

    try:
        plan = split_state_dict_into_shards_factory(
            leaves,
            get_storage_size=size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError:
        raise UserError(f"max_shard_size is {max_shard_size!r}; expected such as 5GB") from None
    for name, keys in plan.filename_to_tensors.items():
        write_tensors(directory / name, {key: tensor(key) for key in keys}, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        files.write_json(directory / INDEX, index)
