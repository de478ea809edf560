"""Pretraining of a language model in the embedded world."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from lorax_gen.config import at_least_one
from lorax_gen.cost import tuning_step_macs
from lorax_gen.data.tokens import Encoder
from lorax_gen.data.world import FAMILIES, make_world, vocabulary
from lorax_gen.data.world_batches import LESSON_LENGTH, pretraining_batch
from lorax_gen.evaluation.greedy import right_answers
from lorax_gen.evaluation.world import WorldQuiz
from lorax_gen.mesh.sharding import MeshConfig, keep_rows, make_mesh
from lorax_gen.models import decoder
from lorax_gen.models.decoder import DecoderConfig, Execution
from lorax_gen.models.huggingface import save_model
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import word_level
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import State
from lorax_gen.training.step import pretraining_loss


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a small LLaMA on documents of the world: lessons (one fact, a short cue) and
    exercises (a seen task's system prompt with questions and answers)."""

    hidden_size: int = 64
    """Width D."""
    intermediate_size: int = 256
    """Feed-forward width F."""
    layers: int = 4
    """Decoder layers."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int = 2
    """Key/value heads."""
    lessons: int = 128
    """Lessons per batch."""
    exercises: int = 16
    """Exercises per batch."""
    questions: int = 6
    """Questions per exercise."""
    document_length: int = 48
    """Longest exercise, in tokens."""
    world_seed: int = 0
    """Which world."""
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        sizes = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
        at_least_one(self, (*sizes, "lessons", "exercises", "questions", "document_length"))

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


def experiment(config: PretrainConfig) -> Experiment:
    """Assembles the run; see `training.loop.fit`."""
    world = make_world(config.world_seed)
    tokenizer = word_level(vocabulary(world))
    encoder = Encoder(tokenizer)
    shape = config.decoder(len(tokenizer))

    def batch(step: int) -> dict[str, Any]:
        return pretraining_batch(
            world,
            encoder,
            seed=config.run.seed,
            step=step,
            lessons=config.lessons,
            exercises=config.exercises,
            questions=config.questions,
            length=config.document_length,
        )

    # With the system prompt in context, the only way in which a language model knows the task.
    quiz = WorldQuiz(world, FAMILIES, per_task=8)
    mesh = make_mesh(config.mesh) if config.mesh.mode == "jit" else None

    def evaluate(state: State) -> dict[str, float]:
        model = Model(shape, state["params"], tokenizer)
        return quiz.accuracy(right_answers(model, quiz.prompted, mesh=mesh))

    def release(state: State, directory: Path, provenance: dict[str, Any]) -> None:
        save_model(directory, Model(shape, state["params"], tokenizer), provenance)

    groups = [(config.lessons, LESSON_LENGTH), (config.exercises, config.document_length)]
    work = {
        "examples": config.lessons + config.exercises,
        "tokens": sum(rows * length for rows, length in groups),
        "flops": sum(tuning_step_macs(shape, *group).flops for group in groups),
    }
    constrain = decoder.unconstrained if mesh is None else keep_rows(mesh)
    return Experiment(
        init=lambda: (decoder.init_params(jax.random.key(config.run.seed), shape), {}),
        loss=pretraining_loss(shape, execution=Execution(constrain=constrain)),
        frozen={},
        batch=batch,
        evaluate=evaluate,
        release=release,
        work=lambda batch: work,
        run=config.run,
        optimizer=config.optimizer,
        mesh=config.mesh,
    )
