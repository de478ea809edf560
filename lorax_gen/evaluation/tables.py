"""Reports of `evaluation.suite` as tables: on the terminal as the paper prints them, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lorax_gen.data.benchmarks import BENCHMARKS


def as_csv(report: dict[str, Any]) -> str:
    """A line for each mode and benchmark, and one for each mode's means."""
    lines = []
    for mode, found in report["modes"].items():
        for result in found["benchmarks"].values():
            lines.append({**result, "mode": mode})
        means = {"benchmark": "AVE", "mode": mode, "acc": found["average"]}
        lines.append(means | {"latency_ms": found["latency_ms"]["median"]})
        lines.append({"benchmark": "HAR", "mode": mode, "acc": found["harmonic"]})
    return to_csv(lines)


def agent_csv(report: dict[str, Any]) -> str:
    """A line for each mode."""
    lines = []
    for found in report["modes"].values():
        plain = {k: v for k, v in found.items() if not isinstance(v, dict)}
        lines.append(plain | found["scores"] | {"latency_ms": found["latency_ms"]["median"]})
    return to_csv(lines)


def to_csv(lines: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


LABELS = {
    "plain": "edge, no prompt",
    "icl": "edge, {shots}-shot",
    "card": "edge + card",
    "lora_gen": "edge + LoRA-Gen",
    "shuffled": "  other task's prompt",
    "empty": "  no prompt to the cloud",
    "random": "  random prompt",
    "full": "edge, tools in context",
    "request": "edge, request alone",
    "lora_gen_shuffled": "  other item's tools",
}


def print_suite(report: dict[str, Any]) -> None:
    """Accuracies in percent as the paper prints them, then what a question costs."""
    console = Console(highlight=False)
    modes = report["modes"]
    names = list(next(iter(modes.values()))["benchmarks"])
    table = make_table(f"accuracy of {report['edge']}, in percent", "")
    for name in names:
        table.add_column(BENCHMARKS[name].title, justify="right")
    for name in ("AVE", "HAR"):
        table.add_column(name, justify="right", style="bold")
    for mode, found in modes.items():
        shares = [result["acc"] for result in found["benchmarks"].values()]
        shares += [found["average"], found["harmonic"]]
        label = LABELS[mode].format(shots=report["shots"])
        table.add_row(label, *(f"{100 * share:.1f}" for share in shares))
    table.add_section()
    first = next(iter(modes.values()))["benchmarks"].values()
    table.add_row("questions", *(str(result["n"]) for result in first), style="dim")
    table.add_row(
        "standard error", *(f"{100 * result['acc_stderr']:.1f}" for result in first), style="dim"
    )
    console.print(table)
    console.print(cost_table(report, "context_tokens"))


def print_agent(report: dict[str, Any]) -> None:
    """The five scores and their average in percent, then what a request costs."""
    console = Console(highlight=False)
    modes = report["modes"]
    table = make_table(f"GPT4Tools, {report['edge']}, in percent", "")
    for name in next(iter(modes.values()))["scores"]:
        table.add_column(name, justify="right", style="bold" if name == "average" else "")
    for mode, found in modes.items():
        table.add_row(LABELS[mode], *(f"{100 * share:.2f}" for share in found["scores"].values()))
    console.print(table)
    console.print(cost_table(report, "edge_tokens"))
    for mode, found in modes.items():
        console.print(
            f"{LABELS[mode].strip()}: {found['compression']:.1f} x fewer tokens; "
            f"the edge sees {found['edge_sees']}"
        )


def cost_table(report: dict[str, Any], tokens: str) -> Table:
    """What one question costs the edge, and its prompt the cloud."""
    table = make_table(f"cost of a question on {report['device']}", "")
    heads = ["tokens", "ms", "p90 ms", "GiB"]
    flops = all("flops" in found for found in report["modes"].values())
    for head in heads + (["GFLOPs", "cloud GFLOPs"] if flops else []):
        table.add_column(head, justify="right")
    for mode, found in report["modes"].items():
        label = LABELS[mode].format(shots=report.get("shots"))
        time = found["latency_ms"]
        row = [f"{found[tokens]:.1f}", f"{time['median']:.2f}", f"{time['p90']:.2f}"]
        row.append(f"{found['memory_bytes'] / 2**30:.3f}")
        if flops:
            row += [f"{found['flops'] / 1e9:.3g}", f"{found['cloud_flops'] / 1e9:.3g}"]
        table.add_row(label, *row)
    return table


def make_table(title: str, head: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False
    )
    table.add_column(head, no_wrap=True)
    return table
