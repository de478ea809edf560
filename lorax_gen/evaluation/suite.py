"""Several answerers on several tasks, as one report: the form of the paper's Tables 2 and 3.

The cost of a question is that of the edge alone, the model that serves; the cloud reads a prompt
once for all questions under it and has columns of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
from lorax_gen.data.config import is_row_file
from lorax_gen.data.own_benchmarks import ENDINGS, load_benchmark
from lorax_gen.data.own_tasks import RowTask, load_row_tasks
from lorax_gen.data.questions import Question
from lorax_gen.errors import UserError
from lorax_gen.evaluation.agent import SCORES, AgentCases, evaluate_agent
from lorax_gen.evaluation.answerers import Answerer, System
from lorax_gen.evaluation.benchmark import BenchmarkCases, Result, evaluate_benchmark
from lorax_gen.evaluation.floors import FLOORS, floors
from lorax_gen.evaluation.metrics import arithmetic_mean
from lorax_gen.evaluation.progress import show, ticker
from lorax_gen.evaluation.report import (
    MEANS,
    Cell,
    Report,
    add_row,
    new_report,
    save_report,
    serving_cost,
)
from lorax_gen.evaluation.rows import (
    METRICS,
    RowCases,
    ask_rows,
    cells_of,
    costs_of,
    row_results,
)
from lorax_gen.files import AnyPath, to_path
from lorax_gen.frames import PLAIN, Frame
from lorax_gen.inference.choices import TOKENS_PER_BATCH
from lorax_gen.locks import only_writer

TITLES = {
    "loss": "loss",
    "choice_accuracy": "choice",
    "choice_accuracy_norm": "norm",
    "exact_match": "exact",
    "rouge_l": "ROUGE-L",
}


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file of rows of one's own tasks; see `data.own_tasks`."""

    name: str
    tasks: list[RowTask]
    left_out: int


def evaluate_suite(
    system: System,
    tasks: Sequence[str | Benchmark | RowFile],
    names: Sequence[str],
    *,
    shots: int = 5,
    seed: int | None = None,
    limit: int | None = None,
    directory: AnyPath | None = None,
    columns: Sequence[str] = (),
    frame: Frame = PLAIN,
    max_new_tokens: int | None = None,
    run_dir: AnyPath | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    timed: int = 50,
    mesh: Mesh | None = None,
    bar: Any = None,
) -> Report:
    """Evaluates answerers on benchmarks and files of rows; see `benchmark` and `rows`.

    Args:
      tasks: names of benchmarks, paths of YAML files that describe one (`data.own_benchmarks`), and
        paths of .jsonl, .json and .parquet files of rows (`data.own_tasks`); or what `find_task`
        finds for these.
      names: of answerers.
      shots: solved examples in a prompt; fewer where a task of rows has fewer.
      seed: of shots, of the order of rows, and of random prompts; None: that of
        lm-evaluation-harness.
      limit: questions of each benchmark, the first ones, and rows of each file, as many of each
        task as of any other; None: all.
      directory: of data files of benchmarks; None: the hub.
      columns: `field=column` where files of rows name a field otherwise.
      frame: how the edge reads an input.
      max_new_tokens: of answers to rows; see `rows.row_results`.
      run_dir: keeps results of single items, `items/<task>.<answerer>.jsonl`, so that the same
        call resumes an interrupted one, and `report.json` and `report.csv`; None: no files.
      timed: questions whose latency is measured for each answerer, after warm-up; 0: none.

    Raises UserError where a name is unknown, data are missing, an answerer lacks a model, or
    another process writes to `run_dir`.
    """
    seed = HARNESS_SEED if seed is None else seed
    for name in names:
        system.check(name)
    found = [find_task(task, columns) if isinstance(task, str) else task for task in tasks]
    named = [task.name for task in found]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise UserError(f"two tasks are called {twice}; rename one, or leave it out")
    cases: dict[str, BenchmarkCases | RowCases] = {}
    for task in found:
        if isinstance(task, RowFile):
            asked = ask_rows(task.tasks, limit, seed, others=max(shots, 1))
            cases[task.name] = RowCases(asked, frame, shots)
        else:
            questions = load_questions(task, "test", directory)[:limit]
            prompted = shots and any(map(system.reads_prompts, names))
            train = load_shots(task, directory) if prompted else ()
            other = other_of(task, directory) if "shuffled" in names else None
            cases[task.name] = BenchmarkCases(task, questions, train, shots, seed, other, frame)
    settings: dict[str, Any] = {"shots": shots, "seed": seed, "limit": limit}
    if any(own.frame != PLAIN for own in cases.values()):
        settings["frame"] = dataclasses.asdict(frame)
    shown: dict[str, Cell] = {}
    for task in found:
        left_out = task.left_out if isinstance(task, RowFile) else 0
        shown |= columns_of(task.name, cases[task.name], left_out)
    with only_writer_of(run_dir):
        path = run_dir and run_dir / "report.json"
        report = new_report("benchmarks", system, shown, path, **settings)
        for name in names:
            answerer = system.answerer(name, seed)  # one merged edge at a time
            cells: dict[str, Cell] = {}
            costs = []
            for title, own in cases.items():
                own_cells, cost = evaluate_task(
                    answerer,
                    title,
                    own,
                    max_new_tokens=max_new_tokens,
                    path=run_dir and run_dir / "items" / f"{title}.{name.replace(':', '.')}.jsonl",
                    tokens_per_batch=tokens_per_batch,
                    mesh=mesh,
                    bar=bar,
                )
                cells |= own_cells
                costs.append(cost)
            add_row(
                report,
                answerer,
                cells,
                **{mean: arithmetic_mean([cost[mean] for cost in costs]) for mean in MEANS},
                **serving_cost(answerer, sample_contexts(answerer, list(cases.values()), timed)),
            )
        if run_dir is not None:
            save_report(report, run_dir)
        return report


