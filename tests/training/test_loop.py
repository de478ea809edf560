"""A run is what its config says, however often it is stopped: same weights, same metrics."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from lorax_gen import cli, load_generator
from lorax_gen import config as configs
from lorax_gen.data.world import FAMILIES
from lorax_gen.errors import UserError
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.recipes import registry as methods
from lorax_gen.recipes.registry import RECIPES, load_config
from lorax_gen.tensors import flatten, read_tensors
from lorax_gen.training.checkpoint import Checkpoints
from lorax_gen.training.loop import Interrupted, fit
from lorax_gen.training.run import RunConfig
from tests.tiny import linear_experiment, write_system

FAMILY = FAMILIES[1]
CONFIG = """
method: lora_gen
cloud: {system}/cloud
edge: {system}/edge
prompts: 8
queries_per_prompt: 2
data: {{kind: world, families: [{family}]}}
generator:
  n_experts: 4
  rank: 2
  alpha: 2
  router_width: 8
  cloud_rank: 2
  cloud_alpha: 2
run: {{steps: 6, log_every: 1, evaluate_every: 3, checkpoint_every: 3}}
optimizer: {{learning_rate: 0.01, warmup_steps: 2}}
"""

# The command, in a process that dies without warning when it asks for the batch of step 5; the
# checkpoint of step 3 is on disk by then.
KILLED = """
import dataclasses, os, signal, sys, time
from pathlib import Path
import tests.conftest
from lorax_gen import cli
from lorax_gen.recipes.registry import RECIPES

name, run_dir = sys.argv[1:]
method = RECIPES["lora_gen"]

def experiment(config):
    made = method.experiment(config)
    def batch(step):
        if step == 5:
            while not any(path.name == "3" for path in Path(run_dir, "checkpoints").iterdir()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return made.batch(step)
    return dataclasses.replace(made, batch=batch)

RECIPES["lora_gen"] = method._replace(experiment=experiment)
cli.main(["train", name, "--run-dir", run_dir])
"""


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_rates(rows):
    rates = ("step_time", "examples_per_second", "tokens_per_second")
    return [{name: row[name] for name in row if name not in rates} for row in rows]


def final_state(run_dir):
    with Checkpoints(run_dir / "checkpoints", RunConfig()) as checkpoints:
        return jax.device_get(checkpoints.orbax.load())


def snapshot(directory):
    return {path: path.stat().st_mtime_ns for path in [directory, *directory.rglob("*")]}


@pytest.fixture(scope="module")
def config_file(tiny_world_system, tmp_path_factory):
    directory = write_system(tmp_path_factory.mktemp("system"), tiny_world_system)
    path = directory / "tiny.yaml"
    path.write_text(CONFIG.format(system=directory, family=FAMILY))
    return path


def run(config_file, run_dir, batch=lambda step: None):
    """The run of a config file; `batch(step)` is called before each step."""
    method, config = load_config(str(config_file))
    made = RECIPES[method].experiment(config)

    def watched(step):
        batch(step)
        return made.batch(step)

    resolved = {"method": method, **configs.to_dict(config)}
    return fit(dataclasses.replace(made, batch=watched), run_dir, resolved)


@pytest.fixture(scope="module")
def unbroken(config_file, tmp_path_factory):
    """The directory of a run that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(config_file, run_dir) == run_dir / "released"
    return run_dir


def assert_same_run(run_dir, unbroken):
    chex.assert_trees_all_equal(final_state(run_dir), final_state(unbroken))
    name = "released/generator.safetensors"
    assert (run_dir / name).read_bytes() == (unbroken / name).read_bytes()
    assert without_rates(rows_of(run_dir)) == without_rates(rows_of(unbroken))
    assert (run_dir / "config.yaml").read_text() == (unbroken / "config.yaml").read_text()


# --- what a run writes ---------------------------------------------------------------------------


def test_a_run_writes_its_metrics(unbroken):
    rows = rows_of(unbroken)
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "accuracy/seen" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evaluations] == [3, 6]
    assert len(rows) == len(training) + len(evaluations)
    for row in training:
        assert set(row) >= {
            "step", "loss", "loss_lm", "loss_cv", "accuracy/batch", "gate_entropy", "expert_load",
            "router_collapsed", "learning_rate", "grad_norm", "step_time", "examples_per_second",
        }  # fmt: skip
        np.testing.assert_allclose(row["loss"], row["loss_lm"] + row["loss_cv"], rtol=1e-5)
        np.testing.assert_allclose(np.sum(row["expert_load"], axis=1), [1, 1], rtol=1e-5)
        assert row["grad_norm"] > 0 and row["examples_per_second"] > 0 and row["step_time"] > 0
        assert row["router_collapsed"] == 0
        assert 0 < row["gate_entropy"] <= np.log(2)
    rates = [row["learning_rate"] for row in training]
    assert rates[:3] == [0, 0.005, 0.01] and rates[5] < rates[3] < 0.01
    for row in evaluations:
        assert set(row) == {
            "step", "accuracy/seen", "accuracy/unseen",
            f"accuracy/seen/{FAMILY}", f"accuracy/unseen/{FAMILY}",
        }  # fmt: skip


