"""The paper's first baseline: one LoRA on the edge model, fine-tuned on all seen tasks.

By default it reads no prompt: it learns what the tasks have in common and cannot know which task a
question is from. Rank 8 on all seven kernels agrees best with the paper's numbers (Table 13). It is
merged after training and released as a PEFT adapter.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax

from lorax_gen.artifacts.peft import save_adapter
from lorax_gen.config import Positive, Size
from lorax_gen.cost import lora_macs
from lorax_gen.errors import UserError
from lorax_gen.frames import Frame
from lorax_gen.method.generator import select_layers
from lorax_gen.method.lora import Tree, init_lora, scaled
from lorax_gen.models.adapter import Adapter, LowRank
from lorax_gen.models.decoder import Array, DecoderConfig, kernel_shapes
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.recipes.base import Load
from lorax_gen.recipes.tuning import Tuned, TuningConfig, tune, tuning_loss
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.step import Loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(TuningConfig):
    """Fine-tune one LoRA on the edge model, on all seen tasks."""

    rank: Size = 8
    alpha: Positive = 8.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    last_layers: Size | None = None
    """Only so many of the edge's last layers have a LoRA; None: all."""

    @property
    def scale(self) -> float:
        """s = alpha / r of eq. 1."""
        return self.alpha / self.rank


def lora_adapter(
    config: LoraConfig, params: Tree, real: Array | None = None, dropout: float = 0.0
) -> Adapter:
    """See `recipes.tuning.Tuned`."""
    return Adapter(scaled(params, config.scale), apply=LowRank(dropout))


def lora_loss(config: LoraConfig, decoder_config: DecoderConfig, **options: Any) -> Loss:
    """L_LM of the frozen edge with the trained LoRA; `frozen` is `{'edge': params}`.

    `options` are those of `recipes.tuning.tuning_loss`.
    """
    options = {"dropout": config.dropout, "answer_length": config.answer_length, **options}
    return tuning_loss(decoder_config, partial(lora_adapter, config), **options)


def experiment(
    config: LoraConfig, load: Load = load_model, devices: list | None = None
) -> Experiment:
    """Assembles the run; see `recipes.tuning`."""
    return tune(config, load, devices, partial(tuned, config), partial(release, config))


def tuned(config: LoraConfig, edge: Model) -> Tuned:
    """Raises UserError where the edge lacks a target, or has fewer than `last_layers`."""
    shapes = kernel_shapes(edge.config)
    for name in config.targets:
        if name not in shapes:
            raise UserError(
                f"targets names {name!r}, which the edge model lacks: choose from {sorted(shapes)}"
            )
    shapes = {name: shapes[name] for name in config.targets}
    key = jax.random.key(config.run.seed)
    layers = select_layers(config.last_layers, edge.config.num_hidden_layers)
    ranks = dict.fromkeys(shapes, config.rank)
    return Tuned(
        "lora",
        "edge + one LoRA",
        lambda: init_lora(key, shapes, config.rank, layers),
        partial(lora_adapter, config),
        macs=lambda tokens: lora_macs(edge.config, tokens, ranks, layers),
        layers=layers,
    )


def release(
    config: LoraConfig,
    params: Tree,
    edge: Model,
    frame: Frame,
    directory: Path,
    provenance: dict[str, Any],
) -> None:
    """Writes the PEFT adapter; its provenance says if questions are read after their prompts."""
    in_context = {"in_context": True} if config.in_context else {}
    save_adapter(
        directory,
        scaled(params, config.scale),
        edge.config,
        base_model=edge.name,
        provenance=provenance | in_context,
        frame=frame,
    )
