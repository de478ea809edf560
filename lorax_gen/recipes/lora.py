"""The paper's first baseline: one LoRA on the edge model, fine-tuned on all seen tasks.

It reads no prompt: it learns what the tasks have in common and cannot know which task a question
is from. Rank 8 on all seven kernels agrees best with the paper's numbers (Table 13). It is merged
after training and released as a PEFT adapter.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from lorax_gen.artifacts.peft import save_adapter
from lorax_gen.config import BelowOne, Positive, Size
from lorax_gen.cost import tuning_step_macs
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.mesh.sharding import make_mesh
from lorax_gen.method.lora import Tree, init_lora, scaled
from lorax_gen.models.adapter import Adapter, LowRank
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.models.huggingface import load_model
from lorax_gen.recipes.base import EdgeConfig, Load, assemble
from lorax_gen.recipes.data import open_data
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.state import State
from lorax_gen.training.step import Batch, Loss, answer_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(EdgeConfig):
    """Fine-tune one LoRA on the edge model, on all seen tasks and without their prompts."""

    rank: Size = 8
    alpha: Positive = 8.0
    dropout: BelowOne = 0.05
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    batch_size: Size = 128
    """Questions per batch, of mixed tasks."""

    @property
    def scale(self) -> float:
        """s = alpha / r of eq. 1."""
        return self.alpha / self.rank


def lora_loss(config: LoraConfig, decoder_config: DecoderConfig, **options: Any) -> Loss:
    """L_LM of the frozen edge with the trained LoRA; `frozen` is `{'edge': params}`.

    `options` are those of `decoder.hidden_states`.
    """

    def loss(params, stats, frozen, batch, key, axis_name):
        lora = scaled(params, config.scale)
        lm, accuracy = answer_loss(
            frozen["edge"],
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


def experiment(
    config: LoraConfig, load: Load = load_model, devices: list | None = None
) -> Experiment:
    """Assembles the run; see `recipes.base` and `training.loop.fit`."""
    mesh = make_mesh(config.mesh, devices)
    edge = config.loader(mesh, load)(config.edge)
    shapes = kernel_shapes(edge.config)
    for name in config.targets:
        if name not in shapes:
            raise UserError(
                f"targets names {name!r}, which the edge model lacks: choose from {sorted(shapes)}"
            )
    shapes = {name: shapes[name] for name in config.targets}
    key, layers = jax.random.key(config.run.seed), edge.config.num_hidden_layers

    data = open_data(config, mesh, edge, samples=config.batch_size)

    def tree(state: State) -> Tree:
        return scaled(state["params"], config.scale)

    def answerer(state: State) -> Answerer:
        return Answerer("lora", "edge + one LoRA", edge, adapter=Adapter(tree(state)))

    def release(state: State, directory: Path, provenance: dict[str, Any]) -> None:
        save_adapter(
            directory,
            tree(state),
            edge.config,
            base_model=edge.name,
            provenance=provenance,
            frame=data.frame,
        )

    def work(batch: Batch) -> dict[str, int]:
        rows, length = batch["tokens"].shape
        ranks, answered = dict.fromkeys(config.targets, config.rank), config.answered(length)
        macs = [
            tuning_step_macs(edge.config, rows, length, ranks, answered=answered, remat=remat)
            for remat in ("none", config.remat)
        ]
        useful, executed = (each.flops for each in macs)
        return {"examples": rows, "tokens": rows * length, "flops": useful, "executed": executed}

    return assemble(
        config,
        mesh,
        data,
        init=lambda: (init_lora(key, shapes, config.rank, layers), {}),
        loss=lora_loss(config, edge.config, execution=config.execution(mesh, edge.config)),
        frozen={"edge": edge.params},
        answerer=answerer,
        release=release,
        work=work,
    )