def test_the_released_generator_is_the_trained_one(unbroken):
    generator, state = load_generator(unbroken / "released"), final_state(unbroken)
    chex.assert_trees_all_equal(jax.device_get(generator.params), state["params"])
    chex.assert_trees_all_equal(jax.device_get(generator.stats), state["stats"])
    assert state["step"] == 6
    last = {key: value for row in rows_of(unbroken) for key, value in row.items()}
    assert generator.metadata["metrics"] == last
    released = unbroken / "released"
    assert (released / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def test_no_frozen_weight_is_kept(unbroken, tiny_world_system):
    frozen = {value.tobytes() for value in flatten(tiny_world_system.frozen).values()}
    state = final_state(unbroken)
    released = read_tensors(unbroken / "released" / "generator.safetensors")
    kept = jax.tree.leaves((state, released))
    assert not frozen & {np.asarray(value).tobytes() for value in kept}
    assert set(state) == {"step", "key", "params", "stats", "opt_state"}
    assert set(state["params"]) == {"meta_tokens", "cloud_lora", "router", "pool"}
    assert set(released) == set(flatten({name: state[name] for name in ("params", "stats")}))


def test_what_is_released_names_no_machine(unbroken, config_file):
    home = str(config_file.parent)
    assert home in (unbroken / "config.yaml").read_text()
    for path in (unbroken / "released").iterdir():
        assert str(Path(home).parent).encode() not in path.read_bytes()
        if path.suffix != ".safetensors":  # among the bytes of numbers anything may stand
            assert '"/' not in path.read_text()
    described = json.loads((unbroken / "released" / "config.json").read_text())
    assert (described["config"]["cloud"], described["config"]["edge"]) == ("cloud", "edge")


# --- stopped and resumed -------------------------------------------------------------------------


def test_a_complete_run_is_not_run_again(config_file, unbroken):
    before, asked = snapshot(unbroken), []
    assert run(config_file, unbroken, asked.append) == unbroken / "released"
    assert not asked and snapshot(unbroken) == before


def test_an_interrupted_run_resumes_where_it_stopped(config_file, unbroken, tmp_path):
    run_dir, asked = tmp_path / "run", []

    def interrupt(step):
        asked.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped at step 4 of 6, state saved") as stop:
        run(config_file, run_dir, interrupt)
    assert stop.value.signal == signal.SIGINT and signal.getsignal(signal.SIGINT) is handler
    assert not (run_dir / "released").exists()
    assert [row["step"] for row in rows_of(run_dir)] == [1, 2, 3, 3, 4]
    run(config_file, run_dir, asked.append)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert_same_run(run_dir, unbroken)


def test_a_killed_run_resumes_with_the_same_command(
    config_file, unbroken, tmp_path, monkeypatch, capsys
):
    run_dir, asked = tmp_path / "run", []
    root = Path(__file__).resolve().parents[2]
    arguments = [str(config_file), str(run_dir)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in rows_of(run_dir)] == [1, 2, 3, 3, 4]
    method = RECIPES["lora_gen"]

    def experiment(config):
        made = method.experiment(config)
        return dataclasses.replace(made, batch=lambda step: asked.append(step) or made.batch(step))

    monkeypatch.setitem(methods.RECIPES, "lora_gen", method._replace(experiment=experiment))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", arguments[0], "--run-dir", arguments[1]])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"released: {run_dir}/released\n"
    assert asked == [3, 4, 5]  # step 4 was taken and is taken again; its row is there once
    assert_same_run(run_dir, unbroken)


# --- directories that are not this run's ---------------------------------------------------------


def test_the_directory_of_another_run_is_refused_and_untouched(config_file, unbroken, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(config_file.read_text().replace("prompts: 8", "prompts: 16"))
    before = snapshot(unbroken)
    with pytest.raises(UserError, match="already holds another run"):
        run(other, unbroken)
    assert snapshot(unbroken) == before


def test_a_foreign_directory_is_refused_and_untouched(tmp_path):
    experiment = linear_experiment(RunConfig(steps=2))
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="is not a run directory"):
            fit(experiment, path, {"steps": 2})
    assert snapshot(tmp_path) == before
    (tmp_path / "empty").mkdir()
    fit(experiment, tmp_path / "empty", {"steps": 2})


@pytest.mark.parametrize("sizes", [(-1, 2, 1), (1, 1, -1)])
def test_a_run_that_replicates_its_weights_splits_none(sizes, tmp_path):
    made = linear_experiment(RunConfig(steps=1))
    mesh = make_mesh(MeshConfig(*sizes))
    with pytest.raises(UserError, match=r"pmap replicates the weights, but fsdp=.* and tensor="):
        fit(dataclasses.replace(made, mesh=mesh, mode="pmap"), tmp_path / "run", {})


def test_a_checkpoint_of_another_structure_is_refused(tmp_path):
    run = RunConfig(steps=2)
    fit(linear_experiment(run), tmp_path / "run", {})
    (tmp_path / "run" / "released").rename(tmp_path / "released")
    other = dataclasses.replace(
        linear_experiment(run), init=lambda: ({"v": np.zeros(3, np.float32)}, {})
    )
    with pytest.raises(UserError, match="checkpoint of step 2 does not fit this run") as err:
        fit(other, tmp_path / "run", {})
    assert "\n" not in str(err.value)


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(tmp_path):
    experiment = linear_experiment(RunConfig(steps=4, checkpoint_every=2))
    fit(experiment, tmp_path / "run", {})
    whole = final_state(tmp_path / "run")
    (tmp_path / "run" / "released").rename(tmp_path / "released")
    latest = tmp_path / "run" / "checkpoints" / "4"
    for path in latest.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match=r"checkpoint of step 4 .*is damaged") as error:
        fit(experiment, tmp_path / "run", {})
    assert f"remove {latest} to resume" in str(error.value)
    assert "\n" not in str(error.value) and "orbax" not in str(error.value)
    shutil.rmtree(latest)
    fit(experiment, tmp_path / "run", {})
    chex.assert_trees_all_equal(final_state(tmp_path / "run"), whole)


