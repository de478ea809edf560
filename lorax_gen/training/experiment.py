"""What a recipe passes to the training loop. Neither depends on the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import optax
from jax.sharding import Mesh

from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import State, init_state
from lorax_gen.training.step import Batch, Loss, make_train_step


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run; with abstract models (shapes only) it can be planned but not run.

    Attributes:
      init: fresh `(params, stats)`; called under jit, so arrays are created sharded.
      loss: see `training.step`.
      frozen: weights that are not trained, by the role of their model.
      batch: the batch of a step, as numpy arrays on the host.
      evaluate: metrics of a state, by name. It and `release` read `params`, `stats` and `step`,
        with several processes as numpy arrays; then all evaluate, and the first one releases.
      release: writes the trained artifact and its provenance into an empty directory.
      work: the work of one step on a batch, by name: `examples` trained on, `tokens` read by the
        models, `flops` of the useful work on all devices together, for MFU, and `executed`,
        FLOPs including recomputation in the backward pass. Missing entries are not reported.
      mesh, mode: the devices it runs on; see `mesh.sharding.parallelize`.
      shapes: the largest batch, as `jax.ShapeDtypeStruct`s.
      counts: counters of the data pipeline, by name; logged as `data/<name>`.
    """

    init: Callable[[], tuple[Any, Any]]
    loss: Loss
    frozen: Any
    batch: Callable[[int], Batch]
    evaluate: Callable[[State], dict[str, float]]
    release: Callable[[State, Path, dict[str, Any]], None]
    work: Callable[[Batch], dict[str, int]]
    run: RunConfig
    optimizer: OptimizerConfig
    mesh: Mesh
    mode: Literal["jit", "pmap"] = "jit"
    shapes: Batch = dataclasses.field(default_factory=dict)
    counts: Callable[[], dict[str, int]] = dict

    def transformation(self) -> optax.GradientTransformation:
        return make_optimizer(self.optimizer, self.run.steps)

    def fresh_state(self) -> State:
        """The state at step 0; call it under jit, or `jax.eval_shape`."""
        params, stats = self.init()
        return init_state(params, stats, self.transformation(), self.run.seed)

    def train_step(self) -> Callable:
        """See `training.step.make_train_step`; not yet jitted."""
        return make_train_step(self.loss, self.transformation())
