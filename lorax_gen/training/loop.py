"""The training loop: one for every recipe.

A run directory holds

    config.yaml        the resolved config; the same command resumes, another config is refused
    metrics.jsonl      one JSON object per line: training metrics, and evaluations
    checkpoints/       orbax checkpoints
    released/          the trained artifact and its metrics, written when the run is complete
    released-STEPS/    the same, of a run that was extended after it had been released
    tensorboard/, profile/, wandb/, wandb-id    on request

It may be in a store (see `files`). There metrics.jsonl and tensorboard/ are uploaded before
each checkpoint, after each evaluation and otherwise once a minute; rows that a killed run has not
uploaded are recomputed when it resumes.

Metrics are read one step late, so that the host prepares a batch while the device computes. With
several processes all take the same steps and write checkpoints; only the first writes the rest.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lorax_gen import documents, files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.mesh import hosts, sharding
from lorax_gen.training import optimizer
from lorax_gen.training.checkpoint import Checkpoints
from lorax_gen.training.console import Console
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.loggers import Logger, open_loggers
from lorax_gen.training.metrics import (
    Clock,
    MetricsLog,
    Profiler,
    RouterWatch,
    device_memory,
    use_compilation_cache,
)
from lorax_gen.training.run import RunConfig
from lorax_gen.training.run_dir import claimed, planned_steps, release_of, without_paths
from lorax_gen.training.signals import Interrupted, StopSignal, stop_signals
from lorax_gen.training.state import State


def fit(
    experiment: Experiment,
    run_dir: AnyPath,
    config: dict[str, Any],
    loggers: Sequence[Logger] = (),
) -> AnyPath:
    """Trains from the latest checkpoint, if there is one, to the end and releases the result.

    With several processes (see `mesh.hosts`) each calls it with the same arguments.

    Args:
      run_dir: a new directory, or that of the same run; one that all processes can reach.
      config: the resolved config as plain values; an existing `config.yaml` must equal it, except
        in the fields that `fixed_part` drops.
      loggers: get each row of metrics too, in the first process; see `training.loggers`.

    Returns:
      the directory of the released artifact.

    Raises:
      UserError: the directory holds another run or one that has trained more steps, is not
        writable or has too little space, or the loss is not finite.
      Interrupted: on SIGINT or SIGTERM, after the state was saved; it is saved before an
        evaluation, which is cut off after a batch and made up for when the run resumes. Several
        processes finish an evaluation that has begun.
    """
    check_processes(experiment, config)
    steps = experiment.run.steps
    with ExitStack() as claims, stop_signals() as stop:
        before = planned_steps(run_dir) or steps
        hosts.on_first(lambda: claims.enter_context(claimed(run_dir, config, steps)))
        if not all(hosts.each((run_dir / "config.yaml").exists())):
            raise UserError(
                f"not every process sees {run_dir}; choose a directory that all can reach"
            )
        released = release_of(run_dir, steps)
        if not hosts.from_first(files.is_complete_directory(released)):
            result, log = train_in(run_dir, experiment, stop, before, loggers)
            # A signal that comes from here on does not keep the release from being finished.
            hosts.on_first(lambda: release(experiment, result, log, released, config))
    return released


def train_in(
    run_dir: AnyPath,
    experiment: Experiment,
    stop: StopSignal,
    before: int,
    loggers: Sequence[Logger],
) -> tuple[State, MetricsLog]:
    """Trains to the end; returns the part of the state that is released, and the log. The run was
    one of `before` steps when it trained last."""
    run, mesh, mode = experiment.run, experiment.mesh, experiment.mode
    use_compilation_cache(run.compilation_cache)
    check_mode(mode, mesh)
    with jax.set_mesh(mesh):
        state = sharding.init_sharded(experiment.fresh_state, mesh)
        train_step = sharding.parallelize(experiment.train_step(), state, mesh, mode)
        with Checkpoints(run_dir / "checkpoints", run) as checkpoints:
            hosts.on_first(lambda: checkpoints.check_room(state))
            state = checkpoints.restore(state) or state
            warn_of_schedule(experiment, before, int(state["step"]))
            start = int(state["step"])
            console = Console(run_dir.name, start, run.steps)
            parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
            console.say(
                f"training {parameters:,} parameters on {mesh.size} "
                f"{'device' if mesh.size == 1 else 'devices'}, in {run_dir} from step {start} of "
                f"{run.steps}"
            )
            with open_log(run_dir, run, start, [console, *loggers]) as log:
                for step, evaluation in log.evaluations.items():
                    if run.best in evaluation:
                        checkpoints.note(step, evaluation)
                state = train(experiment, state, train_step, checkpoints, log, console, stop)
        return gather_state(state), log


def warn_of_schedule(experiment: Experiment, before: int, start: int) -> None:
    """Warns where the steps up to `start` had another learning rate, in a run of `before` steps,
    than in one of the length that it has now."""
    steps, taken = experiment.run.steps, np.arange(start)
    old, new = (optimizer.make_schedule(experiment.optimizer, each) for each in (before, steps))
    if before != steps and start and np.any(old(taken) != new(taken)) and hosts.is_first():
        print(
            f"lorax-gen: warning: run.steps was {before} and is {steps}: the learning rate follows "
            f"the schedule of {steps} steps from step {start + 1} on ({old(start - 1):.3g} at step "
            f"{start}, then {new(start):.3g}), so this is not the run that {steps} steps from the "
            "start would have been",
            file=sys.stderr,
        )


def release(
    experiment: Experiment,
    result: State,
    log: MetricsLog,
    released: AnyPath,
    config: dict[str, Any],
) -> None:
    with files.new_directory(released) as partial:
        provenance = without_paths({"config": config, "metrics": log.last})
        experiment.release(result, partial, provenance)
        (partial / log.path.name).write_bytes(log.path.read_bytes())


def train(
    experiment: Experiment,
    state: State,
    train_step: Callable,
    checkpoints: Checkpoints,
    log: MetricsLog,
    console: Console,
    stop: StopSignal,
) -> State:
    """Trains from the step of `state` to the last: logs, evaluates, saves.

    Args:
      stop: the signal on which the run stops: after the current step, or in an evaluation after
        the current batch. Several processes agree on that by a vote before each step and each
        evaluation; in an evaluation they all go on to its end.
    """
    run, start, run_dir = experiment.run, int(state["step"]), log.path.parent
    mesh = experiment.mesh
    shardings = sharding.tree_shardings(experiment.frozen, mesh)
    frozen = sharding.place(experiment.frozen, shardings)
    schedule = optimizer.make_schedule(experiment.optimizer, run.steps)
    clock, router = Clock(experiment.work, list(mesh.devices.flat)), RouterWatch()
    window = run.profile_window if hosts.is_first() else None
    profiler = Profiler(window, run_dir / "profile")
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
            log.write(step, {**metrics, **clock.read(step), **router(metrics)})
            pending = None

    def evaluate(step: int) -> None:
        """Evaluates the state after `step` steps. It is saved, so a run stopped here evaluates it
        when it resumes."""
        if not due(run, step) or hosts.from_first(step in log.evaluations):
            return
        stopped = f"stopped at step {step} of {run.steps}, state saved"
        if number := int(hosts.vote(stop.number, mesh)):
            raise Interrupted(stopped, number)
        with nullcontext() if hosts.several() else stop.interrupts(stopped):
            evaluation = experiment.evaluate(gather_state(state))
        evaluation = hosts.from_first(evaluation)
        if evaluation:
            log.write(step, evaluation)
            log.flush()
        checkpoints.note(step, evaluation)
        clock.restart(step)

    with profiler:
        if start < run.steps and (number := int(hosts.vote(stop.number, mesh))):
            raise Interrupted(f"stopped at step {start} of {run.steps}", number)  # nothing is lost
        clock.restart(start)
        for step in range(start, run.steps):
            evaluate(step)
            done, last = step + 1, step + 1 == run.steps
            batch = experiment.batch(step)
            vote = hosts.vote(stop.number, mesh)
            profiler.before(done, state)
            state, metrics = train_step(state, frozen, batch)
            console.advance()
            write_pending()  # of the previous step, while the device computes this one
            clock.count(batch)
            profiler.after(done, state)
            number, evaluating = int(vote), due(run, done)
            if done % run.log_every == 0 or last:
                more = {"learning_rate": schedule(step), **device_memory()}
                more |= {f"data/{name}": count for name, count in experiment.counts().items()}
                pending = (done, {**metrics, **more})
            if evaluating or number or done % run.checkpoint_every == 0:
                write_pending()
                log.flush()  # rows must be on disk before the checkpoint that follows them
            # Before an evaluation, which may outlast the notice period of a preempted machine.
            checkpoints.save(done, state, force=evaluating or bool(number), wait=bool(number))
            if number:
                raise Interrupted(f"stopped at step {done} of {run.steps}, state saved", number)
        evaluate(run.steps)
    return state


def due(run: RunConfig, step: int) -> bool:
    """Whether the state after `step` steps is evaluated."""
    return step > 0 and (step % run.evaluate_every == 0 or step == run.steps)


def gather_state(state: State) -> State:
    """The part of the state that is evaluated and released, gathered into every process."""
    return hosts.gather({name: state[name] for name in ("step", "params", "stats")})


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


def open_log(run_dir: AnyPath, run: RunConfig, start: int, loggers: Sequence[Logger]) -> MetricsLog:
    path = run_dir / "metrics.jsonl"
    if not hosts.is_first():
        return MetricsLog(path, start, write=False)
    return MetricsLog(path, start, [*loggers, *open_loggers(run_dir, run, start)])
