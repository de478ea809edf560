"""Specialising to many prompts in one call: prompts per second, and whether memory grows with them.

    python benchmarks/specialize.py
    python benchmarks/specialize.py --counts 1000 10000 --cloud DIR --edge DIR --generator DIR

Prompts are those of the embedded world's tasks, in random wordings with up to three shots. Each
count is run twice, the first time to compile; the memory is the peak of this process.
"""

from __future__ import annotations

import dataclasses
import resource
import time

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import lorax_gen
from lorax_gen.data.world import make_world


@dataclasses.dataclass(frozen=True)
class Options:
    """Cards of many prompts."""

    counts: tuple[int, ...] = (100, 1000, 10000)
    """Prompts of a call."""
    cloud: str = "world/cloud"
    edge: str = "world/edge"
    generator: str = "world/generator"


def make_prompts(count: int) -> list[str]:
    rng, tasks = np.random.default_rng(0), make_world(0).tasks
    return [
        tasks[rng.integers(len(tasks))].prompt(rng, int(rng.integers(0, 4))) for _ in range(count)
    ]


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(options: Options) -> None:
    cloud, edge = lorax_gen.load_model(options.cloud), lorax_gen.load_model(options.edge)
    generator = lorax_gen.load_generator(options.generator)
    table = Table(title="specialise(list of prompts)")
    for name in ("prompts", "different", "seconds", "prompts/s", "peak GiB"):
        table.add_column(name, justify="right")
    for count in options.counts:
        prompts = make_prompts(count)
        lorax_gen.specialize(prompts, cloud, edge, generator)
        begun = time.perf_counter()
        lorax_gen.specialize(prompts, cloud, edge, generator)
        seconds = time.perf_counter() - begun
        row = (count, len(set(prompts)), f"{seconds:.2f}", f"{count / seconds:,.0f}")
        table.add_row(*map(str, row), f"{peak_gib():.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
