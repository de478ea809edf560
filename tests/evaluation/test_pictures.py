"""What the pictures must show, read off the figures; and that files are whole."""

import struct

import numpy as np
import pytest
from matplotlib.colors import to_hex

from lorax_gen.evaluation import gate_pictures, pictures
from lorax_gen.evaluation.world import NAMES

FAMILIES = ("sort", "name")


@pytest.fixture
def report():
    shares = dict(zip(NAMES, (0.2, 0.3, 0.25, 0.99, 0.95, 0.21), strict=True))
    return {
        "columns": {
            "sort": {"n": 608, "tasks": 38, "chance": 0.25},
            "name": {"n": 304, "tasks": 19, "chance": 0.125},
        },
        "rows": {
            name: {
                "label": f"label of {name}",
                "cells": {family: {"score": share} for family in FAMILIES},
                "average": share,
                "context_tokens": 22.74 if "icl" in name else 2.0,
            }
            for name, share in shares.items()
        },
        "settings": {"split": "unseen"},
    }


def make_gates(tasks=6, layers=3, experts=4):
    gates = np.random.default_rng(0).dirichlet(np.ones(experts), (tasks, layers))
    return gates, [f"task-{i}" for i in range(tasks)], [FAMILIES[i % 2] for i in range(tasks)]


def make_rows():
    train = [{"step": s, "loss": 2 / s, "loss_lm": 1 / s, "loss_cv": 0.01} for s in (1, 2, 3, 4)]
    shares = {f"accuracy/{split}": 0.5 for split in ("seen", "unseen")}
    shares |= {f"{key}/{family}": 0.5 for key in shares for family in FAMILIES}
    return [*train[:2], {"step": 2, **shares}, *train[2:], {"step": 4, **shares}]


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def shown(axes):
    return [line for line in axes.lines if len(line.get_xdata())]


DRAW = {
    "accuracy": pictures.draw_accuracy,
    "tradeoff": pictures.draw_tradeoff,
    "training": pictures.draw_training,
    "gates": gate_pictures.draw_gates,
    "map": gate_pictures.draw_map,
    "load": gate_pictures.draw_load,
}


@pytest.mark.parametrize("kind", DRAW)
def test_a_whole_png_replaces_what_was_there(kind, report, tmp_path):
    gates = make_gates()
    values = {"training": (make_rows(),), "gates": gates, "map": gates, "load": gates[:1]}
    values = values.get(kind, (report,))
    report["rows"]["icl"]["latency_ms"] = {"median": 2.0}
    path = tmp_path / "picture.png"
    path.write_text("an older picture")
    DRAW[kind](*values, path)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    assert 900 <= width <= 2000 and 500 <= height <= 1500
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_bars_are_as_high_as_the_shares_in_the_report(report):
    report["rows"]["lora_gen"]["cells"]["name"]["score"] = 0.5
    (axes,) = pictures._figure_accuracy(report).axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [
        [*(row["cells"][family]["score"] for family in FAMILIES), row["average"]]
        for row in report["rows"].values()
    ]
    assert [text.get_text() for text in axes.texts] == "95 50 95 21 21 21".split()


def test_a_missing_answerer_is_left_out_and_the_others_keep_their_colours(report):
    def colours(report):
        figure = pictures._figure_accuracy(report)
        (axes,) = figure.axes
        bars = [to_hex(bars[0].get_facecolor()) for bars in axes.containers]
        return bars, legend_texts(figure.legends[0])

    bars, labels = colours(report)
    del report["rows"]["lora"]
    assert "label of lora (2)" in labels
    assert colours(report) == (bars[:2] + bars[3:], labels[:2] + labels[3:])


def test_chance_has_a_line_per_family_and_their_mean(report):
    (axes,) = pictures._figure_accuracy(report).axes
    (lines,) = axes.collections
    assert [segment[0, 1] for segment in lines.get_segments()] == [0.25, 0.125, 0.1875]


