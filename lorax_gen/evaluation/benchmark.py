"""One benchmark, scored in one mode: accuracies, what they cost, and a file of single items.

    plain      the bare question
    icl        the question behind solved shots, as lm-evaluation-harness puts it
    card       the bare question, to an edge that a card has been merged into
    lora_gen   the bare question; a system prompt with shots of the item's own goes to the cloud,
               which generates the LoRA that the edge answers this item with

and controls, which are `lora_gen` but for what the cloud reads:

    shuffled   the system prompt of another benchmark, with shots of that one
    empty      nothing
    random     as many random tokens as the item's own prompt has

An interrupted run goes on where its file ends.

Dimensions: N items, C choices of an item.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from lorax_gen.config import to_dict
from lorax_gen.cost import generator_macs, mean_flops, prefill_macs
from lorax_gen.data.benchmarks import (
    HARNESS_SEED,
    Benchmark,
    few_shot,
    harness_shots,
    system_prompt,
)
from lorax_gen.data.questions import Question
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.evaluation.item_log import ItemLog, Row, digest
from lorax_gen.evaluation.metrics import choose, choose_normalised, standard_error
from lorax_gen.evaluation.system import System, identity
from lorax_gen.inference.cards import gates_of_prompts
from lorax_gen.inference.choices import TOKENS_PER_BATCH, ChoiceScores, encode_items, score_items
from lorax_gen.mesh import hosts
from lorax_gen.models.model import Model
from lorax_gen.system import gated_pool
from lorax_gen.tensors import tree_hash

Mode = Literal["plain", "icl", "card", "lora_gen", "shuffled", "empty", "random"]
BY_CLOUD = ("lora_gen", "shuffled", "empty", "random")
WITH_SHOTS = ("icl", "lora_gen", "shuffled", "random")
NUMBERS = ("acc", "acc_norm", "context_tokens", "truncated", "prompt_tokens", "prompt_truncated")

Ids = list[int]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How questions are put."""

    mode: Mode = "plain"
    """What the edge and the cloud see of them; see `evaluation.benchmark`."""
    shots: int = 5
    """Solved questions before each, in the modes that have any."""
    seed: int = HARNESS_SEED
    """Of the shots, which at lm-evaluation-harness's seed are those that it draws."""
    bos: bool | None = None
    """Whether what the edge reads begins with BOS; None: for the Gemmas, as the paper has it."""

    def __post_init__(self):
        if self.mode not in (known := Mode.__args__):
            raise UserError(f"unknown mode {self.mode!r}; choose one of {', '.join(known)}")
        if self.shots < 0:
            raise UserError(f"shots={self.shots}: choose 0 or more")
        if self.mode not in WITH_SHOTS:
            object.__setattr__(self, "shots", 0)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a benchmark says of a system in one setting; means are over its items.

    Attributes:
      n: items; `scored` of them by this call, the others were in the file.
      acc: share of items whose right choice has the highest log-likelihood; acc_norm: per
        character of its text. Their standard errors are sample deviation / sqrt(n).
      truncated: items whose context was longer than the edge; prompts_truncated: the same of their
        prompts and the cloud.
      context_tokens: mean, before the choices, that the edge reads; prompt_tokens: the cloud.
      flops: mean, of the edge reading a context up to the first token of an answer; cloud_flops: of
        the cloud and the generator, for one prompt.
      seconds: that this call took, compiling included.
    """

    benchmark: str
    mode: str
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


def evaluate_benchmark(
    benchmark: Benchmark,
    questions: Sequence[Question],
    setting: Setting,
    system: System,
    *,
    train: Sequence[Question] = (),
    other: tuple[Benchmark, Sequence[Question]] | None = None,
    path: Path | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    mesh: Mesh | None = None,
    bar: Any = None,
) -> Result:
    """Scores all questions that the file does not have yet, and sums all of them up.

    Args:
      train: where shots are drawn from.
      other: for `shuffled`: the benchmark whose prompts are read, and its training questions.
      path: of the file of single items, see `ItemLog`; None: no file, nothing to resume.
      mesh: rows are split over its batch axes, weights as training splits them.
      bar: a tqdm bar, which is set to the number of prompts, then of questions.

    Over several processes all call this, and the first one writes.

    Raises UserError where a mode lacks what it needs, the file is of another run, or a
    log-likelihood is not finite.
    """
    begun = time.perf_counter()
    if not questions:
        raise UserError(f"{benchmark.name} has no questions to score")
    log = None
    if path is not None:
        settings = describe(benchmark, questions, setting, system, train, other)
        log = open_log(Path(path), settings, questions)
    numbers = known_numbers(log, len(questions))
    left = np.flatnonzero(np.isnan(numbers).any(1)).tolist()

    prompts = prompts_of(benchmark, questions, setting, system, train, other)
    adapter = None
    if prompts is not None:
        show(bar, f"{benchmark.name}, prompts", len(left))
        gates = gates_of_prompts(
            [prompts[i].ids for i in left],
            system.cloud,
            system.edge.config,
            system.generator,
            tokens_per_batch=tokens_per_batch,
            mesh=mesh,
            progress=advance(bar),
        )
        generator = system.generator
        adapter = gated_pool(generator.params["pool"], gates, generator.config)

    def record(indices: list[int], scores: list[ChoiceScores]) -> None:
        rows = []
        for i, score in zip((left[index] for index in indices), scores, strict=True):
            rows.append(item_row(benchmark, i, questions[i], score, prompts and prompts[i]))
            numbers[i] = [rows[-1][name] for name in NUMBERS]
        if log is not None:
            log.append(rows)

    show(bar, benchmark.name, len(questions), len(questions) - len(left))
    contexts = contexts_of(benchmark, questions, setting, train)
    score_items(
        system.edge,
        encode_items(
            system.edge,
            [(contexts[i], benchmark.continuations(questions[i])) for i in left],
            [questions[i].id for i in left],
            bos=setting.bos,
        ),
        adapter=adapter,
        max_length=system.max_length,
        tokens_per_batch=tokens_per_batch,
        mesh=mesh,
        progress=advance(bar),
        on_batch=record,
    )
    return summary(benchmark, setting, system, numbers, len(left), time.perf_counter() - begun)


def item_row(
    benchmark: Benchmark,
    index: int,
    question: Question,
    score: ChoiceScores,
    prompt: Prompt | None,
) -> Row:
    """What the file says of an item."""
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
    benchmark: Benchmark,
    setting: Setting,
    system: System,
    numbers: np.ndarray,
    scored: int,
    seconds: float,
) -> Result:
    """The result of numbers `[N, len(NUMBERS)]` of all items."""
    columns = dict(zip(NUMBERS, numbers.T, strict=True))
    cloud_flops = 0.0
    if setting.mode in BY_CLOUD:
        spec = system.generator.spec(system.cloud.config, system.edge.config)
        cloud_flops = mean_flops(columns["prompt_tokens"], partial(generator_macs, spec))
    return Result(
        benchmark=benchmark.name,
        mode=setting.mode,
        shots=setting.shots,
        n=len(numbers),
        acc=float(columns["acc"].mean()),
        acc_stderr=standard_error(columns["acc"]),
        acc_norm=float(columns["acc_norm"].mean()),
        acc_norm_stderr=standard_error(columns["acc_norm"]),
        truncated=int((columns["truncated"] > 0).sum()),
        prompts_truncated=int((columns["prompt_truncated"] > 0).sum()),
        context_tokens=float(columns["context_tokens"].mean()),
        prompt_tokens=float(columns["prompt_tokens"].mean()),
        flops=mean_flops(
            columns["context_tokens"], partial(prefill_macs, system.edge.config, logits=1)
        ),
        cloud_flops=cloud_flops,
        scored=scored,
        seconds=seconds,
    )


# --- what is read --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the cloud reads: token ids, of which `truncated` are cut off on the left."""

    ids: Ids
    truncated: int = 0


