"""`lorax-gen demo tasks`: own tasks from rows to answers, on the shipped example and models."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from lorax_gen import config as configs
from lorax_gen import files
from lorax_gen.artifacts.generator import load_generator
from lorax_gen.data.own_tasks import Item
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import ANSWERERS, System
from lorax_gen.evaluation.floors import floors
from lorax_gen.evaluation.rows import Asked, RowCases, ask_rows, evaluate_rows
from lorax_gen.evaluation.tables import make_table
from lorax_gen.files import AnyPath
from lorax_gen.frames import Frame
from lorax_gen.inference.cards import specialize
from lorax_gen.inference.generation import generate_text
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.recipes.registry import RECIPES, load_config
from lorax_gen.training.loop import fit

CONFIG = "own-tasks"
MODES = ("plain", "icl", "cloud_icl", "lora_gen", "shuffled")
SETS = {"held_out_rows": "rows", "held_out_wordings": "wordings", "held_out_tasks": "tasks"}


def run_task_demo(
    run_dir: AnyPath, questions: int, seed: int, steps: int | None = None
) -> dict[str, Any]:
    """Trains, specialises, answers and evaluates; see `cli.demo.Demo`. Returns what it writes into
    report.json.

    Raises `training.loop.Interrupted` on a signal while it trains; the next call resumes.
    """
    method, config = load_config(CONFIG)
    if steps is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=steps))
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} exists and is not from this demo; choose another --run-dir")
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"\n[bold]Own tasks.[/bold] A generator is trained on a file of rows, {config.run.steps} "
        "steps. Two of its twelve tasks are kept back, and of the others some wordings of their "
        "prompts and some rows.\n"
    )
    experiment = RECIPES[method].experiment(config)
    released = fit(experiment, run_dir, {"method": method, **configs.to_dict(config)})
    edge, cloud = load_model(config.edge), load_model(config.cloud)
    generator = load_generator(released)
    opened = config.data.open(edge.tokenizer)
    rng = np.random.default_rng(seed)
    for task in opened.held.get("held_out_tasks", []):
        prompt = task.instructions[rng.integers(len(task.instructions))]
        merged = specialize(prompt, cloud, edge, generator).merge(edge, generator)
        items = [task.items[i] for i in rng.permutation(len(task.items))[:3]]
        console.print(Text.assemble((task.name, "bold"), "  ", (prompt, "italic")))
        show_answers(console, items, opened.frame, edge, merged)
    asked = {
        name: ask_rows(tasks, questions * len(tasks), seed) for name, tasks in opened.held.items()
    }
    report = evaluate_sets(System(edge, cloud, generator), asked, opened.frame)
    print_sets(console, report)
    files.write_json(run_dir / "report.json", report)
    console.print(f"\ngenerator: {released}\nreport: {run_dir / 'report.json'}", markup=False)
    return report


def show_answers(
    console: Console, items: list[Item], frame: Frame, edge: Model, merged: Model
) -> None:
    """The answers to inputs, before and after a prompt specialised the edge."""
    texts = [frame.wrap(item.input) for item in items]
    before = generate_text(edge, texts, max_new_tokens=4)
    after = generate_text(merged, texts, max_new_tokens=4)
    for item, text, old, new in zip(items, texts, before, after, strict=True):
        correct = new.strip() == item.outputs[0]
        mark = ("correct", "green") if correct else (f"wrong, {item.outputs[0]}", "red")
        console.print(Text.assemble(f"    {text:<12} before {old:<9} after {new:<9} ", mark))
    console.print()


def evaluate_sets(
    system: System, asked: dict[str, list[Asked]], frame: Frame
) -> dict[str, dict[str, Any]]:
    """`{set: {"n", "floors", "modes": {mode: metrics}}}` of what is held out."""
    report = {}
    for name, own in asked.items():
        cases = RowCases(own, frame)
        report[name] = {
            "n": len(own),
            "tasks": sorted({case.task.name for case in own}),
            "floors": floors(own),
            "modes": {mode: evaluate_rows(system.answerer(mode), cases) for mode in MODES},
        }
    return report


def print_sets(console: Console, report: dict[str, dict[str, Any]]) -> None:
    """Exact matches of each mode on each set, above those of answers without a model."""
    names = [name for name in SETS if name in report]
    table = make_table("exact matches on what was held out", [SETS[name] for name in names])
    for mode in MODES:
        scores = [report[name]["modes"][mode]["exact_match"] for name in names]
        style = "bold" if mode == "lora_gen" else ""
        table.add_row(ANSWERERS[mode][0], *(f"{score:.3f}" for score in scores), style=style)
    table.add_section()
    for floor in ("majority", "example"):
        scores = [report[name]["floors"][f"{floor}/exact_match"] for name in names]
        table.add_row(f"{floor} answer", *(f"{score:.3f}" for score in scores), style="dim")
    table.add_row("rows", *(str(report[name]["n"]) for name in names), style="dim")
    console.print(table)
