"""What a recipe hands to the training loop: the loop knows no recipe, a recipe knows no loop."""

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
    """A training run, ready to go; or, of models that are shapes alone, one to be planned.

    Attributes:
      init: fresh `(params, stats)`; called under jit, arrays are born sharded.
      loss: see `training.step`.
      frozen: weights that are read and never trained, by the role of their model.
      batch: the host batch of a step, numpy arrays.
      evaluate: metrics of a state, by name. It and `release` read `params`, `stats` and `step`,
        over several processes as numpy arrays; there all evaluate, and the first one releases.
      release: writes what the run is for into an empty directory, with its provenance.
      work: what one step on a batch takes, by name: `examples` that it trains on, `tokens` that the
        models read, `flops` of the useful work on all devices together, for MFU, and `executed`,
        FLOPs with what the backward pass computes again. What is left out is not reported.
      mesh, mode: what it runs on; see `mesh.sharding.parallelize`.
      shapes: the largest batch, as `jax.ShapeDtypeStruct`s.
      counts: what was done to the data so far, by name; it is logged as `data/<name>`.
    """

    init: Callable[[], tuple[Any, Any]]
    loss: Loss
    frozen: Any
    batch: Callable[[int], Batch]
    evaluate: Callable[[State], dict[str, float]]
    release: Callable[[State, Path, dict[str, Any]], None]
    work: Callable[[Batch], dict[str, float]]
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
