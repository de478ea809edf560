"""What a method hands to the training loop: the loop knows no method, a method knows no loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from lorax_gen.config import at_least_one
from lorax_gen.errors import UserError
from lorax_gen.models.decoder import unconstrained
from lorax_gen.training.attention import make_attention
from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.sharding import MeshConfig, keep_rows
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
    """Latest checkpoints kept."""
    best: str = ""
    """Metric of the evaluations, such as accuracy/unseen, by which the best checkpoint is kept too;
    a new best is saved whenever it is found."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Which value of it is best."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard (pip install 'lorax-gen[tensorboard]')."""
    profile_steps: str = ""
    """First and last step to profile, such as 100-102; the trace goes into the run directory."""
    compilation_cache: str = ""
    """Directory that keeps compiled programs from run to run."""

    def __post_init__(self):
        sizes = ("steps", "log_every", "evaluate_every", "checkpoint_every", "keep")
        at_least_one(self, sizes, "run.")
        window = self.profile_window  # raises where it cannot be read
        if window and window[0] > self.steps:
            raise UserError(
                f"run.profile_steps is {self.profile_steps!r}, but the run ends at step "
                f"{self.steps}"
            )

    @property
    def profile_window(self) -> tuple[int, int] | None:
        """`profile_steps` as numbers."""
        if not self.profile_steps:
            return None
        first, _, last = self.profile_steps.partition("-")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise UserError(
                f"run.profile_steps is {self.profile_steps!r}; expected a first and a last step, "
                "counted from 1, such as 100-102"
            )
        return int(first), int(last)


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


def over_mesh(config: Any, mesh: Mesh) -> dict[str, Any]:
    """The options of `decoder.hidden_states` that a method's config and its mesh ask for."""
    return {
        "remat": config.remat,
        "attention": make_attention(config.attention, mesh, config.mesh.mode),
        "constrain": keep_rows(mesh) if config.mesh.mode == "jit" else unconstrained,
    }
