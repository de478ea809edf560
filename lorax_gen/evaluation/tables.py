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

MEANS = ("context_tokens", "prompt_tokens", "flops", "cloud_flops")


def as_csv(report: dict[str, Any]) -> str:
    """A line for each mode and benchmark, and one for each mode's means."""
    lines = []
    for mode, found in report["modes"].items():
        for result in found["benchmarks"].values():
            lines.append({**result, "mode": mode})
        numbers = {name: found[name] for name in MEANS} | timing(found)
        lines.append({"benchmark": "AVE", "mode": mode, "acc": found["average"], **numbers})
        lines.append({"benchmark": "HAR", "mode": mode, "acc": found["harmonic"]})
    return to_csv(lines)


def agent_csv(report: dict[str, Any]) -> str:
    """A line for each mode."""
    lines = []
    for found in report["modes"].values():
        plain = {k: v for k, v in found.items() if not isinstance(v, dict)}
        lines.append(plain | found["scores"] | timing(found))
    return to_csv(lines)


def timing(found: dict[str, Any]) -> dict[str, Any]:
    """Latency and memory of a mode, as columns."""
    time = found["latency_ms"]
    return {
        "latency_ms": time["median"],
        "latency_p90_ms": time["p90"],
        "memory_bytes": found["memory_bytes"],
    }


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
    "shuffled": "  shuffled prompt",
    "empty": "  empty prompt",
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
    table = make_table(f"accuracy of {report['edge']}, in percent")
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
    results = [[found["benchmarks"][name] for found in modes.values()] for name in names]
    errors = [max(result["acc_stderr"] for result in column) for column in results]
    table.add_row("questions", *(str(column[0]["n"]) for column in results), style="dim")
    table.add_row("std. error up to", *(f"{100 * error:.1f}" for error in errors), style="dim")
    console.print(table, "", cost_table(report, "context_tokens"), sep="\n")
    for mode, found in modes.items():
        for name, what in (("truncated", "questions"), ("prompts_truncated", "prompts")):
            print_cut(console, mode, sum(r[name] for r in found["benchmarks"].values()), what)


def print_agent(report: dict[str, Any]) -> None:
    """The five scores and their average in percent, then what a request costs."""
    console = Console(highlight=False)
    modes = report["modes"]
    table = make_table(f"GPT4Tools, {report['edge']}, in percent")
    for name in next(iter(modes.values()))["scores"]:
        table.add_column(name, justify="right", style="bold" if name == "average" else "")
    for mode, found in modes.items():
        table.add_row(LABELS[mode], *(f"{100 * share:.2f}" for share in found["scores"].values()))
    console.print(table, "", cost_table(report, "edge_tokens"), "", sep="\n")
    for mode, found in modes.items():
        console.print(
            f"{LABELS[mode].strip()}: {found['compression']:.1f} x fewer tokens; "
            f"the edge sees {found['edge_sees']}"
        )
        print_cut(console, mode, found["cut_items"], "questions")
        print_cut(console, mode, found["cut_prompts"], "prompts")


def print_cut(console: Console, mode: str, count: int, what: str) -> None:
    """Says what was too long for its model, where anything was."""
    if count:
        console.print(f"{mode}: {count} {what} too long for the model lost their beginning")


def cost_table(report: dict[str, Any], tokens: str) -> Table:
    """What one question costs the edge, and its prompt the cloud."""
    table = make_table(f"cost of a question on {report['device']}")
    for head in ("tokens", "ms", "p90 ms", "GiB", "GFLOPs", "cloud GFLOPs"):
        table.add_column(head, justify="right")
    for mode, found in report["modes"].items():
        label = LABELS[mode].format(shots=report.get("shots"))
        time = found["latency_ms"]
        row = [f"{found[tokens]:.1f}", f"{time['median']:.2f}", f"{time['p90']:.2f}"]
        row.append(f"{found['memory_bytes'] / 2**30:.3f}")
        row += [f"{found[name] / 1e9:.3g}" for name in ("flops", "cloud_flops")]
        table.add_row(label, *row)
    return table


def make_table(title: str) -> Table:
    """A table so narrow that eight benchmarks and their means fit into 80 columns."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    table.add_column(no_wrap=True)
    return table
