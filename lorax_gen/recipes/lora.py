"""The paper's first baseline: one LoRA on the edge model, fine-tuned on all seen tasks.

It reads no prompt: it learns what the tasks have in common and cannot know which one is asked.
Rank 8 on all seven kernels fits the paper's arithmetic best (Table 13). Once trained it is merged.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from lorax_gen import files
from lorax_gen.config import at_least_one
from lorax_gen.cost import tuning_step_macs
from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tokens import Encoder, question_batch
from lorax_gen.data.world_batches import mixed_tasks
from lorax_gen.errors import UserError
from lorax_gen.evaluation.greedy import right_answers
from lorax_gen.evaluation.world import WorldQuiz
from lorax_gen.hub import find_directory
from lorax_gen.mesh.kernels import execution_over
from lorax_gen.mesh.sharding import MeshConfig, make_mesh, tree_shardings
from lorax_gen.method.lora import Tree, init_lora, scaled
from lorax_gen.models.adapter import Adapter, LowRank
from lorax_gen.models.decoder import kernel_shapes
from lorax_gen.models.huggingface import load_model
from lorax_gen.tensors import flatten, read_tensors, unflatten, write_tensors
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import State
from lorax_gen.training.step import Loss, answer_loss


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Fine-tune one LoRA on the edge model, on all seen tasks and without their prompts."""

    edge: str = "world/edge"
    """Edge model: a model directory, or the name of a shipped one."""
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    batch_size: int = 128
    """Questions per batch, of mixed tasks."""
    answer_length: int | None = None
    """Most answer tokens of a row, its end of text included; no logits are computed beyond."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the edge model; bfloat16 on GPUs and TPUs. What is trained is float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again, per layer: nothing, all but matmuls, everything."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """auto is splash on TPU, cudnn on GPU, xla elsewhere, and where those do not fit."""
    data: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        at_least_one(self, ("rank", "batch_size", "answer_length"))
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; choose a number at least 0 and below 1")


def lora_loss(config: LoraConfig, decoder_config: Any, **options: Any) -> Loss:
    """L_LM of the frozen edge with the trained LoRA; `frozen` is the edge's parameters.

    Options as of `decoder.hidden_states`.
    """

    def loss(params, stats, frozen, batch, key, axis_name):
        lora = scaled(params, config.alpha / config.rank)
        lm, accuracy = answer_loss(
            frozen,
            decoder_config,
            batch,
            adapter=Adapter(lora, apply=LowRank(config.dropout)),
            dropout_key=key,
            answer_length=config.answer_length,
            axis_name=axis_name,
            **options,
        )
        return lm, (stats, {"loss_lm": lm, "accuracy/batch": accuracy})

    return loss


def experiment(config: LoraConfig) -> Experiment:
    """Assembles the run; see `training.loop.fit`."""
    mesh = make_mesh(config.mesh)
    shardings = partial(tree_shardings, mesh=mesh) if config.mesh.mode == "jit" else None
    edge = load_model(config.edge, config.dtype, shardings=shardings)
    world, data = config.data.world(), config.data
    encoder = Encoder.of(edge)
    seen = [task for task in world.select("seen") if task.family in data.families]
    shapes = kernel_shapes(edge.config)
    for name in config.targets:
        if name not in shapes:
            raise UserError(
                f"targets names {name!r}, which the edge model lacks: choose from {sorted(shapes)}"
            )
    shapes = {name: shapes[name] for name in config.targets}

    def batch(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([config.run.seed, step])
        tasks = mixed_tasks(rng, seen, config.batch_size)
        questions = [task.questions[rng.integers(len(task.questions))] for task in tasks]
        return question_batch(
            encoder, questions, data.question_length, answer_length=config.answer_length
        )

    quiz = WorldQuiz(world, data.families)

    def evaluate(state: State) -> dict[str, float]:
        lora = scaled(state["params"], config.alpha / config.rank)
        over = mesh if config.mesh.mode == "jit" else None
        return quiz.accuracy(right_answers(edge, quiz.bare, adapter=Adapter(lora), mesh=over))

    def release(state: State, directory: Path, provenance: dict[str, Any]) -> None:
        tree = scaled(state["params"], config.alpha / config.rank)
        with files.new_directory(directory) as partial:
            write_tensors(partial / "lora.safetensors", flatten(tree))
            files.write_json(partial / "config.json", {"format": FORMAT, **provenance})

    macs = tuning_step_macs(
        edge.config,
        config.batch_size,
        data.question_length,
        dict.fromkeys(config.targets, config.rank),
        answered=config.answer_length,
    )
    work = {
        "examples": config.batch_size,
        "tokens": config.batch_size * data.question_length,
        "flops": macs.flops,
    }
    return Experiment(
        init=lambda: (
            init_lora(
                jax.random.key(config.run.seed), shapes, config.rank, edge.config.num_hidden_layers
            ),
            {},
        ),
        loss=lora_loss(
            config,
            edge.config,
            execution=execution_over(mesh, config.attention, config.remat, config.mesh.mode),
        ),
        frozen=edge.params,
        batch=batch,
        evaluate=evaluate,
        release=release,
        work=lambda batch: work,
        run=config.run,
        optimizer=config.optimizer,
        mesh=config.mesh,
    )


FORMAT = "lorax-gen lora 1"


def load_lora(directory: str | files.AnyPath) -> Tree:
    """A released LoRA tree, its scale folded in; merge it with `method.lora.merge`.

    Raises UserError where a file is missing, truncated or of another kind.
    """
    directory = find_directory(directory, "LoRA")
    found = files.read_json(directory / "config.json").get("format")
    if found != FORMAT:
        raise UserError(f"{directory} holds no LoRA (format {found!r}, expected {FORMAT!r})")
    return unflatten(read_tensors(directory / "lora.safetensors"))
