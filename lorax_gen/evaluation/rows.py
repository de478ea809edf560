"""Rows of one's own tasks: loss, choice accuracy, exact match and ROUGE-L; see `floors` for floors.

    loss                  negative log-likelihood per token of the correct outputs, in nats
    choice_accuracy       of rows with choices: the correct one has the highest log-likelihood
    choice_accuracy_norm  the same with log-likelihoods per character of the choice
    exact_match           of greedy answers, without case and white space at the ends
    rouge_l               F-measure of greedy answers, in words: letters and digits of any script

Of several correct outputs the best counts: the likeliest per token, the one that is matched, the
one with the highest F-measure. Dims: N rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lorax_gen.cost import mean_flops
from lorax_gen.data.own_tasks import Item, RowTask
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import Answerer, Prompt
from lorax_gen.evaluation.item_log import ItemLog, ItemRow, digest
from lorax_gen.evaluation.metrics import (
    choose,
    choose_normalised,
    exact_match,
    rouge_l,
    standard_error,
)
from lorax_gen.evaluation.progress import show, ticker
from lorax_gen.files import AnyPath
from lorax_gen.frames import BETWEEN, Frame
from lorax_gen.inference.choices import (
    TOKENS_PER_BATCH,
    ChoiceItem,
    ChoiceScores,
    encode_items,
    score_items,
)
from lorax_gen.inference.continuations import continue_texts, room_for

METRICS = ("loss", "choice_accuracy", "choice_accuracy_norm", "exact_match", "rouge_l")
# What the file has of a row: first what its log-likelihoods say, later what its answer does.
SCORED = {
    "nll", "tokens", "context_tokens", "truncated", "prompt_tokens", "prompt_truncated"
}  # fmt: skip
ANSWERED = {"exact_match", "rouge_l"}
OTHERS = 16  # other rows that are kept with each row, for shots
LONGEST = 512  # new tokens of an answer, where nothing else is said


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row, the wording of its task's prompt, and other rows of the task with other inputs."""

    task: RowTask
    wording: str
    item: Item
    others: tuple[Item, ...]


@dataclasses.dataclass(frozen=True)
class RowCases:
    """Rows and what models read for them, see `answerers.Cases`.

    Attributes:
      shots: other rows in each prompt, fewer where the task has fewer.

    Raises UserError where more shots are asked for than `ask_rows` kept.
    """

    asked: Sequence[Asked]
    frame: Frame
    shots: int = 0

    def __post_init__(self):
        for asked in (asked for asked in self.asked if len(asked.others) < self.shots):
            there = len({item.input for item in asked.task.items} - {asked.item.input})
            if len(asked.others) < min(self.shots, there):
                raise UserError(
                    f"{self.shots} shots, but only {len(asked.others)} of {there} other rows are "
                    "kept; ask for more (ask_rows, others)"
                )

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

    def first(self, count: int) -> RowCases:
        """The first rows."""
        return dataclasses.replace(self, asked=self.asked[:count])

    def _prompt(self, asked: Asked) -> str:
        shots = (self.frame.shot(i.input, i.outputs[0]) for i in asked.others[: self.shots])
        return BETWEEN.join([asked.wording, *shots])


def ask_rows(
    tasks: Sequence[RowTask], count: int | None = None, seed: int = 0, others: int = OTHERS
) -> list[Asked]:
    """At most `count` rows, as many of each task as of any other; wordings in turn.

    Args:
      count: None: all rows.
      seed: of the order of a task's rows.
      others: other rows that are kept with each row, at most.
    """
    rng, drawn = np.random.default_rng(seed), []
    for task in tasks:
        ring = [task.items[i] for i in rng.permutation(len(task.items)).tolist()]
        wordings = task.instructions
        drawn.append(
            [
                Asked(task, wordings[n % len(wordings)], item, following(ring, n, others))
                for n, item in enumerate(ring[:count])
            ]
        )
    longest = max(map(len, drawn), default=0)
    return [own[n] for n in range(longest) for own in drawn if n < len(own)][:count]


def following(ring: Sequence[Item], n: int, most: int) -> tuple[Item, ...]:
    """The rows after row n, then those before it; no input twice, nor that of row n."""
    found: dict[str, Item | None] = {ring[n].input: None}
    for k in range(1, len(ring)):
        if len(found) > most:
            break
        item = ring[(n + k) % len(ring)]
        found.setdefault(item.input, item)
    return tuple(item for item in found.values() if item is not None)


