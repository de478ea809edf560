"""Reports on the terminal: accuracies in the paper's form, then the cost of a question."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lorax_gen.data.benchmarks import BENCHMARKS
from lorax_gen.evaluation.report import Cell, Report
from lorax_gen.frames import Frame

Columns = Mapping[str, Cell]


class Look(NamedTuple):
    """How reports of one kind are shown."""

    title: str
    score: Callable[[float], str]
    means: dict[str, str]  # means of a row to show -> their headers


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


STYLES = {"lora_gen": "bold"}
FLOOR_LABELS = {
    "majority": "most frequent output",
    "input": "the input itself",
    "example": "another row's output",
}
LOOKS = {
    "benchmarks": Look(
        "accuracy of {edge}, in percent", percent, {"average": "AVE", "harmonic": "HAR"}
    ),
    "gpt4tools": Look("GPT4Tools, {edge}, in percent", percent, {"average": "AVE"}),
    "world": Look("accuracy on {split} tasks", "{:.3f}".format, {"average": "mean"}),
}


def print_report(report: Report, console: Console | None = None) -> None:
    """Its tables, and below them its notes."""
    console = console or Console(highlight=False)
    *scores, cost = tables_of(report)
    for table in scores:
        console.print(table, "", sep="\n")
    console.print(cost)
    for note in notes_of(report):
        console.print(note, markup=False)


def tables_of(report: Report) -> list[Table]:
    """Answerers by tasks, a table for each file of rows, and last the cost of a question."""
    columns = report["columns"]
    benchmarks = {name: column for name, column in columns.items() if "file" not in column}
    if report["kind"] == "experiment":
        return [experiment_table(report), experiment_cost_table(report)]
    tables = [score_table(report, benchmarks)] if benchmarks else []
    normalised = {
        name: own
        for name, own in benchmarks.items()
        if (name in BENCHMARKS and BENCHMARKS[name].per_character) or own.get("per_character")
    }
    tables += [norm_table(report, normalised)] if normalised else []
    for file in files_of(report):
        own = {name: column for name, column in columns.items() if column.get("file") == file}
        tables.append(file_table(report, file, own))
    return [*tables, cost_table(report)]


def files_of(report: Report) -> list[str]:
    """The files of rows among its columns."""
    columns = report["columns"].values()
    return list(dict.fromkeys(column["file"] for column in columns if "file" in column))


def notes_of(report: Report) -> list[str]:
    """The frame, compression, and what was truncated or left out, a sentence each."""
    columns, rows, notes = report["columns"], report["rows"], []
    if "frame" in report["settings"]:
        frame = Frame(**report["settings"]["frame"])
        which = "inputs" if frame.benchmarks else "inputs of rows"
        notes.append(f"{which} are read in the frame {frame.template!r}")
    for row in rows.values():
        if "compression" in row:
            notes.append(
                f"{row['label'].strip()}: {row['compression']:.1f} x fewer tokens; "
                f"the edge sees {row['edge_sees']}"
            )
    for name, row in rows.items():
        cells = row["cells"].values()
        for count, what in (
            (row.get("cut_items", sum(c.get("truncated", 0) for c in cells)), "questions"),
            (row.get("cut_prompts", sum(c.get("prompts_truncated", 0) for c in cells)), "prompts"),
        ):
            if count:
                notes.append(
                    f"{name}: {count} {what} too long for the model were truncated on the left"
                )
    for file in files_of(report):
        left_out = next(c["left_out"] for c in columns.values() if c.get("file") == file)
        if left_out:
            notes.append(
                f"{file}: {left_out} rows without an instruction or an output were left out"
            )
    return notes + list(report["settings"].get("notes", ()))


def score_table(report: Report, columns: Columns) -> Table:
    """Accuracies and their means."""
    look, rows = LOOKS[report["kind"]], report["rows"]
    title = look.title.format(**{"edge": report["edge"], **report["settings"]})
    table = make_table(title, [*(own["title"] for own in columns.values()), *look.means.values()])
    for column in table.columns[1 + len(columns) :]:
        column.style = "bold"
    for name, row in rows.items():
        shares = [row["cells"][task]["score"] for task in columns]
        shares += [row[mean] for mean in look.means]
        table.add_row(row["label"], *map(look.score, shares), style=STYLES.get(name, ""))
    table.add_section()
    if all("chance" in column for column in columns.values()):
        chances = [look.score(column["chance"]) for column in columns.values()]
        table.add_row("chance", *chances, style="dim")
    errors = [max(row["cells"][name]["stderr"] for row in rows.values()) for name in columns]
    table.add_row("questions", *(str(column["n"]) for column in columns.values()), style="dim")
    table.add_row("std. error up to", *map(look.score, errors), style="dim")
    return table


def norm_table(report: Report, columns: Columns) -> Table:
    """`acc_norm` of the benchmarks that people quote by it."""
    rows = report["rows"]
    table = make_table("acc_norm, per character", [own["title"] for own in columns.values()])
    for name, row in rows.items():
        shares = [row["cells"][task]["acc_norm"] for task in columns]
        table.add_row(row["label"], *map(percent, shares), style=STYLES.get(name, ""))
    table.add_section()
    errors = [max(row["cells"][n]["acc_norm_stderr"] for row in rows.values()) for n in columns]
    table.add_row("std. error up to", *map(percent, errors), style="dim")
    return table


def file_table(report: Report, file: str, columns: Columns) -> Table:
    """Answerers by the metrics of a file of rows, then floors and chance."""
    rows, first = report["rows"], next(iter(columns.values()))
    tasks = f"{first['tasks']} task{'s' * (first['tasks'] != 1)}"
    looks = {
        name: "{:.3f}".format if own["metric"] == "loss" else percent
        for name, own in columns.items()
    }
    table = make_table(
        f"{file} ({tasks}), in percent; loss in nats",
        [own["title"] for own in columns.values()],
    )
    for key, row in rows.items():
        shown = [looks[name](row["cells"][name]["score"]) for name in columns]
        table.add_row(row["label"], *shown, style=STYLES.get(key, ""))
    table.add_section()
    for floor, label in FLOOR_LABELS.items():
        shares = [own["floors"].get(floor) for own in columns.values()]
        shown = ["-" if share is None else percent(share) for share in shares]
        table.add_row(label, *shown, style="dim")
    if any("chance" in own for own in columns.values()):
        chances = [percent(own["chance"]) if "chance" in own else "-" for own in columns.values()]
        table.add_row("chance", *chances, style="dim")
    table.add_section()
    table.add_row("rows", *(str(own["n"]) for own in columns.values()), style="dim")
    errors = [max(row["cells"][name]["stderr"] for row in rows.values()) for name in columns]
    shown = [looks[name](error) for name, error in zip(columns, errors, strict=True)]
    table.add_row("std. error up to", *shown, style="dim")
    return table


def cost_table(report: Report) -> Table:
    """The cost of one question for the answering model, and of its prompt for the cloud."""
    rows = report["rows"].values()
    timed = any("latency_ms" in row for row in rows)
    heads = ["tokens", *(["ms", "p90 ms", "GiB"] if timed else []), "GFLOPs", "cloud GFLOPs"]
    table = make_table(f"cost of a question on {report['device']}", heads)
    for row in rows:
        own = ["-", "-", "-"]
        if "latency_ms" in row:
            latency = row["latency_ms"]
            own = [f"{latency['median']:.2f}", f"{latency['p90']:.2f}"]
            own.append(f"{row['memory_bytes'] / 2**30:.3f}")
        table.add_row(
            row["label"],
            f"{row['context_tokens']:.1f}",
            *(own if timed else ()),
            *(f"{row[name] / 1e9:.3g}" for name in ("flops", "cloud_flops")),
        )
    return table


def experiment_table(report: Report) -> Table:
    """Variants by columns, means over seeds with their standard errors."""
    columns, seeds = report["columns"], report["settings"]["seeds"]
    many = f"mean and standard error of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    table = make_table(f"{report['title']} ({many})", [own["title"] for own in columns.values()])
    for name, row in report["rows"].items():
        cells = (row["cells"].get(column) for column in columns)
        table.add_row(row["label"], *map(mean_and_error, cells), style=STYLES.get(name, ""))
    return table


def mean_and_error(cell: Cell | None) -> str:
    """Shares, as `0.903 ± 0.012`; without an error where there is a single seed."""
    if cell is None:
        return "-"
    error = f" ± {cell['stderr']:.3f}" if cell["n"] > 1 else ""
    return f"{cell['score']:.3f}{error}"


def experiment_cost_table(report: Report) -> Table:
    """What a question costs each variant, and what its training did."""
    heads = ["tokens", "ms", "GFLOPs", "trained", "train PFLOPs", "steps", "minutes"]
    table = make_table(f"cost on {report['device']}", heads)
    for row in report["rows"].values():
        training = row.get("training", {})
        table.add_row(
            row["label"],
            f"{row['context_tokens']:.1f}",
            f"{row['latency_ms']['median']:.2f}" if "latency_ms" in row else "-",
            f"{row['flops'] / 1e9:.3g}",
            *(
                (
                    f"{training['parameters']:,}",
                    f"{training['flops'] / 1e15:.3g}",
                    f"{training['steps']:,}",
                    f"{training['seconds'] / 60:.1f}",
                )
                if training
                else ("-",) * 4
            ),
        )
    return table


def make_table(title: str, heads: Sequence[str]) -> Table:
    """A table of labels and numbers, narrow enough for eight benchmarks and their means in 80
    columns. Where that is too wide, labels are folded, never numbers."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0 if len(heads) > 6 else 1),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column(overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def progress(items: Sequence) -> Sequence:
    """A progress bar, shown on a terminal only."""
    return tqdm(items, unit="family", leave=False, disable=not sys.stderr.isatty())
