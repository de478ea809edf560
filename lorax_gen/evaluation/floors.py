"""Floors of rows: the scores of answers that need no model.

    majority    the most frequent output of the half of the task's rows that the row is not in
    input       the input itself
    example     the output of another row of the task

None depends on the row's own output.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lorax_gen.data.own_tasks import RowTask
from lorax_gen.evaluation.rows import Asked, answered

FLOORS = ("majority", "input", "example")


def floors(asked: Sequence[Asked]) -> dict[str, float]:
    """Metrics of answers without a model, by `floor/metric`; and `chance`, the mean of 1 / number
    of choices, where rows have choices."""
    tasks = {id(case.task): case.task for case in asked}
    frequent = {key: majorities(task) for key, task in tasks.items()}
    answers = {
        "majority": [frequent[id(case.task)][case.item.input] for case in asked],
        "input": [case.item.input for case in asked],
        "example": [case.others[0].outputs[0] if case.others else "" for case in asked],
    }
    chosen = [case.item for case in asked if case.item.choices]
    found = {}
    for name, texts in answers.items():
        results = [
            answered(text, case.item.outputs) for text, case in zip(texts, asked, strict=True)
        ]
        for metric in ("exact_match", "rouge_l"):
            found[f"{name}/{metric}"] = float(np.mean([row[metric] for row in results]))
        if chosen:
            correct = [
                text in case.item.outputs
                for text, case in zip(texts, asked, strict=True)
                if case.item.choices
            ]
            found[f"{name}/choice_accuracy"] = float(np.mean(correct))
    chances = [1 / len(item.choices) for item in chosen]
    return found | ({"chance": float(np.mean(chances))} if chances else {})


def majorities(task: RowTask) -> dict[str, str]:
    """For each input the most frequent output of the half of the task that it is not in.

    Of all other rows the most frequent output would never be right where two outputs are equally
    frequent: without the row itself its own is the rarer one.
    """
    inputs = sorted(
        {item.input for item in task.items}, key=lambda text: hashlib.sha256(text.encode()).digest()
    )
    half = {text: n % 2 for n, text in enumerate(inputs)}
    counts: tuple[Counter, Counter] = Counter(), Counter()
    for item in task.items:
        counts[half[item.input]][item.outputs[0]] += 1
    most = [own.most_common(1)[0][0] if own else "" for own in counts]
    return {text: most[1 - own] for text, own in half.items()}