def contexts_of(
    benchmark: Benchmark,
    questions: Sequence[Question],
    setting: Setting,
    train: Sequence[Question],
) -> list[tuple[str, ...]]:
    """What the edge reads before the choices of each question."""
    shots = setting.shots if setting.mode == "icl" else 0
    drawn = harness_shots(benchmark, train, shots, questions, setting.seed)
    return [few_shot(benchmark, own, q) for own, q in zip(drawn, questions, strict=True)]


def prompts_of(
    benchmark: Benchmark,
    questions: Sequence[Question],
    setting: Setting,
    system: System,
    train: Sequence[Question],
    other: tuple[Benchmark, Sequence[Question]] | None,
) -> list[Prompt] | None:
    """What the cloud reads for each question; None in modes without a cloud."""
    if setting.mode not in BY_CLOUD:
        return None
    if system.cloud is None or system.generator is None:
        raise UserError(f"mode {setting.mode} needs a cloud model and a generator")
    if setting.mode == "shuffled":
        if other is None or other[0].name == benchmark.name:
            raise UserError("mode shuffled needs another benchmark, whose prompts are read")
        benchmark, train = other
    encoder = Encoder.of(system.cloud)
    if setting.mode == "empty":
        return [Prompt(encoder.ids(""))] * len(questions)
    limit, prompts = system.prompt_room, []
    for i, shots in enumerate(
        harness_shots(benchmark, train, setting.shots, questions, setting.seed)
    ):
        ids = encoder.ids(system_prompt(benchmark, shots))
        if setting.mode == "random":
            ids = random_ids(system.cloud, ids, np.random.default_rng([setting.seed, i]))
        prompts.append(Prompt(ids[-limit:], max(len(ids) - limit, 0)))
    return prompts


