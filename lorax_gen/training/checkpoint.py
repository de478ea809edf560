"""Checkpoints of the training state with orbax: trainables, statistics, optimizer, step and key.

The data position is the step itself: batches are a function of (seed, step). Frozen weights are
not in the state and so never in a checkpoint. With several processes each writes the shards on its
devices into one directory that all can reach: on a disk or in Google's store, where orbax marks a
finished checkpoint with a file. In other stores one process writes archives (`archive`).
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from lorax_gen import files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.mesh import hosts
from lorax_gen.training.archive import Archive
from lorax_gen.training.checksums import checksums
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import State

UNFINISHED = ".orbax-checkpoint-tmp"  # orbax's suffix of a checkpoint that is being written


class Checkpoints:
    """The checkpoints of a run, written in the background, each once.

    The latest are kept, and the best by the evaluations that `note` was told of. Others are removed
    before the next one is written. One that is being written or removed has a name that is not its
    step, or in Google's store no mark: a killed process leaves complete checkpoints only.

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
        with self._clear_errors():
            self.archive = Archive(directory) if archived else None
            self.local = self.archive.local if self.archive else self.directory
            try:
                self.orbax = ocp.training.Checkpointer(self.local, cleanup_tmp_directories=True)
            except Exception:
                self._refuse_damaged()
                raise
        self.steps = [kept.step for kept in self.orbax.checkpoints]  # of complete ones
        self.writing: int | None = None
        self.scores: dict[int, float] = {}
        self.pool = ThreadPoolExecutor(1)
        self.removal: Future[Any] = Future()
        self.removal.set_result(None)

    def _refuse_damaged(self) -> None:
        """Raises UserError where a checkpoint's description cannot be read, without which orbax
        opens none."""
        for path in self.local.iterdir() if self.local.is_dir() else ():
            if path.name.isdigit():
                try:
                    ocp.metadata(path)
                except Exception as error:
                    raise UserError(
                        f"the checkpoint of step {path.name} is damaged ({_reason(error)[:70]}); "
                        f"remove {self._path(path.name)} to resume from another one"
                    ) from error

    def _path(self, step: int | str) -> AnyPath:
        return self.directory / f"{step}{'.tar' if self.archive else ''}"

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._clear_errors(), closing(self.orbax):
                self._wait()
                self._remove_surplus()
                if self.archive:
                    self.archive.copy()
                self._wait()
        except UserError:
            if kind is None or not issubclass(kind, UserError):  # one failure is reported once
                raise
        finally:
            self.pool.shutdown(wait=False)

    def note(self, step: int, evaluation: dict[str, Any]) -> None:
        """Tells of the evaluation of a step, by which the best checkpoint is kept.

        Raises UserError where it has no metric `run.best`, if that is set.
        """
        best = self.run.best
        if not best:
            return
        if best not in evaluation:
            raise UserError(
                f"run.best is {best!r}, but an evaluation gives "
                f"{', '.join(evaluation) or 'nothing'}; the state is saved, and the run resumes "
                "with one of these"
            )
        score = float(evaluation[best])
        if not math.isnan(score):
            self.scores[step] = -score if self.run.best_is == "lowest" else score

    def save(self, step: int, state: State, *, force: bool = False, wait: bool = False) -> None:
        """Saves every `checkpoint_every` steps; with `force` at any step.

        Args:
          wait: return once it is on disk.
        """
        if not force and step % self.run.checkpoint_every:
            return
        if not files.is_url(self.directory) and not self.directory.is_dir():
            raise UserError(
                f"{self.directory} was removed while the run was writing to it; the same "
                "command starts it anew"
            )
        more = {"checksums": checksums(state)}
        with self._clear_errors():
            self._wait()
            self._remove_surplus()
            self.writing = step
            if self.archive:
                self.orbax.save(step, state, force=True, custom_metadata=more)
                self.archive.copy()
            else:
                self.orbax.save_async(step, state, force=True, custom_metadata=more)
            if wait:
                self._wait()

    def _wait(self) -> None:
        """Returns when nothing is being written or removed; raises the error of a failure."""
        written, self.writing = self.writing, None
        self.orbax.wait()
        self.removal.result()
        if self.archive:
            self.archive.wait()
        if written is not None:
            self.steps.append(written)

    def _remove_surplus(self) -> None:
        """Removes, in the background, all but the latest and the best; all are complete."""
        latest = self.steps[-self.run.keep :]
        scored = {step: self.scores[step] for step in self.steps if step in self.scores}
        best = [max(scored, key=lambda step: scored[step])] if scored else []
        removed = [step for step in self.steps if step not in (*latest, *best)]
        self.steps = [step for step in self.steps if step not in removed]
        if hosts.is_first():
            hidden = [self._hide(self.local / str(step)) for step in removed]
            self.removal = self.pool.submit(lambda: [path.rmtree() for path in hidden])

    def _hide(self, checkpoint: AnyPath) -> epath.Path:
        """Makes a checkpoint one that orbax takes for unfinished, and removes on opening."""
        if files.is_url(checkpoint):
            (checkpoint / "commit_success.txt").unlink()
            return checkpoint
        return epath.Path(checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}{UNFINISHED}")))

    def restore(self, state: State) -> State | None:
        """The latest, with the structure, dtypes and shardings of `state`; None if there is none.

        Raises UserError where the checkpoint holds another structure, or is damaged.
        """
        latest = self.orbax.latest
        if latest is None:
            return None
        path = self._path(latest.step)
        try:
            expected = (self.orbax.metadata(latest).custom_metadata or {}).get("checksums")
            restored = self.orbax.load(latest, abstract_state=jax.tree.map(_abstract, state))
        except (OSError, ValueError, KeyError, TypeError) as error:
            # orbax gives the reason as the cause of an error that lists its own classes.
            raise UserError(
                f"the checkpoint of step {latest.step} does not fit this run, or is damaged "
                f"({_reason(error.__cause__ or error)[:70]}); remove {path} to resume from the one "
                "before, or choose another --run-dir"
            ) from error
        if expected is not None:  # checkpoints of earlier versions have none
            found = checksums(restored)
            damaged = [name for name in found if found[name] != expected.get(name)]
            if damaged:
                raise UserError(
                    f"the checkpoint of step {latest.step} is damaged: the values of {damaged[0]} "
                    f"are not those that were saved; remove {path} to resume from the one before"
                )
        return restored

    def check_room(self, state: State) -> None:
        """Raises UserError where the directory is not writable or has too little free space.

        The space is for one checkpoint more than are kept: an old one is removed after the next is
        complete. Stores are not checked for space.
        """
        try:
            files.make_directory(self.directory)
            probe = self.directory / ".probe"
            probe.write_bytes(b"x")
            probe.unlink()
            if files.is_url(self.local):
                return
            free = shutil.disk_usage(self.local).free
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot write to {self.directory} ({reason}); choose another run directory"
            ) from None
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        count = self.run.keep + bool(self.run.best) + 1
        missing = max(count - len(self.steps), 1) * size
        if free < missing:
            raise UserError(
                f"{self.local} has {_gib(free)} free, but {count} checkpoints of "
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


def _reason(error: BaseException) -> str:
    """The error in one line. tensorstore's message for a full disk is long and holds the errno."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
