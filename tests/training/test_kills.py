"""Processes that are killed without warning (SIGKILL), again and again, and two at a time.

    KILLS=50 python -m pytest -s -p no:xdist --timeout 0 tests/training/test_kills.py   # 2 without

A run, or an evaluation, that was killed and resumed ends as one that nothing interrupted, bit for
bit. Of two writers one wins and the other is told.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from lorax_gen.data.world import FAMILIES
from tests.data import rows
from tests.tiny import TINY_RUN, make_generator, write_system

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("KILLS", "2"))
ITEMS = 240  # of the evaluation
CONFIG = (
    TINY_RUN
    + """
run:
  steps: 60
  log_every: 1
  evaluate_every: 4
  checkpoint_every: 3
  keep: 1
  best: accuracy/unseen
optimizer: {{learning_rate: 0.01, warmup_steps: 2}}
"""
)


@pytest.fixture(scope="module")
def system(tiny_world_system, tmp_path_factory):
    directory = tmp_path_factory.mktemp("system")
    write_system(directory, tiny_world_system, make_generator(tiny_world_system))
    (directory / "tiny.yaml").write_text(CONFIG.format(system=directory, family=FAMILIES[1]))
    return directory


def start(*words):
    """The command, in a process of its own that shares the compiled programs of this one."""
    settings = {
        "PYTHONPATH": ROOT,
        "JAX_NUM_CPU_DEVICES": 2,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": True,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "lorax_gen", *map(str, words)],
        env=os.environ | {name: str(value) for name, value in settings.items()},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process):
    out, err = process.communicate()
    return process.returncode, out, err


def lines_of(path, of=lambda row: True):
    """How many complete lines of a file are `of` some kind."""
    text = path.read_text() if path.exists() else ""
    return sum(of(json.loads(line)) for line in text.split("\n")[:-1])


def kill(process, path, of, count, delay):
    """Kills the process `delay` seconds after the file has `count` lines of some kind. Returns its
    exit code, which is 0 where it was over before."""
    while process.poll() is None and lines_of(path, of) < count:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    code, _, err = finished(process)
    assert code in (0, -signal.SIGKILL), err
    return code


def comparable(run_dir):
    """What is released, and the rows of metrics without the speed."""
    rates = ("step_time", "examples_per_second", "tokens_per_second")
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: row[name] for name in row if name not in rates} for row in found]
    return (run_dir / "released" / "generator.safetensors").read_bytes(), kept


def is_evaluation(row):
    return "loss" not in row


def test_a_run_killed_again_and_again_is_the_run_that_nothing_interrupted(system, tmp_path):
    """Two of five kills come within 150 ms after an evaluation, the others at any time."""
    random.seed(0)
    words = ("train", system / "tiny.yaml", "--run-dir")
    assert finished(start(*words, tmp_path / "whole"))[0] == 0
    expected = comparable(tmp_path / "whole")
    kills, aimed, runs, code = 0, 0, 0, 0
    while kills < KILLS:
        runs += code == 0
        run_dir = tmp_path / f"killed{runs}"
        log, aim = run_dir / "metrics.jsonl", kills % 5 in (0, 3)
        of, more = (is_evaluation, 1) if aim else (bool, random.choice([-60, *range(9)]))
        delay = random.random() * (10 if more < 0 else 0.15)  # some while it starts
        count = lines_of(log, of) + more
        code = kill(start(*words, run_dir), log, of, count, delay)
        kills, aimed = kills + (code != 0), aimed + (aim and code != 0)
        print(f"kill {kills} at {lines_of(log)} rows", flush=True)
        if code != 0 and kills in (KILLS, 5 * runs):
            code, _, err = finished(start(*words, run_dir))
            assert code == 0, err
        if code == 0:
            assert comparable(run_dir) == expected
    print(f"\n{kills} kills, {aimed} of them after an evaluation: {runs} runs are equal to one "
          "that nothing interrupted")  # fmt: skip


def test_an_evaluation_killed_again_and_again_is_one_that_nothing_interrupted(system, tmp_path):
    random.seed(0)
    for split, first in (("test", 0), ("train", ITEMS)):
        (tmp_path / "data").mkdir(exist_ok=True)
        lines = rows.make_rows("arc_easy", ITEMS, first)
        rows.write_lines(tmp_path / "data" / f"arc_easy.{split}.jsonl", lines)
    words = ["evaluate", "arc_easy", "--data-dir", tmp_path / "data", "--modes", "lora_gen"]
    words += [f"--{role}={system / role}" for role in ("cloud", "edge", "generator")]
    words += ["--shots", 2, "--tokens-per-batch", 128, "--run-dir"]
    name = "items/arc_easy.lora_gen.jsonl"
    assert finished(start(*words, tmp_path / "whole"))[0] == 0
    kills = 0
    for _ in range(min(KILLS, 8)):
        path = tmp_path / "killed" / name
        count = max(lines_of(path), 1) + 1
        kills += kill(start(*words, tmp_path / "killed"), path, bool, count, 0) != 0
    code, _, err = finished(start(*words, tmp_path / "killed"))
    assert code == 0, err
    found, expected = (
        sorted((tmp_path / run / name).read_text().splitlines()) for run in ("killed", "whole")
    )
    assert found == expected and len(found) == 1 + ITEMS
    print(f"\n{kills} kills: {ITEMS} of {ITEMS} items are equal to those that nothing interrupted")


def test_of_two_processes_in_one_directory_one_wins(system, tmp_path):
    words = ("train", system / "tiny.yaml", "--run-dir", tmp_path / "run")
    (first, *_), (second, _, err) = ended = sorted(
        [finished(process) for process in (start(*words), start(*words))], key=lambda end: end[0]
    )
    assert (first, second) == (0, 2), ended
    assert err.startswith(f"lorax-gen: error: {tmp_path}/run is in use by process "), err
    assert err.count("\n") == 1
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [row["step"] for row in rows if not is_evaluation(row)] == list(range(1, 61))


# Two processes that write one path, again and again; prints how often the second one won.
WRITERS = """
import os, random, sys, time
from pathlib import Path
from lorax_gen import files
from lorax_gen.errors import UserError

