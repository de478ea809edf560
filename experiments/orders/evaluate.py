"""Does the prompt steer? The controls of a generator on orders (make.py).

    python experiments/orders/evaluate.py orders/probe.jsonl --generator runs/generator --cloud A \
        --edge A

GENERATOR is a released generator, or the directory of a run, also of one that is still training:
its latest checkpoint. Each text is asked in its frame after

    own       the order's own prompt
    wording   the same order in a template that was never trained on
    other     the prompt of another order with as many answers, in other words
    swapped   its own prompt with the words exchanged: below chance where the prompt steers
    empty     nothing
    random    as many random tokens
    plain     nothing, and the edge as it is
    icl       nothing, but the prompt is in the edge's own context
    lora      nothing, with one LoRA of all orders (--lora)

and scored by whether the correct one of the asked order's words is the likeliest, in every mode.
The steering margin is own - other. Means and standard errors are over orders: each is one
observation, however many texts it has.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from make import Order, parse
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.table import Table
from wordings import HELD

from lorax_gen import files
from lorax_gen.artifacts.generator import Generator, load_generator, make_generator
from lorax_gen.artifacts.peft import load_adapter
from lorax_gen.data.own_tasks import RowTask, load_row_tasks
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import Answerer, System
from lorax_gen.evaluation.metrics import standard_error
from lorax_gen.evaluation.rows import Asked, RowCases, row_results
from lorax_gen.frames import Frame, make_frame
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.recipes.registry import load_config

Mode = Literal[
    "own", "wording", "other", "swapped", "empty", "random", "plain", "icl", "lora"
]  # fmt: skip
TOLD = ("own", "wording", "other", "swapped")  # what is asked of the generator, by its prompt
MARGINS = (("own", "other"), ("wording", "other"), ("own", "swapped"))
FRAME = "{input}\nAnswer:"


@dataclasses.dataclass(frozen=True)
class Told(RowCases):
    """Rows under prompts that are not necessarily their own."""

    told: tuple[str, ...] = ()

    def prompts(self) -> list[str]:
        return list(self.told)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is evaluated."""

    rows: tyro.conf.Positional[Path]
    """A file of orders."""
    edge: str
    cloud: str | None = None
    generator: Path | None = None
    """A released generator, or the directory of a run."""
    lora: Path | None = None
    """A PEFT adapter, for mode lora."""
    modes: tuple[Mode, ...] = ("own", "other")
    frame: str = FRAME
    """How the edge reads a text, where no generator says it."""
    greedy: bool = False
    """Also whether the greedy answer is the word."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    output: Path | None = None
    """New file of the report."""


# --- prompts -------------------------------------------------------------------------------------


def asked_rows(tasks: Sequence[RowTask]) -> list[Asked]:
    """All rows, under the wordings of their orders in turn."""
    return [
        Asked(task, task.instructions[i % len(task.instructions)], item, ())
        for task in tasks
        for i, item in enumerate(task.items)
    ]


def others(tasks: Sequence[RowTask]) -> dict[str, RowTask]:
    """For each order another one with as many answers, none of them the same word, of the same
    texts where there is such a one: the nearest after it.

    Raises UserError where an order has none."""
    found = {}
    for i, task in enumerate(tasks):
        own = parse(task.name)
        ring = [*tasks[i + 1 :], *tasks[:i]]
        fit = [
            other
            for other in ring
            if len((order := parse(other.name)).words) == len(own.words)
            and not set(order.words) & set(own.words)
        ]
        if not fit:
            raise UserError(f"{task.name!r} has no other order with as many answers in the file")
        found[task.name] = next((o for o in fit if parse(o.name).source == own.source), fit[0])
    return found


def told(mode: Mode, asked: Sequence[Asked]) -> tuple[str, ...]:
    """The prompt of each row in a mode of `TOLD`."""
    if mode == "other":
        tasks = list({case.task.name: case.task for case in asked}.values())
        other = {name: task.instructions for name, task in others(tasks).items()}
        return tuple(
            other[case.task.name][i % len(other[case.task.name])] for i, case in enumerate(asked)
        )
    if mode == "own":
        return tuple(case.wording for case in asked)
    prompts = []
    for i, case in enumerate(asked):
        order = parse(case.task.name)
        own = order.wordings()
        if mode == "wording":
            prompts.append(own[-HELD:][i % HELD])
        elif case.wording not in own:
            raise UserError(f"{case.task.name!r} has no wording {case.wording[:60]!r}; make anew")
        else:
            prompts.append(swapped(order, own.index(case.wording)))
    return tuple(prompts)


def swapped(order: Order, template: int) -> str:
    """The order's wording with each word exchanged for the next."""
    text, words = order.wordings()[template], order.words
    for i, word in enumerate(words):
        text = text.replace(f'"{word}"', f"\0{i}\0")
    for i in range(len(words)):
        text = text.replace(f"\0{i}\0", f'"{words[(i + 1) % len(words)]}"')
    return text


