"""Which command is run, `--help`, and one line for whatever is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

import lorax_gen
from lorax_gen.cli.main import COMMANDS


@pytest.mark.parametrize(
    "words, mentioned",
    [
        ([], ["demo", "train", "specialize", "generate", "export", "verify", "evaluate"]),
        (["demo"], ["--run-dir", "--questions", "--seed"]),
        (["train"], ["CONFIG", "--run-dir", "world-lora"]),
        (["train", "world"], ["--run-dir", "--generator.top-k", "--run.steps", "--mesh.fsdp"]),
        (["train", "world-edge"], ["--hidden-size", "--optimizer.learning-rate"]),
        (["specialize"], ["PROMPT", "--output", "--merged", "--cloud", "--edge", "--generator"]),
        (["generate"], ["QUESTION", "--card", "--context", "--edge", "--max-new-tokens"]),
        (["generate"], ["--chat", "--temperature", "--top-k", "--top-p", "--seed", "--stop"]),
        (["export"], ["ARTIFACT", "--format", "peft", "gguf-lora", "--output", "--dtype"]),
        (["convert"], ["MODEL", "DIR", "--dtype", "--max-shard-size"]),
        (["verify"], ["ARTIFACT", "--edge", "--generator", "--dtype"]),
        (["evaluate"], ["--lora", "--split", "--questions", "--seed", "--run-dir"]),
        (["evaluate"], ["TASK", "--modes", "--data-dir", "--limit", "--shots", "--card"]),
    ],
    ids=" ".join,
)
def test_help_names_the_options(call, words, mentioned):
    code, out, err = call(*words, "--help")
    assert (code, err) == (0, "")
    for word in mentioned:
        assert word in out


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lorax_gen", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("words", [[], ["train"], ["plan"]], ids=" ".join)
def test_without_what_it_needs_a_command_shows_its_help(call, words):
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    assert out == call(*words, "--help")[1] != ""


def test_the_version_is_that_of_the_package(call):
    assert call("--version") == (0, f"lorax-gen {lorax_gen.__version__}\n", "")


@pytest.mark.parametrize(
    "words, message",
    [
        (["specialise", "x"], "no command specialise; did you mean specialize?"),
        (["x"], f"no command x; choose one of {', '.join(COMMANDS)}"),
        (["--x"], "unrecognized options: --x; see lorax-gen --help"),
        (["--version", "x"], "unrecognized options: --version, x; see lorax-gen --help"),
        (["demo", "--seed", "x"], "--seed: invalid literal for int() with base 10: 'x'"),
        (["demo", "--sed", "3"], "unrecognized options: --sed, 3; did you mean --seed?"),
        (["demo", "--sed", "3", "--queston", "3"], "did you mean --questions and --seed?"),
        (
            ["demo", "x" * 200],
            f"invalid choice '{'x' * 200}' for argument 'what'. Expected one of ('world', "
            "'tasks'); see lorax-gen demo --help",
        ),
        (
            ["demo", "tasks", "x" * 200],
            f"unrecognized options: {'x' * 200}; see lorax-gen demo --help",
        ),
        (["generate", "--top-k"], "missing value for argument '--top-k'"),
        (["train", "--run-dir", "x"], "missing from lorax-gen train: CONFIG"),
        (
            ["export"],
            "missing from lorax-gen export: ARTIFACT, --format {merged,peft,gguf-lora}, "
            "--output PATH; see lorax-gen export --help",
        ),
        (
            ["verify", "x", "--dtype", "int8"],
            "invalid choice 'int8' for argument '--dtype'. Expected one of ('float32', "
            "'bfloat16'); see lorax-gen verify --help",
        ),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_wrong_words_are_one_line(refused, monkeypatch, words, message, terminal, encoding):
    """tyro frames its errors as the encoding permits, colours them on a terminal, and on a narrow
    one breaks them within words."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setattr(type(sys.stdout), "encoding", encoding)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "50")
    assert message in refused(*words)
    assert os.environ["COLUMNS"] == "50"


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_is_shown_without_jax(words):
    if words[0] == "lm-eval":
        pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lorax-gen[harness]'")
    code = (
        "import sys\n"
        "from lorax_gen.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "print({'jax', 'transformers', 'flax', 'matplotlib', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_warning_is_one_line(models, tmp_path):
    """Such as that of a key in a config.json that nobody knows."""
    edge = shutil.copytree(models / "edge", tmp_path / "edge")
    config = json.loads((edge / "config.json").read_text()) | {"some_key": 1}
    (edge / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "lorax_gen", "generate", "apple :", "--edge", str(edge)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("apple :")
    said = "has keys that are unknown, and not used: some_key"
    assert done.stderr == f"lorax-gen: warning: {edge}/config.json {said}\n"
