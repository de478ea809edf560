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

from lorax_gen.data.batches import Encoder
from lorax_gen.data.tasks import behind_prompt
from lorax_gen.data.world import World
from lorax_gen.evaluation.choices import ChoiceItem, score_items
from lorax_gen.evaluation.gates import gates_of_prompts
from lorax_gen.evaluation.system import System
from lorax_gen.models.huggingface import Model

Question = tuple[str, str]


def right_answers(model: Model, questions: Sequence[Question], **options: Any) -> np.ndarray:
    """`[N]` bool of questions and their answers; options as of `choices.score_items`."""
    encoder, items = Encoder(model.tokenizer), []
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
    encoder = Encoder(system.cloud.tokenizer)
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
        gates=gates[[i for i, _ in questions]],
        generator=system.generator,
        mesh=mesh,
    )


# --- the world's tasks, as a training run looks at them ------------------------------------------


class WorldQuiz:
    """Some questions about every task of the world, and the shares of them that are right.

    Attributes:
      prompts: of all tasks; questions: `(i, pair)`, asked under prompt i.
    """

    def __init__(self, world: World, families: Sequence[str], per_task: int = 12):
        self.prompts: list[str] = []
        self.questions: list[tuple[int, Question]] = []
        self.groups: list[tuple[str, str]] = []  # split and family of each question
        for split in ("seen", "unseen"):
            for family in families:
                rng, tasks = np.random.default_rng(0), world.select(split, family)
                first = len(self.prompts)
                self.prompts += [task.prompt(rng) for task in tasks]
                for i, task in enumerate(tasks, first):
                    drawn = task.sample(rng, per_task)
                    self.questions += [(i, pair) for pair in drawn]
                    self.groups += [(split, family)] * len(drawn)

    @property
    def bare(self) -> list[Question]:
        """The questions without their prompts."""
        return [pair for _, pair in self.questions]

    @property
    def prompted(self) -> list[Question]:
        """The questions behind their prompts."""
        return [
            (f"{self.prompts[i]} {behind_prompt(question)}", answer)
            for i, (question, answer) in self.questions
        ]

    def accuracy(self, right: np.ndarray) -> dict[str, float]:
        """`accuracy/split/family`, and their means `accuracy/split`, of `right: [N]` bool."""
        result: dict[str, float] = {}
        for split in ("seen", "unseen"):
            shares = {
                family: float(right[[group == (split, family) for group in self.groups]].mean())
                for family in dict.fromkeys(family for _, family in self.groups)
            }
            result |= {f"accuracy/{split}/{family}": share for family, share in shares.items()}
            result[f"accuracy/{split}"] = float(np.mean(list(shares.values())))
        return result