# --- evaluation ----------------------------------------------------------------------------------


def evaluate_rows(
    answerer: Answerer,
    cases: RowCases,
    *,
    max_new_tokens: int | None = None,
    generate: bool = True,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """The metrics of an answerer that apply to the rows, and `n`.

    Args:
      max_new_tokens, generate, mesh: see `row_results`.

    Raises UserError as `row_results`.
    """
    rows = row_results(answerer, cases, max_new_tokens=max_new_tokens, generate=generate, mesh=mesh)
    cells = cells_of(rows)
    return {"n": float(len(rows))} | {metric: own["score"] for metric, own in cells.items()}


def row_results(
    answerer: Answerer,
    cases: RowCases,
    *,
    max_new_tokens: int | None = None,
    generate: bool = True,
    path: AnyPath | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    mesh: Mesh | None = None,
    name: str = "rows",
    bar: Any = None,
) -> list[ItemRow]:
    """The result of each row.

    Batches are made of all rows, also where the file has some: a resumed evaluation has the results
    of one that nothing interrupted.

    Args:
      max_new_tokens: of an answer; None: as many as the longest correct output has, at most 512.
      generate: whether greedy answers are generated, for `exact_match` and `rouge_l`.
      path: of a JSONL file of the rows' results, for one process; those that it has are not
        computed again.
      mesh: rows are sharded over its batch axes, weights as in training.
      name, bar: a tqdm bar, and what it calls the rows.

    Raises UserError where there are no rows, the answerer lacks what it needs, the file is of
    another run, or a log-likelihood is not finite.
    """
    asked, separator = cases.asked, cases.frame.separator
    if not asked:
        raise UserError("no rows to evaluate; give at least one")
    contexts, prompts = answerer.contexts(cases), answerer.prompts(cases)
    texts = [case.item.choices or case.item.outputs for case in asked]
    items = encode_items(
        answerer.model,
        [
            (context, tuple(f"{separator}{text}" for text in own))
            for context, own in zip(contexts, texts, strict=True)
        ],
        [f"{case.task.name}, {case.item.input[:40]!r}" for case in asked],
    )
    longest = max(len(continuation) for item in items for _, continuation in item.choices)
    most, stop = max_new_tokens or min(longest, LONGEST), stop_of(asked)
    rows: list[ItemRow] = [{} for _ in asked]
    log = None
    if path is not None:
        log = ItemLog(path, describe(cases, answerer, most, stop))
        for row in log.rows:
            i = row.get("index")
            if type(i) is not int or not 0 <= i < len(rows) or not is_result(row):
                raise UserError(f"{path} holds a row {i} of another run; remove the file")
            rows[i] |= row
    unscored = [i for i, row in enumerate(rows) if "nll" not in row]
    unanswered = [i for i, row in enumerate(rows) if generate and "answer" not in row]
    left, title = sorted({*unscored, *unanswered}), f"{name}, {answerer.name}"
    options: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "mesh": mesh}

    def record(indices: Sequence[int], found: Sequence[ItemRow]) -> None:
        new = [{"index": i, **row} for i, row in zip(indices, found, strict=True)]
        for row in new:
            rows[row["index"]] |= row
        if log is not None:
            log.append(new)

    adapter = answerer.adapter
    if prompts is not None:
        show(bar, f"{title}: prompts", len(left))
        adapter = answerer.specialise(prompts, wanted=left, progress=ticker(bar), **options)

    def on_scores(indices: list[int], scores: list[ChoiceScores]) -> None:
        record(
            indices,
            [
                scored(asked[i], items[i], score, None if prompts is None else prompts[i])
                for i, score in zip(indices, scores, strict=True)
            ],
        )

    def on_answers(indices: list[int], answers: list[str]) -> None:
        outputs = [asked[i].item.outputs for i in indices]
        record(indices, [answered(*pair) for pair in zip(answers, outputs, strict=True)])
        ticker(bar)(len(indices))

    show(bar, title, len(rows), len(rows) - len(unscored))
    score_items(
        answerer.model,
        items,
        adapter=adapter,
        max_length=answerer.max_length,
        wanted=unscored,
        progress=ticker(bar),
        on_batch=on_scores,
        **options,
    )
    if generate:
        show(bar, f"{title}: answers", len(rows), len(rows) - len(unanswered))
        encoder = Encoder.of(answerer.model)
        room = room_for(answerer.model, most, answerer.max_length)
        continue_texts(
            answerer.model,
            [encoder.ids(context)[-room:] for (context,) in contexts],
            max_new_tokens=most,
            adapter=adapter,
            wanted=unanswered,
            on_batch=on_answers,
            stop=stop,
            **options,
        )
    if log is not None:
        log.flush()
    return rows


