"""`lorax-gen demo`: the full method on the shipped models, shown on the terminal."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from rich.console import Console

from lorax_gen import assets, files
from lorax_gen.artifacts.generator import Generator, load_generator
from lorax_gen.artifacts.peft import load_adapter
from lorax_gen.data.config import WorldConfig
from lorax_gen.errors import UserError
from lorax_gen.evaluation import gate_pictures, pictures
from lorax_gen.evaluation.answerers import System
from lorax_gen.evaluation.report import save_report
from lorax_gen.evaluation.tables import print_report, progress
from lorax_gen.evaluation.world import evaluate_world
from lorax_gen.files import AnyPath
from lorax_gen.inference.cards import specialize
from lorax_gen.inference.generation import generate_text
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model


def run_demo(run_dir: AnyPath, questions: int, seed: int) -> dict[str, Any]:
    """Specialises, evaluates and draws figures; see `cli.demo.Demo`. Returns the report."""
    report_path = run_dir / "report.json"
    if run_dir.exists() and any(run_dir.iterdir()) and not report_path.exists():
        raise UserError(f"{run_dir} exists and is not from a demo; choose another --run-dir")
    files.make_directory(run_dir)
    console = Console(highlight=False)
    edge = load_model("world/edge")
    cloud, generator = load_model("world/cloud"), load_generator("world/generator")
    system = System(edge, cloud, generator, lora=load_adapter("world/lora", edge.config))
    data = WorldConfig()

    console.print(
        "\n[bold]LoRA-Gen in a small world.[/bold] A cloud model reads a task's prompt once and "
        "generates LoRA weights for an edge model; merged, they replace the prompt. None of the "
        "tasks below was ever trained on.\n"
    )
    show_examples(console, cloud, edge, generator, data, seed)
    report = evaluate_world(system, data, questions=questions, seed=seed, progress=progress)
    print_report(report, console)

    save_report(report, run_dir)
    pictures.draw_accuracy(report, run_dir / "accuracy.png")
    draw_gates(cloud, edge, generator, data, run_dir / "gates.png", seed)
    metrics = assets.resolve("world/generator") / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    pictures.draw_training(rows, run_dir / "training.png")
    console.print(f"\nreport and pictures: {run_dir}/")
    return report


def show_examples(
    console: Console, cloud: Model, edge: Model, generator: Generator, data: WorldConfig, seed: int
) -> None:
    """For one unseen task of each family: the prompt, and questions before and after."""
    rng = np.random.default_rng(seed)
    for family in data.families:
        tasks = data.world().select("unseen", family)
        task = tasks[rng.integers(len(tasks))]
        prompt, asked = task.prompt(rng), task.sample(rng, 3)
        card = specialize(prompt, cloud, edge, generator)
        merged = card.merge(edge, generator)
        texts = [question for question, _ in asked]
        before = generate_text(edge, texts, max_new_tokens=4)
        after = generate_text(merged, texts, max_new_tokens=4)
        console.print(f"[bold]{family}[/bold]  [italic]{prompt}[/italic]")
        for (question, answer), old, new in zip(asked, before, after, strict=True):
            mark = "[green]correct[/green]" if new == answer else f"[red]wrong, {answer}[/red]"
            console.print(f"    {question:<11} before {old:<9} after {new:<9} {mark}")
        console.print()


def draw_gates(
    cloud: Model, edge: Model, generator: Generator, data: WorldConfig, path: AnyPath, seed: int
) -> None:
    """Draws heat maps of the gates of up to 8 unseen tasks of each family."""
    rng, chosen = np.random.default_rng(seed), []
    for family in data.families:
        tasks = data.world().select("unseen", family)
        chosen += [tasks[i] for i in np.sort(rng.permutation(len(tasks))[:8])]
    prompts = [task.prompt() for task in chosen]
    cards = specialize(prompts, cloud, edge, generator)
    gates = np.stack([card.dense_gates(generator.config.n_experts) for card in cards])
    names, families = [task.name for task in chosen], [task.family for task in chosen]
    first = edge.config.num_hidden_layers - gates.shape[1]
    gate_pictures.draw_gates(gates, names, families, path, first=first)
