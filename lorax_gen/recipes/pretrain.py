"""Pretraining of a language model in the embedded world."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lorax_gen.config import Seed, Size, check
from lorax_gen.cost import tuning_step_macs
from lorax_gen.data.tokens import Encoder
from lorax_gen.data.world import FAMILIES, World, make_world, vocabulary
from lorax_gen.data.world_batches import LESSON_LENGTH, pretraining_batch
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.evaluation.world import WorldQuiz
from lorax_gen.mesh.sharding import keep_rows, make_mesh
from lorax_gen.models import decoder
from lorax_gen.models.decoder import DecoderConfig, Execution
from lorax_gen.models.huggingface import load_model, save_model
from lorax_gen.models.model import Model
from lorax_gen.recipes.base import Data, Load, RecipeConfig, assemble
from lorax_gen.recipes.data import check_positions
from lorax_gen.tokenizers import word_level
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.state import State
from lorax_gen.training.step import Batch, pretraining_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(RecipeConfig):
    """Pretrain a small LLaMA on documents of the world: lessons (one fact, a short cue) and
    exercises (a seen task's system prompt with questions and answers)."""

    hidden_size: Size = 64
    """Width D."""
    intermediate_size: Size = 256
    """Feed-forward width F."""
    layers: Size = 4
    """Decoder layers."""
    heads: Size = 4
    """Attention heads."""
    kv_heads: Size = 2
    """Key/value heads."""
    lessons: Size = 128
    """Lessons per batch."""
    exercises: Size = 16
    """Exercises per batch."""
    questions: Size = 6
    """Questions per exercise."""
    document_length: Size = 48
    """Longest exercise, in tokens."""
    world_seed: Seed = 0
    """Seed of the world."""

    def __post_init__(self):
        check(self)

    def decoder(self, vocab_size: int) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden_size // self.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )


def experiment(
    config: PretrainConfig, load: Load = load_model, devices: list | None = None
) -> Experiment:
    """Assembles the run; `load` is not used. See `recipes.base` and `training.loop.fit`."""
    del load
    mesh = make_mesh(config.mesh, devices)
    world = make_world(config.world_seed)
    tokenizer = word_level(vocabulary(world))
    shape = config.decoder(len(tokenizer))
    check_positions("document_length", config.document_length, shape, "the model")

    def trained(state: State) -> Model:
        return Model(shape, state["params"], tokenizer)

    def answerer(state: State) -> Answerer:
        # With the system prompt in context: a language model learns the task in no other way.
        return Answerer("icl", "prompt in context", trained(state), in_context=True)

    def release(state: State, directory: Path, provenance: dict[str, Any]) -> None:
        save_model(directory, trained(state), provenance)

    def work(batch: dict[str, Batch]) -> dict[str, int]:
        groups = [group["tokens"].shape for group in batch.values()]
        flops = sum(tuning_step_macs(shape, *group).flops for group in groups)
        return {
            "examples": sum(rows for rows, _ in groups),
            "tokens": sum(rows * length for rows, length in groups),
            "flops": flops,
            "executed": flops,
        }

    over = config.over(mesh)
    constrain = decoder.unconstrained if over is None else keep_rows(mesh)
    return assemble(
        config,
        mesh,
        lessons_and_exercises(config, world, Encoder(tokenizer, vocab_size=len(tokenizer)), over),
        init=lambda: (decoder.init_params(jax.random.key(config.run.seed), shape), {}),
        loss=pretraining_loss(shape, execution=Execution(constrain=constrain)),
        frozen={},
        answerer=answerer,
        release=release,
        work=work,
    )


def lessons_and_exercises(
    config: PretrainConfig, world: World, encoder: Encoder, mesh: Mesh | None
) -> Data:
    """The documents of `pretraining_batch`, and questions about the world's tasks."""
    sizes = {"lessons": config.lessons, "exercises": config.exercises}
    lengths = {"lessons": LESSON_LENGTH, "exercises": config.document_length}
    shapes = {
        name: {
            "tokens": jax.ShapeDtypeStruct((rows, lengths[name]), np.int32),
            "answer": jax.ShapeDtypeStruct((rows, lengths[name]), np.bool_),
        }
        for name, rows in sizes.items()
    }

    def batch(step: int) -> dict[str, Batch]:
        return pretraining_batch(
            world,
            encoder,
            seed=config.run.seed,
            step=step,
            questions=config.questions,
            length=config.document_length,
            **sizes,
        )

    quiz = WorldQuiz(world, FAMILIES, per_task=8)
    return Data(shapes, batch, partial(quiz.accuracy, mesh=mesh))
