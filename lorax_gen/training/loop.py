"""The training loop: one for every recipe.

A run directory holds

    config.yaml        the resolved config; the same command resumes, another config is refused
    metrics.jsonl      one JSON object per line: training metrics, and evaluations
    checkpoints/       orbax checkpoints
    released/          the trained artifact and its metrics, written when the run is complete
    tensorboard/, profile/    on request

It may be in a store (see `files`). There metrics.jsonl and tensorboard/ are uploaded before
each checkpoint, after each evaluation and otherwise once a minute; rows that a killed run has not
uploaded are recomputed when it resumes.

Metrics are read one step late, so that the host prepares a batch while the device computes. With
several processes all take the same steps and write checkpoints; only the first writes the rest.
"""

from __future__ import annotations

import math
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from lorax_gen import documents, files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.mesh import hosts, sharding
from lorax_gen.training import optimizer
from lorax_gen.training.checkpoint import Checkpoints
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.metrics import (
    Clock,
    MetricsLog,
    Profiler,
    RouterWatch,
    device_memory,
    use_compilation_cache,
)
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import State


class Interrupted(Exception):
    """A run was stopped by the signal `signal`; its state is saved."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def fit(experiment: Experiment, run_dir: AnyPath, config: dict[str, Any]) -> AnyPath:
    """Trains from the latest checkpoint, if there is one, to the end and releases the result.

    With several processes (see `mesh.hosts`) each calls it with the same arguments.

    Args:
      run_dir: a new directory, or that of the same run; one that all processes can reach.
      config: the resolved config as plain values; an existing `config.yaml` must equal it, except
        in the fields that `fixed_part` drops.

    Returns:
      the directory of the released artifact.

    Raises:
      UserError: the directory holds another run, is not writable or has too little space, or
        the loss is not finite.
      Interrupted: on SIGINT or SIGTERM, after the state was saved.
    """
    run = experiment.run
    check_processes(experiment, config)
    hosts.on_first(lambda: claim_run_dir(run_dir, config))
    if not all(hosts.each((run_dir / "config.yaml").exists())):
        raise UserError(f"not every process sees {run_dir}; choose a directory that all can reach")
    released = run_dir / "released"
    if hosts.from_first(files.is_complete_directory(released)):
        return released
    use_compilation_cache(run.compilation_cache)
    mesh, mode = experiment.mesh, experiment.mode
    check_mode(mode, mesh)
    with jax.set_mesh(mesh):
        state = sharding.init_sharded(experiment.fresh_state, mesh)
        train_step = sharding.parallelize(experiment.train_step(), state, mesh, mode)
        with Checkpoints(run_dir / "checkpoints", run) as checkpoints:
            hosts.on_first(lambda: checkpoints.check_room(state))
            state = checkpoints.restore(state) or state
            with open_log(run_dir, run, int(state["step"])) as log:
                for step, evaluation in log.evaluations.items():
                    if run.best in evaluation:
                        checkpoints.note(step, evaluation)
                state = train(experiment, state, train_step, checkpoints, log)
        result = gather_state(state)

    def release() -> None:
        with files.new_directory(released) as partial:
            provenance = {"config": without_paths(config), "metrics": log.last}
            experiment.release(result, partial, provenance)
            (partial / log.path.name).write_bytes(log.path.read_bytes())

    hosts.on_first(release)
    return released


def train(
    experiment: Experiment,
    state: State,
    train_step: Callable,
    checkpoints: Checkpoints,
    log: MetricsLog,
) -> State:
    """Trains from the step of `state` to the last: logs, evaluates, saves."""
    run, start, run_dir = experiment.run, int(state["step"]), log.path.parent
    mesh = experiment.mesh
    shardings = sharding.tree_shardings(experiment.frozen, mesh)
    frozen = sharding.place(experiment.frozen, shardings)
    schedule = optimizer.make_schedule(experiment.optimizer, run.steps)
    clock, router = Clock(experiment.work, list(mesh.devices.flat)), RouterWatch()
    window = run.profile_window if hosts.is_first() else None
    profiler = Profiler(window, run_dir / "profile")
    bar = tqdm(
        total=run.steps, initial=start, desc=run_dir.name, unit="step",
        disable=not (sys.stderr.isatty() and hosts.is_first()),
    )  # fmt: skip
    pending: tuple[int, dict[str, Any]] | None = None

    def write_pending() -> None:
        nonlocal pending
        if pending is not None:
            step, metrics = pending
            jax.block_until_ready(metrics)  # or the clock would time the dispatch only
            if not math.isfinite(metrics["loss"]):  # before it is saved in a checkpoint
                raise UserError(
                    f"the loss of step {step} is {float(metrics['loss'])}: training has diverged; "
                    "a smaller optimizer.learning-rate or a longer warm-up may help"
                )
            row = log.write(step, {**metrics, **clock.read(step), **router(metrics)})
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            pending = None

    def evaluate(step: int) -> None:
        """Evaluates the state after `step` steps. It is saved, so a run stopped here evaluates it
        when it resumes."""
        if not due(run, step) or hosts.from_first(step in log.evaluations):
            return
        if stop := int(hosts.vote(max(stopped, default=0), mesh)):
            raise Interrupted(f"stopped at step {step} of {run.steps}, state saved", stop)
        evaluation = hosts.from_first(experiment.evaluate(gather_state(state)))
        log.write(step, evaluation)
        log.flush()
        checkpoints.note(step, evaluation)
        clock.restart(step)

    with bar, profiler, stop_signals() as stopped:
        clock.restart(start)
        for step in range(start, run.steps):
            evaluate(step)
            done, last = step + 1, step + 1 == run.steps
            batch = experiment.batch(step)
            stop = hosts.vote(max(stopped, default=0), mesh)
            profiler.before(done, state)
            state, metrics = train_step(state, frozen, batch)
            bar.update()
            write_pending()  # of the previous step, while the device computes this one
            clock.count(batch)
            profiler.after(done, state)
            stop, evaluating = int(stop), due(run, done)
            if done % run.log_every == 0 or last:
                more = {"learning_rate": schedule(step), **device_memory()}
                more |= {f"data/{name}": count for name, count in experiment.counts().items()}
                pending = (done, {**metrics, **more})
            if evaluating or stop or done % run.checkpoint_every == 0:
                write_pending()
                log.flush()  # rows must be on disk before the checkpoint that follows them
            # Before an evaluation, which may outlast the notice period of a preempted machine.
            checkpoints.save(done, state, force=evaluating or bool(stop), wait=bool(stop))
            if stop:
                raise Interrupted(f"stopped at step {done} of {run.steps}, state saved", stop)
        evaluate(run.steps)
    return state


def due(run: RunConfig, step: int) -> bool:
    """Whether the state after `step` steps is evaluated."""
    return step > 0 and (step % run.evaluate_every == 0 or step == run.steps)


def gather_state(state: State) -> State:
    """The part of the state that is evaluated and released, gathered into every process."""
    return hosts.gather({name: state[name] for name in ("step", "params", "stats")})


# --- the run directory ---------------------------------------------------------------------------


def fixed_part(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the fields that may change when a run resumes: where it runs
    and what it keeps, not what it learns."""
    free = ("mesh", "remat", "attention")
    free_of_run = ("keep", "best", "best_is", "tensorboard", "profile_steps", "compilation_cache")
    fixed = {name: value for name, value in config.items() if name not in free}
    run = fixed.get("run", {})
    return {**fixed, "run": {name: run[name] for name in run if name not in free_of_run}}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The keys, joined by dots, in which two configs differ."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [prefix.removesuffix(".")]
    return [
        found
        for name in {**old, **new}
        for found in differences(old.get(name), new.get(name), f"{prefix}{name}.")
    ]


