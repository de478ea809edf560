"""Checkpoints of the training state with orbax: trainables, statistics, optimizer, step and key.

The data position is the step itself: batches are a function of (seed, step). Frozen weights are
not in the state and so never in a checkpoint. With several processes each writes the shards on its
devices into one directory that all can reach: on a disk or in Google's store, where orbax marks a
finished checkpoint with a file. In other stores one process writes archives (`archive`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lorax_gen import files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.mesh import hosts
from lorax_gen.training.archive import Archive
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import State

policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of a run, written in the background; old ones are removed, except the best.

    Raises UserError where a checkpoint cannot be written; a failure in the background is raised
    by the next save, or on exit.
    """

    def __init__(self, directory: AnyPath, run: RunConfig):
        self.directory, self.run = files.absolute(directory), run
        archived = files.scheme(directory) not in ("", "gs")
        if archived and hosts.several():
            raise UserError(
                f"several processes cannot keep checkpoints in {directory}; choose gs://, or a "
                "directory that all can reach"
            )
        keep = [policies.LatestN(run.keep)]
        if run.best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[run.best],
                    reverse=run.best_is == "lowest",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        with self._clear_errors():
            self.archive = Archive(directory) if archived else None
            self.orbax = ocp.training.Checkpointer(
                self.archive.local if archived else self.directory,
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            with self._clear_errors():
                self.orbax.close()
                if self.archive:
                    self.archive.wait()
        except UserError:
            if kind is None or not issubclass(kind, UserError):  # one failure is reported once
                raise

    def save(self, step: int, state: State, *, force: bool = False, wait: bool = False) -> None:
        """Saves every `checkpoint_every` steps; with `force` at any step.

        Args:
          wait: return once it is on disk; it replaces an earlier one of this step.
        """
        if not force and step % self.run.checkpoint_every:
            return
        self._save(step, state, overwrite=wait, wait=wait)

    def save_best(self, step: int, state: State, evaluation: dict[str, Any]) -> None:
        """Saves the state again with its metric, if `run.best` is set and the evaluation is the
        best so far.

        Raises UserError where the evaluation has no such metric.
        """
        best = self.run.best
        if not best:
            return
        if best not in evaluation:
            raise UserError(
                f"run.best is {best!r}, but an evaluation gives {', '.join(evaluation)}; the state "
                "is saved, and the run resumes with one of these"
            )
        value = float(evaluation[best])
        if self._is_best(value):
            with self._clear_errors():
                self.orbax.wait()  # or it would replace a checkpoint that is still being written
            self._save(step, state, overwrite=True, metrics={best: value})

    def _save(self, step: int, state: State, *, wait: bool = False, **options: Any) -> None:
        with self._clear_errors():
            if self.archive:
                self.archive.wait()
                self.orbax.save(step, state, force=True, **options)
                self.archive.copy()
            else:
                self.orbax.save_async(step, state, force=True, **options)
            if wait:
                (self.archive or self.orbax).wait()

    def _is_best(self, value: float) -> bool:
        saved = [(kept.metrics or {}).get(self.run.best) for kept in self.orbax.checkpoints]
        sign = -1 if self.run.best_is == "lowest" else 1
        return all(sign * value > sign * other for other in saved if other is not None)

    def restore(self, state: State) -> State | None:
        """The latest, with the structure, dtypes and shardings of `state`; None if there is none.

        Raises UserError where the checkpoint holds another structure, or is damaged.
        """
        latest = self.orbax.latest
        if latest is None:
            return None
        try:
            return self.orbax.load(abstract_state=jax.tree.map(_abstract, state))
        except (OSError, ValueError, KeyError, TypeError) as error:
            # orbax gives the reason as the cause of an error that lists its own classes.
            raise UserError(
                f"the checkpoint of step {latest.step} does not fit this run, or is damaged "
                f"({_reason(error.__cause__ or error)}); choose another run directory, or remove "
                f"{self.directory / str(latest.step)}{'.tar' if self.archive else ''} to resume "
                "from the one before"
            ) from error

    def check_room(self, state: State) -> None:
        """Raises UserError where the directory is not writable or has too little free space.

        The space is for one checkpoint more than are kept: an old one is removed after the next is
        complete. Stores are not checked for space.
        """
        local = self.archive.local if self.archive else self.directory
        try:
            files.make_directory(self.directory)
            probe = self.directory / ".probe"
            probe.write_bytes(b"x")
            probe.unlink()
            if files.is_url(local):
                return
            free = shutil.disk_usage(local).free
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot write to {self.directory} ({reason}); choose another run directory"
            ) from None
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        count = self.run.keep + bool(self.run.best) + 1
        missing = max(count - len(self.orbax.checkpoints), 1) * size
        if free < missing:
            raise UserError(
                f"{local} has {_gib(free)} free, but {count} checkpoints of "
                f"{_gib(size)} need {_gib(missing)} more; free space, lower run.keep or choose "
                "another run directory"
            )

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = files.store_error(error)
            if reason is None and not isinstance(error, OSError | ValueError | RuntimeError):
                raise
            raise UserError(
                f"cannot save a checkpoint in {self.directory} ({reason or _reason(error)}); what "
                "was saved before is complete, and the same command resumes the run from there"
            ) from error


def _reason(error: Exception) -> str:
    """The error in one line. tensorstore's message for a full disk is long and holds the errno."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
