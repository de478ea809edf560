"""Figures of a report and of a training run, as PNG files; see `evaluation.style`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lorax_gen.evaluation.style import (
    COLORS,
    FAINT,
    INK,
    LEGEND,
    RULE,
    VERMILION,
    new_figure,
    percent_axis,
    style_axes,
    write_png,
)
from lorax_gen.files import AnyPath

CONTROL: dict[str, Any] = {"facecolor": "#fbe3d3", "edgecolor": VERMILION, "hatch": "/////"}
# The style of each answerer's bars; all others are drawn as controls.
LOOKS: dict[str, dict[str, Any]] = {
    "plain": {"color": "#c4c9ce"},
    "icl": {"color": "#56b4e9"},
    "lora": {"color": "#009e73"},
    "cloud_icl": {"color": "#0072b2"},
    "lora_gen": {"color": VERMILION},
}


def draw_accuracy(report: dict[str, Any], path: AnyPath) -> None:
    """Bars of each answerer's accuracy per family and on average, from `world.evaluate_world`."""
    write_png(_figure_accuracy(report), path)


def draw_tradeoff(report: dict[str, Any], path: AnyPath) -> None:
    """Each answerer's average score against the latency of a question, as in Figure 1 of the paper;
    of a report whose rows have both."""
    write_png(_figure_tradeoff(report), path)


def draw_training(rows: Sequence[dict[str, Any]], path: AnyPath) -> None:
    """Losses, and accuracy on seen and unseen tasks, against the step; rows of `metrics.jsonl`.

    A row is skipped where it lacks the value drawn, and so is a curve that no row has.
    """
    write_png(_figure_training(rows), path)


# --- figures -------------------------------------------------------------------------------------


def _figure_accuracy(report: dict[str, Any]) -> Figure:
    families = report["columns"]
    chances = [column["chance"] for column in families.values()]
    chances.append(float(np.mean(chances)))
    groups = len(families) + 1
    # The mean is drawn slightly apart: it is not a family.
    centres = np.arange(groups) + 0.2 * (np.arange(groups) == len(families))
    width = 0.84 / len(report["rows"])

    figure = new_figure(2.1 * groups + 0.8, 5.6)
    split = report["settings"]["split"]
    axes = style_axes(figure.subplots(), f"Accuracy on {split} tasks, by family")
    for i, (name, row) in enumerate(report["rows"].items()):
        who = row["label"].replace("  ", "LoRA-Gen, ")  # controls are indented under it in tables
        label = f"{who} ({round(row['context_tokens'], 1):g})"
        bars = centres + (i - (len(report["rows"]) - 1) / 2) * width
        shares = [row["cells"][family]["score"] for family in families] + [row["average"]]
        axes.bar(bars, shares, 0.9 * width, label=label, zorder=2, **LOOKS.get(name, CONTROL))
        if name not in LOOKS or name == "lora_gen":
            weight = "bold" if name == "lora_gen" else "normal"
            for x, share, chance in zip(bars, shares, chances, strict=True):
                y = chance if share < chance < share + 0.05 else share  # not across the line
                axes.annotate(
                    f"{100 * share:.0f}", (x, y), (0, 3), textcoords="offset points",
                    ha="center", color=INK, fontsize=10, fontweight=weight,
                )  # fmt: skip
    axes.hlines(
        chances, centres - 0.46, centres + 0.46, colors=INK, linestyles="--", linewidth=1,
        label="chance: best guess without the task", zorder=3,
    )  # fmt: skip
    ticks = [f"{f}\n{c['tasks']} tasks\n{c['n']} questions" for f, c in families.items()]
    axes.set_xticks(centres, [*ticks, "mean\nof the families"])
    axes.tick_params("x", length=0)
    axes.set_xlim(centres[0] - 0.55, centres[-1] + 0.55)
    percent_axis(axes)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(handles)), key=lambda i: labels[i].startswith("chance"))
    legend = figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center",
        ncols=3, title="Who answers (context tokens per question)", **LEGEND,
    )  # fmt: skip
    legend.get_title().set(fontsize=10, fontweight="bold", color=INK)
    return figure


