"""The data of a recipe, of any kind: training batches and evaluation questions."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lorax_gen.data.config import Guard, MixtureConfig, WorldConfig
from lorax_gen.data.instructions import NaturalSource
from lorax_gen.data.own_tasks import RowSource
from lorax_gen.data.sources import Source
from lorax_gen.data.tokens import Batch, Encoder
from lorax_gen.data.world import vocabulary
from lorax_gen.data.world_batches import generator_batch, tuning_batch
from lorax_gen.errors import UserError
from lorax_gen.evaluation.world import WorldQuiz
from lorax_gen.mesh import hosts
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.model import Model
from lorax_gen.recipes.base import Data, EdgeConfig
from lorax_gen.recipes.evaluation import mixture_metrics


def open_data(
    config: EdgeConfig,
    mesh: Mesh,
    edge: Model,
    reader: Model | None = None,
    *,
    samples: int,
    queries: int = 1,
    full_sequence: bool = False,
    in_context: bool = False,
    groups: Sequence[str] = (),
    meta_tokens: int = 0,
) -> Data:
    """The data that a config names; for abstract models only the shapes of a batch.

    A batch holds `tokens` and `answer: [B, T]`, questions for the edge model; with a `reader` also
    `prompt: [P, T]` and `prompt_lengths: [P]`, where row b belongs to prompt b // Q; with `groups`
    also `group: [B]` bool.

    Args:
      reader: the model that reads prompts; None: a batch has questions only.
      samples: P prompts, with Q = `queries` questions each; without a reader B questions.
      full_sequence: the loss is on all tokens of a row, not only on its answer.
      in_context: the edge reads a question after its prompt: a row has up to `data.prompt_length` +
        `data.question_length` tokens.
      groups: families of the world, or sources or tasks of a mixture, as glob patterns; `group`
        marks their rows.
      meta_tokens: that the reader has after a prompt.

    Raises UserError where the data cannot be opened, or a batch could hold what a model cannot read
    when it is used.
    """
    data, prompted = config.data, reader is not None
    check_models(data, edge, reader, in_context, meta_tokens)
    shapes = batch_shapes(data, samples, queries, prompted, in_context, bool(groups))
    if edge.is_abstract:
        return Data(shapes, closed, closed)
    over, to_edge = config.over(mesh), Encoder.of(edge)
    to_reader = Encoder.of(reader) if reader is not None else None
    options: dict[str, Any] = {"prompts": samples, "queries": queries, "seed": config.run.seed}
    options |= {"answer_length": config.answer_length, "full_sequence": full_sequence}
    options |= {"in_context": in_context, "groups": groups}
    if isinstance(data, WorldConfig):
        quiz = WorldQuiz(data.world(), data.families)
        batch = world_batches(data, to_reader, to_edge, **options)
        return Data(shapes, batch, partial(quiz.accuracy, mesh=over))
    opened = data.open(edge.tokenizer)
    warn_without_texts(opened.guard)
    check_groups(groups, [name for source in opened.sources for name in names_of(source)])
    mixture = data.mixture(to_reader, to_edge, opened=opened, **options)
    shots = data.evaluate_shots if prompted or in_context else 0
    evaluate = mixture_metrics(data, opened, over, shots)
    return Data(shapes, mixture.batch, evaluate, lambda: mixture.counts, opened.frame)


def check_models(
    data: WorldConfig | MixtureConfig,
    edge: Model,
    reader: Model | None = None,
    in_context: bool = False,
    meta_tokens: int = 0,
) -> None:
    """Raises UserError where the models cannot read rows of the config's lengths when they are
    used, an end of text is missing, or the data are a world whose words they do not have. An edge
    that reads prompts itself reads them in a way of its recipe, which checks their length."""
    key, longest = "data.question_length", data.question_length
    if in_context:
        key, longest = f"data.prompt_length + {key}", data.prompt_length + longest
    check_positions(key, longest, edge.config, "the edge model")
    if reader is not None and reader is not edge:
        key, longest = "data.prompt_length", data.prompt_length
        check_positions(key, longest, reader.config, "the cloud model", meta_tokens)
    needs_end_of_text(edge, "edge", "training puts it after each answer")
    if isinstance(data, WorldConfig):
        words = set(vocabulary(data.world()))
        for role, model in (("edge", edge), ("cloud", reader)):
            if model is None or model.tokenizer is None:
                continue
            if missing := sorted(words.difference(model.tokenizer.get_vocab())):
                raise UserError(
                    f"data.kind is world, but the {role} model {model.name} lacks {len(missing):,} "
                    f"of the world's {len(words):,} words ({', '.join(missing[:3])}, ...); train "
                    "world/cloud and world/edge on it, and other models on data.kind mixture"
                )


def check_positions(
    key: str, length: int, config: DecoderConfig, model: str, meta_tokens: int = 0
) -> None:
    """Raises UserError where rows of a config's length are longer than a model's positions: it
    would be trained on what it cannot read when it is used."""
    positions = config.max_position_embeddings
    most = positions - meta_tokens
    if length > most:
        less = f", less {meta_tokens} meta tokens" if meta_tokens else ""
        raise UserError(
            f"{key} is {length}, but {model} reads at most {most} tokens ({positions} positions, "
            f"max_position_embeddings{less}); set {key} to {most} or less"
        )


def needs_end_of_text(model: Model, role: str, why: str) -> None:
    """Raises UserError where the tokenizer of a model has no end of text."""
    if model.tokenizer is not None and model.tokenizer.eos_token_id is None:
        raise UserError(
            f"the {role} model's tokenizer has no end of text, and {why}; set eos_token in its "
            "tokenizer_config.json"
        )


def batch_shapes(
    data: WorldConfig | MixtureConfig,
    samples: int,
    queries: int,
    prompted: bool,
    in_context: bool = False,
    grouped: bool = False,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The largest batch that `open_data` makes, as shapes and dtypes."""
    before = data.prompt_length if in_context else 0
    rows = samples * queries, before + data.question_length
    shapes = {
        "tokens": jax.ShapeDtypeStruct(rows, np.int32),
        "answer": jax.ShapeDtypeStruct(rows, np.bool_),
    }
    if grouped:
        shapes["group"] = jax.ShapeDtypeStruct(rows[:1], np.bool_)
    if not prompted:
        return shapes
    return shapes | {
        "prompt": jax.ShapeDtypeStruct((samples, data.prompt_length), np.int32),
        "prompt_lengths": jax.ShapeDtypeStruct((samples,), np.int32),
    }


