"""Training samples of real tasks: a system prompt for the cloud, bare questions for the edge.

A `Source` turns data into episodes; `mixture.Mixture` draws batches from several of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from lorax_gen.data.benchmarks import Benchmark
from lorax_gen.data.questions import Question
from lorax_gen.data.unseen import refuse_name
from lorax_gen.errors import UserError
from lorax_gen.frames import BETWEEN, PLAIN

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Episode:
    """One system prompt and the questions under it."""

    task: str
    """Name of the task: a batch has at least two different ones."""
    instruction: str
    """Description of the task in the system prompt."""
    shots: tuple[str, ...]
    """Solved examples after it; the last ones are dropped first where a prompt is too long."""
    questions: tuple[Pair, ...]
    """`(input, answer)`, the answer with its leading separator."""
    join: Callable[[Episode, str], str] = lambda episode, question: PLAIN.after(
        episode.prompt, question
    )
    """`join(episode, input)`: what a model reads that has the prompt in its own context, the text
    that evaluation gives it."""

    @property
    def prompt(self) -> str:
        """What the cloud reads."""
        return BETWEEN.join([self.instruction, *self.shots])

    def without_last_shot(self) -> Episode:
        """The episode with a shorter prompt."""
        return dataclasses.replace(self, shots=self.shots[:-1])


class Source(Protocol):
    """Training data of one kind."""

    name: str
    tasks: int
    """How many different tasks its episodes belong to."""

    def __len__(self) -> int:
        """Number of samples."""

    def episode(self, index: int, rng: np.random.Generator, shots: int, queries: int) -> Episode:
        """Sample `index` with up to `shots` shots and 1 to `queries` different questions.

        A pure function of its arguments: every random choice is drawn from `rng`.
        """

    def texts(self) -> Iterator[str]:
        """All texts that episodes are made of, for the check against unseen benchmarks."""


class QuestionSource:
    """Multi-shot samples of a benchmark's training split.

    Sample i asks question i alone, with the text that evaluation scores. Its prompt is the
    benchmark's description and shots drawn from the same split, never a question that is asked.
    Shots are complete: BoolQ's questions without a passage are asked but not used as shots, unless
    none has one.

    Raises UserError for an unseen benchmark.
    """

    def __init__(self, benchmark: Benchmark, train: Sequence[Question]):
        refuse_name(benchmark.name)
        if benchmark.unseen:
            raise UserError(f"{benchmark.name} is an unseen benchmark: never trained on")
        self.name, self.tasks = benchmark.name, 1
        self.benchmark, self.train = benchmark, train
        complete = [i for i, question in enumerate(train) if benchmark.complete(question)]
        self.pool = complete or list(range(len(train)))

    def __len__(self) -> int:
        return len(self.train)

    def episode(self, index: int, rng: np.random.Generator, shots: int, queries: int) -> Episode:
        others = draw(rng, len(self.train), queries + 1)
        asked = [index, *(i for i in others if i != index)][:queries]
        questions = [self.benchmark.pair(self.train[i]) for i in asked]
        # Compared by text, not by index: SocialIQA repeats questions with other choices.
        contexts = {context for context, _ in questions}
        shown = (self.train[self.pool[i]] for i in draw(rng, len(self.pool), shots + queries))
        solved = [self.benchmark.pair(question) for question in shown]
        return Episode(
            task=self.name,
            instruction=self.benchmark.description,
            shots=tuple("".join(pair) for pair in solved if pair[0] not in contexts)[:shots],
            questions=tuple(questions),
            join=after_shots,
        )

    def texts(self) -> Iterator[str]:
        return (self.benchmark.solved(question) for question in self.train)


def after_shots(episode: Episode, question: str) -> str:
    """A benchmark's question after solved shots, without the description, as in
    lm-evaluation-harness."""
    return BETWEEN.join([*episode.shots, question])


def draw(rng: np.random.Generator, size: int, count: int) -> list[int]:
    """`count` distinct indices below `size`, or all of them where there are fewer."""
    return rng.choice(size, min(count, size), replace=False).tolist()
