"""Reports on the terminal: accuracies in the paper's form, then the cost of a question."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lorax_gen.evaluation.report import Report


class Look(NamedTuple):
    """How reports of one kind are shown."""

    title: str
    score: Callable[[float], str]
    means: dict[str, str]  # means of a row to show -> their headers


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


LOOKS = {
    "benchmarks": Look(
        "accuracy of {edge}, in percent", percent, {"average": "AVE", "harmonic": "HAR"}
    ),
    "gpt4tools": Look("GPT4Tools, {edge}, in percent", percent, {"average": "AVE"}),
    "world": Look("accuracy on {split} tasks", "{:.3f}".format, {"average": "mean"}),
}


def print_report(report: Report, console: Console | None = None) -> None:
    """Answerers by tasks, then the cost of a question for each, and what was truncated."""
    console = console or Console(highlight=False)
    columns, rows = report["columns"], report["rows"]
    look = LOOKS[report["kind"]]
    title = look.title.format(**{"edge": report["edge"], **report["settings"]})
    table = make_table(title, len(columns) + len(look.means))
    for column in columns.values():
        table.add_column(column["title"], justify="right")
    for head in look.means.values():
        table.add_column(head, justify="right", style="bold")
    for name, row in rows.items():
        shares = [cell["score"] for cell in row["cells"].values()]
        shares += [row[mean] for mean in look.means]
        style = "bold" if name == "lora_gen" else ""
        table.add_row(row["label"], *map(look.score, shares), style=style)
    table.add_section()
    if all("chance" in column for column in columns.values()):
        chances = [look.score(column["chance"]) for column in columns.values()]
        table.add_row("chance", *chances, style="dim")
    errors = [max(row["cells"][name]["stderr"] for row in rows.values()) for name in columns]
    table.add_row("questions", *(str(column["n"]) for column in columns.values()), style="dim")
    table.add_row("std. error up to", *map(look.score, errors), style="dim")
    console.print(table, "", cost_table(report), sep="\n")
    for row in rows.values():
        if "compression" in row:
            console.print(
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
                console.print(
                    f"{name}: {count} {what} too long for the model were truncated on the left"
                )


def cost_table(report: Report) -> Table:
    """The cost of one question for the answering model, and of its prompt for the cloud."""
    table = make_table(f"cost of a question on {report['device']}", 6)
    for head in ("tokens", "ms", "p90 ms", "GiB", "GFLOPs", "cloud GFLOPs"):
        table.add_column(head, justify="right")
    for row in report["rows"].values():
        latency = row["latency_ms"]
        table.add_row(
            row["label"],
            f"{row['context_tokens']:.1f}",
            f"{latency['median']:.2f}",
            f"{latency['p90']:.2f}",
            f"{row['memory_bytes'] / 2**30:.3f}",
            *(f"{row[name] / 1e9:.3g}" for name in ("flops", "cloud_flops")),
        )
    return table


def make_table(title: str, columns: int) -> Table:
    """A table narrow enough for eight benchmarks and their means in 80 columns."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0 if columns > 6 else 1),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column(no_wrap=True)
    return table


def progress(items: Sequence) -> Sequence:
    """A progress bar, shown on a terminal only."""
    return tqdm(items, unit="family", leave=False, disable=not sys.stderr.isatty())
