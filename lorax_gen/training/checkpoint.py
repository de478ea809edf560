"""Checkpoints of the training state with orbax: trainables, statistics, optimizer, step and key.

The data position is the step itself: batches are a function of (seed, step). Frozen weights are
not in the state and so never in a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lorax_gen.errors import UserError
from lorax_gen.training.state import State

Checkpoints = ocp.training.Checkpointer


def open_checkpoints(directory: Path, every: int, keep: int) -> Checkpoints:
    """A checkpointer that saves each `every` steps and keeps the latest `keep`."""
    return Checkpoints(
        directory.absolute(),
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(every),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def restore(checkpoints: Checkpoints, state: State) -> State | None:
    """The latest checkpoint in the structure, dtypes and shardings of `state`, or None.

    Raises UserError where the checkpoint holds another structure.
    """
    if checkpoints.latest is None:
        return None
    try:
        return checkpoints.load(abstract_state=jax.tree.map(_abstract, state))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint of step {checkpoints.latest.step} in {checkpoints.directory.name} "
            f"does not fit this run ({str(error).splitlines()[0]}); choose another run directory"
        ) from error


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
