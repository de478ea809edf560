"""AutoCompressors (Chevalier et al., 2023): a prompt becomes k vectors for each of its segments.

A segment is read as [soft prompt | segment | k summary tokens]; the states at the summary tokens
are appended to the soft prompt, which stands before the next segment and in the end before the
question, in place of the prompt's tokens:

    sigma_s = states at the summary tokens of [sigma_1 .. sigma_{s-1} | segment s | summary]

As in princeton-nlp/AutoCompressors the states are those after the final norm, `last_hidden_state`
there, and they are input embeddings as they are. That code gives soft prompts and summary tokens no
learned position, of models that have those; here everything has its position in the row.

Dims beyond the legend (`lorax_gen.method`): S segments of a prompt, K vectors of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_gen.config import Positive, Size, check
from lorax_gen.errors import UserError
from lorax_gen.method.generator import select_kernels
from lorax_gen.method.lora import Tree, init_lora, scaled
from lorax_gen.method.meta_tokens import insert_meta_tokens, read_meta_states
from lorax_gen.models import decoder
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import Array, DecoderConfig, Execution, Params


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """An edge that compresses prompts: its summary tokens, and the LoRA that it reads and answers
    with."""

    vectors: Size = 50
    """Summary tokens: vectors that a segment becomes."""
    segments: Size = 3
    """Segments of equal length that a prompt is read in."""
    rank: Size = 16
    alpha: Positive = 16.0
    """The LoRA is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Kernels of the edge model that it adapts."""

    def __post_init__(self):
        check(self)
        if not 0 < len(set(self.targets)) == len(self.targets):
            raise UserError(f"targets is {self.targets!r}; list one or more kernels, each once")

    @property
    def length(self) -> int:
        """Vectors of a soft prompt."""
        return self.vectors * self.segments

    @property
    def scale(self) -> float:
        """s = alpha / r of eq. 1."""
        return self.alpha / self.rank

    def room(self, edge: DecoderConfig) -> tuple[int, int]:
        """Most tokens of a prompt, and of a question, that an edge has positions for: the last
        segment is after the soft prompt of the others and before its summary tokens.

        Raises UserError where there is none.
        """
        left = edge.max_position_embeddings - self.length
        if left < 1:
            raise UserError(
                f"{self.segments} segments of {self.vectors} vectors leave no room for a text in "
                f"the {edge.max_position_embeddings} positions of the edge model; choose fewer"
            )
        return left * self.segments, left


def init_compressor(
    key: Array, config: CompressorConfig, edge: DecoderConfig, end_of_text: Array
) -> dict[str, Any]:
    """`summary`: `[K, D]` fp32, each a copy of the embedding `[D]` of the end of text, and `lora`,
    whose product is zero.

    Raises UserError where a target is no kernel of the edge.
    """
    shapes = select_kernels(decoder.kernel_shapes(edge), config.targets, "edge")
    return {
        "summary": jnp.tile(end_of_text.astype(jnp.float32), (config.vectors, 1)),
        "lora": init_lora(key, dict(shapes), config.rank, edge.num_hidden_layers),
    }


def compressor_lora(params: dict[str, Any], config: CompressorConfig) -> Tree:
    """The trained LoRA with its scale folded in."""
    return scaled(params["lora"], config.scale)


class Segment(NamedTuple):
    """A segment of each prompt.

    Attributes:
      tokens: `[P, T]`; lengths: `[P]`, how many of them a prompt has.
      targets: `[P, T]`, the token after each; followed: `[P, T]` bool, whether there is one.
    """

    tokens: Array
    lengths: Array
    targets: Array
    followed: Array


def split(prompt: Array, lengths: Array, segments: int) -> Iterator[Segment]:
    """Prompts `[P, T]` in segments of equal lengths, up to one token; T / S rounded up at most."""
    last, size = prompt.shape[1] - 1, -(-prompt.shape[1] // segments)
    for s in range(segments):
        start, end = (lengths * i // segments for i in (s, s + 1))
        index = start[:, None] + jnp.arange(size)
        tokens, targets = (
            jnp.take_along_axis(prompt, jnp.minimum(i, last), axis=1) for i in (index, index + 1)
        )
        within = (index < end[:, None]) & (index + 1 < lengths[:, None])
        yield Segment(tokens, end - start, targets, within)


def read_segment(
    params: Params,
    config: DecoderConfig,
    summary: Array,
    soft_prompt: Array,
    segment: Segment,
    **options: Any,
) -> tuple[Array, Array]:
    """States `[P, T, D]` of a segment after a soft prompt `[P, S K, D]`, and those at its summary
    tokens `[P, K, D]`.

    `options` are those of `decoder.hidden_states`.
    """
    count = summary.shape[0]
    embeddings = decoder.embed(params, config, segment.tokens)
    embeddings = insert_meta_tokens(embeddings, segment.lengths, summary, count)
    hidden = decoder.hidden_states(
        params, config, embeddings=embeddings, prefix=soft_prompt, **options
    )
    states = read_meta_states(hidden, segment.lengths, count)
    return hidden[:, : segment.tokens.shape[1]], states


class Compressed(NamedTuple):
    """What reading prompts gives.

    Attributes:
      soft_prompt: `[P, S K, D]`.
      segments: the segments and the states `[P, T, D]` of each.
    """

    soft_prompt: Array
    segments: list[tuple[Segment, Array]]


def compress(
    params: Params,
    config: DecoderConfig,
    summary: Array,
    prompt: Array,
    lengths: Array,
    *,
    segments: int,
    substep: int | None = None,
    dropout_key: Array | None = None,
    **options: Any,
) -> Compressed:
    """Reads prompts `[P, T]` segment by segment.

    Args:
      summary: `[K, D]`.
      substep: segments between two of which the gradient is stopped, in training; None: nowhere.
        The question, which is read after all of them, counts as the last segment, and sub-steps are
        counted from it: then its loss always reaches the summary of the segment before it.
      dropout_key: of the adapter's dropout; each segment derives its own.
      options: see `read_segment`.
    """
    read, dtype = [], params["embed"].dtype
    soft_prompt = jnp.zeros((prompt.shape[0], 0, config.hidden_size), dtype)
    for s, segment in enumerate(split(prompt, lengths, segments)):
        if starts_substep(s, segments, substep):
            soft_prompt = jax.lax.stop_gradient(soft_prompt)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, s)
        hidden, states = read_segment(
            params, config, summary, soft_prompt, segment, dropout_key=key, **options
        )
        soft_prompt = jnp.concatenate([soft_prompt, states], axis=1)
        read.append((segment, hidden))
    if starts_substep(segments, segments, substep):
        soft_prompt = jax.lax.stop_gradient(soft_prompt)
    return Compressed(soft_prompt, read)


def starts_substep(index: int, segments: int, substep: int | None) -> bool:
    """Whether a sub-step begins with segment `index` of `segments` and the question after them."""
    return substep is not None and (segments + 1 - index) % substep == 0


@partial(jax.jit, static_argnames=("config", "segments", "execution"))
def soft_prompts(
    params: Params,
    config: DecoderConfig,
    summary: Array,
    prompt: Array,
    lengths: Array,
    *,
    segments: int,
    adapter: Adapter | None = None,
    execution: Execution = Execution(),
) -> Array:
    """The soft prompts `[P, S K, D]` of prompts `[P, T]`, at inference."""
    read = compress(
        params,
        config,
        summary,
        prompt,
        lengths,
        segments=segments,
        adapter=adapter,
        execution=execution,
    )
    return read.soft_prompt
