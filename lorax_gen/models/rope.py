"""Rotary position embeddings, their frequencies as they are or stretched to longer texts.

Dims beyond the legend (`lorax_gen.method`): E head size.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from lorax_gen.config import Positive, Size, check
from lorax_gen.errors import UserError

Array = jax.Array
Base = Annotated[float, Meta(ge=1e-6, le=1e18)]
"""Of angles that fp32 holds at every position."""
Tables = tuple[Array, Array]
"""Cosines and sines `[..., T, 1, E/2]` (fp32)."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequencies divided by `factor`, `rope_type: linear`; with the other three fields only the
    slow ones, `rope_type: llama3` (LLaMA 3.1 and later)."""

    factor: Base
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None

    def __post_init__(self):
        check(self)
        _, *others = dataclasses.astuple(self)
        if len({value is None for value in others}) > 1:
            raise UserError(f"{self} is neither of rope_type linear, factor alone, nor of llama3")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise UserError(
                f"high_freq_factor={high} is not above low_freq_factor={low}; frequencies are "
                "blended between them"
            )

    @property
    def rope_type(self) -> str:
        return "linear" if self.low_freq_factor is None else "llama3"


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer; `theta` None: the layer rotates nothing."""

    theta: Base | None = 10000.0
    scaling: RopeScaling | None = None

    def __post_init__(self):
        check(self)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """`[E/2]` fp32: angles per position."""
    if rope.theta is None:
        return np.zeros(head_dim // 2, np.float32)
    exponents = np.arange(0, head_dim, 2) / head_dim
    # Rounded where torch rounds: at position 100,000 a last bit is an angle of 0.01.
    frequencies = np.float32(1) / (rope.theta**exponents).astype(np.float32)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    if low is None or high is None or original is None:  # all are: rope_type linear
        return frequencies / np.float32(scaling.factor)
    # Turns over the original context: many are kept, few are slowed by `factor`, blended between.
    turns = original * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (frequencies * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def rope_tables(rope: Rope, head_dim: int, positions: Array) -> Tables:
    """Cosines and sines at integer positions `[..., T]`."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(x: Array, tables: Tables | None) -> Array:
    """`x: [B, T, heads, E]` rotated, halves paired as in Hugging Face's LLaMA; None: as it is."""
    if tables is None:
        return x
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
