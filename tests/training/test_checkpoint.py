"""What a checkpoint holds, which ones are kept, and that a run goes on from one anywhere."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen import cli, documents
from lorax_gen import config as configs
from lorax_gen.errors import UserError
from lorax_gen.mesh import sharding
from lorax_gen.mesh.sharding import MeshConfig
from lorax_gen.recipes import registry as methods
from lorax_gen.training import checkpoint
from lorax_gen.training.checkpoint import Checkpoints
from lorax_gen.training.loop import Interrupted, fit
from lorax_gen.training.run import RunConfig
from tests.tiny import linear_experiment

ROOT = Path(__file__).resolve().parents[2]
RUN = RunConfig(steps=6, log_every=1, evaluate_every=100, checkpoint_every=100)
DATA, SPLIT = MeshConfig(data=8), MeshConfig(data=1, fsdp=4, tensor=2)
FROZEN = np.random.default_rng(0).normal(size=(512, 2048)).astype(np.float32)  # 4 MB


def kernels_experiment(mesh, run=RUN, batch=lambda step: None):
    """Two kernels that the table of shardings splits, behind a frozen one."""

    def init():
        keys = jax.random.split(jax.random.key(0))
        return {
            "up": jax.random.normal(keys[0], (16, 32)) / 4,
            "down": jax.random.normal(keys[1], (32, 16)) / 4,
        }, {"mean": jnp.zeros(16)}

    def loss(params, stats, frozen, batch, key, axis_name):
        x = jnp.tanh(batch["x"] @ frozen["gate"][:16, :16] @ params["up"]) @ params["down"]
        noise = 0.1 * jax.random.normal(key, x.shape)  # drawn anew in each step, from the state
        return jnp.mean((x + noise - batch["x"]) ** 2), ({"mean": x.mean(0)}, {})

    def make_batch(step):
        batch(step)
        rng = np.random.default_rng([run.seed, step])
        return {"x": rng.normal(size=(16, 16)).astype(np.float32)}

    return dataclasses.replace(
        linear_experiment(run, make_batch),
        init=init,
        loss=loss,
        frozen={"gate": FROZEN},
        evaluate=lambda state: {"size": float(abs(state["params"]["up"]).max())},
        release=lambda state, directory, provenance: None,
        mesh=sharding.make_mesh(mesh),
        mode=mesh.mode,
    )


def mesh_of(experiment):
    return dict(experiment.mesh.shape) | {"mode": experiment.mode}


def config_of(experiment):
    return {"run": configs.to_dict(experiment.run), "mesh": mesh_of(experiment)}


def train(experiment, run_dir):
    fit(experiment, run_dir, config_of(experiment))
    return saved_state(run_dir, experiment.run.steps)


def stop_at(step, number=signal.SIGTERM):
    return lambda now: os.kill(os.getpid(), number) if now == step else None


def steps_of(run_dir):
    return {int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit()}


def saved_state(run_dir, step):
    with Checkpoints(run_dir / "checkpoints", RUN) as checkpoints:
        return jax.device_get(checkpoints.orbax.load(step))


# --- on another mesh -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The last state of a run on `DATA` that nothing stopped."""
    return train(kernels_experiment(DATA), tmp_path_factory.mktemp("unbroken") / "run")


@pytest.fixture
def stopped(tmp_path):
    """The directory of the same run, stopped by SIGTERM behind step 3."""
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        train(kernels_experiment(DATA, batch=stop_at(2)), tmp_path / "run")
    return tmp_path / "run"


def test_a_state_is_restored_bit_for_bit_into_other_shards(stopped):
    expected = saved_state(stopped, 3)
    mesh = sharding.make_mesh(SPLIT)
    shapes = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), expected)
    empty = jax.device_put(shapes, sharding.tree_shardings(shapes, mesh))
    with Checkpoints(stopped / "checkpoints", RUN) as checkpoints:
        restored = checkpoints.restore(empty)
    chex.assert_trees_all_equal(restored, expected)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, empty)
    parts = {part.data.shape for part in restored["params"]["up"].addressable_shards}
    assert parts == {(4, 16)}


