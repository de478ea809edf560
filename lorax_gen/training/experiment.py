"""What a method hands to the training loop: the loop knows no method, a method knows no loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorax_gen.mesh.sharding import MeshConfig
from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import State
from lorax_gen.training.step import Batch, Loss


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run, ready to go.

    Attributes:
      init: fresh `(params, stats)`; called under jit, arrays are born sharded.
      loss: see `training.step`.
      frozen: weights that are read and never trained.
      batch: the host batch of a step, numpy arrays.
      evaluate: metrics of a state, by name. It and `release` read `params`, `stats` and `step`,
        over several processes as numpy arrays; there all evaluate, and the first one releases.
      release: writes what the run is for into an empty directory, with its provenance.
      work: what one step on a batch takes, by name: `examples` that it trains on, `tokens` that the
        models read, and `flops` of the useful work on all devices together, for MFU. What is
        left out is not reported.
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
    mesh: MeshConfig
    counts: Callable[[], dict[str, int]] = dict