@pytest.mark.parametrize("layers", [1, 3, gate_pictures.PANELS_PER_ROW + 1])
def test_gates_have_one_panel_per_layer_with_families_together(layers):
    gates, names, groups = make_gates(layers=layers)
    figure = gate_pictures._figure_gates(gates, names, groups)
    panels = [axes for axes in figure.axes if axes.get_title().startswith("layer")]
    assert [axes.get_title() for axes in panels] == [f"layer {i}" for i in range(layers)]
    order = [0, 2, 4, 1, 3, 5]
    for layer, axes in enumerate(panels):
        np.testing.assert_array_equal(axes.images[0].get_array(), gates[order, layer])
    assert [t.get_text() for t in panels[0].get_yticklabels()] == [names[i] for i in order]


def test_families_stand_for_tasks_too_many_to_name():
    figure = gate_pictures._figure_gates(*make_gates(tasks=gate_pictures.LONGEST_NAMED + 2))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(FAMILIES)


def test_training_rows_are_drawn_where_they_have_the_value():
    figure = pictures._figure_training(make_rows())
    losses, accuracy = figure.axes
    assert [list(line.get_xdata()) for line in losses.lines] == [[1, 2, 3, 4]] * 2
    assert [list(line.get_xdata()) for line in shown(accuracy)] == [[2, 4]] * 6
    solid = [line.get_linestyle() == "-" for line in shown(accuracy)]
    assert solid == [True, False] * 3  # unseen, seen


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]])
def test_a_run_without_evaluations_is_drawn_and_says_so(rows):
    losses, accuracy = pictures._figure_training(rows).axes
    assert [list(line.get_ydata()) for line in losses.lines] == ([[2.0, 1.0]] if rows else [])
    assert not shown(accuracy)
    assert accuracy.texts[0].get_text() == "no evaluation yet"


def test_who_was_timed_is_a_point_of_latency_and_score(report):
    for i, name in enumerate(("plain", "lora_gen", "new_method")):
        row = report["rows"].setdefault(name, dict(report["rows"]["icl"]))
        row["latency_ms"] = {"median": 2.0 + i}
    (axes,) = pictures._figure_tradeoff(report).axes
    found = {each.get_label(): each.get_offsets().tolist()[0] for each in axes.collections}
    assert found == {
        "label of plain (2 tokens)": [2.0, 0.2],
        "label of lora_gen (2 tokens)": [3.0, 0.95],
        "label of icl (23 tokens)": [4.0, 0.3],  # of new_method, which is labelled so
    }


def test_tasks_with_the_same_gates_are_the_same_point_of_the_map():
    gates, names, groups = make_gates(tasks=6)
    gates[3] = gates[1]
    (axes,) = gate_pictures._figure_map(gates, names, groups).axes
    points = {each.get_label(): np.asarray(each.get_offsets()) for each in axes.collections}
    own = points[groups[1]]  # tasks 1, 3 and 5 are of one family
    np.testing.assert_allclose(own[0], own[1], atol=1e-12)
    assert np.abs(own[0] - own[2]).max() > 0.05


def test_the_map_keeps_the_distances_of_tasks_that_lie_in_a_plane():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(7, 2)) @ rng.normal(size=(2, 12))
    gates = flat.reshape(7, 3, 4)
    (axes,) = gate_pictures._figure_map(gates, ["t"] * 7, ["f"] * 7).axes
    (points,) = (np.asarray(each.get_offsets()) for each in axes.collections)
    apart = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)  # noqa: E731
    np.testing.assert_allclose(apart(points), apart(flat), rtol=1e-6)
    assert "second principal component" in axes.get_ylabel()


def test_loads_are_shares_in_descending_order():
    gates = np.zeros((2, 1, 4))
    gates[:, 0, 2], gates[0, 0, 1] = 0.75, 0.5
    (axes,) = gate_pictures._figure_load(gates).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.75, 0.25, 0, 0])
    assert axes.lines[-1].get_ydata()[0] == 0.25  # an even share
