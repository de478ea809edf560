"""A SIGTERM at any time: the state is saved, the exit code is 0, and the same command resumes."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorax_gen import temporary
from lorax_gen.training.loop import Interrupted, fit
from lorax_gen.training.run import RunConfig
from tests.tiny import linear_experiment

ROOT = Path(__file__).resolve().parents[2]

# The command, whose process gets a SIGTERM at the moment that its last argument names.
STOPPED = """
import dataclasses, os, signal, sys
moment = sys.argv.pop()
sys.argv[0] = "lorax-gen"
kill = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
if moment == "import":
    class Finder:
        def find_spec(self, name, *_):
            if name == "tyro":
                kill()
    sys.meta_path.insert(0, Finder())
from lorax_gen import cli
from lorax_gen.recipes import registry
from tests.tiny import linear_experiment

def experiment(config):
    made = linear_experiment(config.run)
    if moment == "experiment":
        kill()
    def init():
        if moment == "init":
            kill()
        return made.init()
    def batch(step):
        if moment == step:
            kill()
        return made.batch(step)
    def release(*arguments):
        if moment == "release":
            kill()
        made.release(*arguments)
    def evaluate(state):
        if moment == "evaluate":
            kill()
            sys.exit("the evaluation goes on")
        return made.evaluate(state)
    return dataclasses.replace(made, init=init, release=release, evaluate=evaluate)

registry.RECIPES["lora"] = registry.RECIPES["lora"]._replace(experiment=experiment)
cli.main()
"""
RESUMES = "the same command resumes the run\n"


def start(directory, moment, *words):
    directory.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", STOPPED, "train", "world-lora", "--run.steps", "3", *words, moment],
        cwd=directory, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def last_line(process):
    return process.stderr.splitlines(keepends=True)[-1]


@pytest.mark.parametrize(
    "moment, line",
    [
        ("import", f"lorax-gen: stopped; {RESUMES}"),
        ("experiment", f"lorax-gen: stopped; {RESUMES}"),
        ("init", f"lorax-gen: stopped at step 0 of 3; {RESUMES}"),
        ("evaluate", f"lorax-gen: stopped at step 3 of 3, state saved; {RESUMES}"),
    ],
)
def test_outside_of_a_step_it_ends_at_once_and_nothing_is_half_written(moment, line, tmp_path):
    stopped = start(tmp_path / "cwd", moment)
    assert (stopped.returncode, stopped.stdout, last_line(stopped)) == (0, "", line)
    assert not [path for path in tmp_path.rglob("*") if temporary.NAME.fullmatch(path.name)]
    resumed = start(tmp_path / "cwd", "never")
    assert resumed.returncode == 0
    assert resumed.stdout == "released: runs/world-lora/released\n"


def test_in_the_release_it_is_finished(tmp_path):
    stopped = start(tmp_path / "cwd", "release")
    assert stopped.returncode == 0
    assert stopped.stdout == "released: runs/world-lora/released\n"
    released = tmp_path / "cwd" / "runs" / "world-lora" / "released"
    assert {path.name for path in released.iterdir()} == {"weights.safetensors", "metrics.jsonl"}
    assert {path.name for path in released.parent.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "released", ".lock",
    }  # fmt: skip


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 1.0, 3.0, 8.0])
def test_whenever_it_comes_from_outside(delay, tmp_path):
    """Python itself starts within the first moments, and cannot be asked to handle signals yet."""
    code = "import sys; print('on', flush=True); from lorax_gen import cli; cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.argv[0] = 'lorax-gen'; {code}",
         "train", "world-lora", "--run.steps", "20000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout.readline() == "on\n"
    time.sleep(0.15 + delay)  # the first imports of this package, which are small
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 0 and err.endswith(RESUMES), err


def test_a_stop_while_the_state_is_made_is_seen_before_the_first_step(tmp_path):
    made, asked = linear_experiment(RunConfig(steps=3)), []

    def init():
        os.kill(os.getpid(), signal.SIGTERM)
        return made.init()

    def batch(step):
        asked.append(step)
        return made.batch(step)

    experiment = dataclasses.replace(made, init=init, batch=batch)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step 0 of 3"):
        fit(experiment, tmp_path / "run", {})
    assert not asked and signal.getsignal(signal.SIGTERM) is handler
    fit(dataclasses.replace(experiment, init=made.init), tmp_path / "run", {})
    assert asked == [0, 1, 2]
