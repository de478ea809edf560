"""Model files of llama.cpp (GGUF): metadata, and tensors that are dequantised as they are read.

A file is one, or the parts `name-00001-of-00003.gguf` and so on, of which the first has the
metadata. Tensors differ from Hugging Face's in three ways, undone here as they are read:

* quantised: `gguf.quants` dequantises all types that it knows, to fp32;
* in architectures that rotate neighbouring features (`Family.neighbours`) the rows of q and k are
  in that order: row 2 i + s of a head is row s E/2 + i of Hugging Face's;
* norms that multiply by 1 + weight (`rms_norm_offset`) are stored with the 1 added.

Dims beyond the legend (`lorax_gen.method`): E head size.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from lorax_gen.documents import convert
from lorax_gen.errors import UserError
from lorax_gen.models.config import DecoderConfig
from lorax_gen.models.families import family_of, tensor_names
from lorax_gen.models.gguf_format import Tensor, read_gguf

T = TypeVar("T")

KERNELS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
NORMS = {
    "attn_norm": "attn_norm", "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm", "mlp_post_norm": "post_ffw_norm",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
}  # fmt: skip
# Our path of a tensor -> its name in the file, in every architecture that has it.
NAMES = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
    **{f"layers/{ours}": f"blk.{{i}}.{name}.weight" for ours, name in (KERNELS | NORMS).items()},
    **{f"layers/{ours}_bias": f"blk.{{i}}.{name}.bias" for ours, name in KERNELS.items()},
}
# What rope scaling divides frequencies by: `gguf_config` reads it.
ROPE_FACTORS = "rope_freqs.weight"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# Stored as they are; all others are dequantised to fp32.
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What a file and its other parts hold; tensors are mapped into memory, not read.

    Attributes:
      source: the path, for messages.
      metadata: keys, such as `llama.block_count`, and their values.
      tensors: by name, as they are stored.
    """

    source: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def get(self, key: str, kind: type[T], default: Any = ...) -> T:
        """A value of the metadata; raises UserError where it has another type, or is missing and
        there is no default."""
        if key not in self.metadata:
            if default is ...:
                raise UserError(f"{self.source} is incomplete: its metadata lacks {key}")
            return default
        return convert(self.metadata[key], kind, f"{self.source}: {key}")


def open_gguf(path: Path) -> GGUFFile:
    """Opens a file, and with it all parts of a model that is split.

    Raises UserError where `gguf` is not installed, or a file is missing, truncated, of another
    format or version, or not the part that its name says.
    """
    first = GGUFFile(str(path), *read_gguf(path))
    count = first.get("split.count", int, 1)
    if count < 2:
        return first
    named = PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise UserError(
            f"{path} is one of {count} parts; expected a name such as "
            f"model-00001-of-{count:05}.gguf, as it was split"
        )
    paths = [path.with_name(f"{named[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        raise UserError(f"{path} is one of {count} parts, and {missing[0]} is missing; get it too")
    parts = [first if each == path else GGUFFile(str(each), *read_gguf(each)) for each in paths]
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        if (part.get("split.no", int), part.get("split.count", int)) != (i, count):
            raise UserError(f"{part.source} is not part {i + 1} of {count}, as its name says")
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise UserError(f"{part.source}: {twice[0]} is in another part too")
        tensors |= part.tensors
    whole = dataclasses.replace(parts[0], tensors=tensors)
    expected = whole.get("split.tensors.count", int, len(tensors))
    if len(tensors) != expected:
        raise UserError(
            f"{whole.source}: the {count} parts hold {len(tensors)} tensors; expected {expected}"
        )
    return whole


class GGUFCheckpoint:
    """The tensors of a GGUF file as `checkpoint_files.Checkpoint` has them: by name, in the shapes,
    order and values of Hugging Face, read on demand."""

    described_by = "its metadata"

    def __init__(self, file: GGUFFile, config: DecoderConfig):
        self.source = file.source
        self.file_of = {key: each for key, each in file.tensors.items() if key != ROPE_FACTORS}
        self.offset = config.rms_norm_offset
        self.head_dim = config.head_dim if family_of(config).neighbours else None

    def names(self, config: DecoderConfig) -> dict[str, list[str]]:
        return tensor_names(config, NAMES)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.file_of[key].shape

    def dtype(self, key: str) -> np.dtype:
        """Raises UserError where `gguf` cannot dequantise its type."""
        kind = self.file_of[key].kind
        if kind.name in DTYPES:
            return np.dtype(DTYPES[kind.name])
        if not _is_known(kind):
            raise UserError(
                f"{self.source}: {key} is of type {kind.name}, which the gguf package cannot "
                "dequantise; get the model in another quantisation"
            )
        return np.dtype(np.float32)

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor; only its rows are dequantised, so `index` may select a shard's."""
        tensor = self.file_of[key]
        rows: slice | np.ndarray = index[0]
        if self.head_dim and (".attn_q." in key or ".attn_k." in key):
            rows = _halves(tensor.shape[0], self.head_dim)[index[0]]
        if len(tensor.shape) == 1:  # quantised or not, it is small
            value = dequantised(tensor)[rows]
        else:
            part = dataclasses.replace(tensor, data=tensor.data[rows])
            value = dequantised(part)[(slice(None), *index[1:])]
        return value - np.float32(1) if self.offset and key.endswith("norm.weight") else value


def dequantised(tensor: Tensor) -> np.ndarray:
    """Its numbers, as `gguf` has them: fp32, but float64 where that is stored."""
    from gguf import quants

    if tensor.kind.name == "F64":  # gguf refuses it
        return tensor.data.view(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # see `checkpoint_files.check_finite`
        return quants.dequantize(tensor.data, tensor.kind)


@functools.cache
def _is_known(kind: Any) -> bool:
    from gguf import GGML_QUANT_SIZES, quants

    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _halves(size: int, head_dim: int) -> np.ndarray:
    """For each row in Hugging Face's order its row in the file."""
    return np.arange(size).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
