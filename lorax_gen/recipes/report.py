"""The page of training runs and evaluations: what each directory holds becomes a section."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lorax_gen import documents, files
from lorax_gen.errors import UserError
from lorax_gen.evaluation import gate_pictures, pictures
from lorax_gen.evaluation.page import (
    PAGE,
    Grid,
    Note,
    Picture,
    Row,
    Section,
    draw,
    grid_of,
    grid_of_paper,
    write_page,
)
from lorax_gen.evaluation.paper import TABLES
from lorax_gen.evaluation.report import FORMAT
from lorax_gen.evaluation.tables import notes_of, tables_of
from lorax_gen.files import AnyPath
from lorax_gen.recipes.gates import Gates, gates_of_run
from lorax_gen.training.metrics import read_rows


def write_report(runs: Sequence[AnyPath], output: AnyPath, *, gates: bool = True) -> AnyPath:
    """Writes `report.html`, and its pictures as PNG files, into a directory; returns the page.

    Args:
      runs: directories of training runs (`metrics.jsonl`) and evaluations (`report.json`), or
        directories of such.
      gates: whether the generators of training runs are loaded, for pictures of their gates.

    Raises UserError for a directory that holds neither, and where `output` is not a directory of
    an earlier report.
    """
    found = [each for run in runs for each in find_runs(run)]
    if output.exists() and any(output.iterdir()) and not (output / PAGE).exists():
        raise UserError(f"{output} holds something else than a report; choose another --output")
    sections = []
    for i, (name, run) in enumerate(found, 1):
        if (run / "report.json").is_file():
            sections.append(evaluation(run / "report.json", name, f"{i}-"))
        if (run / "metrics.jsonl").is_file():
            sections.append(training(run, name, f"{i}-", gates))
    files.make_directory(output)
    write_page(output, "lorax-gen report", sections)
    return output / PAGE


def find_runs(path: AnyPath) -> list[tuple[str, AnyPath]]:
    """`(name, directory)` of a run or an evaluation, or of those directly within a directory."""
    if not path.is_dir():
        raise UserError(f"no directory {path}; name run directories of train or evaluate")
    if _is_run(path):
        return [(path.name, path)]
    within = sorted((each for each in path.iterdir() if each.is_dir()), key=lambda each: each.name)
    found = [(f"{path.name}/{each.name}", each) for each in within if _is_run(each)]
    if not found:
        raise UserError(
            f"{path} holds neither report.json nor metrics.jsonl, and no directory in it does; "
            "name run directories of train or evaluate"
        )
    return found


def _is_run(path: AnyPath) -> bool:
    return (path / "report.json").is_file() or (path / "metrics.jsonl").is_file()


def evaluation(path: AnyPath, name: str, prefix: str) -> Section:
    """The section of a `report.json`."""
    report = documents.read_json(path)
    if report.get("format") != FORMAT:
        raise UserError(f"{path} has format {report.get('format')!r}; expected {FORMAT!r}")
    parts: list[Grid | Picture | Note] = [grid_of(table) for table in tables_of(report)]
    parts += [Note(note) for note in notes_of(report)]
    if (number := report.get("paper")) in TABLES:
        parts += grid_of_paper(TABLES[number])
    rows = report["rows"].values()
    if report["kind"] == "world":
        caption = f"Accuracy on {report['settings']['split']} tasks."
        parts.append(draw(f"{prefix}accuracy.png", caption, pictures.draw_accuracy, report))
    if any("latency_ms" in row and row.get("average") is not None for row in rows):
        caption = "Mean score against the latency of a question, with the tokens that it reads."
        parts.append(draw(f"{prefix}tradeoff.png", caption, pictures.draw_tradeoff, report))
    models = f"edge {report['edge']}" + (f", cloud {report['cloud']}" if report["cloud"] else "")
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    return Section(name, f"{models}; {report['device']}; {versions}", parts)


def training(run: AnyPath, name: str, prefix: str, gates: bool) -> Section:
    """The section of a training run: its curves, its last numbers, and its generator's gates."""
    rows = read_rows(run / "metrics.jsonl")
    last: dict[str, Any] = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if isinstance(value, int | float)}
    shown = tuple(
        Row((key, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
        for key, value in last.items()
    )
    parts: list[Grid | Picture | Note] = [
        draw(f"{prefix}training.png", "Training.", pictures.draw_training, rows),
        Grid("Last numbers", ("", "value"), shown),
    ]
    complete = (run / "released").is_dir()
    if found := _gates(run) if gates and (run / "config.yaml").is_file() else None:
        parts[1:1] = list(gate_parts(found, prefix))
    about = f"{last.get('step', 0):,} steps, {'released' if complete else 'not released yet'}"
    return Section(name, about, parts)


def _gates(run: AnyPath) -> Gates | None:
    try:
        return gates_of_run(run)
    except UserError as error:
        raise UserError(f"{run}: {error}; --no-gates leaves out the pictures of gates") from None


def gate_parts(found: Gates, prefix: str) -> Iterable[Picture]:
    gates, names, groups, first = found
    few = np.arange(len(names))
    if len(names) > gate_pictures.LONGEST_NAMED:  # evenly, so that no group is left out
        few = np.linspace(0, len(names) - 1, gate_pictures.LONGEST_NAMED).astype(int)
    some = [[each[i] for i in few] for each in (names, groups)]
    yield draw(
        f"{prefix}gates.png", f"Gates of {len(few)} prompts, by edge layer.",
        partial(gate_pictures.draw_gates, first=first), gates[few], *some,
    )  # fmt: skip
    yield draw(
        f"{prefix}map.png", f"{len(names)} prompts by their gates in all layers.",
        gate_pictures.draw_map, gates, names, groups,
    )  # fmt: skip
    yield draw(
        f"{prefix}load.png", "How evenly the experts are used.",
        partial(gate_pictures.draw_load, first=first), gates,
    )  # fmt: skip
