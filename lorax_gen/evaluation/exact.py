"""Questions with one correct answer each, such as those of the embedded world.

An answer counts as correct when each of its tokens, and the end of the text after it, is the most
likely one given the tokens before it: exactly when greedy decoding would write that answer.

Dims: N questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from lorax_gen.data.tokens import Encoder
from lorax_gen.evaluation.answerers import Answerer, Cases
from lorax_gen.inference.choices import ChoiceItem, ChoiceScores, score_items


def score_answers(
    answerer: Answerer, cases: Cases, answers: Sequence[str], *, mesh: Mesh | None = None
) -> list[ChoiceScores]:
    """Scores of the answer to each question; `greedy[0]`: whether greedy decoding would write it.

    Args:
      mesh: rows are sharded over its batch axes, weights as in training; None: no mesh.
    """
    encoder, items = Encoder.of(answerer.model), []
    for (context,), answer in zip(answerer.contexts(cases), answers, strict=True):
        row, start = encoder.row(context, answer)
        items.append(ChoiceItem(((row[:start], row[start:]),), context))
    prompts = answerer.prompts(cases)
    adapter = answerer.adapter
    if prompts is not None:
        adapter = answerer.specialise(prompts, mesh=mesh)
    return score_items(answerer.model, items, adapter=adapter, mesh=mesh)


def correct_answers(
    answerer: Answerer, cases: Cases, answers: Sequence[str], *, mesh: Mesh | None = None
) -> np.ndarray:
    """`[N]` bool: whether the answerer would write the answer to each question."""
    scores = score_answers(answerer, cases, answers, mesh=mesh)
    return np.array([bool(score.greedy[0]) for score in scores])
