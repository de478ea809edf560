"""Reading and writing model directories in Hugging Face's format.

config.json                   the shape: see `config_json`
model.safetensors             the parameters: see `checkpoint_files`
tokenizer.json and others     read and written by `transformers`
generation_config.json        the tokens that end a text
provenance.json               where it comes from, and its frame (see `frames`) if it has one
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
from msgspec import Meta

from lorax_gen import documents, files
from lorax_gen.files import AnyPath
from lorax_gen.frames import PLAIN, Frame, read_frame
from lorax_gen.hub import WITHOUT_WEIGHTS, find_directory, find_gguf, is_gguf, public_name
from lorax_gen.models import int8
from lorax_gen.models.checkpoint_files import read_params, write_params
from lorax_gen.models.config_json import read_config, write_config
from lorax_gen.models.decoder import Params, abstract_params
from lorax_gen.models.gguf_config import read_gguf_config
from lorax_gen.models.gguf_files import GGUFCheckpoint, open_gguf
from lorax_gen.models.gguf_tokenizer import read_gguf_stop_ids, read_gguf_tokenizer
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import load_tokenizer

PROVENANCE = "provenance.json"


def load_model(
    name_or_dir: str | AnyPath,
    dtype: Any = jnp.float32,
    *,
    in_int8: bool = False,
    shardings: Callable[[Params], Any] | None = None,
    revision: str | None = None,
    bos: bool | None = None,
) -> Model:
    """Loads a model from a directory or URL, a shipped one (`world/cloud`) or the hub (`org/name`),
    or from a GGUF file (`model.gguf`, of a directory or on the hub `org/name::model.gguf`).

    Args:
      dtype: of the parameters; None keeps the checkpoint's, float64 as float32 where JAX has only
        that.
      in_int8: keep the kernels in int8 (see `models.int8`); they cannot be merged or saved.
      shardings: maps the abstract parameters to a tree of shardings, such as
        `partial(mesh.sharding.tree_shardings, mesh=mesh)`; None: the default device.
      revision: branch, tag or commit on the hub.
      bos: whether texts begin with BOS; None: the tokenizer's default.

    Raises UserError where the directory or a file is missing or damaged, config.json asks for what
    the decoder does not do or contradicts itself, or a tensor is missing, not used, of a wrong
    shape or dtype, or not finite.
    """
    if is_gguf(name_or_dir):
        return _load_gguf(name_or_dir, dtype, in_int8, shardings, revision, bos)
    directory = find_directory(name_or_dir, revision=revision)
    config = read_config(directory / "config.json")
    params = read_params(directory, config, dtype, in_int8=in_int8, shardings=shardings)
    name, stop_ids = public_name(name_or_dir), read_stop_ids(directory, config.vocab_size)
    frame = stored_frame(directory)
    return Model(config, params, load_tokenizer(directory), stop_ids, name, bos, frame)


def _load_gguf(
    name: str | AnyPath,
    dtype: Any,
    in_int8: bool,
    shardings: Callable[[Params], Any] | None,
    revision: str | None,
    bos: bool | None,
) -> Model:
    file = open_gguf(find_gguf(name, revision=revision))
    config = read_gguf_config(file)
    tokenizer, stop_ids = read_gguf_tokenizer(file), read_gguf_stop_ids(file)
    checkpoint = GGUFCheckpoint(file, config)
    params = read_params(checkpoint, config, dtype, in_int8=in_int8, shardings=shardings)
    return Model(config, params, tokenizer, stop_ids, public_name(name), bos)


def load_reader(name_or_dir: str | AnyPath) -> Model:
    """A model without its weights, which are not downloaded either: its shape and its tokenizer,
    for whoever only needs to know what it reads. A GGUF file has all in one.

    Raises UserError as `load_model`.
    """
    if is_gguf(name_or_dir):
        file = open_gguf(find_gguf(name_or_dir))
        config = read_gguf_config(file)
        tokenizer, stop_ids = read_gguf_tokenizer(file), read_gguf_stop_ids(file)
        return Model(config, abstract_params(config), tokenizer, stop_ids, public_name(name_or_dir))
    directory = find_directory(name_or_dir, patterns=WITHOUT_WEIGHTS)
    config = read_config(directory / "config.json")
    stop_ids = read_stop_ids(directory, config.vocab_size)
    tokenizer, name = load_tokenizer(directory), public_name(name_or_dir)
    return Model(config, abstract_params(config), tokenizer, stop_ids, name)


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
      provenance: if given, written to `provenance.json`; the model's frame is added to it.
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
        write_provenance(partial, provenance, model.frame)
        if extra is not None:
            extra(partial)


def write_provenance(directory: Path, provenance: dict[str, Any] | None, frame: Frame) -> None:
    """Writes provenance and a frame, if there are any."""
    framed = {} if frame == PLAIN else {"frame": frame.stored()}
    if provenance is not None or framed:
        files.write_json(directory / PROVENANCE, {**(provenance or {}), **framed})


def stored_frame(directory: AnyPath) -> Frame:
    """The frame that the provenance of a directory has; the plain one where it has none.

    Raises UserError where it is damaged.
    """
    path = directory / PROVENANCE
    provenance = documents.read_json(path) if path.is_file() else {}
    return read_frame(provenance.get("frame", {}), f"{path}: frame")


def stored_in_context(directory: AnyPath) -> bool:
    """Whether the provenance of an adapter says that it was trained on questions after prompts.

    Raises UserError where it is damaged.
    """
    path = directory / PROVENANCE
    provenance = documents.read_json(path) if path.is_file() else {}
    return documents.convert(provenance.get("in_context", False), bool, f"{path}: in_context")


def read_stop_ids(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text.

    As in transformers, generation_config.json has precedence over config.json. Its other fields are
    defaults of options that callers give here.

    Raises UserError where either has anything but ids of the vocabulary.
    """
    token = Annotated[int, Meta(ge=0, lt=vocab_size)]
    found: tuple[int, ...] = ()
    for path in (directory / "config.json", directory / "generation_config.json"):
        ids = documents.read_json(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            one_or_more = Annotated[tuple[token, ...], Meta(min_length=1)]
            ids = ids if isinstance(ids, list) else [ids]
            found = documents.convert(ids, one_or_more, f"{path}: eos_token_id")
    return found
