"""Rows of one's own tasks: loss, choice accuracy, exact match and ROUGE-L, each beside its floors.

    loss              mean negative log-likelihood of the correct output's tokens, in nats
    choice_accuracy   of rows with choices; chance is 1 / number of choices
    exact_match       of greedy answers, without case and white space at the ends
    rouge_l           F-measure of greedy answers, the best of the correct outputs

Floors are what costs nothing: the task's most frequent other output, the input itself, and the
output of another row of the task.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from lorax_gen.data.own_tasks import Item, RowTask
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.evaluation.metrics import choose
from lorax_gen.frames import BETWEEN, Frame
from lorax_gen.inference.choices import encode_items, score_items
from lorax_gen.inference.continuations import continue_texts, room_for


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row, the wording of its task's prompt, and other rows of the task."""

    task: RowTask
    wording: str
    item: Item
    others: tuple[Item, ...]


@dataclasses.dataclass(frozen=True)
class RowCases:
    """Rows and what models read for them, see `answerers.Cases`; `shots` are in each prompt."""

    asked: Sequence[Asked]
    frame: Frame
    shots: int = 0

    def bare(self) -> list[tuple[str, ...]]:
        return [(self.frame.wrap(asked.item.input),) for asked in self.asked]

    def prompts(self) -> list[str]:
        return [self._prompt(asked) for asked in self.asked]

    def prompted(self) -> list[tuple[str, ...]]:
        pairs = zip(self.prompts(), self.asked, strict=True)
        return [(self.frame.prompted(prompt, asked.item.input),) for prompt, asked in pairs]

    def other_prompts(self) -> list[str]:
        """The prompt of the next task."""
        first = {asked.task.name: self._prompt(asked) for asked in reversed(self.asked)}
        if len(first) < 2:
            raise UserError("mode shuffled needs rows of two tasks or more")
        names = list(first)
        following = dict(zip(names, [*names[1:], names[0]], strict=True))
        return [first[following[asked.task.name]] for asked in self.asked]

    def _prompt(self, asked: Asked) -> str:
        shots = (self.frame.shot(i.input, i.outputs[0]) for i in asked.others[: self.shots])
        return BETWEEN.join([asked.wording, *shots])


def ask_rows(tasks: Sequence[RowTask], count: int, seed: int = 0) -> list[Asked]:
    """At most `count` rows, as many of each task as of any other; wordings in turn."""
    rng, drawn = np.random.default_rng(seed), []
    for task in tasks:
        order = rng.permutation(len(task.items)).tolist()
        others = [tuple(task.items[j] for j in order if j != i) for i in order]
        wordings = [task.instructions[n % len(task.instructions)] for n in range(len(order))]
        drawn.append(
            [
                Asked(task, wording, task.items[i], rest)
                for i, wording, rest in zip(order, wordings, others, strict=True)
            ]
        )
    longest = max(map(len, drawn), default=0)
    return [own[n] for n in range(longest) for own in drawn if n < len(own)][:count]


def evaluate_rows(
    answerer: Answerer,
    cases: RowCases,
    *,
    max_new_tokens: int = 64,
    generate: bool = True,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """The metrics of an answerer that apply to the rows, and `n`.

    Args:
      generate: whether greedy answers are generated, for `exact_match` and `rouge_l`.
    """
    asked, contexts = cases.asked, answerer.contexts(cases)
    prompts, adapter = answerer.prompts(cases), answerer.adapter
    if prompts is not None:
        adapter = answerer.specialise(prompts, mesh=mesh)
    separator = cases.frame.separator
    texts = [case.item.choices or case.item.outputs[:1] for case in asked]
    items = encode_items(
        answerer.model,
        [
            (context, tuple(f"{separator}{text}" for text in own))
            for context, own in zip(contexts, texts, strict=True)
        ],
        [case.task.name for case in asked],
    )
    scores = score_items(
        answerer.model, items, adapter=adapter, max_length=answerer.max_length, mesh=mesh
    )
    losses, tokens, right = 0.0, 0, []
    for case, item, score in zip(asked, items, scores, strict=True):
        correct = case.item.answer if case.item.choices else 0
        losses -= float(score.loglikelihoods[correct])
        tokens += len(item.choices[correct][1])
        if case.item.choices:
            right.append(choose(score.loglikelihoods) == correct)
    found = {"n": float(len(asked)), "loss": losses / tokens}
    if right:
        found["choice_accuracy"] = float(np.mean(right))
    if generate:
        encoder = Encoder.of(answerer.model)
        room = room_for(answerer.model, max_new_tokens, answerer.max_length)
        answers = continue_texts(
            answerer.model,
            [encoder.ids(context)[-room:] for (context,) in contexts],
            max_new_tokens=max_new_tokens,
            adapter=adapter,
            mesh=mesh,
        )
        found |= text_scores(answers, [case.item.outputs for case in asked])
    return found


def floors(asked: Sequence[Asked]) -> dict[str, float]:
    """`exact_match` and `rouge_l` of answers without a model, by `floor/metric`, and `chance`."""
    outputs = [case.item.outputs for case in asked]
    others = [[item.outputs[0] for item in case.others] for case in asked]
    answers = {
        "majority": [Counter(own).most_common(1)[0][0] if own else "" for own in others],
        "input": [case.item.input for case in asked],
        "example": [own[0] if own else "" for own in others],
    }
    found = {
        f"{name}/{metric}": score
        for name, texts in answers.items()
        for metric, score in text_scores(texts, outputs).items()
    }
    chances = [1 / len(case.item.choices) for case in asked if case.item.choices]
    return found | ({"chance": float(np.mean(chances))} if chances else {})


def text_scores(answers: Sequence[str], outputs: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means of exact match and of ROUGE-L over answers and their correct outputs."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer, plain = RougeScorer(["rougeL"]), lambda text: text.strip().lower()
    exact = [plain(answer) in map(plain, own) for answer, own in zip(answers, outputs, strict=True)]
    rouge = [
        scorer.score_multi(list(own), answer)["rougeL"].fmeasure
        for answer, own in zip(answers, outputs, strict=True)
    ]
    return {"exact_match": float(np.mean(exact)), "rouge_l": float(np.mean(rouge))}
