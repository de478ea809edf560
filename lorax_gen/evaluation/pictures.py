"""Figures of a report, of the gates and of a training run, as PNG files.

They are drawn from plain values, without pyplot's global state. Backgrounds are light and opaque,
so that a figure looks the same on a light and on a dark page. Colours are those of Okabe and Ito
(jfly.uni-koeln.de/color), which colour-blind readers can distinguish.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lorax_gen.files import AnyPath, replaced_file

INK, FAINT, RULE = "#1f2328", "#59636e", "#d8dee4"
VERMILION = "#d55e00"

CONTROL: dict[str, Any] = {"facecolor": "#fbe3d3", "edgecolor": VERMILION, "hatch": "/////"}
# The style of each answerer's bars; all others are drawn as controls.
LOOKS: dict[str, dict[str, Any]] = {
    "plain": {"color": "#c4c9ce"},
    "icl": {"color": "#56b4e9"},
    "lora": {"color": "#009e73"},
    "cloud_icl": {"color": "#0072b2"},
    "lora_gen": {"color": VERMILION},
}
FAMILY_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LONGEST_NAMED = 40  # names of more tasks than this would be too small to read
PANELS_PER_ROW = 6


def draw_accuracy(report: dict[str, Any], path: AnyPath) -> None:
    """Bars of each answerer's accuracy per family and on average, from `world.evaluate_world`."""
    _write(_figure_accuracy(report), path)


def draw_gates(
    gates: np.ndarray, names: Sequence[str], groups: Sequence[str], path: AnyPath
) -> None:
    """Heat maps of tasks x experts, one per edge layer, with the tasks of a family together.

    Args:
      gates: `[tasks, L, N]`, each in 0..1.
      names: the tasks' names; drawn where there are at most `LONGEST_NAMED`.
      groups: the family of each task.
    """
    _write(_figure_gates(gates, names, groups), path)


def draw_training(rows: Sequence[dict[str, Any]], path: AnyPath) -> None:
    """Losses, and accuracy on seen and unseen tasks, against the step; rows of `metrics.jsonl`.

    A row is skipped where it lacks the value drawn, and so is a curve that no row has.
    """
    _write(_figure_training(rows), path)


# --- figures -------------------------------------------------------------------------------------


def _figure_accuracy(report: dict[str, Any]) -> Figure:
    families = report["columns"]
    chances = [column["chance"] for column in families.values()]
    chances.append(float(np.mean(chances)))
    groups = len(families) + 1
    # The mean is drawn slightly apart: it is not a family.
    centres = np.arange(groups) + 0.2 * (np.arange(groups) == len(families))
    width = 0.84 / len(report["rows"])

    figure = _figure(2.1 * groups + 0.8, 5.6)
    split = report["settings"]["split"]
    axes = _axes(figure.subplots(), f"Accuracy on {split} tasks, by family")
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
    _percent(axes)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(handles)), key=lambda i: labels[i].startswith("chance"))
    legend = figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center",
        ncols=3, title="Who answers (context tokens per question)", **_LEGEND,
    )  # fmt: skip
    legend.get_title().set(fontsize=10, fontweight="bold", color=INK)
    return figure


def _figure_gates(gates: np.ndarray, names: Sequence[str], groups: Sequence[str]) -> Figure:
    tasks, layers, experts = gates.shape
    families = list(dict.fromkeys(groups))
    order = sorted(range(tasks), key=lambda i: families.index(groups[i]))
    sizes = [sum(group == family for group in groups) for family in families]
    ends = np.cumsum(sizes)
    middles = ends - np.asarray(sizes) / 2 - 0.5
    named = tasks <= LONGEST_NAMED
    columns = min(layers, PANELS_PER_ROW)
    lines = -(-layers // columns)

    height = max(2.6, tasks * (0.19 if named else 0.05))
    width = columns * max(1.6, 0.09 * experts) + (3.4 if named else 1.8)
    figure = _figure(max(width, 7.5), lines * (height + 0.6) + 0.8)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for layer, axes in itertools.zip_longest(range(layers), grid.flat):
        if layer is None:
            axes.set_visible(False)
            continue
        image = axes.imshow(
            gates[order, layer], cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none"
        )
        axes.hlines(ends[:-1] - 0.5, -0.5, experts - 0.5, colors=INK, linewidth=1)
        axes.set_title(f"layer {layer}", fontsize=11, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(labelsize=10, colors=INK, length=0)
        axes.tick_params("x", labelbottom=True)  # where no panel stands below, too
        axes.spines[:].set_color(FAINT)
        if named:
            axes.set_yticks(range(tasks), [names[i] for i in order], fontsize=8)
        else:
            axes.set_yticks(middles, families, fontsize=11)
        if named and layer % columns == columns - 1:
            right = axes.secondary_yaxis("right")
            right.set_yticks(middles, families, fontsize=11, color=INK)
            right.tick_params(length=0)
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label("gate: weight of the expert", fontsize=11, color=INK)
    bar.ax.tick_params(labelsize=10, colors=INK)
    bar.outline.set_edgecolor(FAINT)
    figure.supxlabel("expert", fontsize=11, color=INK)
    figure.suptitle("The experts that each task's prompt chooses, by edge layer", **_TITLE)
    return figure


def _figure_training(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = _figure(12, 4.8)
    left, right = figure.subplots(1, 2)

    _axes(left, "Training loss")
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
        ("loss_cv", "$L_{cv}$, balance of the experts", FAMILY_COLORS[4]),
    ):
        steps, values = _series(rows, key)
        if any(value > 0 for value in values):  # a log axis cannot show a loss of 0
            left.plot(steps, values, color=color, linewidth=1.4, label=label)
            left.set_yscale("log")
    left.set_ylabel("loss", fontsize=11, color=INK)
    handles = [axes.get_legend_handles_labels()[0] for axes in figure.axes]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), **_LEGEND}
    if any(handles):
        left.legend(handles=list(itertools.chain(*handles)), ncols=2, **below)

    _axes(right, "Accuracy on seen and unseen tasks")
    prefix = "accuracy/unseen/"
    families = dict.fromkeys(
        key.removeprefix(prefix) for row in rows for key in row if key.startswith(prefix)
    )
    looks = {f"/{f}": (f, c, 1.4) for f, c in zip(families, itertools.cycle(FAMILY_COLORS))}
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
    _percent(right)
    last = max((row["step"] for row in rows), default=1)
    for axes in (left, right):
        axes.set_xlim(0, last)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step", fontsize=11, color=INK)
    return figure


# --- shared style -------------------------------------------------------------------------------

_TITLE: dict[str, Any] = {"fontsize": 14, "fontweight": "bold", "color": INK}
_LEGEND: dict[str, Any] = {"fontsize": 10, "frameon": False, "labelcolor": INK}


def _figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches, at the edges too
    return Figure(figsize=(width, height), facecolor="white", layout=layout)


def _axes(axes: Axes, title: str) -> Axes:
    axes.set_title(title, loc="left", pad=12, **_TITLE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=11, colors=INK)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _percent(axes: Axes) -> None:
    """An axis of shares, with room above 100 % for the label of a full bar."""
    axes.set_ylim(0, 1.06)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the key."""
    have = [row for row in rows if key in row]
    return [row["step"] for row in have], [row[key] for row in have]


def _write(figure: Figure, path: AnyPath) -> None:
    """Writes a complete PNG or none."""
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
