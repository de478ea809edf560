"""The report of an evaluation: answerers by tasks, and the cost of a question for each.

    {
      "format": "lorax-gen report 1",
      "kind": "benchmarks", "gpt4tools", "world" or "experiment",
      "edge", "cloud": names of the models, "device", "versions",
      "settings": what the numbers depend on besides the models: shots, limit, split, seed ...
      "columns": {task: {"title", "n", and where known "chance", "tasks"}}; a file of rows has a
          column for each metric, FILE/METRIC, with "file", "metric" and "floors",
      "rows": {answerer: {
          "label",
          "cells": {task: {"score", "stderr", "n", and further counts of the kind}},
          "average", "harmonic": of the scores, those of files of rows left out; without any none,
          "context_tokens", "prompt_tokens": means read by the answering model and by the cloud,
          "flops", "cloud_flops": means for these tokens,
          where timed "latency_ms": {"median", "p90", "questions"}, "memory_bytes" and
          "memory_measured",
          and further counts of the kind}},
    }

An experiment has variants for answerers, a cell's "n" is the number of seeds, its "stderr" is over
seeds, and it has "title" and, of trained variants, "training": {"parameters", "flops", "steps",
"seconds"}; "paper" names the table of the paper that it stands beside.

Scores are shares, but for a loss. A column's standard error is that of its items: sample
deviation / sqrt(n).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from lorax_gen import documents, files
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import Answerer, System
from lorax_gen.evaluation.latency import measure_latency, peak_memory
from lorax_gen.evaluation.metrics import arithmetic_mean, harmonic_mean, standard_error
from lorax_gen.files import AnyPath
from lorax_gen.mesh import hosts
from lorax_gen.models.adapter import prefix_length

Report = dict[str, Any]
Cell = dict[str, Any]
FORMAT = "lorax-gen report 1"
MEANS = ("context_tokens", "prompt_tokens", "flops", "cloud_flops")


def new_report(
    kind: str,
    system: System,
    columns: Mapping[str, Cell],
    path: AnyPath | None = None,
    **settings: Any,
) -> Report:
    """A report without rows, or with the rows of the report at `path`.

    Raises UserError where the report at `path` is of another evaluation, or with several processes:
    they can score a benchmark (`evaluate_benchmark`), not time it.
    """
    if hosts.several():
        raise UserError("a report is made by one process; with several use evaluate_benchmark")
    report = {
        "format": FORMAT,
        "kind": kind,
        "edge": system.edge.name,
        "cloud": system.cloud.name if system.cloud else None,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("lorax-gen", "jax", "jaxlib")},
        "settings": settings,
        "columns": dict(columns),
        "rows": {},
    }
    if path is None or not path.exists():
        return report
    old = documents.read_json(path)
    for name in report.keys() - {"device", "versions", "rows"}:
        if name == "cloud" and None in (old.get(name), report[name]):
            continue  # not every answerer needs one
        found, ours = old.get(name), report[name]
        if found == ours:
            continue
        if isinstance(found, dict) and isinstance(ours, dict):
            key = next(key for key in {**ours, **found} if found.get(key) != ours.get(key))
            name, found, ours = f"{name}.{key}", found.get(key), ours.get(key)
        raise UserError(
            f"{path} is of {name} {found!r}, this evaluation of {ours!r}; choose another run "
            "directory"
        )
    return report | {"cloud": report["cloud"] or old["cloud"], "rows": old["rows"]}


def cell(values: np.ndarray, **more: Any) -> Cell:
    """A cell from the items' scores `[n]`."""
    return {
        "score": float(values.mean()),
        "stderr": standard_error(values),
        "n": len(values),
        **more,
    }


def add_row(report: Report, answerer: Answerer, cells: Mapping[str, Cell], **more: Any) -> None:
    """Writes an answerer's row into the report; `more` holds its costs and further counts."""
    columns = report["columns"]
    scores = [own["score"] for name, own in cells.items() if "file" not in columns[name]]
    means = {}
    if scores:
        means = {"average": arithmetic_mean(scores), "harmonic": harmonic_mean(scores)}
    report["rows"][answerer.name] = {
        "label": answerer.label,
        "cells": dict(cells),
        **means,
        **more,
    }


def serving_cost(answerer: Answerer, texts: Sequence[str]) -> Cell:
    """Latency of the first token after each text, one at a time, and memory; see `latency`.
    Nothing where there are no texts.

    A generated LoRA is merged for serving, so that it adds nothing here.
    """
    if not texts:
        return {}
    model, adapter = answerer.model, answerer.serving_adapter
    room = model.config.max_position_embeddings - 1 - prefix_length(adapter)
    rows = [ids for text in texts if (ids := model.encode(text)[-room:])]
    latency = measure_latency(model, rows, adapter=adapter)
    memory = peak_memory(model, max(map(len, rows)), adapter=adapter)
    return {
        "latency_ms": {"median": latency.median, "p90": latency.p90, "questions": len(rows)},
        "memory_bytes": memory.peak_bytes,
        "memory_measured": memory.measured,
    }


def save_report(report: Report, run_dir: AnyPath) -> None:
    """Writes `report.json`, and the same as `report.csv`."""
    files.make_directory(run_dir)
    files.write_json(run_dir / "report.json", report)
    files.write_text(run_dir / "report.csv", to_csv(report))


def to_csv(report: Report) -> str:
    """A line per answerer and task, and for each answerer its means with its costs."""
    lines: list[dict[str, Any]] = []
    for name, row in report["rows"].items():
        lines += [{"answerer": name, "task": task, **cell} for task, cell in row["cells"].items()]
        plain = {key: value for key, value in row.items() if not isinstance(value, dict)}
        average, harmonic = plain.pop("average", None), plain.pop("harmonic", None)
        latency = row.get("latency_ms", {})
        plain |= {f"latency_{key}_ms": latency[key] for key in ("median", "p90") if latency}
        lines.append({"answerer": name, "task": "AVE", "score": average, **plain})
        if harmonic is not None:
            lines.append({"answerer": name, "task": "HAR", "score": harmonic})
    out = io.StringIO()
    columns = dict.fromkeys(key for line in lines for key in line)
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
