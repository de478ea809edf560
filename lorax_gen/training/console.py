"""What a run says on stderr: a bar in a terminal, lines elsewhere (SLURM, nohup, CI)."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from lorax_gen.mesh import hosts
from lorax_gen.training.loggers import Logger


class Console(Logger):
    """Shows the progress of a run, in the first process: in a terminal a bar, and elsewhere a line
    for each row of metrics. Evaluations are lines in both."""

    def __init__(self, name: str, start: int, steps: int):
        self.steps, self.terminal = steps, sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=start, desc=name, unit="step",
            disable=not (self.terminal and hosts.is_first()),
        )  # fmt: skip

    def say(self, text: str) -> None:
        if hosts.is_first():
            tqdm.write(f"lorax-gen: {text}", file=sys.stderr)

    def advance(self) -> None:
        """A step has been taken."""
        self.bar.update()

    def write(self, step: int, row: dict[str, Any]) -> None:
        if "loss" in row:
            self.bar.set_postfix(loss=f"{row['loss']:.3f}")
            if self.terminal:
                return
            found = describe_training(row)
        else:
            found = describe_evaluation(row)
        self.say(f"step {step} of {self.steps}: {', '.join(found)}")

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self.bar.close()


def describe_training(row: dict[str, Any]) -> list[str]:
    found = [f"loss {row['loss']:.4g}"]
    if "step_time" in row:
        found.append(f"{row['step_time']:.3g} s a step")
    if "tokens_per_second" in row:
        found.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    return found


def describe_evaluation(row: dict[str, Any]) -> list[str]:
    """The main metrics: not those of a family of tasks, such as accuracy/unseen/clock."""
    main = [name for name in row if name != "step" and name.count("/") < 2]
    return [f"{name} {row[name]:.4g}" for name in main if isinstance(row[name], float)]
