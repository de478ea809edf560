"""What the fuzz targets share: ways to damage a file, and what counts as a refusal.

Each target loads damaged files of one kind. A load must refuse with one line, or return what is
valid by a check of the target's own; any other exception fails, as do 10 seconds or 1 GiB.

    FUZZ=10000 python -m pytest tests/fuzz       # 20 files of each kind without it
"""

from __future__ import annotations

import copy
import gc
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lorax_gen.errors import LONGEST, UserError

COUNT = int(os.environ.get("FUZZ", "20"))
MEMORY = 1 << 30  # bytes that a load may allocate before it refuses

fuzz = settings(
    max_examples=COUNT,
    deadline=timedelta(seconds=10),
    derandomize=COUNT == 20,  # the small run is the same on every machine
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def refused(load: Callable[[], Any]) -> str | None:
    """The message with which `load` refuses; None where it accepts."""
    try:
        with little_memory():
            load()
    except UserError as error:
        message = str(error)
        assert message and len(message) <= LONGEST and "\n" not in message, message
        assert message.isprintable(), message
        return message
    return None


@contextmanager
def little_memory() -> Iterator[None]:
    """Allocating more than `MEMORY` raises MemoryError, where the system can limit it (Linux)."""
    old = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        with open("/proc/self/status") as file:
            used = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
    except OSError:
        yield
        return
    gc.collect(0)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, old)


# --- bytes ---------------------------------------------------------------------------------------


@st.composite
def damaged_bytes(draw: Callable, data: bytes) -> bytes:
    """The bytes with one to three accidents: cut, flipped bits, zeroed, moved, written over."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.integers(1, 64))
        part = data[at : at + size]
        kind = draw(st.sampled_from("cut flip zero delete insert repeat overwrite empty".split()))
        if kind == "cut":
            data = data[:at]
        elif kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "zero":
            data = data[:at] + bytes(len(part)) + data[at + size :]
        elif kind == "delete":
            data = data[:at] + data[at + size :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=64)) + data[at:]
        elif kind == "repeat":
            data = data[:at] + part + data[at:]
        elif kind == "overwrite":
            new = draw(st.binary(min_size=1, max_size=64))
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "empty" and draw(st.integers(0, 9)) == 0:
            data = b""
    return data


# --- JSON ----------------------------------------------------------------------------------------

NUMBERS = (
    0, 1, -1, 2, 3, 7, 16, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**31),
    10**30, 0.0, -0.0, 0.5, 1.5, -1.5, 1e-45, 1e38, 1e300, float("nan"), float("inf"),
    float("-inf"),
)  # fmt: skip
TEXTS = (
    "",
    " ",
    "0",
    "1",
    "true",
    "null",
    "a",
    "../x",
    "/etc/passwd",
    "x" * 400,
    "\x00",
    "é",
    "NaN",
)


def values() -> st.SearchStrategy:
    """Values that a field was not meant to have."""
    plain = st.sampled_from([*NUMBERS, *TEXTS, None, True, False])
    return st.one_of(
        plain,
        st.lists(plain, max_size=3),
        st.dictionaries(st.sampled_from(TEXTS), plain, max_size=2),
        st.integers(60, 200).map(nested),
    )


def nested(depth: int) -> list:
    """A list in a list in a list, so many deep."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def damaged_json(draw: Callable, value: Any) -> Any:
    """The value with one or two changes: an entry replaced, dropped, renamed, repeated, added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        spots = list(_spots(value))
        if not spots:
            return draw(values())
        node, key = draw(st.sampled_from(spots))
        kind = draw(st.sampled_from("replace replace nudge drop rename repeat add".split()))
        old = node[key]
        if kind == "nudge" and isinstance(old, int | float) and not isinstance(old, bool):
            node[key] = draw(st.sampled_from([old + 1, old - 1, -old, old * 2, str(old), [old]]))
        elif kind == "drop":
            del node[key]
        elif kind == "rename" and isinstance(node, dict):
            node[draw(st.sampled_from([f"{key}s", f"_{key}", str(key).upper(), ""]))] = node.pop(
                key
            )
        elif kind == "repeat" and isinstance(node, list):
            node.insert(key, copy.deepcopy(old))
        elif kind == "add" and isinstance(node, dict):
            node[draw(st.sampled_from(["extra", *TEXTS]))] = draw(values())
        else:
            node[key] = draw(values())
    return value


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every `(container, key)` in a value."""
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        yield from _spots(inner)


# --- tensors -------------------------------------------------------------------------------------

DTYPES = (
    np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_,
    np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
)  # fmt: skip
BAD_NUMBERS = (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e30, 300.0)


@st.composite
def damaged_tensors(draw: Callable, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with one or two changes of a name, a shape, a dtype or a number."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, 2))):
        if not tensors:
            return tensors
        name = draw(st.sampled_from(sorted(tensors)))
        value = tensors[name]
        kind = draw(st.sampled_from("drop rename add swap shape dtype number all cut grow".split()))
        if kind == "drop":
            del tensors[name]
        elif kind == "rename":
            tensors[draw(st.sampled_from([f"{name}s", name.upper(), "x", name[:-1]]))] = (
                tensors.pop(name)
            )
        elif kind == "add":
            tensors[draw(st.sampled_from(["extra", f"{name}.extra", f"{name}2"]))] = value
        elif kind == "swap":
            other = draw(st.sampled_from(sorted(tensors)))
            tensors[name], tensors[other] = tensors[other], value
        elif kind == "shape":
            shapes = [value.reshape(-1), value[None], value.T, value[..., None]]
            tensors[name] = draw(st.sampled_from(shapes))
        elif kind == "dtype":
            with np.errstate(all="ignore"):
                tensors[name] = value.astype(draw(st.sampled_from(DTYPES)))
        elif kind in ("number", "all") and value.size:
            value = value.copy()
            at = draw(st.integers(0, value.size - 1)) if kind == "number" else slice(None)
            with np.errstate(all="ignore"):
                bad = np.asarray(draw(st.sampled_from(BAD_NUMBERS))).astype(value.dtype)
            value.reshape(-1)[at] = bad
            tensors[name] = value
        elif kind == "cut" and value.ndim:
            axis = draw(st.integers(0, value.ndim - 1))
            tensors[name] = value.take(range(max(value.shape[axis] - 1, 0)), axis)
        elif kind == "grow" and value.ndim:
            axis = draw(st.integers(0, value.ndim - 1))
            tensors[name] = np.concatenate([value, value], axis)
    return tensors
