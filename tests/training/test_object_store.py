"""A run whose directory is in an object store is the run that it is on a disk, killed or not."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lorax_gen import cli, files
from lorax_gen.data.world import FAMILIES
from lorax_gen.errors import UserError
from lorax_gen.mesh import hosts
from lorax_gen.training.checkpoint import Checkpoints
from lorax_gen.training.loop import fit
from lorax_gen.training.run import RunConfig
from tests.data import rows
from tests.stores import bucket, servers  # noqa: F401
from tests.tiny import PROMPTS, TINY_RUN, linear_experiment, make_generator, write_system

CONFIG = (
    TINY_RUN
    + """
run: {{steps: 6, log_every: 1, evaluate_every: 3, checkpoint_every: 3, keep: 1, tensorboard: true}}
optimizer: {{learning_rate: 0.01, warmup_steps: 2}}
"""
)

# The command, in a process that dies without warning when it asks for the batch of step 5; the
# checkpoint of step 3 is in the store by then.
KILLED = """
import dataclasses, os, signal, sys, time
from lorax_gen import cli, files
from lorax_gen.recipes.registry import RECIPES

name, run_dir = sys.argv[1:]
checkpoints = files.to_path(run_dir) / "checkpoints"
method = RECIPES["lora_gen"]

def experiment(config):
    made = method.experiment(config)
    def batch(step):
        if step == 5:
            while not any((checkpoints / n).exists() for n in ("3.tar", "3/commit_success.txt")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return made.batch(step)
    return dataclasses.replace(made, batch=batch)

RECIPES["lora_gen"] = method._replace(experiment=experiment)
cli.main(["train", name, "--run-dir", run_dir])
"""


def start(*words):
    """Runs a command in a process of its own, of the same programs as this one."""
    root = Path(__file__).resolve().parents[2]
    settings = {
        "PYTHONPATH": root,
        "JAX_NUM_CPU_DEVICES": jax.config.jax_num_cpu_devices,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": True,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    }
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=root,
        env=os.environ | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
    )


def rows_of(run_dir):
    rates = ("step_time", "examples_per_second", "tokens_per_second")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in rates} for line in lines]


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """`call(*words) -> (exit code, stdout, stderr)`, in an empty working directory that stays
    empty."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        assert not list(tmp_path.iterdir())
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def system(bucket, tiny_world_system):  # noqa: F811
    """Directories `cloud`, `edge` and `generator` and a config `tiny.yaml` in a store."""
    folder = bucket / "system"
    write_system(folder, tiny_world_system, make_generator(tiny_world_system))
    text = CONFIG.format(system=folder, family=FAMILIES[1])
    files.write_text(folder / "tiny.yaml", text)
    return folder


@pytest.fixture(scope="module")
def unbroken(system, tmp_path_factory):
    """A run on a disk that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    ended = start("-m", "lorax_gen", "train", system / "tiny.yaml", "--run-dir", run_dir)
    assert ended.returncode == 0, ended.stderr
    return run_dir


@pytest.fixture(scope="module")
def resumed(bucket, system):  # noqa: F811
    """A run in the store that was killed without warning, and taken up by the same command."""
    run_dir = bucket / "runs" / "killed"
    killed = start("-c", KILLED, system / "tiny.yaml", run_dir)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = [row["step"] for row in rows_of(run_dir)]
    assert steps == [1, 2, 3, 3]  # all that led to the checkpoint, and what was found of it
    assert not (run_dir / "released").exists()
    ended = start("-m", "lorax_gen", "train", system / "tiny.yaml", "--run-dir", run_dir)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"released: {run_dir}/released\n"
    return run_dir


def test_a_killed_run_ends_as_one_that_nothing_stopped(resumed, unbroken):
    name = "released/generator.safetensors"
    assert (resumed / name).read_bytes() == (unbroken / name).read_bytes()
    assert rows_of(resumed) == rows_of(resumed / "released") == rows_of(unbroken)
    assert (resumed / "config.yaml").read_text() == (unbroken / "config.yaml").read_text()


def test_a_run_keeps_in_a_store_what_it_keeps_on_a_disk(resumed, unbroken):
    names = {path.name for path in resumed.iterdir()}
    assert names | {".lock"} == {path.name for path in unbroken.iterdir()}  # a store has no locks
    assert not files.find(resumed, files.INCOMPLETE)
    [checkpoint] = (resumed / "checkpoints").iterdir()
    assert checkpoint.name.removesuffix(".tar") == "6"
    assert len(files.find(resumed / "tensorboard", "events.*")) == 2  # killed, then resumed


def test_what_is_released_names_no_bucket(resumed, bucket):  # noqa: F811
    described = (resumed / "released" / "config.json").read_text()
    assert json.loads(described)["config"]["cloud"] == "cloud"
    assert str(bucket) not in described


def test_a_complete_run_is_not_run_again_and_another_is_refused(call, resumed, system):
    words = ("train", system / "tiny.yaml", "--run-dir", resumed)
    before = file_states(resumed)
    assert call(*words) == (0, f"released: {resumed}/released\n", "")
    code, _, err = call(*words, "--prompts", 16)
    assert code == 2 and "already holds another run (its config.yaml differs in prompts)" in err
    assert file_states(resumed) == before


def file_states(directory):
    return files.file_system(directory).find(str(directory), detail=True)


def test_a_half_written_release_is_released_again(call, resumed, system):
    released = resumed / "released"
    before = (released / "generator.safetensors").read_bytes()
    (released / "config.json").unlink()
    (released / files.INCOMPLETE).write_text("")
    models = ["--cloud", system / "cloud", "--edge", system / "edge", "--generator", released]
    code, _, err = call("specialize", PROMPTS[0], *models, "--output", "card")
    assert code == 2 and f"{released} is incomplete" in err
    assert call("train", system / "tiny.yaml", "--run-dir", resumed)[0] == 0
    assert (released / "generator.safetensors").read_bytes() == before
    assert (released / "config.json").exists() and not files.is_incomplete(released)


def test_what_was_trained_is_used_from_the_store(call, resumed, system):
    out = resumed / "out"
    models = ["--edge", system / "edge", "--generator", resumed / "released"]
    card, merged, adapter = out / "task.card.safetensors", out / "merged", out / "adapter"
    words = ["specialize", PROMPTS[0], "--cloud", system / "cloud", *models]
    words += ["--output", card, "--merged", merged]
    code, printed, err = call(*words)
    assert (code, err) == (0, "") and f"card: {card}" in printed
    assert "already exists" in call(*words)[2]
    assert call("export", card, "--format", "peft", "--output", adapter, *models)[0] == 0
    gguf = out / "adapter.gguf"
    assert call("export", adapter, "--format", "gguf-lora", "--output", gguf, *models)[0] == 0
    assert (out / "adapter.gguf").exists()
    assert "already exists" in call("export", card, "--format", "merged", "--output", merged,
                                    *models)[2]  # fmt: skip
    for artifact in (card, merged, adapter):
        assert call("verify", artifact, *models)[0] == 0
    ask = ["generate", "apple :", "bell :"]
    answers = call(*ask, "--model", merged)
    assert answers[0] == 0
    for artifact in (card, adapter):
        assert call(*ask, "--model", system / "edge", "--card", artifact,
                    "--generator", resumed / "released") == answers  # fmt: skip


def test_an_evaluation_in_a_store_goes_on_where_it_stopped(call, bucket, system):  # noqa: F811
    data, run_dir = bucket / "data", bucket / "runs" / "evaluation"
    for split, first in (("test", 0), ("train", 9)):
        path = data / "deep" / f"arc_easy.{split}.jsonl"
        with files.new_file(path) as temporary:
            rows.write_lines(temporary, rows.make_rows("arc_easy", 4, first))
    words = ["evaluate", "arc_easy", "--data-dir", data, "--run-dir", run_dir, "--shots", 1]
    words += ["--modes", "plain", "lora_gen"]
    words += [f"--{role}={system / role}" for role in ("cloud", "edge", "generator")]
    code, out, err = call(*words)
    assert (code, err) == (0, "") and "ARC-e" in out
    item = run_dir / "items" / "arc_easy.lora_gen.jsonl"
    lines = item.read_text().splitlines()
    assert len(lines) == 1 + 4
    item.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])
    assert call(*words)[0] == 0
    assert sorted(item.read_text().splitlines()[1:]) == sorted(lines[1:])
    assert (run_dir / "report.csv").exists() and (run_dir / "report.json").exists()


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def run_dir(bucket, request):  # noqa: F811
    return bucket / "runs" / request.node.name.strip("]").replace("[", "-")


def steps_of(run_dir):
    names = {path.name.removesuffix(".tar") for path in (run_dir / "checkpoints").iterdir()}
    return {int(name) for name in names}


def test_the_latest_and_the_best_checkpoints_are_kept(run_dir, tmp_path):
    """The error of the linear run falls and rises: what is kept is what a disk keeps."""
    run = RunConfig(
        steps=9, log_every=1, evaluate_every=3, checkpoint_every=2, best="error", best_is="lowest"
    )
    for directory in (run_dir, tmp_path / "run"):
        made = linear_experiment(run)

        def stopped(step, made=made):
            if step == 7:
                raise KeyboardInterrupt
            return made.batch(step)

        with pytest.raises(KeyboardInterrupt):
            fit(dataclasses.replace(made, batch=stopped), directory, {})
        fit(made, directory, {})
    assert steps_of(run_dir) == steps_of(tmp_path / "run") >= {8, 9}
    assert rows_of(run_dir) == rows_of(tmp_path / "run")


STATE = {"w": jnp.arange(4.0)}


def test_a_checkpoint_that_is_half_removed_does_not_count(run_dir, tmp_path, monkeypatch):
    """The process dies while it removes, on a disk or in a store that orbax writes to."""
    directory = (run_dir if files.scheme(run_dir) == "gs" else tmp_path) / "checkpoints"
    run = RunConfig(steps=9, keep=1)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(epath.Path(directory)), "rmtree", die)
        checkpoints = Checkpoints(directory, run)
        for step in (3, 6, 9):  # the first is surplus when the last one is written
            checkpoints.save(step, STATE, force=True, wait=True)
    assert len(names_of(directory)) == 3  # the first one is still there, in part
    with Checkpoints(directory, run) as checkpoints:
        assert checkpoints.steps == [6, 9]
        restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, STATE))
    np.testing.assert_array_equal(restored["w"], STATE["w"])
    wait_until(lambda: names_of(directory) == {"9"})  # orbax removes the rest when it pleases


def wait_until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def names_of(directory):
    return {path.name for path in directory.iterdir()}


def test_a_damaged_checkpoint_is_named(run_dir):
    made = linear_experiment(RunConfig(steps=2, log_every=1, evaluate_every=2, checkpoint_every=2))
    fit(made, run_dir, {})
    (run_dir / "released").rmtree()
    [checkpoint] = (run_dir / "checkpoints").iterdir()
    if checkpoint.suffix == ".tar":
        checkpoint.write_text("half")
    else:
        for path in files.find(checkpoint / "state", "manifest.ocdbt"):
            path.write_text("half")
    with pytest.raises(UserError, match=r"damaged .*to resume from the one before") as error:
        fit(made, run_dir, {})
    assert str(checkpoint) in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_that_cannot_be_uploaded_ends_the_run_in_one_line(run_dir, monkeypatch):
    made = linear_experiment(RunConfig(steps=9, log_every=1, evaluate_every=9, checkpoint_every=2))
    if files.scheme(run_dir) == "gs":
        pytest.skip("orbax uploads there by a client of its own")
    store = files.file_system(run_dir)
    put = store.put_file

    def fail(local, remote):
        if remote.endswith("4.tar"):
            raise OSError("connection lost")
        put(local, remote)

    monkeypatch.setattr(store, "put_file", fail)
    with pytest.raises(UserError, match=r"cannot save a checkpoint in .* \(connection lost\)"):
        fit(made, run_dir, {})
    assert steps_of(run_dir) == {2}
    monkeypatch.undo()
    asked = []
    again = dataclasses.replace(made, batch=lambda step: asked.append(step) or made.batch(step))
    fit(again, run_dir, {})
    assert asked == [2, 3, 4, 5, 6, 7, 8]


def test_several_processes_share_checkpoints_where_orbax_can_write(bucket, monkeypatch):  # noqa: F811
    monkeypatch.setattr(hosts, "several", lambda: True)
    if files.scheme(bucket) == "gs":
        Checkpoints(bucket / "shared", RunConfig())
        return
    with pytest.raises(UserError, match=r"several processes cannot keep checkpoints in s3://"):
        Checkpoints(bucket / "shared", RunConfig())


def test_a_bucket_that_is_not_there_is_told_before_anything_is_trained(call, bucket):  # noqa: F811
    nowhere = f"{files.scheme(bucket)}://nowhere/run"
    code, out, err = call("train", "world", "--run-dir", nowhere, "--prompts", 8)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"lorax-gen: error: cannot write to {nowhere} (")
