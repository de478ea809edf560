"""Command lines with one thing wrong: exit code 2, one line on stderr, nothing written."""

import contextlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_gen.cli.main import main
from lorax_gen.errors import LONGEST
from tests.fuzz.damage import fuzz, little_memory

NO_SIZE = ["0", "-1", "1.5", "many", "", "1e3", "nan", "99999999999999999999", "true"]
NO_COUNT = NO_SIZE[1:]
NO_RATE = ["1.5", "-0.1", "nan", "inf", "much", ""]
NO_MODEL = ["", "nowhere", "no where/else", "/nowhere", "world/nowhere", "../.."]
NO_CHOICE = ["", "both", "float8", "FLOAT32", "0"]
NO_SEED = ["-1", "1.5", "x", "", str(2**64), "4294967296"]
PROMPT = "Look at the color of each thing : red=alpha , else=beta ."

# Command -> arguments that it accepts, and per option values that it must refuse.
COMMANDS = {
    "generate": (
        ["apple :"],
        {
            "--card": ["nowhere", "", ".", "README.md"],
            "--edge": NO_MODEL,
            "--max-new-tokens": [*NO_SIZE, "1000000"],
            "--temperature": ["-1", "nan", "inf", "hot", ""],
            "--top-k": NO_SIZE,
            "--top-p": ["0", "-1", "1.1", "nan", "x"],
            "--seed": NO_SEED[:5],
            "--stop": [""],
            "--dtype": NO_CHOICE,
            "--chat": [None],  # the shipped tokenizer has no chat template
        },
    ),
    "specialize": (
        [PROMPT, "--output", "OUT/card.safetensors"],
        {
            "--cloud": [*NO_MODEL, "world/edge"],
            "--edge": [*NO_MODEL, "world/cloud"],
            "--generator": [*NO_MODEL, "world/edge"],
            "--output": ["README.md", "gs://", "ftp://host/x", "s3:///x"],
            "--fsdp": [*NO_SIZE, "1000"],
            "--tensor": [*NO_SIZE, "1000"],
        },
    ),
    "export": (
        ["nowhere", "--format", "peft", "--output", "OUT/adapter"],
        {"--format": NO_CHOICE, "--dtype": NO_CHOICE, "--max-shard-size": ["-5GB", "0", "5XB", ""]},
    ),
    "verify": (["nowhere"], {"--edge": NO_MODEL, "--dtype": NO_CHOICE, "--generator": NO_MODEL}),
    "evaluate": (
        ["boolq", "--data-dir", "nowhere"],
        {
            "--modes": ["", "none", "plain,icl"],
            "--shots": NO_COUNT,
            "--limit": NO_SIZE,
            "--tokens-per-batch": NO_SIZE,
            "--max-new-tokens": NO_SIZE,
            "--bos": ["maybe", "true", ""],
            "--fsdp": NO_SIZE,
            "--tensor": NO_SIZE,
            "--questions": NO_SIZE,
            "--seed": NO_SEED,
            "--split": ["", "both"],
        },
    ),
    "train": (
        ["world", "--run-dir", "OUT/run"],
        {
            "--run.steps": NO_SIZE,
            "--run.seed": NO_SEED,
            "--run.keep": NO_SIZE,
            "--run.best-is": ["", "most"],
            "--run.profile-steps": ["x", "5-1", "0-3"],
            "--optimizer.learning-rate": ["0", "-1", "nan", "inf", "x"],
            "--optimizer.b1": ["1", *NO_RATE],
            "--optimizer.final-fraction": NO_RATE,
            "--optimizer.weight-decay": ["-1", "nan", "inf"],
            "--mesh.data": ["0", "-2", "x", "1000"],
            "--mesh.mode": ["", "both"],
            "--data.families": ["", "sorts"],
            "--data.seed": NO_SEED,
            "--data.max-shots": NO_COUNT,
            "--data.prompt-length": NO_SIZE,
            "--prompts": NO_SIZE,
            "--microbatches": [*NO_SIZE, "7"],
            "--answer-length": NO_SIZE,
            "--generator.n-experts": [*NO_SIZE, "1"],
            "--generator.top-k": [*NO_SIZE, "99"],
            "--generator.rank": NO_SIZE,
            "--generator.alpha": ["0", "-1", "nan", "inf"],
            "--generator.cloud-dropout": ["1", *NO_RATE],
            "--generator.edge-targets": ["", "nothing"],
            "--cloud": NO_MODEL,
            "--edge": NO_MODEL,
            "--dtype": NO_CHOICE,
        },
    ),
    "plan": (
        ["world"],
        {
            "--topology": ["", "x", "gpu:0", "gpu:-1", "gpu:99999999999", "v5e:4", "v9:4x4", "gpu"],
            "--utilisation": ["0", *NO_RATE],
            "--output": ["README.md", "ftp://x/y"],
            "--prompts": NO_SIZE,
            "--run.steps": NO_SIZE,
        },
    ),
    "demo": ([], {"--questions": NO_SIZE, "--seed": NO_SEED, "--run-dir": ["README.md", "gs://"]}),
}
CASES = [
    (name, option, value)
    for name, (_, options) in COMMANDS.items()
    for option, values in options.items()
    for value in values
]


def said(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), little_memory():
        try:
            main(arguments)
        except SystemExit as stop:
            return stop.code or 0, out.getvalue(), err.getvalue()
    raise AssertionError("main returned")


def check_refused(arguments: list[str]) -> None:
    code, _, err = said(arguments)
    assert code == 2, (arguments, code, err)
    line = err.strip().splitlines()[-1]
    assert line.startswith("lorax-gen: error: "), (arguments, err)
    assert len(line) <= LONGEST + len("lorax-gen: error: "), line
    assert "Traceback" not in err


@fuzz
@given(case=st.sampled_from(CASES))
def test_a_wrong_value_is_refused_in_one_line(case, tmp_path_factory):
    name, option, value = case
    base = tmp_path_factory.mktemp("out")
    arguments = [word.replace("OUT", str(base)) for word in COMMANDS[name][0]]
    joined = [] if value is None else [value]
    if option in arguments:
        at = arguments.index(option)
        arguments[at : at + 2] = []
    check_refused([name, *arguments, option, *joined])
    assert not list(base.iterdir()), "something was written"


WORDS = st.one_of(
    st.sampled_from([*COMMANDS, "--help-me", "-", "--", "-x", "--edge", "--run-dir=", "@nowhere"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)


@fuzz
@given(name=st.sampled_from(sorted(COMMANDS)), words=st.lists(WORDS, min_size=1, max_size=4))
def test_any_words_end_in_a_result_or_in_one_line(name, words, tmp_path_factory, monkeypatch):
    """Words after a command that none of them makes valid: an unknown option always comes last."""
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    if "-h" in words or "--" in words:
        return
    check_refused([name, *words, "--no-such-option"])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_an_option_given_twice_or_without_its_value_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [word.replace("OUT", str(tmp_path / "out")) for word in COMMANDS[name][0]]
    option = next(option for option, values in COMMANDS[name][1].items() if values != [None])
    check_refused([name, *arguments, option])
