"""What the models of a run will read: its batches, drawn as training draws them, but without the
models' weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lorax_gen.data.config import MixtureConfig, Opened, WorldConfig, split_weight
from lorax_gen.data.instructions import NaturalSource
from lorax_gen.data.mixture import Mixture
from lorax_gen.data.own_tasks import RowSource, RowTask
from lorax_gen.data.sources import Source
from lorax_gen.data.tokens import Batch, Encoder
from lorax_gen.errors import UserError
from lorax_gen.method.generator import select_layers
from lorax_gen.models.huggingface import load_reader
from lorax_gen.models.model import Model
from lorax_gen.recipes.autocompressor import AutoCompressorConfig, check_room
from lorax_gen.recipes.base import CloudConfig, PromptedConfig, RecipeConfig
from lorax_gen.recipes.data import check_models, warn_without_texts, world_batches
from lorax_gen.recipes.direct import DirectTraining
from lorax_gen.recipes.lora_gen import LoraGenConfig
from lorax_gen.recipes.tuning import TuningConfig

MOST_BATCHES = 100  # of an epoch that is surveyed


class Mixed(NamedTuple):
    """A mixture of sources: its config, what it opened, and its batches."""

    data: MixtureConfig
    opened: Opened
    mixture: Mixture


class Preview(NamedTuple):
    """The data of a run.

    Attributes:
      cloud: the encoder of the model that reads prompts; None: the recipe has none. An edge that
        compresses prompts itself has this place (`compresses`).
      batch: the batch of a step, as in training.
      mixed: None where the data are the embedded world.
    """

    data: WorldConfig | MixtureConfig
    cloud: Encoder | None
    edge: Encoder
    batch: Callable[[int], Batch]
    mixed: Mixed | None = None
    compresses: bool = False

    @property
    def batches_per_epoch(self) -> int | None:
        """None where there are no epochs."""
        if self.mixed is None:
            return None
        mixture = self.mixed.mixture
        return -(-mixture.samples_per_epoch // mixture.prompts)


class Read(NamedTuple):
    """A prompt and the questions under it, as token ids.

    Attributes:
      questions: of each, what comes before the tokens with a loss, and these.
    """

    prompt: list[int]
    questions: list[tuple[list[int], list[int]]]


def open_preview(config: RecipeConfig, load: Callable[[str], Model] = load_reader) -> Preview:
    """Opens the data of a config.

    Raises UserError as `recipes.data.open_data`, and where the recipe has no `data`.
    """
    if not isinstance(config, PromptedConfig | TuningConfig):
        raise UserError(
            "method pretrain makes its documents from the embedded world and has no data; name a "
            "config of lora_gen or of a baseline"
        )
    edge = load(config.edge)
    cloud = edge if isinstance(config, PromptedConfig) else None  # an edge that reads them itself
    if isinstance(config, CloudConfig):
        cloud = load(config.cloud)
    if compresses := isinstance(config, AutoCompressorConfig):
        check_room(config, edge)
    in_context = isinstance(config, TuningConfig) and config.in_context
    meta = 0
    if isinstance(config, LoraGenConfig | DirectTraining):
        meta = select_layers(config.generator.last_layers, edge.config.num_hidden_layers)
    check_models(config.data, edge, cloud, in_context, meta)
    data, to_edge = config.data, Encoder.of(edge)
    to_cloud = None if cloud is None else Encoder.of(cloud)
    options: dict[str, Any] = {"seed": config.run.seed, "answer_length": config.answer_length}
    if isinstance(config, CloudConfig):
        options |= {"full_sequence": config.loss == "sequence"}
    if isinstance(config, PromptedConfig):
        options |= {"prompts": config.prompts, "queries": config.queries_per_prompt}
    else:
        options |= {"prompts": config.batch_size, "queries": 1, "in_context": in_context}
    if isinstance(data, WorldConfig):
        batch = world_batches(data, to_cloud, to_edge, **options)
        return Preview(data, to_cloud, to_edge, batch, compresses=compresses)
    opened = data.open(edge.tokenizer)
    warn_without_texts(opened.guard)
    mixture = data.mixture(to_cloud, to_edge, opened=opened, **options)
    mixed = Mixed(data, opened, mixture)
    return Preview(data, to_cloud, to_edge, mixture.batch, mixed, compresses)


def read_batch(batch: Batch) -> Iterator[Read]:
    """What is read for each prompt of a batch; without prompts, for each question. Rows that stand
    for a missing question are left out."""
    prompts: list[list[int]] = [[]] * len(batch["tokens"])
    if "prompt" in batch:
        lengths = batch["prompt_lengths"]
        prompts = [row[:n].tolist() for row, n in zip(batch["prompt"], lengths, strict=True)]
    queries = len(batch["tokens"]) // len(prompts)
    for i, prompt in enumerate(prompts):
        rows = slice(i * queries, (i + 1) * queries)
        questions = []
        for tokens, marked in zip(batch["tokens"][rows], batch["answer"][rows], strict=True):
            loss = np.flatnonzero(marked)
            if len(loss) and loss[-1]:
                first, end = int(loss[0]), int(loss[-1]) + 1
                questions.append((tokens[:first].tolist(), tokens[first:end].tolist()))
        yield Read(prompt, questions)


class Survey(NamedTuple):
    """Of drawn batches: how many, how many tokens each prompt and each question has, and how many
    of all hold the tokenizer's unknown token."""

    batches: int
    prompts: list[int]
    questions: list[int]
    unknown: int


def survey(preview: Preview, batches: int | None = None) -> Survey:
    """Draws the first batches; None: of one epoch, at most `MOST_BATCHES`. `mixture.counts` has
    what was left out of them."""
    count = batches or min(preview.batches_per_epoch or MOST_BATCHES, MOST_BATCHES)
    read = [one for step in range(count) for one in read_batch(preview.batch(step))]
    questions = [before + after for one in read for before, after in one.questions]
    unknown = sum(preview.edge.tokenizer.unk_token_id in ids for ids in questions)
    if preview.cloud is not None:
        unknown += sum(preview.cloud.tokenizer.unk_token_id in one.prompt for one in read)
    return Survey(
        count,
        [len(one.prompt) for one in read if one.prompt],
        [len(question) for question in questions],
        unknown,
    )


class SourceRow(NamedTuple):
    """A source, in numbers; `rows` of each task by its name, where tasks have names."""

    name: str
    weight: float
    samples: int
    tasks: int
    left_out: int
    rows: dict[str, int]


def source_rows(mixed: Mixed) -> list[SourceRow]:
    """The sources of a mixture. `left_out` counts rows without an input or an output."""
    weights = [weight for _, weight in map(split_weight, mixed.data.sources)]
    return [
        SourceRow(
            source.name,
            weight,
            len(source),
            source.tasks,
            getattr(source, "left_out", 0),
            rows_of_tasks(source),
        )
        for source, weight in zip(mixed.opened.sources, weights, strict=True)
    ]


def rows_of_tasks(source: Source) -> dict[str, int]:
    """The number of rows of each task by its name; empty where tasks have no names."""
    if isinstance(source, RowSource):
        return {task.name: len(task.items) for task in source.row_tasks}
    if isinstance(source, NaturalSource):
        return Counter(task.name for task, _ in source.samples)
    return {}


def held_numbers(tasks: list[RowTask]) -> tuple[int, int, int]:
    """How many tasks, wordings and rows are held out."""
    return (
        len(tasks),
        sum(len(task.instructions) for task in tasks),
        sum(len(task.items) for task in tasks),
    )
