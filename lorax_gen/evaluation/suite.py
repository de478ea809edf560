"""Several answerers on several benchmarks, as one report: the form of the paper's Tables 2 and 3.

The cost of a question is that of the edge alone, the model that serves; the cloud reads a prompt
once for all questions under it and has columns of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jax.sharding import Mesh

from lorax_gen.data.agent import AgentItem
from lorax_gen.data.benchmarks import (
    BENCHMARKS,
    HARNESS_SEED,
    Benchmark,
    find_benchmark,
    load_questions,
    load_shots,
)
from lorax_gen.data.questions import Question
from lorax_gen.evaluation.agent import SCORES, AgentCases, evaluate_agent
from lorax_gen.evaluation.answerers import Answerer, System
from lorax_gen.evaluation.benchmark import BenchmarkCases, Result, evaluate_benchmark
from lorax_gen.evaluation.metrics import arithmetic_mean
from lorax_gen.evaluation.report import (
    MEANS,
    Cell,
    Report,
    add_row,
    new_report,
    save_report,
    serving_cost,
)
from lorax_gen.files import AnyPath
from lorax_gen.inference.choices import TOKENS_PER_BATCH
from lorax_gen.locks import only_writer


def evaluate_suite(
    system: System,
    tasks: Sequence[str],
    names: Sequence[str],
    *,
    shots: int = 5,
    seed: int | None = None,
    limit: int | None = None,
    directory: AnyPath | None = None,
    run_dir: AnyPath | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    timed: int = 50,
    mesh: Mesh | None = None,
    bar: Any = None,
) -> Report:
    """Evaluates answerers on benchmarks; see `evaluation.benchmark`.

    Args:
      tasks: names of benchmarks; names: of answerers.
      seed: of shots and of random prompts; None: that of lm-evaluation-harness.
      limit: questions of each benchmark, the first ones; None: all.
      directory: of data files; None: the hub.
      run_dir: keeps results of single items, `items/<benchmark>.<answerer>.jsonl`, so that the same
        call resumes an interrupted one, and `report.json` and `report.csv`; None: no files.
      timed: questions whose latency is measured for each answerer, after warm-up.

    Raises UserError where a name is unknown, data are missing, an answerer lacks a model, or
    another process writes to `run_dir`.
    """
    seed = HARNESS_SEED if seed is None else seed
    records = [find_benchmark(task) for task in tasks]
    answerers = [system.answerer(name, seed) for name in names]
    tests = {r.name: load_questions(r, "test", directory)[:limit] for r in records}
    train: dict[str, list[Question]] = {}
    if shots and any(a.reads_prompts and a.name != "shuffled" for a in answerers):
        train = {r.name: load_shots(r, directory) for r in records}
    columns = {r.name: {"title": r.title, "n": len(tests[r.name])} for r in records}
    path = run_dir and run_dir / "report.json"
    settings = {"shots": shots, "seed": seed, "limit": limit}
    with only_writer_of(run_dir):
        report = new_report("benchmarks", system, columns, path, **settings)
        for answerer in answerers:
            results = {}
            for record in records:
                other = other_of(record, directory) if answerer.name == "shuffled" else None
                results[record.name] = evaluate_benchmark(
                    record,
                    tests[record.name],
                    answerer,
                    shots=shots,
                    seed=seed,
                    train=train.get(record.name, ()),
                    other=other,
                    path=run_dir and run_dir / "items" / f"{record.name}.{answerer.name}.jsonl",
                    tokens_per_batch=tokens_per_batch,
                    mesh=mesh,
                    bar=bar,
                )
            cases = {
                r.name: BenchmarkCases(r, tests[r.name], train.get(r.name, ()), shots, seed)
                for r in records
            }
            add_row(
                report,
                answerer,
                {name: as_cell(result) for name, result in results.items()},
                **{
                    mean: arithmetic_mean([getattr(result, mean) for result in results.values()])
                    for mean in MEANS
                },
                **serving_cost(answerer, sample_contexts(answerer, cases, timed)),
            )
        if run_dir is not None:
            save_report(report, run_dir)
        return report


def as_cell(result: Result) -> Cell:
    """A benchmark's result as a cell of a report."""
    plain = dataclasses.asdict(result)
    for name in ("benchmark", "answerer"):
        del plain[name]
    return {"score": plain.pop("acc"), "stderr": plain.pop("acc_stderr"), **plain}


def evaluate_agent_suite(
    system: System,
    items: Sequence[AgentItem],
    names: Sequence[str],
    *,
    run_dir: AnyPath | None = None,
    max_new_tokens: int = 512,
    seed: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    timed: int = 20,
    mesh: Mesh | None = None,
    bar: Any = None,
) -> Report:
    """Evaluates answerers on GPT4Tools; see `evaluation.agent`, `evaluate_suite` for arguments."""
    answerers = [system.answerer(name, seed or 0) for name in names]
    columns = {name: {"title": name, "n": len(items)} for name in SCORES}
    path = run_dir and run_dir / "report.json"
    settings = {"max_new_tokens": max_new_tokens, "seed": seed or 0, "limit": len(items)}
    with only_writer_of(run_dir):
        report = new_report("gpt4tools", system, columns, path, **settings)
        for answerer in answerers:
            if bar is not None:
                bar.reset(total=len(items))
                bar.set_description(f"gpt4tools, {answerer.name}")
            found = evaluate_agent(
                answerer,
                items,
                path=run_dir and run_dir / "items" / f"gpt4tools.{answerer.name}.jsonl",
                max_new_tokens=max_new_tokens,
                seed=seed or 0,
                tokens_per_batch=tokens_per_batch,
                mesh=mesh,
                progress=bar.update if bar is not None else lambda count: None,
            )
            texts = [text for (text,) in answerer.contexts(AgentCases(items[:timed]))]
            add_row(report, answerer, **found, **serving_cost(answerer, texts))
        if run_dir is not None:
            save_report(report, run_dir)
        return report


def only_writer_of(run_dir: AnyPath | None) -> AbstractContextManager[None]:
    """Refuses a second process that writes items to the same directory; see `locks`."""
    return nullcontext() if run_dir is None else only_writer(run_dir / "items")


def other_of(record: Benchmark, directory: AnyPath | None) -> tuple[Benchmark, list[Question]]:
    """The benchmark whose prompts the control reads: the next one that may be trained on."""
    order = list(BENCHMARKS.values())
    start = order.index(record) + 1
    other = next(r for r in order[start:] + order[:start] if not r.unseen and r != record)
    return other, load_shots(other, directory)


def sample_contexts(
    answerer: Answerer, cases: Mapping[str, BenchmarkCases], count: int
) -> list[str]:
    """What an answerer reads of `count` questions, as many of each benchmark."""
    texts = []
    for own in cases.values():
        first = own.questions[: -(-count // len(cases))]
        texts += [c[0] for c in answerer.contexts(dataclasses.replace(own, questions=first))]
    return texts[:count]