def test_a_run_killed_before_its_config_was_written_is_no_hindrance(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    left = run_dir / ".config.yaml.0123456789abcdef.tmp"
    left.write_text("run: {st")
    (run_dir / ".lock").write_text("process 1 on host")
    fit(linear_experiment(RunConfig(steps=2)), run_dir, {"steps": 2})
    assert (run_dir / "released").is_dir() and not left.exists()


def test_a_second_run_in_the_directory_is_refused_and_changes_nothing(tmp_path):
    run_dir, told = tmp_path / "run", []
    made = linear_experiment(RunConfig(steps=3, log_every=1))

    def batch(step):
        if step == 1:
            before = snapshot(run_dir)
            with pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on") as e:
                fit(made, run_dir, {})
            assert snapshot(run_dir) == before
            told.append(str(e.value))
        return made.batch(step)

    fit(dataclasses.replace(made, batch=batch), run_dir, {})
    assert len(told) == 1
    assert [row["step"] for row in rows_of(run_dir) if "loss" in row] == [1, 2, 3]


def removing(run_dir, at, made):
    """The experiment, whose run directory is removed at a step."""

    def batch(step):
        if step == at:
            shutil.rmtree(run_dir)
        return made.batch(step)

    return dataclasses.replace(made, batch=batch)


@pytest.mark.parametrize("log_every, message", [(1, "metrics.jsonl was removed"),
                                                (100, "checkpoints was removed")])  # fmt: skip
def test_a_run_whose_directory_is_removed_stops_at_the_next_row_or_save(
    log_every, message, tmp_path
):
    made = linear_experiment(RunConfig(steps=50, log_every=log_every, checkpoint_every=5))
    asked = []

    def batch(step):
        asked.append(step)
        return made.batch(step)

    experiment = removing(tmp_path / "run", 2, dataclasses.replace(made, batch=batch))
    with pytest.raises(UserError, match=message) as error:
        fit(experiment, tmp_path / "run", {})
    assert str(error.value).endswith("the same command starts it anew") and max(asked) <= 5
    assert not (tmp_path / "run").exists()


PRIVATE = {
    "cloud": "/home/ann/models/cloud",
    "edge": "org/edge",
    "data": {
        "sources": ("/home/ann/mine.jsonl=2", "alpaca=0.5", "mine=/home/ann/x.jsonl", "boolq"),
        "directory": "~/data",
        "more": [
            {"paths": ["file:///home/ann/y", "gs://bucket/z/", "~bob/a.json", "C:\\Users\\b"]}
        ],
    },
    "rate": 0.5,
    "nothing": None,
}


def test_what_is_released_names_no_path_of_this_machine(tmp_path):
    told = []

    def release(state, directory, provenance):
        told.append(provenance)

    made = dataclasses.replace(linear_experiment(RunConfig(steps=1)), release=release)
    fit(made, tmp_path / "run", PRIVATE)
    assert told[0]["config"] == {
        "cloud": "cloud",
        "edge": "org/edge",
        "data": {
            "sources": ["mine.jsonl=2", "alpaca=0.5", "mine=x.jsonl", "boolq"],
            "directory": "data",
            "more": [{"paths": ["y", "z", "a.json", "b"]}],
        },
        "rate": 0.5,
        "nothing": None,
    }
    assert set(told[0]["metrics"]) >= {"loss", "error"}


# --- failed starts -------------------------------------------------------------------------------


def failing(made, part):
    """The experiment, with a part that fails before the first step is done."""

    def fail(*_):
        raise UserError("it does not fit")

    return dataclasses.replace(made, **{part: fail})


@pytest.mark.parametrize("part", ["init", "loss", "batch", "work", "counts"])
def test_a_failed_start_leaves_the_directory_to_the_corrected_command(tmp_path, part):
    made = linear_experiment(RunConfig(steps=2, tensorboard=True))
    with pytest.raises(UserError, match="it does not fit"):
        fit(failing(made, part), tmp_path / "run", {"prompts": 3})
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}
    fit(made, tmp_path / "run", {"prompts": 4})
    assert (tmp_path / "run" / "released").is_dir()