def random_ids(model: Model, ids: Ids, rng: np.random.Generator) -> Ids:
    """As many ids, drawn from all that are not special; those that are special stay."""
    special = set(model.tokenizer.all_special_ids)
    known = min(len(model.tokenizer), model.config.vocab_size)
    choices = np.setdiff1d(np.arange(known), list(special))
    drawn = rng.choice(choices, len(ids)).tolist()
    return [old if old in special else new for old, new in zip(ids, drawn, strict=True)]


# --- the file and the bar ------------------------------------------------------------------------


def describe(
    benchmark: Benchmark,
    questions: Sequence[Question],
    setting: Setting,
    system: System,
    train: Sequence[Question],
    other: tuple[Benchmark, Sequence[Question]] | None,
) -> Row:
    """All that the scores of single items depend on, as plain values."""
    found: Row = {
        "benchmark": benchmark.name,
        **dataclasses.asdict(setting),
        "max_length": system.max_length,
        "edge": identity(system.edge),
        "edge_dtype": str(system.edge.params["embed"].dtype),
        "n": len(questions),
        "questions": digest([benchmark.template, *map(dataclasses.asdict, questions)]),
    }
    if setting.shots:
        found["train"] = digest(list(map(dataclasses.asdict, train)))
    if setting.mode in BY_CLOUD and system.cloud and system.generator:
        generator = system.generator
        found["cloud"] = identity(system.cloud)
        found["generator"] = digest(
            [to_dict(generator.config), *map(tree_hash, (generator.params, generator.stats))]
        )
        found["description"] = benchmark.description
    if setting.mode == "shuffled" and other is not None:
        found["prompts_of"] = other[0].name
        found["train"] = digest(list(map(dataclasses.asdict, other[1])))
    return found


def open_log(path: Path, settings: Row, questions: Sequence[Question]) -> ItemLog | None:
    """The file, in the first process; None in others.

    Raises UserError, in all of them, where it is of another run or holds other items.
    """
    opened: list[ItemLog] = []

    def task() -> None:
        log = ItemLog(path, settings)
        for row in log.rows:
            i = row.get("index")
            known = isinstance(i, int) and 0 <= i < len(questions)
            if not known or row.get("id") != questions[i].id or not set(NUMBERS) <= set(row):
                raise UserError(f"{path} holds an item {i} of another run; remove the file")
        opened.append(log)

    hosts.on_first(task)
    return opened[0] if opened else None


def known_numbers(log: ItemLog | None, count: int) -> np.ndarray:
    """`[N, len(NUMBERS)]` of the items in the file, NaN for the others; alike in all processes."""
    numbers = np.full((count, len(NUMBERS)), np.nan)
    for row in log.rows if log is not None else ():
        numbers[row["index"]] = [row[name] for name in NUMBERS]
    return np.array(hosts.from_first(numbers))


def show(bar: Any, text: str, total: int, done: int = 0) -> None:
    if bar is not None:
        bar.reset(total=total)
        bar.set_description(text)
        bar.update(done)


def advance(bar: Any) -> Callable[[int], object]:
    return (lambda count: None) if bar is None else bar.update
