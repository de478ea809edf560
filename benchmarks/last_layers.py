"""A train step of LoRA-Gen with experts in the last m layers of the edge, for several m.

    make smollm
    python benchmarks/last_layers.py
    python benchmarks/last_layers.py --cloud DIR --edge DIR --last-layers 28 14 7

Seconds on the clock and of all cores, medians of steps that take turns, after one that is not
counted; random tokens, in the shape of `experiments/orders`. MACs are `lorax_gen.cost`'s, without
what is recomputed; temporaries are XLA's, arguments (weights and state) apart.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import lorax_gen
from lorax_gen.cost import train_step_macs
from lorax_gen.method import GeneratorConfig, count_params, init_generator
from lorax_gen.models.decoder import Execution, kernel_shapes
from lorax_gen.models.model import Model
from lorax_gen.system import GeneratorSpec
from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer
from lorax_gen.training.state import init_state
from lorax_gen.training.step import generator_loss, make_train_step

SMOLLM = ".cache/smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed."""

    last_layers: tuple[int, ...] = (30, 15, 8)
    """Layers of the edge with experts."""
    cloud: str = SMOLLM
    edge: str = SMOLLM
    prompts: int = 8
    queries: int = 8
    """Questions of each prompt."""
    prompt_length: int = 56
    length: int = 24
    """Tokens of a question and its answer."""
    answer_length: int = 4
    remat: Literal["none", "dots", "full"] = "dots"
    repeats: int = 5


@dataclasses.dataclass(frozen=True)
class Side:
    """A compiled step. `run()` takes one and returns its seconds: on the clock, of all cores."""

    run: Callable[[], tuple[float, float]]
    trained: int
    macs: int
    temporaries: int


def make_side(options: Options, cloud: Model, edge: Model, last: int) -> Side:
    generator = GeneratorConfig(
        n_experts=16, top_k=4, composition="products", rank=4, alpha=4.0, cloud_dropout=0.0,
        last_layers=last,
    )  # fmt: skip
    spec = GeneratorSpec(generator, cloud.config, edge.config)
    rng, rows = np.random.default_rng(0), options.prompts * options.queries
    prompt, tokens = (options.prompts, options.prompt_length), (rows, options.length)
    answer = np.arange(options.length) >= options.length - options.answer_length
    batch = {
        "prompt": rng.integers(0, cloud.config.vocab_size, prompt).astype(np.int32),
        "prompt_lengths": np.full(options.prompts, options.prompt_length, np.int32),
        "tokens": rng.integers(0, edge.config.vocab_size, tokens).astype(np.int32),
        "answer": np.tile(answer, (rows, 1)),
    }
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    init = init_generator(
        jax.random.key(0),
        generator,
        edge_layers=edge.config.num_hidden_layers,
        edge_shapes=kernel_shapes(edge.config),
        cloud_layers=cloud.config.num_hidden_layers,
        cloud_shapes=kernel_shapes(cloud.config),
        cloud_embedding=jnp.copy(cloud.params["embed"][0]),
    )
    state = init_state(*init, optimizer, seed=0)
    frozen = {"cloud": cloud.params, "edge": edge.params}
    loss = generator_loss(
        spec, answer_length=options.answer_length, execution=Execution(remat=options.remat)
    )
    step = jax.jit(make_train_step(loss, optimizer), donate_argnums=0)
    compiled = step.lower(state, frozen, batch).compile()
    macs = train_step_macs(
        spec,
        prompts=options.prompts,
        queries=options.queries,
        prompt_length=options.prompt_length,
        length=options.length,
        answered=options.answer_length,
    )

    def run() -> tuple[float, float]:
        nonlocal state
        clock, cores = time.perf_counter(), time.process_time()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - clock, time.process_time() - cores

    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return Side(run, count_params(init[0]), macs.total, temporaries)


def main(options: Options) -> None:
    console, load = Console(), os.getloadavg()[0]
    cloud, edge = (lorax_gen.load_model(name) for name in (options.cloud, options.edge))
    sides = {last: make_side(options, cloud, edge, last) for last in options.last_layers}
    seconds: dict[int, list] = {last: [] for last in sides}
    for last in [*sides] * (options.repeats + 1):
        seconds[last].append(sides[last].run())
    table = Table(title=f"a train step, {len(os.sched_getaffinity(0))} cores, load {load:.1f}")
    names = ("layers", "seconds", "core seconds", "GMACs", "temporaries MB", "trained M")
    for name in names:
        table.add_column(name, justify="right")
    for last, side in sides.items():
        clock, cores = np.median(seconds[last][1:], axis=0)
        table.add_row(
            *(str(last), f"{clock:.2f}", f"{cores:.2f}", f"{side.macs / 1e9:.0f}"),
            *(f"{side.temporaries / 1e6:.0f}", f"{side.trained / 1e6:.1f}"),
        )
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