@pytest.mark.parametrize("mesh", [DATA, SPLIT, MeshConfig(2, 2, 2), MeshConfig(mode="pmap")])
def test_a_run_goes_on_where_it_stopped_on_any_mesh(stopped, unbroken, mesh):
    """Up to rounding, and bit for bit on the mesh it came from."""
    asked = []
    experiment = kernels_experiment(mesh, batch=asked.append)
    state = train(experiment, stopped)
    assert asked == [3, 4, 5]
    if mesh == DATA:
        chex.assert_trees_all_equal(state, unbroken)
    elif mesh.mode == "jit":  # under pmap each device draws noise of its own
        chex.assert_trees_all_close(state, unbroken, rtol=1e-4, atol=1e-5)
    assert state["step"] == 6
    assert documents.read_yaml(stopped / "config.yaml")["mesh"] == mesh_of(experiment)


def test_a_run_goes_on_with_other_things_watched_but_not_learned(stopped):
    watched = dataclasses.replace(RUN, keep=5, best="size", profile_steps="5-5")
    learned = dataclasses.replace(RUN, seed=1)
    with pytest.raises(UserError, match="already holds another run"):
        train(kernels_experiment(DATA, learned), stopped)
    assert train(kernels_experiment(DATA, watched), stopped)["step"] == 6


# --- what is in one ------------------------------------------------------------------------------


