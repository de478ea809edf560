"""Reading and writing model directories in Hugging Face's format.

    config.json                   the shape, with the keys of `families`
    model.safetensors             one tensor per layer and kernel, or several files and an index
    tokenizer.json and others     read and written by `transformers`
    generation_config.json        the tokens that end a text

Layers are stacked when read and unstacked when written, one leaf at a time: the host holds at most
one leaf besides the arrays on the devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from lorax_gen import assets, documents, files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.hub import find_directory
from lorax_gen.models import int8
from lorax_gen.models.config_json import read_config, write_config
from lorax_gen.models.decoder import DecoderConfig, Params, abstract_params
from lorax_gen.models.families import is_transposed, leaf_at, tensor_names, tensor_shapes
from lorax_gen.models.model import Model
from lorax_gen.tensors import open_safetensors, write_tensors
from lorax_gen.tokenizers import load_tokenizer

INDEX = "model.safetensors.index.json"


def load_model(
    name_or_dir: str | AnyPath,
    dtype: Any = jnp.float32,
    *,
    in_int8: bool = False,
    shardings: Callable[[Params], Any] | None = None,
    revision: str | None = None,
    bos: bool | None = None,
) -> Model:
    """Loads a model from a directory or URL, a shipped one (`world/cloud`) or the hub (`org/name`).

    Args:
      dtype: of the parameters; None keeps the checkpoint's.
      in_int8: keep the kernels in int8 (see `models.int8`); they cannot be merged or saved.
      shardings: maps the abstract parameters to a tree of shardings, such as
        `partial(mesh.sharding.tree_shardings, mesh=mesh)`; None: the default device.
      revision: branch, tag or commit on the hub.
      bos: whether texts begin with BOS; None: the tokenizer's default.

    Raises UserError where the directory, a file or a tensor is missing, unknown or has a
    wrong shape.
    """
    directory = find_directory(name_or_dir, revision=revision)
    config = read_config(directory / "config.json")
    params = read_params(directory, config, dtype, in_int8=in_int8, shardings=shardings)
    # No path and no URL may enter artifacts made with the model.
    on_hub = not (files.is_url(name_or_dir) or assets.resolve(name_or_dir).is_dir())
    name = str(name_or_dir) if on_hub else directory.resolve().name
    return Model(config, params, load_tokenizer(directory), read_stop_ids(directory), name, bos)


def save_model(
    directory: str | AnyPath,
    model: Model,
    provenance: dict[str, Any] | None = None,
    *,
    dtype: Any = None,
    max_shard_size: str = "5GB",
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model directory that `transformers` and `load_model` read; never overwrites.

    Args:
      provenance: if given, written to `provenance.json`.
      dtype: of the tensors; None keeps theirs.
      max_shard_size: of a file of tensors, such as `500MB`; several files get an index.
      extra: writes further files into the temporary directory, before it is renamed.

    Raises UserError where `directory` exists, the kernels are in int8, or no family supports the
    config.
    """
    int8.refuse(model.params, "save")
    with files.new_directory(directory) as partial:
        eos = list(model.stop_ids) if len(model.stop_ids) > 1 else next(iter(model.stop_ids), None)
        ids = {
            "bos_token_id": model.tokenizer.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": model.tokenizer.pad_token_id,
        }
        kind = jnp.dtype(dtype or model.params["embed"].dtype)
        config = {**write_config(model.config), **ids, "dtype": kind.name, "torch_dtype": kind.name}
        files.write_json(partial / "config.json", config)
        files.write_json(partial / "generation_config.json", ids)
        write_params(partial, model.params, model.config, dtype, max_shard_size)
        model.tokenizer.save_pretrained(partial)
        if provenance is not None:
            files.write_json(partial / "provenance.json", provenance)
        if extra is not None:
            extra(partial)