def is_result(row: ItemRow) -> bool:
    """Whether a row of the file is what `scored` or `answered` makes."""
    numbers = {key for key, value in row.items() if isinstance(value, int | float)}
    return numbers >= SCORED or (numbers >= ANSWERED and isinstance(row.get("answer"), str))


def stop_of(asked: Sequence[Asked]) -> tuple[str, ...]:
    """What ends an answer besides the end of text, which an edge without training does not know: a
    line end where every correct output is one line, else an empty line where none has one."""
    outputs = [output for case in asked for output in case.item.outputs]
    return next(
        ((mark,) for mark in ("\n", BETWEEN) if not any(mark in text for text in outputs)), ()
    )


def scored(case: Asked, item: ChoiceItem, score: ChoiceScores, prompt: Prompt | None) -> ItemRow:
    """What a row's log-likelihoods say."""
    found, choices = score.loglikelihoods, case.item.choices
    if not np.isfinite(found).all():
        raise UserError(
            f"{item.name}: a log-likelihood is {found.sum()}; the model overflows in its dtype, or "
            "its weights are broken"
        )
    tokens = np.array([len(continuation) for _, continuation in item.choices])
    correct = case.item.answer if choices else int(np.argmax(found / tokens))
    row: ItemRow = {
        "task": case.task.name,
        "loglikelihoods": found.tolist(),
        "nll": -float(found[correct]),
        "tokens": int(tokens[correct]),
        "context_tokens": score.context_tokens,
        "truncated": score.truncated,
        "prompt_tokens": len(prompt.ids) if prompt else 0,
        "prompt_truncated": prompt.truncated if prompt else 0,
    }
    if choices:
        row["choice_accuracy"] = int(choose(found) == correct)
        row["choice_accuracy_norm"] = int(choose_normalised(found, choices) == correct)
    return row


def answered(answer: str, outputs: Sequence[str]) -> ItemRow:
    """What a row's greedy answer says."""
    return {
        "answer": answer,
        "exact_match": int(exact_match(answer, outputs)),
        "rouge_l": rouge_l(answer, outputs),
    }


def describe(cases: RowCases, answerer: Answerer, most: int, stop: Sequence[str]) -> ItemRow:
    """Everything that the results of single rows depend on, as plain values."""
    found = {
        "shots": cases.shots,
        "n": len(cases.asked),
        "rows": digest([[case.task.name, dataclasses.asdict(case.item)] for case in cases.asked]),
        "frame": dataclasses.asdict(cases.frame),
        "max_new_tokens": most,
        "stop": list(stop),
        **answerer.identity(),
    }
    if answerer.reads_prompts:
        found["prompts"] = digest(cases.prompts())
    return found


def cells_of(rows: Sequence[ItemRow]) -> dict[str, dict[str, Any]]:
    """`score`, `stderr` and `n` of each metric that the rows have.

    The loss is a ratio of sums over rows; its standard error is that of its residuals.
    """
    nll, tokens = (np.array([row[key] for row in rows], float) for key in ("nll", "tokens"))
    loss = float(nll.sum() / tokens.sum())
    error = standard_error((nll - loss * tokens) / tokens.mean())
    cells = {"loss": {"score": loss, "stderr": error, "n": len(rows)}}
    for metric in METRICS[1:]:
        values = np.array([row[metric] for row in rows if metric in row], float)
        if len(values):
            cells[metric] = {
                "score": float(values.mean()),
                "stderr": standard_error(values),
                "n": len(values),
            }
    return cells


def costs_of(answerer: Answerer, rows: Sequence[ItemRow]) -> dict[str, float]:
    """Means over rows of what the models read and compute, and how many rows were truncated."""
    seen, read = ([row[key] for row in rows] for key in ("context_tokens", "prompt_tokens"))
    return {
        "context_tokens": float(np.mean(seen)),
        "prompt_tokens": float(np.mean(read)),
        "flops": mean_flops(seen, answerer.macs),
        "cloud_flops": mean_flops(read, answerer.prompt_macs),
        "truncated": sum(row["truncated"] > 0 for row in rows),
        "prompts_truncated": sum(row["prompt_truncated"] > 0 for row in rows),
    }
