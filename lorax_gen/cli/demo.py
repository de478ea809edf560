"""`lorax-gen demo` and `lorax-gen demo tasks`."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lorax_gen.cli import stop
from lorax_gen.cli.parse import UserPath
from lorax_gen.config import Seed, Size
from lorax_gen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Demo:
    """See the method work: specialise a small model to unseen tasks, in minutes.

    world uses the shipped generator: prints answers before and after, a table of methods, and
    writes report.json and pictures into the run directory. tasks trains a generator on the shipped
    file of own tasks (the config own-tasks), and then specialises, answers and evaluates on the
    tasks, wordings and rows that it kept back. Interrupted, the same command resumes.
    """

    what: Annotated[Literal["world", "tasks"], tyro.conf.Positional] = "world"
    """world or tasks."""
    run_dir: UserPath | None = None
    """Run directory; default runs/demo, or runs/tasks."""
    questions: Size = 16
    """Questions per task."""
    seed: Seed = 0
    """Seed of wordings and questions."""
    steps: Size | None = None
    """Training steps of tasks; default those of its config."""

    def run(self) -> int:
        if self.what == "tasks":
            return self.run_tasks()
        if self.steps is not None:
            raise UserError("--steps is an option of `demo tasks`; the world's demo does not train")
        from lorax_gen.demo import run_demo

        run_demo(self.run_dir or Path("runs/demo"), self.questions, self.seed)
        return 0

    def run_tasks(self) -> int:
        with stop.exit_on_sigterm():
            from lorax_gen.demo_tasks import run_task_demo
            from lorax_gen.training.loop import Interrupted

            try:
                run_dir = self.run_dir or Path("runs/tasks")
                run_task_demo(run_dir, self.questions, self.seed, self.steps)
            except Interrupted as interrupted:
                print(
                    f"lorax-gen: {interrupted}; the same command resumes the run", file=sys.stderr
                )
                return 0 if interrupted.signal == signal.SIGTERM else 128 + signal.SIGINT
        return 0
