"""Figures of gates: which experts each task's prompt chooses, and which tasks are alike by them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorax_gen.evaluation.style import (
    COLORS,
    FAINT,
    INK,
    LEGEND,
    TITLE,
    new_figure,
    style_axes,
    write_png,
)
from lorax_gen.files import AnyPath

LONGEST_NAMED = 40  # names of more tasks than this would be too small to read
PANELS_PER_ROW = 6


def draw_gates(
    gates: np.ndarray, names: Sequence[str], groups: Sequence[str], path: AnyPath, first: int = 0
) -> None:
    """Heat maps of tasks x experts, one per edge layer, with the tasks of a family together.

    Args:
      gates: `[tasks, L, N]`, each in 0..1.
      names: the tasks' names; drawn where there are at most `LONGEST_NAMED`.
      groups: the family of each task.
      first: the edge layer that the first of the gates are of.
    """
    write_png(_figure_gates(gates, names, groups, first), path)


def draw_map(gates: np.ndarray, names: Sequence[str], groups: Sequence[str], path: AnyPath) -> None:
    """Tasks as points, near each other where their gates are alike; arguments as `draw_gates`.

    The plane is that of the two largest principal components of the gates of all layers together;
    its axes say how much of the variance they hold.
    """
    write_png(_figure_map(gates, names, groups), path)


def draw_load(gates: np.ndarray, path: AnyPath, first: int = 0) -> None:
    """The share of the gates that each expert holds, by edge layer, beside an even share.

    Args:
      gates: `[tasks, L, N]`; first: see `draw_gates`.
    """
    write_png(_figure_load(gates, first), path)


# --- figures -------------------------------------------------------------------------------------


def _figure_gates(
    gates: np.ndarray, names: Sequence[str], groups: Sequence[str], first: int = 0
) -> Figure:
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
    figure = new_figure(max(width, 7.5), lines * (height + 0.6) + 0.8)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for layer, axes in itertools.zip_longest(range(layers), grid.flat):
        if layer is None:
            axes.set_visible(False)
            continue
        image = axes.imshow(
            gates[order, layer], cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none"
        )
        axes.hlines(ends[:-1] - 0.5, -0.5, experts - 0.5, colors=INK, linewidth=1)
        axes.set_title(f"layer {first + layer}", fontsize=11, color=INK)
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
    figure.suptitle("The experts that each task's prompt chooses, by edge layer", **TITLE)
    return figure


def _figure_map(gates: np.ndarray, names: Sequence[str], groups: Sequence[str]) -> Figure:
    flat = gates.reshape(len(gates), -1) - gates.reshape(len(gates), -1).mean(0)
    _, sizes, directions = np.linalg.svd(flat, full_matrices=False)
    points = np.zeros((len(gates), 2))
    points[:, : len(directions[:2])] = flat @ directions[:2].T
    variance = np.zeros(2)
    variance[: len(sizes[:2])] = sizes[:2] ** 2 / max(float((sizes**2).sum()), 1e-30)

    families = list(dict.fromkeys(groups))
    figure = new_figure(8.5, 6.4)
    axes = style_axes(figure.subplots(), "Tasks by their gates")
    for i, family in enumerate(families):
        own = points[[group == family for group in groups]]
        marker = "os^Dv"[i // len(COLORS) % 5]
        color = COLORS[i % len(COLORS)]
        x, y = own.T
        axes.scatter(x, y, s=34, color=color, marker=marker, alpha=0.8, linewidth=0, label=family)
    if len(names) <= LONGEST_NAMED and len(families) > len(names) // 2:  # else a colour names them
        for name, (x, y) in zip(names, points, strict=True):
            axes.annotate(name, (x, y), (4, 3), textcoords="offset points", fontsize=8, color=FAINT)
    axes.grid(axis="x", color=axes.get_ygridlines()[0].get_color(), linewidth=0.8)
    for name, share in zip("xy", variance, strict=True):
        which = {"x": "first", "y": "second"}[name]
        getattr(axes, f"set_{name}label")(
            f"{which} principal component ({100 * share:.0f} % of the variance)",
            fontsize=11, color=INK,
        )  # fmt: skip
    if len(families) <= 24:
        columns = min(6, len(families))
        figure.legend(loc="outside lower center", ncols=columns, **LEGEND)
    return figure


def _figure_load(gates: np.ndarray, first: int = 0) -> Figure:
    load = gates.mean(0)  # [L, N]
    load = load / load.sum(-1, keepdims=True)
    layers, experts = load.shape
    ordered = -np.sort(-load, axis=-1)
    figure = new_figure(8.5, 4.6)
    axes = style_axes(figure.subplots(), "Load of the experts, the busiest first")
    for layer in range(layers):
        shade = 0.25 + 0.75 * layer / max(layers - 1, 1)
        ends = layer in (0, layers - 1)
        axes.plot(
            range(1, experts + 1), ordered[layer], color=COLORS[0], alpha=shade, linewidth=1.4,
            marker="o", markersize=3,
            label=f"edge layer {first + layer}" if ends or layers < 7 else None,
        )  # fmt: skip
    axes.axhline(1 / experts, color=INK, linestyle="--", linewidth=1, label="an even share")
    axes.set_ylim(0, None)
    axes.set_xlabel("expert, by its load", fontsize=11, color=INK)
    axes.set_ylabel("share of all gates", fontsize=11, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.legend(loc="outside lower center", ncols=4, **LEGEND)
    return figure
