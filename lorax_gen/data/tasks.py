"""A task: a system prompt in several wordings, and questions with one correct answer each."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a family.

    Attributes:
      templates: wordings of the description, with `{slot}` parts.
      slots: their values; `{pairs}` is filled from `pairs`, whose order carries no meaning.
      questions: `(input, answer)`, the input as a model without a prompt reads it.
      drills: easier questions, used only after a prompt, that state the fact which a question
        requires; language models are pretrained on them.
      split: `seen` tasks may be trained on, `unseen` ones never.
    """

    family: str
    name: str
    templates: tuple[str, ...]
    slots: dict[str, str]
    questions: tuple[tuple[str, str], ...]
    pairs: tuple[str, ...] = ()
    drills: tuple[tuple[str, str], ...] = ()
    split: str = "seen"

    def prompt(self, rng: np.random.Generator | None = None, shots: int = 0) -> str:
        """The system prompt: the description, then `shots` solved examples.

        With `rng` the wording, the order of pairs and the examples are drawn; without it the first
        of each is taken.
        """
        template, pairs = self.templates[0], list(self.pairs)
        if rng is not None:
            template = self.templates[rng.integers(len(self.templates))]
            rng.shuffle(pairs)
        text = template.format(pairs=" , ".join(pairs), **self.slots)
        examples = self.sample(rng, shots) if rng is not None else self.questions[:shots]
        return " ".join(
            [text, *(f"{behind_prompt(question)} {answer} ." for question, answer in examples)]
        )

    def sample(self, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
        """`count` different questions, or all of them where there are fewer."""
        chosen = rng.permutation(len(self.questions))[:count]
        return [self.questions[i] for i in chosen]


def in_groups(name: str, groups: Sequence[str]) -> bool:
    """Whether the name of a task, a family or a source fits one of the glob patterns."""
    return any(fnmatch.fnmatchcase(name, group) for group in groups)


def behind_prompt(question: str) -> str:
    """A question as written after a prompt, whose list of inputs and answers has no colons."""
    return question.removesuffix(" :")