def test_a_run_that_fails_after_a_row_keeps_its_directory(tmp_path):
    made = linear_experiment(RunConfig(steps=3, log_every=1))

    def batch(step):
        if step == 2:
            raise UserError("no such file")
        return made.batch(step)

    with pytest.raises(UserError, match="no such file"):
        fit(dataclasses.replace(made, batch=batch), tmp_path / "run", {"prompts": 3})
    with pytest.raises(UserError, match="already holds another run"):
        fit(made, tmp_path / "run", {"prompts": 4})


# --- longer and shorter --------------------------------------------------------------------------


def of_length(steps, decay=1.0, **more):
    """`(experiment, config)` of a run; its learning rate is constant without decay."""
    run = RunConfig(steps=steps, **more)
    made = linear_experiment(run)
    rate = dataclasses.replace(made.optimizer, final_fraction=decay)
    return dataclasses.replace(made, optimizer=rate), {"run": dataclasses.asdict(run)}


def weights(released):
    return (released / "weights.safetensors").read_bytes()


def test_an_extended_run_is_one_of_that_length_bit_for_bit(tmp_path, capsys):
    often = {"log_every": 1, "evaluate_every": 3}
    for name, lengths in {"extended": (6, 12), "unbroken": (12,)}.items():
        for steps in lengths:
            made, config = of_length(steps, **often)
            last = fit(made, tmp_path / name, config)
        if name == "extended":
            assert last.name == "released-12"
            first = weights(tmp_path / name / "released")
            assert weights(last) != first
            assert fit(made, tmp_path / name, config) == last
            assert weights(tmp_path / name / "released") == first
    assert "warning" not in capsys.readouterr().err
    extended, unbroken = tmp_path / "extended", tmp_path / "unbroken"
    assert weights(extended / "released-12") == weights(unbroken / "released")
    chex.assert_trees_all_equal(final_state(extended), final_state(unbroken))
    assert without_rates(rows_of(extended)) == without_rates(rows_of(unbroken))


