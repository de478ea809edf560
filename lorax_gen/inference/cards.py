"""Prompts to gates to task cards, which specialise an edge model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from lorax_gen.artifacts.card import TaskCard, make_card
from lorax_gen.artifacts.generator import Generator
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.inference.reading import read_prompts
from lorax_gen.models.decoder import Array, Execution
from lorax_gen.models.model import Model
from lorax_gen.prompts import check_size
from lorax_gen.system import prompt_gates

Ids = Sequence[int]


def gates_of_prompts(
    prompts: Sequence[Ids],
    cloud: Model,
    edge: Model,
    generator: Generator,
    **options: Any,
) -> np.ndarray:
    """Gates `[P, L, N]` fp32 of prompts, token ids of the cloud's tokenizer.

    The cloud reads each distinct prompt once.

    Args:
      options: `tokens_per_batch`, `wanted`, `mesh` and `progress` of `reading.read_prompts`.

    Raises UserError if a model is not the one that the generator was trained with, or a token is
    not in the cloud's vocabulary.
    """
    spec = generator.spec(cloud, edge)

    def read(weights: Any, prompt: Array, lengths: Array, execution: Execution) -> Array:
        return prompt_gates(*weights, spec, prompt, lengths, execution=execution)

    return read_prompts(
        prompts,
        cloud,
        read,
        (generator.params, generator.stats, cloud.params),
        (spec.layers, generator.config.n_experts),
        room=spec.cloud.max_position_embeddings - spec.layers,
        **options,
    )


@overload
def specialize(
    prompt: str, cloud: Model, edge: Model, generator: Generator, **options: Any
) -> TaskCard: ...
@overload
def specialize(
    prompt: list[str] | tuple[str, ...],
    cloud: Model,
    edge: Model,
    generator: Generator,
    **options: Any,
) -> list[TaskCard]: ...
def specialize(
    prompt: str | Sequence[str],
    cloud: Model,
    edge: Model,
    generator: Generator,
    **options: Any,
) -> TaskCard | list[TaskCard]:
    """A task card for each prompt (one for a string, a list for several).

    A card does not depend on the other prompts: BatchNorm uses its running statistics and
    padding is masked.

    Args:
      options: `tokens_per_batch`, `mesh` and `progress` of `gates_of_prompts`.

    Raises UserError for an empty prompt, one longer than the cloud model's positions, or models
    that the generator was not trained with.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    encoder, rows = Encoder.of(cloud), []
    room = cloud.config.max_position_embeddings - generator.spec(cloud, edge).layers
    for text in prompts:
        if not text.strip():
            raise UserError("the prompt is empty; describe the task in a sentence or more")
        check_size(text, room, cloud.tokenizer, "a prompt")
        rows.append(encoder.ids(text))
        if len(rows[-1]) > room:
            raise UserError(
                f"a prompt of {len(rows[-1])} tokens is longer than the {room} positions that the "
                "cloud model has before its meta tokens; shorten it"
            )
    gates = gates_of_prompts(rows, cloud, edge, generator, **options)
    cards = [
        make_card(row, text, cloud, edge, generator)
        for row, text in zip(gates, prompts, strict=True)
    ]
    return cards[0] if isinstance(prompt, str) else cards
