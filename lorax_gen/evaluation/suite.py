"""Several benchmarks in several modes, as one report: the form of the paper's Tables 2 and 3.

Accuracies are shares; means over benchmarks are arithmetic (AVE) and harmonic (HAR). What a
question costs is of the edge alone, which is what serves; the cloud reads a prompt once for all
questions under it and stands in columns of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lorax_gen import files
from lorax_gen.data.agent import AgentItem, full_prompt
from lorax_gen.data.benchmarks import (
    BENCHMARKS,
    Benchmark,
    few_shot,
    find_benchmark,
    harness_shots,
    load_questions,
    load_shots,
)
from lorax_gen.data.questions import Question
from lorax_gen.errors import UserError
from lorax_gen.evaluation.agent import evaluate_agent
from lorax_gen.evaluation.benchmark import Setting, evaluate_benchmark
from lorax_gen.evaluation.latency import measure_latency, peak_memory
from lorax_gen.evaluation.metrics import arithmetic_mean, harmonic_mean
from lorax_gen.evaluation.system import System
from lorax_gen.evaluation.tables import MEANS, agent_csv, as_csv
from lorax_gen.inference.choices import TOKENS_PER_BATCH
from lorax_gen.models.model import Model

Report = dict[str, Any]


def evaluate_suite(
    system: System,
    names: Sequence[str],
    modes: Sequence[str],
    *,
    card: Model | None = None,
    shots: int = 5,
    seed: int | None = None,
    limit: int | None = None,
    directory: Path | None = None,
    run_dir: Path | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    timed: int = 50,
    mesh: Mesh | None = None,
    bar: Any = None,
) -> Report:
    """Scores benchmarks in modes; see `evaluation.benchmark`.

    Args:
      card: the edge with a card merged in, for mode `card`.
      limit: questions of each benchmark, the first ones; None: all.
      directory: of data files; None: the hub.
      run_dir: keeps results of single items, `items/<benchmark>.<mode>.jsonl`, so that the same
        call goes on where one was interrupted, and `report.json` and `report.csv`; None: nothing.
      timed: questions whose latency is measured in each mode, after warm-up.

    Raises UserError where a name or mode is unknown, data are missing, or a mode lacks a model.
    """
    records = [find_benchmark(name) for name in names]
    settings = {
        mode: Setting(mode, shots, **({} if seed is None else {"seed": seed})) for mode in modes
    }
    tests = {r.name: load_questions(r, "test", directory)[:limit] for r in records}
    train: dict[str, list[Question]] = {}
    if any(setting.shots for mode, setting in settings.items() if mode != "shuffled"):
        train = {r.name: load_shots(r, directory) for r in records}
    report = about(system) | {"benchmarks": [*tests], "shots": shots, "limit": limit}
    report = with_earlier_modes(report, run_dir and run_dir / "report.json")
    for mode, setting in settings.items():
        served = dataclasses.replace(system, edge=card) if mode == "card" else system
        results = {}
        for record in records:
            path = run_dir / "items" / f"{record.name}.{mode}.jsonl" if run_dir else None
            other = other_of(record, directory) if mode == "shuffled" else None
            results[record.name] = evaluate_benchmark(
                record,
                tests[record.name],
                setting,
                served,
                train=train.get(record.name, ()),
                other=other,
                path=path,
                tokens_per_batch=tokens_per_batch,
                mesh=mesh,
                bar=bar,
            )
        accuracies = [result.acc for result in results.values()]
        contexts = sample_contexts(records, tests, train, setting, timed)
        report["modes"][mode] = {
            "benchmarks": {name: dataclasses.asdict(found) for name, found in results.items()},
            "average": arithmetic_mean(accuracies),
            "harmonic": harmonic_mean(accuracies),
            **{
                name: arithmetic_mean([getattr(found, name) for found in results.values()])
                for name in MEANS
            },
            **serving_cost(served.edge, contexts),
        }
    if run_dir is not None:
        files.write_json(run_dir / "report.json", report)
        files.write_text(run_dir / "report.csv", as_csv(report))
    return report


def evaluate_agent_suite(
    system: System,
    items: Sequence[AgentItem],
    modes: Sequence[str],
    *,
    run_dir: Path | None = None,
    max_new_tokens: int = 512,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    timed: int = 20,
    mesh: Mesh | None = None,
    bar: Any = None,
) -> Report:
    """Has tools called in modes; see `evaluation.agent`. Arguments as of `evaluate_suite`."""
    report = about(system) | {"limit": len(items)}
    report = with_earlier_modes(report, run_dir and run_dir / "agent.json")
    for mode in modes:
        if bar is not None:
            bar.reset(total=len(items))
            bar.set_description(f"gpt4tools, {mode}")
        found = evaluate_agent(
            system,
            items,
            mode,
            path=run_dir / "items" / f"gpt4tools.{mode}.jsonl" if run_dir else None,
            max_new_tokens=max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            mesh=mesh,
            progress=bar.update if bar is not None else lambda count: None,
        )
        texts = [full_prompt(item) if mode == "full" else item.request for item in items[:timed]]
        report["modes"][mode] = found | serving_cost(system.edge, texts)
    if run_dir is not None:
        files.write_json(run_dir / "agent.json", report)
        files.write_text(run_dir / "agent.csv", agent_csv(report))
    return report


def with_earlier_modes(report: Report, path: Path | None) -> Report:
    """A report begun with the modes of an earlier call in the same run directory, if there was one.

    Raises UserError where that report is of something else.
    """
    if path is None or not path.exists():
        return report | {"modes": {}}
    old = files.read_json(path)
    for name in report.keys() - {"device", "versions"}:
        if name == "cloud" and None in (old.get(name), report[name]):
            continue  # not every mode needs one
        if old.get(name) != report[name]:
            raise UserError(
                f"{path} is of {name} {old.get(name)!r}, this evaluation of {report[name]!r}; "
                "choose another run directory"
            )
    return report | {"cloud": report["cloud"] or old.get("cloud"), "modes": old["modes"]}


def about(system: System) -> Report:
    """What was evaluated, by name, on what."""
    return {
        "edge": system.edge.name,
        "cloud": system.cloud.name if system.cloud else None,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("lorax-gen", "jax", "jaxlib")},
    }


def other_of(record: Benchmark, directory: Path | None) -> tuple[Benchmark, list[Question]]:
    """Whose prompts a benchmark is given in the control: the next one that may be trained on."""
    order = list(BENCHMARKS.values())
    start = order.index(record) + 1
    other = next(r for r in order[start:] + order[:start] if not r.unseen and r != record)
    return other, load_shots(other, directory)


def sample_contexts(
    records: Sequence[Benchmark],
    tests: dict[str, list[Question]],
    train: dict[str, list[Question]],
    setting: Setting,
    count: int,
) -> list[str]:
    """What the edge reads of `count` questions, from all benchmarks in turn."""
    texts = []
    for record in records:
        questions = tests[record.name][: -(-count // len(records))]
        shots: list = [[]] * len(questions)
        if setting.mode == "icl":
            shots = harness_shots(
                record, train[record.name], setting.shots, questions, setting.seed
            )
        texts += [few_shot(record, s, q)[0] for s, q in zip(shots, questions, strict=True)]
    return texts[:count]


def serving_cost(model: Model, texts: Sequence[str]) -> Report:
    """Latency of the first token behind texts, one at a time, and memory; see `latency`."""
    room = model.config.max_position_embeddings - 1
    rows = [model.encode(text)[-room:] for text in texts]
    rows = [row for row in rows if row]
    latency = measure_latency(model, rows)
    memory = peak_memory(model, max(map(len, rows)))
    return {
        "latency_ms": {"median": latency.median, "p90": latency.p90, "questions": len(rows)},
        "memory_bytes": memory.peak_bytes,
        "memory_measured": memory.measured,
    }
