"""`lorax-gen demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorax_gen.cli.parse import UserPath
from lorax_gen.config import Seed, Size


@dataclasses.dataclass(frozen=True)
class Demo:
    """See the method work: specialise a small model to unseen tasks, in minutes.

    Uses the shipped models. Prints answers before and after, a table of methods, and writes
    report.json and pictures into the run directory.
    """

    run_dir: UserPath = Path("runs/demo")
    """Directory of the report and the pictures."""
    questions: Size = 16
    """Questions per task."""
    seed: Seed = 0
    """Seed of wordings and questions."""

    def run(self) -> int:
        from lorax_gen.demo import run_demo

        run_demo(self.run_dir, self.questions, self.seed)
        return 0
