"""The GGUF format: a header of keys and values, then tensors, mapped into memory.

    'GGUF', version (uint32), number of tensors and of keys (uint64 each)
    keys       name, type (uint32), value; an array has its items' type and their number
    tensors    name, number of axes (uint32), sizes (uint64, the fastest first), type (uint32),
               offset (uint64) from the first multiple of `general.alignment` after all of these

A string is its length (uint64) and UTF-8. The `gguf` package names types and dequantises them; its
own reader makes several arrays of each token and merge, 1 GB and 15 s for a vocabulary of 256,000.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lorax_gen.errors import UserError

VERSIONS = (2, 3)
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
MAX_AXES = 4
MAX_NAME = 65535  # bytes


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as it is stored.

    Attributes:
      kind: `gguf.GGMLQuantizationType`.
      shape: of its numbers, the fastest axis last.
      data: `[*shape[:-1], bytes of a row]` uint8, mapped into memory.
    """

    kind: Any
    shape: tuple[int, ...]
    data: np.ndarray


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and tensors of a file, by name.

    Raises UserError where `gguf` is not installed, or the file is missing, truncated, of another
    format or version, or has a key or tensor twice, or a type that is unknown.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need one more package: pip install 'lorax-gen[gguf]'") from None
    _check_header(path)
    try:
        return _Reader(np.memmap(path, np.uint8, "r"), gguf).read()
    except UserError as error:
        raise UserError(f"{path}{error}") from None
    except (struct.error, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a complete GGUF file ({error}); get it again") from None


def _check_header(path: Path) -> None:
    try:
        with path.open("rb") as file:
            header = file.read(24)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from None
    if header[:4] != b"GGUF":
        raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF")
    if len(header) < 24:
        raise UserError(f"{path} is not a complete GGUF file; get it again")
    (version,) = struct.unpack("<I", header[4:8])
    if version and not version & 0xFFFF:
        raise UserError(f"{path} is a GGUF file for big-endian machines; get the usual one")
    if version not in VERSIONS:
        raise UserError(
            f"{path} is GGUF of version {version}; supported are "
            f"{' and '.join(map(str, VERSIONS))}: convert the original model again"
        )


class _Reader:
    """Reads from `at` on; what is beyond the end raises ValueError or struct.error."""

    def __init__(self, data: np.ndarray, gguf: Any):
        self.data, self.view, self.gguf = data, data.data, gguf
        self.at = 8

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors, keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string(MAX_NAME)
            if key in metadata:
                raise UserError(f" has the key {key} twice")
            metadata[key] = self.value(self.scalar("I"))
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self.string(MAX_NAME)
            if name in infos:
                raise UserError(f" has the tensor {name} twice")
            axes = self.scalar("I")
            if not 1 <= axes <= MAX_AXES:
                raise ValueError(f"{name} has {axes} axes")
            sizes = tuple(self.scalar("Q") for _ in range(axes))
            infos[name] = sizes[::-1], self.scalar("I"), self.scalar("Q")
        alignment = metadata.get("general.alignment", self.gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return metadata, {name: self.tensor(name, start, *info) for name, info in infos.items()}

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.view, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self, most: int | None = None) -> str:
        size = self.scalar("Q")
        if size > (len(self.view) - self.at if most is None else most):
            raise ValueError(f"a text of {size} bytes")
        text = bytes(self.view[self.at : self.at + size])
        self.at += size
        return text.decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == BOOL:
            return bool(self.scalar("B"))
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind}")
        kind, size = self.scalar("I"), self.scalar("Q")
        if size > len(self.view) - self.at:
            raise ValueError(f"an array of {size} items")
        if kind == STRING:
            return [self.string() for _ in range(size)]
        if kind not in SCALARS and kind != BOOL:
            raise ValueError(f"an array of type {kind}")
        dtype = np.dtype(f"<{SCALARS.get(kind, 'B')}")
        values = np.frombuffer(self.view, dtype, size, self.at) if size else np.empty(0, dtype)
        self.at += values.nbytes
        return (values.astype(bool) if kind == BOOL else values).tolist()

    def tensor(self, name: str, start: int, shape: tuple[int, ...], kind: int, at: int) -> Tensor:
        try:
            known = self.gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise UserError(
                f" holds {name} of type {kind}, which the gguf package does not know; get the "
                "model in another quantisation"
            ) from None
        block, size = self.gguf.GGML_QUANT_SIZES[known]
        if shape[-1] % block:
            raise ValueError(f"{name} has rows of {shape[-1]} numbers in blocks of {block}")
        stored = (*shape[:-1], shape[-1] // block * size)
        end = start + at + math.prod(stored)
        if end > len(self.view):
            raise ValueError(f"{name} ends at byte {end:,} of {len(self.view):,}")
        return Tensor(known, shape, self.data[start + at : end].reshape(stored))
