"""The shipped example of own tasks: its rows, its config, and the demo that trains on it."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from lorax_gen import cli, demo_tasks
from lorax_gen.assets import resolve
from lorax_gen.data.own_tasks import load_row_tasks
from lorax_gen.data.world import make_world, vocabulary
from lorax_gen.demo_tasks import run_task_demo
from lorax_gen.errors import UserError
from lorax_gen.recipes.registry import load_config
from lorax_gen.training.loop import Interrupted

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config():
    return load_config("own-tasks")[1]


def test_the_shipped_rows_are_those_that_the_script_makes():
    rows = runpy.run_path(str(ROOT / "experiments" / "world_tasks.py"))["rows"]()
    lines = resolve("world/tasks.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(rows)


def test_the_rows_are_twelve_tasks_of_all_forms_in_words_that_the_models_know(config):
    tasks, left_out = load_row_tasks(resolve("world/tasks.jsonl"))
    assert (len(tasks), left_out) == (12, 0)
    assert {(len(task.items), len(task.instructions)) for task in tasks} == {(64, 6)}
    forms = {
        frozenset(json.loads(line))
        for line in resolve("world/tasks.jsonl").read_text().splitlines()
    }
    assert forms == {
        frozenset({"task", "instruction", "input", "output"}),
        frozenset({"task", "instruction", "input", "choices", "answer"}),
        frozenset({"task", "messages"}),
        frozenset({"task", "instruction", "prompt", "completion"}),
    }
    known = set(vocabulary(make_world(0)))
    for task in tasks:
        for text in (*task.instructions, *(item.input for item in task.items)):
            assert set(text.lower().split()) <= known, text
        assert {output for item in task.items for output in item.outputs} <= known


def test_the_config_keeps_back_two_tasks_and_some_wordings_and_rows(config):
    opened = config.data.open(None)
    held = {
        name: (len(tasks), len(tasks[0].instructions), len(tasks[0].items))
        for name, tasks in opened.held.items()
    }
    assert held == {
        "held_out_tasks": (2, 6, 64),
        "held_out_wordings": (10, 1, 58),
        "held_out_rows": (10, 5, 6),
    }
    assert opened.frame.wrap("apple") == "apple :"
    # Every word of a held-out task occurs in one that is trained on.
    trained = {word for task in opened.sources[0].row_tasks for word in task.name.split()}
    assert {word for task in opened.held["held_out_tasks"] for word in task.name.split()} <= trained


# --- lorax-gen demo tasks ------------------------------------------------------------------------


STEPS = 60


def start(run_dir):
    """The command in a process of its own, with as many devices as this one."""
    settings = {
        "PYTHONPATH": ROOT,
        "JAX_NUM_CPU_DEVICES": jax.device_count(),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": True,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    }
    words = ["demo", "tasks", "--steps", STEPS, "--questions", 1, "--run-dir", run_dir]
    return subprocess.Popen(
        [sys.executable, "-m", "lorax_gen", *map(str, words)],
        env=os.environ | {name: str(value) for name, value in settings.items()},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(tmp_path, capsys):
    whole, killed = tmp_path / "one", tmp_path / "two"
    report = run_task_demo(whole, 1, 0, STEPS)
    out = capsys.readouterr().out
    assert "exact matches on what was held out" in out and "before" in out
    assert {name: found["n"] for name, found in report.items()} == {
        "held_out_tasks": 2, "held_out_wordings": 10, "held_out_rows": 10,
    }  # fmt: skip
    process, log = start(killed), killed / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n")):
        time.sleep(0.01)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert not (killed / "released").exists()
    assert run_task_demo(killed, 1, 0, STEPS) == report
    assert capsys.readouterr().out.replace("/two", "/one") == out
    for name in ("released/generator.safetensors", "report.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_interrupted_it_says_how_to_go_on(monkeypatch, capsys, number, code):
    def interrupted(*_):
        raise Interrupted("stopped at step 7 of 60, state saved", number)

    monkeypatch.setattr(demo_tasks, "run_task_demo", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "tasks"])
    assert stop.value.code == code
    assert capsys.readouterr().err == (
        "lorax-gen: stopped at step 7 of 60, state saved; the same command resumes the run\n"
    )


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not from this demo"):
        run_task_demo(tmp_path, 1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
