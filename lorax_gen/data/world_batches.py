"""Batches of the embedded world, as a pure function of (seed, step).

The random generator of a batch is seeded with `[seed, step]`: a resumed run asks for the next step
and gets the batch of an uninterrupted run. Rows are right-padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorax_gen.data.tasks import Task, behind_prompt, in_groups
from lorax_gen.data.tokens import Batch, Encoder, pad_rows, prompt_batch, question_batch
from lorax_gen.data.world import Piece, World, exercise, lesson

LESSON_LENGTH = 7  # tongue, attribute, thing, colon, answer, BOS and EOS


def mixed_tasks(rng: np.random.Generator, tasks: Sequence[Task], count: int) -> list[Task]:
    """`count` tasks, families in equal parts: BatchNorm needs every batch to mix tasks."""
    families = sorted({task.family for task in tasks})
    by_family = {f: [t for t in tasks if t.family == f] for f in families}
    order = [families[i % len(families)] for i in rng.permutation(count)]
    return [by_family[f][rng.integers(len(by_family[f]))] for f in order]


def generator_batch(
    tasks: Sequence[Task],
    cloud: Encoder,
    edge: Encoder,
    *,
    seed: int,
    step: int,
    prompts: int,
    queries: int,
    prompt_length: int,
    question_length: int,
    max_shots: int = 0,
    full_sequence: bool = False,
    answer_length: int | None = None,
) -> Batch:
    """Training batch of the generator: P prompts for the cloud, P * Q bare questions for the edge.

    Row `b` of the questions belongs to prompt `b // Q`.
    """
    rng = np.random.default_rng([seed, step])
    drawn = mixed_tasks(rng, tasks, prompts)
    shots = rng.integers(0, max_shots + 1, prompts)
    texts = [task.prompt(rng, int(k)) for task, k in zip(drawn, shots, strict=True)]
    questions = [
        task.questions[i] for task in drawn for i in rng.integers(0, len(task.questions), queries)
    ]
    return {
        **prompt_batch(cloud, texts, prompt_length),
        **question_batch(edge, questions, question_length, full_sequence, answer_length),
    }


def tuning_batch(
    tasks: Sequence[Task],
    edge: Encoder,
    *,
    seed: int,
    step: int,
    rows: int,
    question_length: int,
    full_sequence: bool = False,
    answer_length: int | None = None,
    prompt_length: int | None = None,
    max_shots: int = 0,
    groups: Sequence[str] = (),
) -> Batch:
    """Training batch of one model: B questions of mixed tasks.

    Args:
      prompt_length: questions are after a prompt of up to so many tokens, as a model reads them
        that has the prompt in its context; None: bare.
      groups: families, as glob patterns, whose rows `group: [B]` marks; none: it is left out.
    """
    rng = np.random.default_rng([seed, step])
    drawn = mixed_tasks(rng, tasks, rows)
    questions = [task.questions[rng.integers(len(task.questions))] for task in drawn]
    length = question_length
    if prompt_length is not None:
        length += prompt_length
        shots = rng.integers(0, max_shots + 1, rows)
        prompts = [task.prompt(rng, int(k)) for task, k in zip(drawn, shots, strict=True)]
        prompt_batch(edge, prompts, prompt_length)  # raises where one is longer
        questions = [
            (f"{prompt} {behind_prompt(question)}", answer)
            for prompt, (question, answer) in zip(prompts, questions, strict=True)
        ]
    batch = question_batch(edge, questions, length, full_sequence, answer_length)
    if groups:
        batch["group"] = np.array([in_groups(task.family, groups) for task in drawn])
    return batch


def document_batch(encoder: Encoder, documents: Sequence[Sequence[Piece]], length: int) -> Batch:
    """`{'tokens', 'answer': [B, T]}` of documents made of pieces; `answer` marks the loss."""
    rows, marks = [], []
    for pieces in documents:
        ids, mark = encoder.ids(""), []
        mark = [False] * len(ids)
        for text, trained in pieces:
            piece = encoder.ids(text)[len(encoder.ids("")) :]
            ids, mark = ids + piece, mark + [trained] * len(piece)
        rows.append([*ids, encoder.end_of_text])
        marks.append([*mark, True])
    return {
        "tokens": pad_rows(rows, length, encoder.pad_id, "a document"),
        "answer": pad_rows(marks, length, False, "a document").astype(bool),
    }


def pretraining_batch(
    world: World,
    encoder: Encoder,
    *,
    seed: int,
    step: int,
    lessons: int,
    exercises: int,
    questions: int,
    length: int,
) -> dict[str, Batch]:
    """Two groups of documents, each padded to its own length: short lessons, long exercises."""
    rng = np.random.default_rng([seed, step])
    groups = {}
    if lessons:
        documents = [lesson(world, rng) for _ in range(lessons)]
        groups["lessons"] = document_batch(encoder, documents, LESSON_LENGTH)
    if exercises:
        documents = [exercise(world, rng, questions) for _ in range(exercises)]
        groups["exercises"] = document_batch(encoder, documents, length)
    return groups
