"""The page: what it shows of runs and evaluations, and what it refuses."""

import base64
import json
import re
import shutil

import pytest

from lorax_gen import assets
from lorax_gen.cli.main import run
from lorax_gen.errors import UserError
from lorax_gen.evaluation.paper import TABLES
from lorax_gen.recipes.gates import gates_of_run
from lorax_gen.recipes.report import find_runs, write_report

REPORT = {
    "format": "lorax-gen report 1",
    "kind": "experiment",
    "title": "Experts <n>",
    "paper": "5",
    "edge": "world/edge",
    "cloud": "world/cloud",
    "device": "cpu",
    "versions": {"lorax-gen": "0.1.0"},
    "settings": {"seeds": [0, 1, 2]},
    "columns": {"unseen": {"title": "unseen"}, "seen": {"title": "seen"}},
    "rows": {
        "n8": {
            "label": "n = 8",
            "cells": {"unseen": {"score": 0.9034, "stderr": 0.0121, "n": 3}},
            "context_tokens": 3.0,
            "flops": 1.5e6,
            "average": 0.9034,
            "latency_ms": {"median": 2.5},
            "training": {"parameters": 1234, "flops": 2e15, "steps": 600, "seconds": 90.0},
        },
    },
}
ROWS = [{"step": 1, "loss": 2.0, "loss_lm": 1.5}, {"step": 2, "loss": 1.0, "accuracy/unseen": 0.5}]


def evaluation(directory, **changes):
    directory.mkdir(parents=True)
    (directory / "report.json").write_text(json.dumps(REPORT | changes))
    return directory


def training(directory):
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return directory


def texts(page):
    """Cells and headings of a page, without their tags."""
    found = re.findall(r"<(?:td|th|h2|h3)[^>]*>([^<]*)<", page)
    return [text.strip() for text in found]


def test_the_page_shows_scores_costs_and_the_papers_numbers(tmp_path):
    page = write_report([evaluation(tmp_path / "experts")], tmp_path / "out").read_text()
    found = texts(page)
    for text in ("0.903 ± 0.012", "n = 8", "1,234", "1.5", "600", "2.50", "58.7"):
        assert text in found, text
    assert any(TABLES["5"].title in text for text in found)
    assert "Experts &lt;n&gt;" in page and "<n>" not in page  # texts of a report are no markup


def test_the_pictures_are_in_the_page_and_beside_it(tmp_path):
    runs = [evaluation(tmp_path / "a"), training(tmp_path / "b")]
    page = write_report(runs, tmp_path / "out").read_text()
    within = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    beside = sorted((tmp_path / "out").glob("*.png"))
    assert [path.name for path in beside] == ["1-tradeoff.png", "2-training.png"]
    assert [base64.b64decode(each) for each in within] == [path.read_bytes() for path in beside]
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("data:", "#section-")) for link in links)


def test_a_directory_of_runs_stands_for_them_in_order(tmp_path):
    for name in ("b", "a"):
        evaluation(tmp_path / "runs" / name)
    (tmp_path / "runs" / "else").mkdir()
    assert [name for name, _ in find_runs(tmp_path / "runs")] == ["runs/a", "runs/b"]


def test_an_earlier_page_is_replaced_and_anything_else_is_not(tmp_path):
    run_dir, out = training(tmp_path / "run"), tmp_path / "out"
    write_report([run_dir], out)
    assert "2 steps" in write_report([run_dir], out).read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"something else than a report; choose another --output"):
        write_report([run_dir], other)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "no directory"),
        (lambda path: path.mkdir(), "holds neither report.json nor metrics.jsonl"),
        (lambda path: evaluation(path, format="else 2"), "has format 'else 2'; expected"),
        (lambda path: (path.mkdir(), (path / "report.json").write_text("[]")), r"report\.json"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(make, message, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        write_report([tmp_path / "run"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_needs_a_run():
    with pytest.raises(UserError, match="name one or more run directories"):
        run(["report"])


@pytest.fixture
def world_run(tmp_path):
    """The shipped generator as the run that trained it."""
    path, shipped = tmp_path / "world", assets.resolve("world/generator")
    shutil.copytree(shipped, path / "released")
    shutil.copy(shipped / "metrics.jsonl", path)
    (path / "config.yaml").write_text("method: lora_gen\ndata: {kind: world}\n")
    return path


def test_gates_of_a_generator_are_those_of_unseen_tasks(world_run):
    gates, names, groups, first = gates_of_run(world_run)
    assert (
        gates.shape == (len(names), 4, 32)
        and first == 0
        and set(groups) == {"sort", "grade", "clock", "check"}
    )
    assert ((gates > 0).sum(-1) == 4).all()  # K
    assert abs(gates.sum(-1) - 1).max() < 1e-5


def test_missing_models_of_a_run_are_named_with_the_way_out(world_run, tmp_path):
    (world_run / "config.yaml").write_text("method: lora_gen\ncloud: nowhere/at-all\n")
    with pytest.raises(UserError, match=r"nowhere/at-all.*--no-gates"):
        write_report([world_run], tmp_path / "out")
    write_report([world_run], tmp_path / "out", gates=False)