def closed(*_: Any) -> Any:
    """Raises RuntimeError: the data of an abstract experiment cannot be read."""
    raise RuntimeError("abstract models can be planned, but not trained or evaluated")


def world_batches(
    data: WorldConfig, reader: Encoder | None, edge: Encoder, **options: Any
) -> Callable[[int], Batch]:
    """Batches of the embedded world's seen tasks, as a function of the step."""
    seen = [task for task in data.world().select("seen") if task.family in data.families]
    options |= {"question_length": data.question_length}
    in_context, groups = options.pop("in_context", False), options.pop("groups", ())
    prompts = {"prompt_length": data.prompt_length, "max_shots": data.max_shots}
    if reader is None:
        rows = options.pop("prompts") * options.pop("queries")
        options |= {"groups": check_groups(groups, data.families)}
        options |= prompts if in_context else {}
        return lambda step: tuning_batch(seen, edge, step=step, rows=rows, **options)
    options |= prompts
    return lambda step: generator_batch(seen, reader, edge, step=step, **options)


def check_groups(groups: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """The groups; raises UserError for one that fits none of the names of families, or of sources
    and their tasks."""
    for group in groups:
        if not fnmatch.filter(names, group):
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UserError(f"no family, source or task is called {group!r}; there are {shown}")
    return groups


def names_of(source: Source) -> list[str]:
    """The name of a source, and those of its tasks where they have some."""
    if isinstance(source, RowSource):
        return [source.name, *(task.name for task in source.row_tasks)]
    if isinstance(source, NaturalSource):
        return [source.name, *dict.fromkeys(task.name for task, _ in source.samples)]
    return [source.name]


def warn_without_texts(guard: Guard) -> None:
    """Warns on stderr where the guard against unseen tasks lacks the texts of some of them."""
    if guard.without and hosts.is_first():
        print(
            f"lorax-gen: warning: there are no files of {', '.join(guard.without)}: whether the "
            "training data hold these unseen tasks is checked by their names only, not by their "
            "texts",
            file=sys.stderr,
        )