def check_processes(experiment: Experiment, config: dict[str, Any]) -> None:
    """Raises UserError where configs differ between processes, or several cannot run this one."""
    if len(set(hosts.each(zlib.crc32(documents.to_yaml(config).encode())))) > 1:
        raise UserError("the processes have different configs; start all with the same command")
    if hosts.several() and experiment.mode == "pmap":
        raise UserError("mesh.mode=pmap is for one process; with several use jit and mesh.data=-1")


def check_mode(mode: str, mesh: Mesh) -> None:
    """Raises UserError where the mesh would shard weights that pmap replicates."""
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    if mode == "pmap" and fsdp * tensor > 1:
        raise UserError(
            f"mesh.mode=pmap replicates the weights, but fsdp={fsdp} and tensor={tensor} would "
            "split them; set these to 1 and data to -1, or use jit"
        )


def claim_run_dir(run_dir: AnyPath, config: dict[str, Any]) -> None:
    """Creates the directory and writes the config, or checks that it holds the same run."""
    path, text = run_dir / "config.yaml", documents.to_yaml(config)
    if path.exists():
        old, new = documents.read_yaml(path), documents.parse_yaml(text, "the resolved config")
        if differing := differences(fixed_part(old), fixed_part(new)):
            raise UserError(
                f"{run_dir} already holds another run (its config.yaml differs in "
                f"{', '.join(differing[:5])}); choose another --run-dir, or repeat that run's "
                "config to resume it"
            )
        if old == new or files.is_complete_directory(run_dir / "released"):
            return
    elif run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"{run_dir} exists and is not a run directory; choose another --run-dir")
    try:
        files.make_directory(run_dir)
        files.write_text(path, text)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {run_dir} ({reason}); choose another") from None


def open_log(run_dir: AnyPath, run: RunConfig, start: int) -> MetricsLog:
    board = run_dir / "tensorboard" if run.tensorboard else None
    return MetricsLog(run_dir / "metrics.jsonl", start, board, write=hosts.is_first())


def without_paths(value: Any) -> Any:
    """Plain values, with absolute paths and URLs reduced to their last component: a released
    artifact names no machine and no bucket."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, str) and (files.is_url(value) or Path(value).is_absolute()):
        return Path(value).name
    return value


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the first SIGINT or SIGTERM; a second one has its usual effect."""
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
