"""What recipes share: the fields of their configs, and how an experiment is assembled.

A recipe is a config and a function `experiment(config, load, devices)`. With `load_model` and the
devices of this machine the experiment can be trained; with a `load` that returns abstract models
(shapes only) and described devices, the same experiment can be planned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh

from lorax_gen.config import Size, check
from lorax_gen.data.config import MixtureConfig, WorldConfig
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.frames import PLAIN, Frame
from lorax_gen.mesh.kernels import execution_over, kernel_of
from lorax_gen.mesh.sharding import MeshConfig, check_rows, tree_shardings
from lorax_gen.models.decoder import DecoderConfig, Execution
from lorax_gen.models.model import Model
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import State
from lorax_gen.training.step import Batch, Loss

Load = Callable[..., Model]
"""`load(name, dtype, in_int8=, shardings=)`, like `models.huggingface.load_model`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Fields of every recipe."""

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def over(self, mesh: Mesh) -> Mesh | None:
        """The mesh that frozen weights and evaluations are sharded over; None under pmap, which
        replicates the weights."""
        return mesh if self.mesh.mode == "jit" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeConfig(RecipeConfig):
    """Fields of recipes that adapt a frozen edge model."""

    edge: str = "world/edge"
    """Edge model: a model directory, or the name of a shipped one."""
    data: WorldConfig | MixtureConfig = dataclasses.field(default_factory=WorldConfig)
    answer_length: Size | None = None
    """Most answer tokens of a row, end of text included; logits are computed for these only."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen models; bfloat16 on GPUs and TPUs. Trained parameters are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes per layer: nothing, all but matmuls, everything."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """auto: splash on TPU, cudnn on GPU, xla elsewhere and for models that these cannot compute."""

    def __post_init__(self):
        check(self)

    def loader(self, mesh: Mesh, load: Load) -> Load:
        """`load` in the config's dtype, with weights loaded directly into their shards."""
        over = self.over(mesh)
        shardings = over and partial(tree_shardings, mesh=over)
        return partial(load, dtype=self.dtype, shardings=shardings)

    def execution(self, mesh: Mesh, *models: DecoderConfig) -> Execution:
        """How forward passes of the models run.

        Raises UserError where the kernel that was asked for cannot compute their attention.
        """
        for model in models:
            kernel_of(self.attention, mesh, model, self.dtype)
        return execution_over(mesh, self.attention, self.remat, self.mesh.mode)

    def answered(self, length: int) -> int:
        """Positions that go through the head, of a row of `length` tokens."""
        return min(self.answer_length or length, length - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedConfig(EdgeConfig):
    """Fields of recipes that read a prompt once for several questions."""

    prompts: Size = 32
    """Prompts per batch; each batch mixes tasks."""
    queries_per_prompt: Size = 4
    """Questions per prompt, which is read once for all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CloudConfig(PromptedConfig):
    """Fields of recipes in which a frozen cloud model reads the prompts."""

    cloud: str = "world/cloud"
    """Cloud model: a model directory, or the name of a shipped one."""
    cloud_int8: bool = False
    """Keep the cloud model's kernels in int8, half the bytes of bfloat16 (pip install
    'lorax-gen[int8]')."""
    loss: Literal["answer", "sequence"] = "answer"
    """L_LM on the answer's tokens, or on the full sequence that the edge model reads."""
    microbatches: Size = 1
    """Parts of a batch that run in sequence to save memory; the gradients are the same."""


class Data(NamedTuple):
    """Training batches and evaluation of a run; `recipes.data` opens it.

    Attributes:
      shapes: the largest batch, as `jax.ShapeDtypeStruct`s.
      batch: the batch of a step.
      evaluate: metrics of an answerer, by name.
      counts: see `Experiment`.
      frame: how the edge reads an input.
    """

    shapes: Batch
    batch: Callable[[int], Batch]
    evaluate: Callable[[Answerer], dict[str, float]]
    counts: Callable[[], dict[str, int]] = dict
    frame: Frame = PLAIN


def assemble(
    config: RecipeConfig,
    mesh: Mesh,
    data: Data,
    *,
    init: Callable[[], tuple[Any, Any]],
    loss: Loss,
    frozen: dict[str, Any],
    answerer: Callable[[State], Answerer],
    release: Callable[[State, Path, dict[str, Any]], None],
    work: Callable[[Batch], dict[str, int]],
) -> Experiment:
    """The experiment of a recipe.

    Args:
      answerer: the answerer that evaluates a state.
      init, loss, frozen, release, work: see `Experiment`.

    Raises UserError where the batch cannot be sharded over the mesh.
    """
    check_rows(data.shapes, mesh)
    return Experiment(
        init=init,
        loss=loss,
        frozen=frozen,
        batch=data.batch,
        evaluate=lambda state: data.evaluate(answerer(state)),
        release=release,
        work=work,
        run=config.run,
        optimizer=config.optimizer,
        mesh=mesh,
        mode=config.mesh.mode,
        shapes=data.shapes,
        counts=data.counts,
    )
