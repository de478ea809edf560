"""One answerer on one benchmark: accuracies, costs, and a file of single items.

An interrupted run resumes from its file.

Dims: N items.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lorax_gen.cost import mean_flops
from lorax_gen.data.benchmarks import (
    HARNESS_SEED,
    Benchmark,
    few_shot,
    harness_shots,
    system_prompt,
)
from lorax_gen.data.questions import Question
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import Answerer, Prompt
from lorax_gen.evaluation.item_log import ItemLog, ItemRow, digest
from lorax_gen.evaluation.metrics import choose, choose_normalised, standard_error
from lorax_gen.evaluation.progress import show, ticker
from lorax_gen.files import AnyPath, to_path
from lorax_gen.frames import PLAIN, Frame
from lorax_gen.inference.choices import TOKENS_PER_BATCH, ChoiceScores, encode_items, score_items
from lorax_gen.mesh import hosts

NUMBERS = ("acc", "acc_norm", "context_tokens", "truncated", "prompt_tokens", "prompt_truncated")


@dataclasses.dataclass(frozen=True)
class Result:
    """An answerer's result on a benchmark; means are over its items.

    Attributes:
      n: items; `scored` of them in this call, the others were in the file.
      acc: share of items whose correct choice has the highest log-likelihood; acc_norm: per
        character of its text. Their standard errors are sample deviation / sqrt(n).
      truncated: items whose context was truncated to fit the edge; prompts_truncated: items whose
        prompt was truncated to fit the cloud.
      context_tokens: mean read by the edge before the choices; prompt_tokens: by the cloud.
      flops: mean of the edge for a context, up to the first token of an answer; cloud_flops: of the
        cloud and the generator, for one prompt.
      seconds: of this call, compilation included.
    """

    benchmark: str
    answerer: str
    shots: int
    n: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    truncated: int
    prompts_truncated: int
    context_tokens: float
    prompt_tokens: float
    flops: float
    cloud_flops: float
    scored: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class BenchmarkCases:
    """The questions of a benchmark, see `answerers.Cases`.

    Attributes:
      train: questions that shots are drawn from, `shots` for each question.
      seed: of the shots; with lm-evaluation-harness's seed they are the same as there.
      other: the benchmark whose prompts the control reads, and its training questions.
      frame: around each question, unless it leaves benchmarks as they are (`Frame.benchmarks`). In
        the plain frame all texts are those of lm-evaluation-harness.
    """

    benchmark: Benchmark
    questions: Sequence[Question]
    train: Sequence[Question] = ()
    shots: int = 0
    seed: int = HARNESS_SEED
    other: tuple[Benchmark, Sequence[Question]] | None = None
    frame: Frame = PLAIN

    def __post_init__(self):
        if not self.frame.benchmarks:
            object.__setattr__(self, "frame", PLAIN)

    def bare(self) -> list[tuple[str, ...]]:
        return [tuple(map(self.frame.wrap, self.benchmark.contexts(q))) for q in self.questions]

    def prompted(self) -> list[tuple[str, ...]]:
        """After solved shots, as in lm-evaluation-harness."""
        drawn = self._draw(self.benchmark, self.train)
        return [
            few_shot(self.benchmark, shots, question, self.frame)
            for shots, question in zip(drawn, self.questions, strict=True)
        ]

    def prompts(self) -> list[str]:
        """The description of the task, then solved shots drawn for each question."""
        return self._prompts(self.benchmark, self.train)

    def other_prompts(self) -> list[str]:
        if self.other is None or self.other[0].name == self.benchmark.name:
            raise UserError("mode shuffled needs another benchmark, whose prompts are read")
        return self._prompts(*self.other)

    def continuations(self, question: Question) -> tuple[str, ...]:
        """The text that is scored, one per choice, with the frame's separator before it."""
        return tuple(
            f"{self.frame.separator}{text.removeprefix(' ')}"
            for text in self.benchmark.continuations(question)
        )

    def first(self, count: int) -> BenchmarkCases:
        """The first questions."""
        return dataclasses.replace(self, questions=self.questions[:count])

    def _prompts(self, benchmark: Benchmark, train: Sequence[Question]) -> list[str]:
        drawn = self._draw(benchmark, train)
        return [system_prompt(benchmark, shots, self.frame) for shots in drawn]

    def _draw(self, benchmark: Benchmark, train: Sequence[Question]) -> list[list[Question]]:
        return harness_shots(benchmark, train, self.shots, self.questions, self.seed)


