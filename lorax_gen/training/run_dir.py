"""The directory of a run: whose it is, and what a released artifact may tell of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from etils import epath

from lorax_gen import documents, files, locks, temporary
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.hub import without_folders

# What a run writes before its first row.
OWN = ("config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "wandb", "wandb-id", "profile")


@contextmanager
def claimed(run_dir: AnyPath, config: dict[str, Any], steps: int) -> Iterator[None]:
    """Creates the directory and writes the config, or checks that it holds the same run.

    Until the block ends other processes are refused. Where it ends with an error before a row or a
    checkpoint was written, a new directory is emptied again: the corrected config is not refused.

    Raises UserError where the directory holds another run or something else, is in use, or is not
    writable.
    """
    complete = files.is_complete_directory(release_of(run_dir, steps))
    if check_run_dir(run_dir, config, steps) and complete:
        yield  # nothing will be written
        return
    with locks.only_writer(run_dir):
        path = run_dir / "config.yaml"
        known = check_run_dir(run_dir, config, steps)
        if not known or documents.read_yaml(path) != plain(config):
            try:
                files.write_text(path, documents.to_yaml(config))
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"cannot write to {run_dir} ({reason}); choose another") from None
        if not files.is_url(run_dir):  # what wrote them is dead, or it would hold the lock
            for name in ("config.yaml", "metrics.jsonl", "released", f"released-{steps}"):
                temporary.remove_leftovers(run_dir / name)
        try:
            yield
        except BaseException:
            if not known:
                with suppress(Exception):  # one failure is reported once
                    remove_failed_start(run_dir)
            raise


def remove_failed_start(run_dir: AnyPath) -> None:
    """Removes what a run has written into a new directory, if that is no row and no checkpoint."""
    log = run_dir / "metrics.jsonl"
    if checkpoint_steps(run_dir) or (log.exists() and log.read_bytes()):
        return
    for path in list(run_dir.iterdir()):
        if path.name in OWN:
            _remove(path)


def _remove(path: AnyPath) -> None:
    if not path.is_dir():
        path.unlink()
    else:
        epath.Path(path).rmtree()


def release_of(run_dir: AnyPath, steps: int) -> AnyPath:
    """Where the artifact of a run of `steps` steps is, or goes: `released`, or `released-STEPS`
    where that is taken by a run of another length, which was extended."""
    released = run_dir / "released"
    taken = files.is_complete_directory(released)
    other = taken and _steps(released) not in (None, steps)
    return run_dir / f"released-{steps}" if other else released


def _steps(released: AnyPath) -> int | None:
    """The step of a released artifact, which is that of its last row of metrics."""
    log = released / "metrics.jsonl"
    rows = log.read_bytes().splitlines() if log.exists() else []
    return json.loads(rows[-1])["step"] if rows else None


def planned_steps(run_dir: AnyPath) -> int | None:
    """`run.steps` of the run that the directory holds; None if it holds none."""
    path = run_dir / "config.yaml"
    return documents.read_yaml(path).get("run", {}).get("steps") if path.exists() else None


def checkpoint_steps(run_dir: AnyPath) -> list[int]:
    folder = run_dir / "checkpoints"
    names = [path.stem for path in folder.iterdir()] if folder.is_dir() else []
    return [int(name) for name in names if name.isdigit()]


def check_run_dir(run_dir: AnyPath, config: dict[str, Any], steps: int) -> bool:
    """Whether the directory holds a run. Raises UserError where that is another run or has
    trained more than `steps`, or where the directory holds something else."""
    path = run_dir / "config.yaml"
    if path.exists():
        old = documents.read_yaml(path)
        if differing := differences(fixed_part(old), fixed_part(plain(config))):
            raise UserError(
                f"{run_dir} already holds another run (its config.yaml differs in "
                f"{', '.join(differing[:5])}); choose another --run-dir, or repeat that run's "
                "config to resume it"
            )
        trained = max([0, *checkpoint_steps(run_dir)])
        if steps < trained:
            raise UserError(
                f"run.steps is {steps}, but the run in {run_dir} has trained {trained} steps; "
                f"choose {trained} or more, or another --run-dir"
            )
        return True
    if run_dir.exists() and (not run_dir.is_dir() or any(map(_foreign, run_dir.iterdir()))):
        raise UserError(f"{run_dir} exists and is not a run directory; choose another --run-dir")
    return False


def _foreign(path: AnyPath) -> bool:
    """Whether it is not from a run that was killed before it had written its config."""
    return path.name != locks.NAME and not temporary.NAME.fullmatch(path.name)


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The config as it is read from its file."""
    return documents.parse_yaml(documents.to_yaml(config), "the resolved config")


def fixed_part(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the fields that may change when a run resumes: where it runs, how long, and
    what it logs and keeps, not what it learns from."""
    free = ("mesh", "remat", "attention")
    free_of_run = (
        "steps", "log_every", "evaluate_every", "checkpoint_every", "keep", "best", "best_is",
        "tensorboard", "wandb", "profile_steps", "compilation_cache",
    )  # fmt: skip
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


def without_paths(value: Any) -> Any:
    """Plain values, with absolute paths and URLs reduced to their last component, in `path=weight`
    too: a released artifact names no machine, no user and no bucket."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        if (last := without_folders(value)) != value:
            return last
        name, mark, rest = value.partition("=")
        return f"{name}={without_paths(rest)}" if mark else value
    return value