new, folder, rounds = getattr(files, sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
random.seed(0)

def write(path, text, begin):
    while time.time() < begin:
        pass
    try:
        with new(path) as temporary:
            parts = [temporary / f"{i}" for i in range(20)] if temporary.is_dir() else [temporary]
            for part in parts:
                part.write_text(text * 100_000)
        return 0
    except UserError as error:
        return 2 if f"{path} already exists" in str(error) else 3
    except BaseException:
        return 4

wins = 0
for number in range(rounds):
    path, begin, children = folder / f"{number}", time.time() + 0.01, []
    for text in "ab":
        later = 0.02 * random.random()
        pid = os.fork()
        if pid == 0:
            os._exit(write(path, text, begin + later))
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0, 2], codes
    parts = [path] if path.is_file() else list(path.iterdir())
    assert len(parts) == (1 if path.is_file() else 20)
    assert {part.read_text() for part in parts} == {"ab"[codes.index(0)] * 100_000}
    wins += codes.index(0)
assert {path.name for path in folder.iterdir()} == set(map(str, range(rounds)))
print(wins)
"""


@pytest.mark.parametrize("new", ["new_file", "new_directory"])
def test_of_two_writers_of_one_path_one_wins_and_nothing_is_damaged(new, tmp_path):
    """They begin within 20 ms, in processes of their own."""
    rounds = 2 * max(KILLS, 10)
    words = [sys.executable, "-c", WRITERS, new, str(tmp_path), str(rounds)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    print(f"\n{rounds} times two writers: 0 damaged, the second won {ended.stdout.strip()} times")