def _figure_tradeoff(report: dict[str, Any]) -> Figure:
    rows = {
        name: row
        for name, row in report["rows"].items()
        if "latency_ms" in row and row.get("average") is not None
    }
    figure = new_figure(8.5, 5.6)
    axes = style_axes(figure.subplots(), "Score against latency")
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    others = itertools.product("^sDvPX", COLORS)  # for those without a look of their own
    for name, row in rows.items():
        marker, color = ("o", LOOKS[name]["color"]) if name in LOOKS else next(others)
        axes.scatter(
            row["latency_ms"]["median"], row["average"], s=130 if name == "lora_gen" else 60,
            color=color, marker=marker, edgecolor=INK, linewidth=0.6, zorder=3, clip_on=False,
            label=f"{row['label'].strip()} ({row['context_tokens']:.0f} tokens)",
        )  # fmt: skip
    percent_axis(axes)
    axes.set_xlim(0, 1.1 * max((row["latency_ms"]["median"] for row in rows.values()), default=1))
    axes.set_xlabel("median latency of a question's first token, ms", fontsize=11, color=INK)
    axes.set_ylabel("mean score", fontsize=11, color=INK)
    legend = figure.legend(
        loc="outside lower center", ncols=2, title="Who answers (context tokens)", **LEGEND
    )
    legend.get_title().set(fontsize=10, fontweight="bold", color=INK)
    return figure


def _figure_training(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = new_figure(12, 4.8)
    left, right = figure.subplots(1, 2)

    style_axes(left, "Training loss")
    steps, rates = _series(rows, "learning_rate")
    if steps:
        shade = left.twinx()  # drawn below the losses; its scale is in the label
        shade.fill_between(
            steps, rates, color=RULE, alpha=0.45, linewidth=0,
            label=f"learning rate, up to {max(rates):.2g}",
        )  # fmt: skip
        shade.set_ylim(0, 1.05 * max(rates) or 1)
        shade.set_axis_off()
        left.set_zorder(shade.get_zorder() + 1)
        left.patch.set_visible(False)
    has_lm = any("loss_lm" in row for row in rows)
    for key, label, color in (
        ("loss_lm" if has_lm else "loss", "$L_{LM}$, answer tokens" if has_lm else "loss", INK),
        ("loss_cv", "$L_{cv}$, balance of the experts", COLORS[4]),
    ):
        steps, values = _series(rows, key)
        if any(value > 0 for value in values):  # a log axis cannot show a loss of 0
            left.plot(steps, values, color=color, linewidth=1.4, label=label)
            left.set_yscale("log")
    left.set_ylabel("loss", fontsize=11, color=INK)
    handles = [axes.get_legend_handles_labels()[0] for axes in figure.axes]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), **LEGEND}
    if any(handles):
        left.legend(handles=list(itertools.chain(*handles)), ncols=2, **below)

    style_axes(right, "Accuracy on seen and unseen tasks")
    prefix = "accuracy/unseen/"
    families = dict.fromkeys(
        key.removeprefix(prefix) for row in rows for key in row if key.startswith(prefix)
    )
    looks = {f"/{f}": (f, c, 1.4) for f, c in zip(families, itertools.cycle(COLORS))}
    looks[""] = ("mean", INK, 2.2)
    splits: dict[str, Any] = {"unseen": "-", "seen": (0, (4, 2))}
    lines = [
        Line2D([], [], color=FAINT, linestyle=style, label=f"{split} tasks")
        for split, style in splits.items()
    ]
    for suffix, (label, color, width) in looks.items():
        look: dict[str, Any]
        look = {"color": color, "linewidth": width, "marker": "o", "markersize": width + 1.6}
        lines.append(Line2D([], [], label=label, **look))
        for split, style in splits.items():
            curve = _series(rows, f"accuracy/{split}{suffix}")
            right.plot(*curve, linestyle=style, clip_on=False, **look)
    if any(line.get_xdata().size for line in right.lines):
        right.legend(handles=lines, ncols=4, **below)
    else:
        note = {"ha": "center", "fontsize": 11, "color": FAINT}
        right.text(0.5, 0.5, "no evaluation yet", transform=right.transAxes, **note)
    percent_axis(right)
    last = max((row["step"] for row in rows), default=1)
    for axes in (left, right):
        axes.set_xlim(0, last)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step", fontsize=11, color=INK)
    return figure


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the key."""
    have = [row for row in rows if key in row]
    return [row["step"] for row in have], [row[key] for row in have]
