"""Trees of arrays as safetensors files, with names joined by dots, and their hashes. No pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lorax_gen import files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath


def named_leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of `{'a': {'b': x}}` as `('a.b', x)`, left on their devices."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from named_leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def flatten(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """`{'a': {'b': x}}` as `{'a.b': x}`, on the host."""
    return {name: np.asarray(value) for name, value in named_leaves(tree)}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`. Raises UserError where a name is also the beginning of another."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"there are tensors of the names {path!r} and {parent!r} before it")
        if name in node:
            raise UserError(f"there is a tensor {path!r}, and others inside it")
        node[name] = value
    return tree


def tree_hash(tree: dict[str, Any], dtype: Any = None) -> str:
    """First 16 hex digits of the SHA-256 over names, shapes, dtypes and bytes of a tree.

    With `dtype`, values are cast to it first, so a tree has the hash of its copy in that dtype.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree), key=itemgetter(0)):  # copied one by one
        value = np.asarray(leaf)
        value = value.astype(dtype or value.dtype, copy=False)
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def write_tensors(
    path: AnyPath, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes a new safetensors file, atomically."""
    with files.new_file(path) as temporary:
        mode = temporary.stat().st_mode
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(contiguous, temporary, metadata=metadata)
        temporary.chmod(mode)  # safetensors makes it readable by its owner only


def open_safetensors(path: AnyPath) -> Any:
    """Opens a safetensors file. Raises UserError if it is missing, truncated or another format."""
    if not path.is_file():
        raise UserError(f"no such file: {path}; expected a safetensors file there")
    try:
        return safe_open(files.local_copy(path), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); get it again"
        ) from None


def read_tensors(path: AnyPath) -> dict[str, np.ndarray]:
    """All tensors of a file. Raises UserError if it is missing or truncated, or a tensor has a
    dtype that numpy and ml_dtypes lack."""
    with open_safetensors(path) as file:
        return {name: _read(file, name, path) for name in file.keys()}  # noqa: SIM118


def _read(file: Any, name: str, path: AnyPath) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError, SafetensorError):
        dtype = file.get_slice(name).get_dtype()
        raise UserError(f"{path}: {name} is stored as {dtype}, which cannot be read") from None


def read_metadata(path: AnyPath) -> dict[str, str]:
    """The metadata of a file. Raises UserError if it is missing or truncated."""
    with open_safetensors(path) as file:
        return file.metadata() or {}
