"""Where the rows of a run go, beside its own metrics.jsonl: TensorBoard, Weights & Biases, others.

A logger of one's own has the three methods of `Logger`; `fit(..., loggers=[...])` takes it.
"""

from __future__ import annotations

import secrets
from typing import Any, Protocol

from lorax_gen import files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.training.run import RunConfig


class Logger(Protocol):
    """Gets the rows of a run, in the first of several processes only.

    After a kill a resumed run repeats the rows after its last checkpoint, with the same values.
    """

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Takes a row of numbers and lists of numbers; one without `loss` is an evaluation."""

    def flush(self) -> None:
        """Called before each checkpoint and after each evaluation."""

    def close(self) -> None:
        """Called once, when training ends or fails."""


class TensorBoard(Logger):
    """Event files in a directory; they replace earlier ones after step `start`."""

    def __init__(self, directory: AnyPath, start: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "run.tensorboard needs tensorboardX: pip install 'lorax-gen[tensorboard]'"
            ) from None
        self.directory, self.local = directory, files.staging(directory)
        self.board = SummaryWriter(str(self.local), purge_step=start + 1 if start else None)

    def write(self, step: int, row: dict[str, Any]) -> None:
        for name, value in numbers(row).items():
            self.board.add_scalar(name, value, step)
        self.board.flush()

    def flush(self) -> None:
        files.upload(self.local, self.directory)

    def close(self) -> None:
        self.board.close()


class WandB(Logger):
    """A run of a Weights & Biases project. Its id is kept in the run directory, so that a resumed
    run goes on in the same one; WANDB_MODE=offline writes to the disk only.

    Raises UserError where wandb is not installed, or cannot start.
    """

    def __init__(self, project: str, run_dir: AnyPath):
        try:
            import wandb
        except ImportError:
            raise UserError("run.wandb needs wandb: pip install 'lorax-gen[wandb]'") from None
        kept = run_dir / "wandb-id"
        if not kept.exists():
            files.write_text(kept, secrets.token_hex(8))
        try:
            self.run = wandb.init(
                project=project,
                id=kept.read_text(),
                name=run_dir.name,
                dir=str(files.staging(run_dir)),
                resume="allow",
                settings=wandb.Settings(console="off", save_code=False),
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"run.wandb: wandb cannot start ({reason[:100]}); log in by `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def write(self, step: int, row: dict[str, Any]) -> None:
        self.run.log(numbers(row), step=step)

    def flush(self) -> None:
        """wandb sends rows on its own."""

    def close(self) -> None:
        self.run.finish()


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {k: value for k, value in row.items() if k != "step" and isinstance(value, float)}


def open_loggers(run_dir: AnyPath, run: RunConfig, start: int) -> list[Logger]:
    """The loggers that a config asks for."""
    found: list[Logger] = []
    if run.tensorboard:
        found.append(TensorBoard(run_dir / "tensorboard", start))
    if run.wandb:
        found.append(WandB(run.wandb, run_dir))
    return found
