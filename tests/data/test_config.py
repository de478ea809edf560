"""Sources by name or path, their weights, and the mixture that a config asks for."""

import json

import pytest

from lorax_gen.data.config import MixtureConfig, open_source, split_weight
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.tokenizers import word_level
from tests.data.rows import make_rows, write_lines

TRIPLE = {"instruction": "Say what melts", "input": "ice", "output": "it melts"}
TASK = {
    "Definition": "Name the color of the thing",
    "Positive Examples": [{"input": "grass", "output": "green"}],
    "Instances": [{"input": "coal", "output": "black"}, {"input": "snow", "output": "white"}],
}


@pytest.fixture
def directory(tmp_path):
    """Files of a benchmark's train and of an unseen one's test split, of triples and of tasks."""
    write_lines(tmp_path / "arc_easy.train.jsonl", make_rows("arc_easy", 5))
    write_lines(tmp_path / "winogrande.test.jsonl", make_rows("winogrande", 1))
    write_lines(tmp_path / "alpaca_some.jsonl", [TRIPLE, {**TRIPLE, "input": ""}])
    (tmp_path / "colors").mkdir()
    (tmp_path / "colors" / "task900_colors.json").write_text(json.dumps(TASK))
    return tmp_path


@pytest.mark.parametrize(
    "entry, found", [("alpaca", ("alpaca", 1.0)), ("alpaca=0.25", ("alpaca", 0.25))]
)
def test_a_weight_stands_behind_a_name(entry, found):
    assert split_weight(entry) == found


def test_sources_are_named_or_are_files(directory):
    assert len(open_source("arc_easy", directory)) == 5
    assert len(open_source("alpaca", directory)) == 2
    assert len(open_source(str(directory / "alpaca_some.jsonl"), None)) == 2
    assert len(open_source(str(directory / "colors"), None)) == 2


def test_a_set_is_found_by_its_name_as_a_file_or_a_folder(directory):
    (directory / "alpaca_notes.txt").write_text("none of its files")
    assert len(open_source("alpaca", directory)) == 2
    (directory / "colors").rename(directory / "natural_instructions")
    assert len(open_source("natural_instructions", directory)) == 2


def test_a_config_opens_its_mixture(directory):
    config = MixtureConfig(
        sources=("arc_easy", "alpaca=2", str(directory / "colors")),
        directory=str(directory), shots=1, prompt_length=64, question_length=64, evaluate_on=(),
    )  # fmt: skip
    encoder = Encoder(word_level(["ice", "melts"]))
    mixture = config.mixture(encoder, encoder, seed=0, prompts=4, queries=2)
    assert mixture.samples_per_epoch == 5 + 2 * 2 + 2
    batch = mixture.batch(0)
    assert batch["prompt"].shape[0] == 4 and batch["tokens"].shape[0] == 8


def test_a_question_of_an_unseen_benchmark_is_found_in_whatever_source(directory):
    planted = make_rows("winogrande", 1)[0]
    text = planted["sentence"].replace("_", planted["option1"])
    write_lines(directory / "alpaca_some.jsonl", [TRIPLE, {**TRIPLE, "output": f"So: {text}"}])
    config = MixtureConfig(sources=("arc_easy", "alpaca"), directory=str(directory))
    encoder = Encoder(word_level(["ice"]))
    with pytest.raises(UserError, match="alpaca holds a question of an unseen benchmark"):
        config.mixture(encoder, encoder, seed=0, prompts=4, queries=1)


@pytest.mark.parametrize("name", ["hellaswag", "winogrande", "piqa"])
def test_unseen_benchmarks_are_no_sources(name, directory):
    with pytest.raises(UserError, match="is an unseen benchmark: it is never trained on"):
        open_source(name, directory)


@pytest.mark.parametrize("name", ["my.HellaSwag.jsonl", "PIQA", "wino-grande"])
def test_files_called_like_an_unseen_benchmark_are_refused(name, directory):
    write_lines(directory / name, [TRIPLE])
    with pytest.raises(UserError, match=f"{name} must not be trained on"):
        open_source(str(directory / name), None)


def test_what_cannot_be_opened_is_said(directory, tmp_path):
    for name, where, message in (
        ("arc_esy", directory, "unknown source 'arc_esy': neither a file nor one of arc_challenge"),
        ("gpt4tools", None, "gpt4tools has no copy on the hub"),
        ("gpt4tools", directory, "no file gpt4tools_71k.json"),
        ("natural_instructions", None, "set data.directory"),
        ("natural_instructions", directory, "found nothing"),
        ("alpaca", tmp_path / "nowhere", "no such data directory"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(name, where)
    write_lines(directory / "alpaca_more.jsonl", [TRIPLE])
    with pytest.raises(UserError, match=r"found alpaca_more.jsonl, alpaca_some.jsonl; name the"):
        open_source("alpaca", directory)
    with pytest.raises(UserError, match="weight that is not a number"):
        MixtureConfig(sources=("alpaca=half",))
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        MixtureConfig(sources=())
    with pytest.raises(UserError, match="unknown benchmark 'bolq'; did you mean boolq"):
        MixtureConfig(evaluate_on=("bolq",))