# --- models --------------------------------------------------------------------------------------


def open_generator(path: Path, cloud: Model, edge: Model) -> Generator:
    """A released generator, or the latest checkpoint of a run."""
    if not (path / "checkpoints").is_dir():
        return load_generator(path)
    config = load_config(str(path / "config.yaml"))[1]
    # Without its clean-up: the run may be writing the next one.
    with ocp.training.Checkpointer((path / "checkpoints").absolute()) as checkpointer:
        latest = checkpointer.latest
        if latest is None:
            raise UserError(f"{path} has no checkpoint yet; wait for run.checkpoint_every")
        state = checkpointer.load(latest)
    print(f"step {latest.step}", file=sys.stderr)
    return make_generator(
        config.generator,
        state["params"],
        state["stats"],
        cloud=cloud.config,
        edge=edge.config,
        frame=make_frame(config.data.frame, edge.tokenizer),
    )


def answerers(options: Options) -> tuple[dict[str, Answerer], Frame]:
    """The answerer of each mode, and how the edge reads a text."""
    edge = load_model(options.edge, dtype=options.dtype)
    cloud = generator = None
    if options.generator is not None:
        if options.cloud is None:
            raise UserError("--generator needs --cloud")
        same = options.cloud == options.edge
        cloud = edge if same else load_model(options.cloud, dtype=options.dtype)
        generator = open_generator(options.generator, cloud, edge)
    lora = None if options.lora is None else load_adapter(options.lora, edge.config)
    system = System(edge, cloud, generator, lora=lora)
    frame = make_frame(options.frame, edge.tokenizer) if generator is None else generator.frame
    kinds = {mode: "lora_gen" if mode in TOLD else mode for mode in options.modes}
    return {mode: system.answerer(kind) for mode, kind in kinds.items()}, frame


# --- scores --------------------------------------------------------------------------------------


def means(rows: Sequence[Mapping], metric: str) -> dict[str, float]:
    """The mean of each order."""
    by_order = defaultdict(list)
    for row in rows:
        by_order[row["task"]].append(row[metric])
    return {order: float(np.mean(values)) for order, values in by_order.items()}


def over_orders(values: Sequence[float]) -> dict[str, float]:
    """The mean over orders and its standard error."""
    array = np.array(values, float)
    return {"score": float(array.mean()), "stderr": standard_error(array), "orders": len(array)}


def report(results: Mapping[str, Sequence[Mapping]], tasks: Sequence[RowTask]) -> dict:
    """Scores of each mode and margins between them, in all and by attribute."""
    groups: dict[str, list[str]] = defaultdict(list)
    chance = {task.name: 1 / len(task.items[0].choices) for task in tasks}
    for name in chance:
        groups["all"].append(name)
        groups[parse(name).attribute].append(name)
    accuracy = {mode: means(rows, "choice_accuracy") for mode, rows in results.items()}
    found = {}
    for group, names in groups.items():
        own = {mode: over_orders([by[n] for n in names]) for mode, by in accuracy.items()}
        own["chance"] = over_orders([chance[n] for n in names])
        for a, b in MARGINS:
            if a in accuracy and b in accuracy:
                gaps = [accuracy[a][n] - accuracy[b][n] for n in names]
                own[f"{a} - {b}"] = over_orders(gaps)
        found[group] = own
    for mode, rows in results.items():
        if all("exact_match" in row for row in rows):
            exact = means(rows, "exact_match")
            found["all"][f"{mode}, greedy"] = over_orders(list(exact.values()))
    return found


def show(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    table = Table(title="choice accuracy, mean over orders and its standard error")
    columns = list(found)
    table.add_column("")
    for group in columns:
        table.add_column(f"{group} ({found[group]['chance']['orders']})", justify="right")
    for row in found["all"]:
        cells = (found[group].get(row) for group in columns)
        texts = ["" if c is None else f"{c['score']:.2f} ± {c['stderr']:.2f}" for c in cells]
        table.add_row(row, *texts)
    Console(width=20 + 15 * len(columns)).print(table)


def main(options: Options) -> None:
    tasks, _ = load_row_tasks(options.rows)
    by_mode, frame = answerers(options)
    asked, results = asked_rows(tasks), {}
    for mode, answerer in by_mode.items():
        prompts = told(mode if mode in TOLD else "own", asked)
        cases = Told(asked, frame, told=prompts)
        results[mode] = row_results(answerer, cases, generate=options.greedy, max_new_tokens=4)
    found = report(results, tasks)
    show(found)
    if options.output is not None:
        with files.new_file(options.output) as path:
            path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UserError as error:
        sys.exit(f"orders: error: {error}")