def read_stop_ids(directory: Path) -> tuple[int, ...]:
    """The tokens that end a text; generation_config.json has precedence over config.json."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            ids = documents.read_json(directory / name).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


# --- tensors in ----------------------------------------------------------------------------------


class Checkpoint:
    """The tensors of a directory by name, from one or more files; read on demand."""

    def __init__(self, directory: Path):
        self.directory = directory
        single, index = directory / "model.safetensors", directory / INDEX
        if index.is_file() and not single.is_file():
            weight_map = documents.read_json(index).get("weight_map")
            names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
            if not all(isinstance(name, str) for name in names):
                raise UserError(f"{index} has no weight_map of tensors to files; get it again")
            handles = {name: open_safetensors(directory / name) for name in sorted(set(names))}
            self.source = str(index)
        else:
            handles, self.source = {single.name: open_safetensors(single)}, str(single)
        self.file_of = {key: file for file in handles.values() for key in file.keys()}  # noqa: SIM118

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.file_of[key].get_slice(key).get_shape())

    def dtype(self, key: str) -> np.dtype:
        return self.read(key, (slice(0, 0),)).dtype

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.file_of[key].get_slice(key)[index]


def read_params(
    directory: Path,
    config: DecoderConfig,
    dtype: Any = jnp.float32,
    *,
    in_int8: bool = False,
    shardings: Callable[[Params], Any] | None = None,
) -> Params:
    """Parameters from a directory's safetensors; see `load_model`.

    Names and shapes of all tensors are checked before the first is read.
    """
    checkpoint = Checkpoint(Path(directory))
    check_tensors(checkpoint, config)
    shapes = abstract_params(config)
    kept = jax.eval_shape(int8.quantize_kernels, shapes) if in_int8 else shapes
    wanted = shardings(kept) if shardings else None
    params: Params = {"layers": {}}
    for ours, keys in tensor_names(config).items():
        sharding = leaf_at(wanted, ours) if wanted else None
        pair = int8.is_quantized(leaf_at(kept, ours))
        read_to = sharding["qvalue"] if pair and sharding else sharding
        leaf = read_leaf(checkpoint, ours, keys, leaf_at(shapes, ours).shape, dtype, read_to)
        if pair:
            leaf = jax.jit(int8.quantize, out_shardings=sharding)(leaf)
        (params["layers"] if ours.startswith("layers/") else params)[ours.split("/")[-1]] = leaf
    return params


def check_tensors(checkpoint: Checkpoint, config: DecoderConfig) -> None:
    """Raises UserError that names the first tensor that is missing, unknown or of a wrong shape."""
    expected, source = tensor_shapes(config), checkpoint.source
    for key, shape in expected.items():
        if key not in checkpoint.file_of:
            raise UserError(f"{source} lacks the tensor {key}, which its config.json asks for")
        if checkpoint.shape(key) != shape:
            raise UserError(
                f"{source}: {key} has shape {checkpoint.shape(key)}, but its config.json asks for "
                f"{shape}"
            )
    # Harmless: a head stored although it is tied, and buffers that old versions saved.
    foreign = sorted(
        key
        for key in set(checkpoint.file_of) - set(expected) - {"lm_head.weight"}
        if not key.endswith("rotary_emb.inv_freq")
    )
    if foreign:
        raise UserError(f"{source} holds an unknown tensor {foreign[0]}; is it another family?")


def read_leaf(
    checkpoint: Checkpoint,
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
    dtype = np.dtype(dtype)
    parts: dict[str, np.ndarray] = {}  # devices with equal shards share it

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in parts:
            chosen, own = (keys[index[0]], index[1:]) if stacked else (keys, index)
            size = [len(range(n)[i]) for n, i in zip(shape, index, strict=True)]
            out = np.empty(size, dtype)
            for i, key in enumerate(chosen):
                value = checkpoint.read(key, own[::-1] if transposed else own)
                out[i if stacked else ...] = value.T if transposed else value
            parts[str(index)] = out
        return parts[str(index)]

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, part)


# --- tensors out ---------------------------------------------------------------------------------


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