def evaluate_benchmark(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answerer: Answerer,
    *,
    shots: int = 5,
    seed: int = HARNESS_SEED,
    train: Sequence[Question] = (),
    other: tuple[Benchmark, Sequence[Question]] | None = None,
    frame: Frame = PLAIN,
    path: AnyPath | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    mesh: Mesh | None = None,
    bar: Any = None,
) -> Result:
    """Scores all questions that the file lacks, and summarises all items.

    Batches are made of all questions, also where the file has some: a resumed evaluation has the
    scores of one that nothing interrupted, bit for bit.

    Args:
      shots, seed, train, other, frame: see `BenchmarkCases`; shots for answerers that read prompts.
      path: of the file of single items, see `ItemLog`; None: no file, nothing to resume.
      mesh: rows are sharded over its batch axes, weights as in training.
      bar: a tqdm bar, whose total is set to the number of prompts, then of questions.

    With several processes all of them call this, and the first one writes.

    Raises UserError where the answerer lacks what it needs, the file is of another run, or a
    log-likelihood is not finite.
    """
    begun = time.perf_counter()
    if not questions:
        raise UserError(f"{benchmark.name} has no questions to score")
    if shots < 0:
        raise UserError(f"shots={shots}: choose 0 or more")
    shots = shots if answerer.reads_prompts else 0
    cases = BenchmarkCases(benchmark, questions, train, shots, seed, other, frame)
    log = None
    if path is not None:
        log = open_log(to_path(path), describe(cases, answerer), questions)
    numbers = known_numbers(log, len(questions))
    left = np.flatnonzero(np.isnan(numbers).any(1)).tolist()

    prompts, adapter = answerer.prompts(cases), answerer.adapter
    if prompts is not None:
        show(bar, f"{benchmark.name}, {answerer.name}: prompts", len(left))
        adapter = answerer.specialise(
            prompts,
            tokens_per_batch=tokens_per_batch,
            wanted=left,
            mesh=mesh,
            progress=ticker(bar),
        )

    def record(indices: list[int], scores: list[ChoiceScores]) -> None:
        rows = []
        for i, score in zip(indices, scores, strict=True):
            prompt = None if prompts is None else prompts[i]
            rows.append(item_row(benchmark, i, questions[i], score, prompt))
            numbers[i] = [rows[-1][name] for name in NUMBERS]
        if log is not None:
            log.append(rows)

    show(bar, f"{benchmark.name}, {answerer.name}", len(questions), len(questions) - len(left))
    contexts = answerer.contexts(cases)
    score_items(
        answerer.model,
        encode_items(
            answerer.model,
            [
                (context, cases.continuations(question))
                for context, question in zip(contexts, questions, strict=True)
            ],
            [question.id for question in questions],
        ),
        adapter=adapter,
        max_length=answerer.max_length,
        tokens_per_batch=tokens_per_batch,
        wanted=left,
        mesh=mesh,
        progress=ticker(bar),
        on_batch=record,
    )
    if log is not None:
        log.flush()
    return summary(cases, answerer, numbers, len(left), time.perf_counter() - begun)


