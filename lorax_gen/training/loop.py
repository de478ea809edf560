"""The training loop: one for every method.

A run directory holds

    config.yaml        the resolved config: the same command resumes, another one is refused
    metrics.jsonl      one JSON object per line: training metrics, and evaluations
    checkpoints/       orbax checkpoints
    released/          the trained artifact and its metrics, written when the run is complete

Metrics are read one step late, so that the host prepares a batch while the device works.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lorax_gen import config as configs
from lorax_gen import files
from lorax_gen.errors import UserError
from lorax_gen.training import checkpoint, optimizer, sharding
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.state import State, init_state
from lorax_gen.training.step import make_train_step


class Interrupted(Exception):
    """A run was stopped by the signal `signal`; its state is saved."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def fit(experiment: Experiment, run_dir: Path, config: dict[str, Any]) -> Path:
    """Trains to the end, from the latest checkpoint if there is one, and releases the result.

    Args:
      run_dir: a new directory, or that of the same run.
      config: the resolved config as plain values; what `config.yaml` must equal.

    Returns:
      the directory of the released artifact.

    Raises:
      UserError: the directory holds another run.
      Interrupted: SIGINT or SIGTERM came; the state was saved first.
    """
    claim_run_dir(run_dir, config)
    released = run_dir / "released"
    if released.is_dir():
        return released
    run = experiment.run
    mesh = sharding.make_mesh(experiment.mesh)
    transformation = optimizer.make_optimizer(experiment.optimizer, run.steps)

    def fresh() -> State:
        params, stats = experiment.init()
        return init_state(params, stats, transformation, run.seed)

    with jax.set_mesh(mesh):
        state = sharding.init_sharded(fresh, mesh)
        train_step = sharding.parallelize(
            make_train_step(experiment.loss, transformation), state, mesh, experiment.mesh.mode
        )
        checkpoints = checkpoint.open_checkpoints(
            run_dir / "checkpoints", run.checkpoint_every, run.keep
        )
        state = checkpoint.restore(checkpoints, state) or state
        log = MetricsLog(run_dir / "metrics.jsonl", int(state["step"]))
        with checkpoints, log:
            state = train(experiment, state, train_step, mesh, checkpoints, log, run_dir.name)
        with files.new_directory(released) as partial:
            provenance = {"config": without_places(config), "metrics": log.last}
            experiment.release(state, partial, provenance)
            shutil.copy(log.path, partial)
    return released


def train(
    experiment: Experiment,
    state: State,
    train_step: Callable,
    mesh: Mesh,
    checkpoints: checkpoint.Checkpoints,
    log: MetricsLog,
    name: str,
) -> State:
    """Steps from where `state` is to the end: logs, evaluates, saves."""
    run, start = experiment.run, int(state["step"])
    frozen = jax.device_put(experiment.frozen, sharding.tree_shardings(experiment.frozen, mesh))
    schedule = optimizer.make_schedule(experiment.optimizer, run.steps)
    bar = tqdm(
        total=run.steps, initial=start, desc=name, unit="step", disable=not sys.stderr.isatty()
    )
    pending: tuple[int, dict[str, Any]] | None = None

    def write_pending() -> None:
        nonlocal pending
        if pending is not None:
            bar.set_postfix(loss=f"{log.write(*pending)['loss']:.3f}")
            pending = None

    with bar, stop_signals() as stopped:
        clock, since = time.perf_counter(), start
        for step in range(start, run.steps):
            state, metrics = train_step(state, frozen, experiment.batch(step))
            bar.update()
            write_pending()  # those of the step before: the device is busy meanwhile
            done, stopping = step + 1, bool(stopped)
            last = done == run.steps
            evaluating = last or done % run.evaluate_every == 0
            if done % run.log_every == 0 or last:
                now = time.perf_counter()
                rate = (done - since) * experiment.examples_per_step / (now - clock)
                clock, since = now, done
                extra = {"learning_rate": schedule(step), "examples_per_second": rate}
                pending = (done, {**metrics, **extra})
            if evaluating or stopping or done % run.checkpoint_every == 0:
                write_pending()  # a checkpoint must not be there before the rows that lead to it
            if evaluating:
                log.write(done, experiment.evaluate(state))
                clock, since = time.perf_counter(), done
            if stopping:
                checkpoints.save(done, state, force=True, overwrite=True)
                message = f"stopped at step {done} of {run.steps}, state saved"
                raise Interrupted(message, stopped[0])
            checkpoints.save_async(done, state, force=last)
    return state


def claim_run_dir(run_dir: Path, config: dict[str, Any]) -> None:
    """Makes the directory and writes the config, or checks that the same run is there."""
    path, text = run_dir / "config.yaml", configs.to_yaml(config)
    if path.exists():
        if configs.read_yaml(path) != configs.read_yaml_text(text):
            raise UserError(
                f"{run_dir} already holds another run (its config.yaml differs); "
                "choose another --run-dir, or repeat that run's config to resume it"
            )
        return
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"{run_dir} exists and is not a run of ours; choose another --run-dir")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write to {run_dir} ({error.strerror}); choose another") from None


def without_places(value: Any) -> Any:
    """Plain values, absolute paths cut to their last name: what is released names no machine."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


class MetricsLog:
    """Appends rows to metrics.jsonl; rows behind the resumed step are dropped first."""

    def __init__(self, path: Path, start: int):
        rows = [json.loads(line) for line in read_whole_lines(path)]
        kept = [row for row in rows if row["step"] <= start]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.path = path
        self.last: dict[str, Any] = {}
        for row in kept:
            self.last.update(row)

    def __enter__(self) -> MetricsLog:
        self.file = self.path.open("a")
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Waits for the metrics and appends them as one line."""
        row = {"step": step} | {key: plain(value) for key, value in metrics.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.last.update(row)
        return row


def read_whole_lines(path: Path) -> list[str]:
    """Lines of a file, without a last one that was cut off."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def plain(value: Any) -> Any:
    """A number or nested lists of numbers, to six significant digits."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    array = np.asarray(value)
    rounded = np.vectorize(lambda x: float(f"{x:.6g}"), otypes=[float])(array)
    return rounded.tolist()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that a first SIGINT or SIGTERM makes non-empty; a second one acts as usual."""
    caught: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    previous = {}

    def handler(number, frame):
        caught.append(number)
        for kind in kinds:
            signal.signal(kind, previous[kind])

    try:
        previous = {kind: signal.signal(kind, handler) for kind in kinds}
    except ValueError:  # not in the main thread: the caller handles signals
        previous = {}
    try:
        yield caught
    finally:
        for kind, old in previous.items():
            signal.signal(kind, old)