def find_task(name: str, columns: Sequence[str] = ()) -> Benchmark | RowFile:
    """The benchmark of a name or a YAML file, or the rows of a file.

    Raises UserError where there is none, or the file is malformed.
    """
    if name.endswith(ENDINGS):
        return load_benchmark(to_path(name))
    if is_row_file(name):
        path = to_path(name)
        return RowFile(path.name.partition(".")[0], *load_row_tasks(path, columns))
    return find_benchmark(name)


def columns_of(name: str, cases: BenchmarkCases | RowCases, left_out: int = 0) -> dict[str, Cell]:
    """The columns of a task in a report.

    Args:
      left_out: rows of a file that were left out.
    """
    if isinstance(cases, BenchmarkCases):
        column: Cell = {"title": cases.benchmark.title, "n": len(cases.questions)}
        if name not in BENCHMARKS and cases.benchmark.per_character:
            column["per_character"] = True
        return {name: column}
    reached = floors(cases.asked)
    choices = sum(bool(case.item.choices) for case in cases.asked)
    found = {}
    for metric in METRICS:
        of_choices = metric.startswith("choice")
        if of_choices and not choices:
            continue
        key = metric.removesuffix("_norm")
        floor = {own: reached[f"{own}/{key}"] for own in FLOORS if f"{own}/{key}" in reached}
        column = {
            "title": TITLES[metric],
            "n": choices if of_choices else len(cases.asked),
            "file": name,
            "metric": metric,
            "floors": floor,
            "tasks": len({case.task.name for case in cases.asked}),
            "left_out": left_out,
        }
        chance = {"chance": reached["chance"]} if of_choices else {}
        found[f"{name}/{metric}"] = column | chance
    return found


def evaluate_task(
    answerer: Answerer,
    name: str,
    cases: BenchmarkCases | RowCases,
    *,
    max_new_tokens: int | None,
    **options: Any,
) -> tuple[dict[str, Cell], Cell]:
    """The cells of an answerer's row for one task, and the means of `MEANS`.

    Args:
      options: of `evaluate_benchmark` and `row_results` alike.
    """
    if isinstance(cases, BenchmarkCases):
        result = evaluate_benchmark(
            cases.benchmark,
            cases.questions,
            answerer,
            shots=cases.shots,
            seed=cases.seed,
            train=cases.train,
            other=cases.other,
            frame=cases.frame,
            **options,
        )
        return {name: as_cell(result)}, dataclasses.asdict(result)
    rows = row_results(answerer, cases, max_new_tokens=max_new_tokens, name=name, **options)
    cells, costs = cells_of(rows), costs_of(answerer, rows)
    cells["loss"] |= {key: value for key, value in costs.items() if key not in MEANS}
    return {f"{name}/{metric}": cell for metric, cell in cells.items()}, costs


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
    for name in names:
        system.check(name)
    columns = {name: {"title": name, "n": len(items)} for name in SCORES}
    path = run_dir and run_dir / "report.json"
    settings = {"max_new_tokens": max_new_tokens, "seed": seed or 0, "limit": len(items)}
    with only_writer_of(run_dir):
        report = new_report("gpt4tools", system, columns, path, **settings)
        for name in names:
            answerer = system.answerer(name, seed or 0)
            show(bar, f"gpt4tools, {name}", len(items))
            found = evaluate_agent(
                answerer,
                items,
                path=run_dir and run_dir / "items" / f"gpt4tools.{name.replace(':', '.')}.jsonl",
                max_new_tokens=max_new_tokens,
                seed=seed or 0,
                tokens_per_batch=tokens_per_batch,
                mesh=mesh,
                progress=ticker(bar),
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
    start = order.index(record) + 1 if record in order else 0
    other = next(r for r in order[start:] + order[:start] if not r.unseen and r != record)
    return other, load_shots(other, directory)


def sample_contexts(
    answerer: Answerer, cases: Sequence[BenchmarkCases | RowCases], count: int
) -> list[str]:
    """What an answerer reads of `count` questions, as many of each task."""
    each = -(-count // len(cases))
    texts = [c[0] for own in cases for c in answerer.contexts(own.first(each))]
    return texts[:count]