def test_no_frozen_weight_is_in_a_checkpoint(stopped):
    state = saved_state(stopped, 3)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert names == {
        "['step']", "['key']", "['params']['up']", "['params']['down']", "['stats']['mean']",
        *(
            f"['opt_state'][1][0]['{name}']{leaf}"
            for name in ("mu", "nu")
            for leaf in ("['up']", "['down']")
        ),
        "['opt_state'][1][0]['count']", "['opt_state'][1][2]['count']",
    }  # fmt: skip
    kernels, statistics, key, counts = 2 * 16 * 32 * 4, 16 * 4, 2 * 4, 3 * 4
    held = 3 * kernels + statistics + key + counts
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == held
    files = [path for path in (stopped / "checkpoints").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < FROZEN.nbytes / 20  # noise does not shrink


# --- which are kept ------------------------------------------------------------------------------


def scored(run, batch=None):
    """The metric of step 2 is 0.5, and so on; steps are at most 12."""
    scores = {2: 0.5, 4: 0.1, 6: 0.9, 8: 0.3, 10: 0.2, 12: 0.4}
    return dataclasses.replace(
        linear_experiment(run, batch), evaluate=lambda state: {"score": scores[int(state["step"])]}
    )


@pytest.mark.parametrize(
    "best, best_is, kept",
    [
        ("", "highest", {8, 10, 12}),
        ("score", "highest", {6, 8, 10, 12}),
        ("score", "lowest", {4, 8, 10, 12}),
    ],
)
def test_the_latest_and_the_best_are_kept(tmp_path, best, best_is, kept):
    run = RunConfig(12, evaluate_every=2, checkpoint_every=2, keep=3, best=best, best_is=best_is)
    fit(scored(run), tmp_path / "run", {})
    assert steps_of(tmp_path / "run") == kept


def test_a_new_best_is_saved_between_the_intervals_too(tmp_path):
    run = RunConfig(12, evaluate_every=2, checkpoint_every=5, keep=1, best="score")
    fit(scored(run), tmp_path / "run", {})
    assert steps_of(tmp_path / "run") == {6, 12}


def test_the_best_outlives_an_interruption(tmp_path):
    run = RunConfig(12, evaluate_every=2, checkpoint_every=2, keep=1, best="score")
    made = linear_experiment(run)

    def batch(step):
        stop_at(8)(step)
        return made.batch(step)

    with pytest.raises(Interrupted):
        fit(scored(run, batch), tmp_path / "run", {})
    assert steps_of(tmp_path / "run") == {6, 9}
    fit(scored(run), tmp_path / "run", {})
    assert steps_of(tmp_path / "run") == {6, 12}


def test_a_metric_that_no_evaluation_gives_is_refused(tmp_path):
    run = RunConfig(4, evaluate_every=2, best="scores")
    with pytest.raises(UserError, match=r"run\.best is 'scores', but an evaluation gives score"):
        fit(scored(run), tmp_path / "run", {})


def test_a_run_with_a_wrong_metric_has_lost_no_step(tmp_path):
    run = RunConfig(4, evaluate_every=2, checkpoint_every=4, best="scores")
    with pytest.raises(UserError):
        fit(scored(run), tmp_path / "run", {})
    assert steps_of(tmp_path / "run") == {2}
    fit(scored(dataclasses.replace(run, best="score")), tmp_path / "run", {})
    assert steps_of(tmp_path / "run") == {2, 4}


# --- where nothing can be written ----------------------------------------------------------------


def never(step):
    raise AssertionError("a step was taken")


def test_a_disk_without_room_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    experiment = kernels_experiment(DATA, batch=never)
    with pytest.raises(UserError) as error:
        train(experiment, tmp_path / "run")
    assert "9.31e-06 GiB free, but 3 checkpoints of 1.15e-05 GiB need 3.46e-05 GiB" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_checkpoints_that_are_there_need_no_room(stopped, monkeypatch):
    """One of three is there already."""
    usage = shutil.disk_usage(stopped)._replace(free=25_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    assert train(kernels_experiment(DATA), stopped)["step"] == 6


def test_a_place_that_cannot_be_written_to_is_an_error_before_the_first_step(
    stopped, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/run \(Not a directory\); choose"):
        train(kernels_experiment(DATA, batch=never), tmp_path / "file" / "run")

    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot write to .*checkpoints \(Permission denied\)"):
        train(kernels_experiment(DATA, batch=never), stopped)


# The command, in a process that may write files of 2 kB at most from the batch of step 3 on: a disk
# that fills up.
FULL = """
import resource, sys, time
from pathlib import Path
import tests.conftest
from lorax_gen import cli
from lorax_gen.recipes import registry as methods
from tests.training.test_checkpoint import DATA, kernels_experiment, steps_of

def experiment(config):
    def fill(step):
        if step == 3:
            while steps_of(Path(sys.argv[2])) != {2}:
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    return kernels_experiment(DATA, config.run, fill)

methods.RECIPES["lora"] = methods.RECIPES["lora"]._replace(experiment=experiment)
cli.main(["train", sys.argv[1], "--run-dir", sys.argv[2]])
"""


def test_a_disk_that_fills_up_is_one_line_and_loses_no_checkpoint(tmp_path, monkeypatch, capsys):
    config, run_dir = tmp_path / "full.yaml", tmp_path / "run"
    config.write_text("method: lora\nrun: {steps: 6, log_every: 1, checkpoint_every: 2}\n")
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(config), str(run_dir)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 2
    assert [line for line in ended.stderr.splitlines() if "lorax-gen: error" in line] == [
        f"lorax-gen: error: cannot save a checkpoint in {run_dir}/checkpoints (File too large); "
        "what was saved before is complete, and the same command resumes the run from there"
    ]
    assert steps_of(run_dir) == {2}
    asked = []
    method = methods.RECIPES["lora"]._replace(
        experiment=lambda config: kernels_experiment(DATA, config.run, asked.append)
    )
    monkeypatch.setitem(methods.RECIPES, "lora", method)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(config), "--run-dir", str(run_dir)])
    assert stop.value.code == 0 and asked == [2, 3, 4, 5]
    capsys.readouterr()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
