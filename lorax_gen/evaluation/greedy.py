"""Accuracy on questions with one right answer each, such as those of the embedded world.

A question counts as right when every token of its answer, and the end of the text behind it, is the
most likely one given what stands before it: exactly when greedy decoding would write that answer.

Dimensions: N questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lorax_gen.data.tokens import Encoder
from lorax_gen.evaluation.system import System
from lorax_gen.inference.cards import gates_of_prompts
from lorax_gen.inference.choices import ChoiceItem, score_items
from lorax_gen.models.model import Model
from lorax_gen.system import gated_pool

Question = tuple[str, str]


def right_answers(model: Model, questions: Sequence[Question], **options: Any) -> np.ndarray:
    """`[N]` bool of questions and their answers; options as of `choices.score_items`."""
    encoder, items = Encoder.of(model), []
    for question, answer in questions:
        row, start = encoder.row(question, answer)
        items.append(ChoiceItem(((row[:start], row[start:]),), question))
    return np.array([bool(score.greedy[0]) for score in score_items(model, items, **options)])


def right_specialised(
    system: System,
    prompts: Sequence[str],
    questions: Sequence[tuple[int, Question]],
    mesh: Mesh | None = None,
) -> np.ndarray:
    """`[N]` bool: bare questions `(i, pair)`, the edge specialised by prompt i."""
    encoder = Encoder.of(system.cloud)
    gates = gates_of_prompts(
        [encoder.ids(prompt) for prompt in prompts],
        system.cloud,
        system.edge.config,
        system.generator,
        mesh=mesh,
    )
    return right_answers(
        system.edge,
        [pair for _, pair in questions],
        adapter=gated_pool(
            system.generator.params["pool"],
            gates[[i for i, _ in questions]],
            system.generator.config,
        ),
        mesh=mesh,
    )


# --- the world's tasks, as a training run looks at them ------------------------------------------
