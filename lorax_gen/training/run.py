"""Length of a run, and when it logs, evaluates and saves."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lorax_gen.config import Seed, Size, check
from lorax_gen.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of a run, and when it logs, evaluates and saves. Every config has one as `run`."""

    steps: Size = 1000
    """Optimizer steps of the run. More steps than before extend a run; what the shorter one has
    released stays, and the longer one is released as released-STEPS."""
    seed: Seed = 0
    """Seed of initial weights, batches and dropout."""
    log_every: Size = 50
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Size = 500
    """Steps between evaluations on seen and unseen tasks."""
    checkpoint_every: Size = 500
    """Steps between checkpoints; a resumed run loses at most this much."""
    keep: Size = 2
    """Latest checkpoints kept."""
    best: str = ""
    """Metric of the evaluations, such as accuracy/unseen, by which the best checkpoint is kept too;
    each new best is saved at once."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Whether the highest or the lowest value of `best` is best."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard (pip install 'lorax-gen[tensorboard]')."""
    wandb: str = ""
    """Weights & Biases project that also gets the metrics (pip install 'lorax-gen[wandb]')."""
    profile_steps: str = ""
    """First and last step to profile, such as 100-102; the trace goes into the run directory."""
    compilation_cache: str = ""
    """Directory that caches compiled programs between runs."""

    def __post_init__(self):
        check(self, "run.")
        window = self.profile_window  # raises where it cannot be parsed
        if window and window[0] > self.steps:
            raise UserError(
                f"run.profile_steps is {self.profile_steps!r}, but the run ends at step "
                f"{self.steps}"
            )

    @property
    def profile_window(self) -> tuple[int, int] | None:
        """`profile_steps` as numbers; None if it is empty."""
        if not self.profile_steps:
            return None
        first, _, last = self.profile_steps.partition("-")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise UserError(
                f"run.profile_steps is {self.profile_steps!r}; expected a first and a last step, "
                "counted from 1, such as 100-102"
            )
        return int(first), int(last)
