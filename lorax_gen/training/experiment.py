"""What a method hands to the training loop: the loop knows no method, a method knows no loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.sharding import MeshConfig
from lorax_gen.training.state import State
from lorax_gen.training.step import Batch, Loss


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long a run is and what it writes when. Every training config holds one as `run`."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of initial weights, batches and dropout."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 500
    """Steps between evaluations on seen and unseen tasks."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a resumed run loses at most this much."""
    keep: int = 2
    """Checkpoints kept."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run, ready to go.

    Attributes:
      init: fresh `(params, stats)`; called under jit, arrays are born sharded.
      loss: see `training.step`.
      frozen: weights that are read and never trained.
      batch: the host batch of a step, numpy arrays.
      evaluate: metrics of a state, by name.
      release: writes what the run is for into an empty directory, with its provenance.
      examples_per_step: rows that one step trains on.
    """

    init: Callable[[], tuple[Any, Any]]
    loss: Loss
    frozen: Any
    batch: Callable[[int], Batch]
    evaluate: Callable[[State], dict[str, float]]
    release: Callable[[State, Path, dict[str, Any]], None]
    examples_per_step: int
    run: RunConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