def test_an_extended_run_whose_learning_rate_was_that_of_a_shorter_one_says_so(tmp_path, capsys):
    fit(*run_of(of_length(6, 0.0), tmp_path / "run"))
    capsys.readouterr()
    fit(*run_of(of_length(12, 0.0), tmp_path / "run"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "run.steps was 6 and is 12" in line and "from step 7 on" in line


def run_of(made, run_dir):
    return made[0], run_dir, made[1]


def test_fewer_steps_than_are_trained_are_refused_and_change_nothing(tmp_path):
    fit(*run_of(of_length(6), tmp_path / "run"))
    before = snapshot(tmp_path / "run")
    with pytest.raises(UserError, match=r"run\.steps is 4, but the run in .* has trained 6 steps"):
        fit(*run_of(of_length(4), tmp_path / "run"))
    assert snapshot(tmp_path / "run") == before


def test_how_often_a_run_logs_evaluates_and_saves_may_change(tmp_path):
    made, config = of_length(8, log_every=4, evaluate_every=4, checkpoint_every=4)

    def batch(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return made.batch(step)

    with pytest.raises(Interrupted, match="step 4 of 8"):
        fit(dataclasses.replace(made, batch=batch), tmp_path / "run", config)
    often = of_length(8, log_every=1, evaluate_every=2, checkpoint_every=1)
    fit(*run_of(often, tmp_path / "run"))
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [4, 5, 6, 7, 8]
    assert [row["step"] for row in rows if "loss" not in row] == [4, 6, 8]


def test_evaluations_of_nothing_are_not_written(tmp_path):
    made = linear_experiment(RunConfig(steps=4, log_every=4, evaluate_every=2))
    fit(dataclasses.replace(made, evaluate=lambda state: {}), tmp_path / "run", {})
    assert [set(row) >= {"step", "loss"} for row in rows_of(tmp_path / "run")] == [True]


# --- the loop's own business, on a run that compiles at once -------------------------------------


def test_rows_stand_in_the_file_before_a_checkpoint_of_their_step(tmp_path):
    """A process that dies behind a checkpoint has lost no row: resuming could not make it again."""
    run = RunConfig(steps=5, log_every=1, evaluate_every=4, checkpoint_every=1)
    steps = []

    def batch(step):
        path = tmp_path / "run" / "metrics.jsonl"
        steps.append([row["step"] for row in rows_of(path.parent) if "loss" in row])
        return made.batch(step)

    made = linear_experiment(run)
    fit(dataclasses.replace(made, batch=batch), tmp_path / "run", {})
    assert steps == [list(range(1, step + 1)) for step in range(5)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_at_the_last_step_leaves_only_the_release(tmp_path, number):
    run = RunConfig(steps=3, log_every=2, evaluate_every=2, checkpoint_every=2)
    made = linear_experiment(run)

    def batch(step):
        if step == 2:
            os.kill(os.getpid(), number)
        return made.batch(step)

    with pytest.raises(Interrupted, match="step 3 of 3") as stop:
        fit(dataclasses.replace(made, batch=batch), tmp_path / "run", {})
    assert stop.value.signal == number
    fit(made, tmp_path / "run", {})
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [2, 2, 3, 3]
    assert (tmp_path / "run" / "released" / "weights.safetensors").exists()


def test_an_evaluation_that_was_cut_short_is_made_up_for(tmp_path):
    """What led to it is not lost, however long it lasts and however hard the end."""
    run = RunConfig(steps=4, log_every=1, evaluate_every=2, checkpoint_every=100)
    made, begun, asked = linear_experiment(run), [], []

    def evaluate(state):
        begun.append(int(state["step"]))
        if len(begun) == 1:
            raise RuntimeError("the machine is gone")
        return made.evaluate(state)

    def batch(step):
        asked.append(step)
        return made.batch(step)

    experiment = dataclasses.replace(made, evaluate=evaluate, batch=batch)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        fit(experiment, tmp_path / "run", {})
    fit(experiment, tmp_path / "run", {})
    assert begun == [2, 2, 4] and asked == [0, 1, 2, 3]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 2, 3, 4, 4]


def test_a_stop_in_front_of_an_evaluation_does_not_wait_for_it(tmp_path):
    run = RunConfig(steps=4, log_every=1, evaluate_every=2, checkpoint_every=100)
    made, steps, begun = linear_experiment(run), [], []

    def counts():  # asked for behind each step
        steps.append(len(steps) + 1)
        if steps[-1] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    def evaluate(state):
        begun.append(int(state["step"]))
        return made.evaluate(state)

    experiment = dataclasses.replace(made, evaluate=evaluate, counts=counts)
    with pytest.raises(Interrupted, match="step 2 of 4"):
        fit(experiment, tmp_path / "run", {})
    assert begun == []
    fit(experiment, tmp_path / "run", {})
    assert begun == [2, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_an_evaluation_ends_it_within_a_batch(tmp_path, number):
    run = RunConfig(steps=4, log_every=1, evaluate_every=2, checkpoint_every=100)
    made, batches, asked, shots = linear_experiment(run), [], [], [2]
    score = jax.jit(lambda w: abs(w - 1).max())

    def evaluate(state):
        for batch in range(5):
            if batch in shots:
                shots.remove(batch)
                os.kill(os.getpid(), number)
            with contextlib.suppress(Exception):  # as a library may
                batches.append((int(state["step"]), batch))
                error = float(score(state["params"]["w"]))
        return {"error": error}

    def batch(step):
        asked.append(step)
        return made.batch(step)

    experiment = dataclasses.replace(made, evaluate=evaluate, batch=batch)
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped at step 2 of 4, state saved") as stop:
        fit(experiment, tmp_path / "run", {})
    assert stop.value.signal == number and signal.getsignal(number) is handler
    assert batches == [(2, 0), (2, 1)]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    fit(experiment, tmp_path / "run", {})
    assert batches[2:] == [(step, batch) for step in (2, 4) for batch in range(5)]
    assert asked == [0, 1, 2, 3]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 2, 3, 4, 4]


def test_a_key_that_is_pressed_where_we_do_not_handle_it_is_not_taken_for_a_stop(tmp_path):
    def evaluate(state):
        raise KeyboardInterrupt

    made = linear_experiment(RunConfig(steps=2))
    with pytest.raises(KeyboardInterrupt):
        fit(dataclasses.replace(made, evaluate=evaluate), tmp_path / "run", {})


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(tmp_path):
    run = RunConfig(steps=6, log_every=1, evaluate_every=6, checkpoint_every=1)
    made = linear_experiment(run)

    def batch(step):
        rows = made.batch(step)
        return rows if step < 3 else rows | {"y": rows["y"] * np.nan}

    with pytest.raises(UserError, match="the loss of step 4 is nan: training has diverged"):
        fit(dataclasses.replace(made, batch=batch), tmp_path / "run", {})
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3]
    steps = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert max(steps) == 3
