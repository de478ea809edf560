"""Latency and memory of one question at a time, as in interactive use on a device.

A time runs from the question on the host to the tokens of its greedy answer on the host. Questions
are padded to a few lengths, and each length's program runs once before it is timed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lorax_gen.data.tokens import bucket, pad_rows
from lorax_gen.errors import UserError
from lorax_gen.models.adapter import Adapter, prefix_length
from lorax_gen.models.decoding import generate_tokens
from lorax_gen.models.model import Model

SMALLEST = 8  # least number of tokens that a question is padded to


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds per question: half of the questions took at most `median`, nine in ten `p90`."""

    median: float
    p90: float
    questions: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """The most bytes at a time on one device.

    Attributes:
      measured: whether it is the peak of the process so far; otherwise what the compiled program
        needs, weights included, on platforms without memory statistics.
    """

    peak_bytes: int
    measured: bool


def measure_latency(
    model: Model,
    questions: Sequence[Sequence[int]],
    *,
    new_tokens: int = 1,
    adapter: Adapter | None = None,
) -> Latency:
    """Times the questions one by one, in their order.

    Args:
      questions: token ids, each question of at least one.
      new_tokens: length of an answer; a stop token ends it earlier.
      adapter: see `models.adapter`; its `rows` and its `prefix`, if any, hold one row, used for
        every question.

    Raises UserError where there is no question, or one with its answer exceeds the positions.
    """
    if not questions:
        raise UserError("no question to time; give at least one")
    answer = answerer(model, new_tokens, adapter)
    before = prefix_length(adapter)
    rows = [padded(model, ids, new_tokens, before) for ids in questions]
    for row in {tokens.shape: (tokens, lengths) for tokens, lengths in rows}.values():
        answer(*row)
    times = []
    for tokens, lengths in rows:
        start = time.perf_counter()
        answer(tokens, lengths)
        times.append(1e3 * (time.perf_counter() - start))
    return Latency(float(np.median(times)), float(np.percentile(times, 90)), len(times))


def peak_memory(
    model: Model, tokens: int, *, new_tokens: int = 1, adapter: Adapter | None = None
) -> Memory:
    """Peak memory of the device for questions of up to `tokens` tokens, after it has answered one.

    Raises UserError where that exceeds the positions of the model.
    """
    question = padded(model, [0] * tokens, new_tokens, prefix_length(adapter))
    device = jax.local_devices()[0]
    if "peak_bytes_in_use" in (device.memory_stats() or {}):
        answerer(model, new_tokens, adapter)(*question)
        return Memory(int(device.memory_stats()["peak_bytes_in_use"]), measured=True)
    compiled = generate_tokens.lower(
        model.decoding_params,
        model.config,
        *map(jnp.asarray, question),
        max_new_tokens=new_tokens,
        stop_ids=model.stop_ids,
        adapter=adapter,
    ).compile()
    sizes = compiled.memory_analysis()
    assert sizes is not None  # XLA gives them on CPU, GPU and TPU
    program = sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    moved = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Memory(program + moved, measured=False)


def answerer(
    model: Model, new_tokens: int, adapter: Adapter | None
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The function from a question's tokens `[1, T]` and length `[1]` to its answer `[1, N]`."""

    def answer(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.asarray(
            generate_tokens(
                model.decoding_params,
                model.config,
                tokens,
                lengths,
                max_new_tokens=new_tokens,
                stop_ids=model.stop_ids,
                adapter=adapter,
            )
        )

    return answer


def padded(
    model: Model, ids: Sequence[int], new_tokens: int, before: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A question as `[1, T]` int32, T one of a few sizes, and its length `[1]`; `before` are the
    positions of a prefix."""
    room = model.config.max_position_embeddings - new_tokens - before
    if not 0 < len(ids) <= room:
        raise UserError(
            f"a question of {len(ids)} tokens and {new_tokens} new ones: expected at least one "
            f"token, and {room + new_tokens} in all, the positions that the model has for them"
        )
    length = min(bucket(len(ids), SMALLEST), room)
    return pad_rows([ids], length, 0, "a question"), np.array([len(ids)], np.int32)
