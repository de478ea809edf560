"""LoRA-Gen in the embedded world over three seeds: accuracy on unseen tasks, mean and deviation.

    python experiments/world_seeds.py

Trains the generator from the shipped language models with seeds 0, 1 and 2 (`lorax-gen train world
--run.seed N`, interrupted runs resume) and prints a table. The measured result is in
docs/world.md.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lorax_gen.cli.main import run
from lorax_gen.data.world import FAMILIES

SEEDS = (0, 1, 2)


def last_evaluation(run_dir: Path) -> dict[str, float]:
    """The last row of a run's metrics with accuracies on unseen tasks."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "accuracy/unseen" in row][-1]


def main() -> None:
    rows = []
    for seed in SEEDS:
        run_dir = Path(f"runs/world-seed-{seed}")
        if run(["train", "world", "--run-dir", str(run_dir), "--run.seed", str(seed)]):
            return  # interrupted: the same command resumes
        rows.append(last_evaluation(run_dir))
    table = Table(title="accuracy on unseen tasks", title_justify="left")
    table.add_column("seed")
    for name in [*FAMILIES, "mean"]:
        table.add_column(name, justify="right")
    keys = [*(f"accuracy/unseen/{family}" for family in FAMILIES), "accuracy/unseen"]
    for seed, row in zip(SEEDS, rows, strict=True):
        table.add_row(str(seed), *(f"{row[key]:.3f}" for key in keys))
    columns = [[row[key] for row in rows] for key in keys]
    table.add_section()
    table.add_row("mean", *(f"{statistics.mean(column):.3f}" for column in columns))
    table.add_row("std", *(f"{statistics.stdev(column):.3f}" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