def item_row(
    benchmark: Benchmark,
    index: int,
    question: Question,
    score: ChoiceScores,
    prompt: Prompt | None,
) -> ItemRow:
    """The row of an item in the file."""
    if not np.isfinite(score.loglikelihoods).all():
        raise UserError(
            f"{question.id}: a log-likelihood is {score.loglikelihoods.sum()}; the model overflows "
            "in its dtype, or its weights are broken"
        )
    texts = [text.removeprefix(" ") for text in benchmark.continuations(question)]
    pred, pred_norm = choose(score.loglikelihoods), choose_normalised(score.loglikelihoods, texts)
    return {
        "index": index,
        "id": question.id,
        "loglikelihoods": score.loglikelihoods.tolist(),
        "greedy": score.greedy.tolist(),
        "answer": question.answer,
        "pred": pred,
        "pred_norm": pred_norm,
        "acc": int(pred == question.answer),
        "acc_norm": int(pred_norm == question.answer),
        "context_tokens": score.context_tokens,
        "truncated": score.truncated,
        "prompt_tokens": len(prompt.ids) if prompt else 0,
        "prompt_truncated": prompt.truncated if prompt else 0,
    }


def summary(
    cases: BenchmarkCases, answerer: Answerer, numbers: np.ndarray, scored: int, seconds: float
) -> Result:
    """The result from the numbers `[N, len(NUMBERS)]` of all items."""
    columns = dict(zip(NUMBERS, numbers.T, strict=True))
    return Result(
        benchmark=cases.benchmark.name,
        answerer=answerer.name,
        shots=cases.shots,
        n=len(numbers),
        acc=float(columns["acc"].mean()),
        acc_stderr=standard_error(columns["acc"]),
        acc_norm=float(columns["acc_norm"].mean()),
        acc_norm_stderr=standard_error(columns["acc_norm"]),
        truncated=int((columns["truncated"] > 0).sum()),
        prompts_truncated=int((columns["prompt_truncated"] > 0).sum()),
        context_tokens=float(columns["context_tokens"].mean()),
        prompt_tokens=float(columns["prompt_tokens"].mean()),
        flops=mean_flops(columns["context_tokens"], answerer.macs),
        cloud_flops=mean_flops(columns["prompt_tokens"], answerer.prompt_macs),
        scored=scored,
        seconds=seconds,
    )


# --- the file ---------------------------------------------------------------------------------


def describe(cases: BenchmarkCases, answerer: Answerer) -> ItemRow:
    """Everything that the scores of single items depend on, as plain values."""
    benchmark, questions = cases.benchmark, cases.questions
    found: ItemRow = {
        "benchmark": benchmark.name,
        "shots": cases.shots,
        "seed": cases.seed,
        "n": len(questions),
        "questions": digest([benchmark.template, *map(dataclasses.asdict, questions)]),
        **answerer.identity(),
    }
    if cases.frame != PLAIN:
        found["frame"] = dataclasses.asdict(cases.frame)
    shuffled = cases.other if answerer.name == "shuffled" else None
    if shuffled is not None:
        found["prompts_of"] = shuffled[0].name
    if answerer.reads_prompts:
        source, train = shuffled or (benchmark, cases.train)
        found["description"] = source.description
        found["train"] = digest(list(map(dataclasses.asdict, train)))
    return found


def open_log(path: AnyPath, settings: ItemRow, questions: Sequence[Question]) -> ItemLog | None:
    """The file, in the first process; None in others.

    Raises UserError, in all of them, where it is of another run or holds other items.
    """
    opened: list[ItemLog] = []

    def task() -> None:
        log = ItemLog(path, settings)
        for row in log.rows:
            i = row.get("index")
            known = (
                isinstance(i, int) and 0 <= i < len(questions) and row.get("id") == questions[i].id
            )
            if not known or not set(NUMBERS) <= set(row):
                raise UserError(f"{path} holds an item {i} of another run; remove the file")
        opened.append(log)

    hosts.on_first(task)
    return opened[0] if opened else None


def known_numbers(log: ItemLog | None, count: int) -> np.ndarray:
    """`[N, len(NUMBERS)]` of the items in the file, NaN for others; the same in all processes."""
    numbers = np.full((count, len(NUMBERS)), np.nan)
    for row in log.rows if log is not None else ():
        numbers[row["index"]] = [row[name] for name in NUMBERS]
    return np.array(hosts.from_first(numbers))
