"""What all figures share: colours, axes, legends, and how they become PNG files.

They are drawn from plain values, without pyplot's global state. Backgrounds are light and opaque,
so that a figure looks the same on a light and on a dark page. Colours are those of Okabe and Ito
(jfly.uni-koeln.de/color), which colour-blind readers can distinguish.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from lorax_gen.files import AnyPath, replaced_file

INK, FAINT, RULE = "#1f2328", "#59636e", "#d8dee4"
VERMILION = "#d55e00"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
TITLE: dict[str, Any] = {"fontsize": 14, "fontweight": "bold", "color": INK}
LEGEND: dict[str, Any] = {"fontsize": 10, "frameon": False, "labelcolor": INK}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches, at the edges too
    return Figure(figsize=(width, height), facecolor="white", layout=layout)


def style_axes(axes: Axes, title: str) -> Axes:
    axes.set_title(title, loc="left", pad=12, **TITLE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=11, colors=INK)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def percent_axis(axes: Axes) -> None:
    """A vertical axis of shares, with room above 100 % for the label of a full bar."""
    axes.set_ylim(0, 1.06)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def write_png(figure: Figure, path: AnyPath) -> None:
    """Writes a complete PNG or none."""
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
