"""`lorax-gen data CONFIG`: what training will read, and what it will leave out."""

import dataclasses
import json
import re

import pytest
import yaml

from lorax_gen.models.huggingface import load_model, load_reader, save_model
from lorax_gen.recipes.preview import open_preview, read_batch, survey
from lorax_gen.recipes.registry import load_config
from lorax_gen.tokenizers import SPECIAL, word_level
from tests.data.rows import write_lines

CONFIG = {
    "method": "lora_gen", "prompts": 4, "queries_per_prompt": 2,
    "data": {
        "kind": "mixture", "sources": ["mine.jsonl", "few.jsonl=0.5"], "frame": "{input} :",
        "directory": ".", "shots": 1, "prompt_length": 16, "question_length": 5,
        "held_out": {"rows": 0.25},
    },
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """`config(**data)` writes mine.yaml, of 8 rows of one task and 2 of another, and of one that is
    left out."""
    rows = [
        {"task": "a", "instruction": "Name the color .", "input": thing, "output": "red"}
        for thing in ("apple", "anchor", "arrow", "barrel", "basket", "bell", "boat", "box")
    ]
    write_lines(tmp_path / "mine.jsonl", [*rows, rows[0] | {"output": ""}])
    few = [row | {"task": "b", "instruction": "Grade the thing ."} for row in rows[:2]]
    write_lines(tmp_path / "few.jsonl", few)

    def write(method="lora_gen", **data):
        values = CONFIG | {"method": method, "data": CONFIG["data"] | data}
        if method == "lora":
            del values["prompts"], values["queries_per_prompt"]
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
        return "mine.yaml"

    return write


def cells(out, row):
    """The numbers of a table's row."""
    [line] = [line for line in out.splitlines() if line.startswith(f"{row}  ")]
    return line.removeprefix(row).split()


def test_samples_show_what_both_models_read_and_where_the_loss_is(call, config):
    code, out, _ = call("data", config(), "--samples", 2, "--data.shots", 0)
    assert code == 0
    first, second = out.split("\nsample 2, task ")
    assert re.match(r"sample 1, task '[ab]'\n  the cloud reads [56] tokens\n    <bos> ", first)
    asked = re.findall(
        r"  the edge reads 5 tokens, the loss is on 2\n    <bos> (\w+) :>>> red <eos><<<\n", first
    )
    assert 1 <= len(asked) == len(set(asked)) <= 2
    assert second.split("\n\n")[0] != first


def test_tables_count_sources_held_out_rows_and_what_is_missing(call, config):
    code, out, err = call("data", config(), "--samples", 0)
    assert code == 0 and "no files of hellaswag, winogrande, piqa" in err
    assert cells(out, "mine") == ["1", "6", "1", "1"]  # 2 of 8 rows held out, one without output
    assert cells(out, "few") == ["1", "1", "0.5", "0"]
    assert "tasks of mine (rows): a (6)\n" in out and "frame of rows: '{input} :'\n" in out
    assert cells(out, "held_out_rows") == ["2", "2", "3"]
    assert cells(out, "prompts")[-1] == "16"
    assert cells(out, "questions with answers") == ["5"] * 5
    # An epoch of 6 + round(0.5) samples is two batches of 4; the task of one row has no other.
    assert "tokens, in 2 batches; an epoch has 2\n" in out
    assert cells(out, "samples (a prompt with its questions)") == ["8"]
    missing = int(cells(out, "shots that their tasks do not have")[0])
    assert missing == int(cells(out, "questions that their tasks do not have")[0]) > 0


def test_what_is_too_long_is_counted(call, config):
    code, out, _ = call("data", config(), "--samples", 0, "--data.prompt-length", 6, "--batches", 3)
    assert code == 0 and "tokens, in 3 batches; an epoch has 2\n" in out
    left = int(cells(out, "shots left out of them")[0])
    assert left == int(cells(out, "prompts too long with all shots")[0]) > 0
    assert int(cells(out, "prompts")[-2]) <= 6


def test_words_that_a_tokenizer_does_not_know_are_counted(call, config, tmp_path):
    (tmp_path / "few.jsonl").write_text(
        "".join(
            json.dumps({"task": "b", "instruction": "Qwerty .", "input": x, "output": "red"}) + "\n"
            for x in ("apple", "bell")
        )
    )
    out = call("data", config(), "--samples", 0)[1]
    assert re.search(r"^[1-9]\d* prompts or questions hold a word that their tokenizer", out, re.M)
    assert "does not know" not in call("data", "own-tasks", "--samples", 0, "--batches", 1)[1]


def test_control_characters_of_rows_do_not_reach_the_terminal(call, config, tmp_path):
    text = (tmp_path / "mine.jsonl").read_text() if (tmp_path / "mine.jsonl").exists() else ""
    assert text  # the fixture has written it
    (tmp_path / "mine.jsonl").write_text(text.replace('"task": "a"', '"task": "\\u001b[31ma"'))
    out = call("data", config(), "--samples", 1)[1]
    assert "\x1b" not in out and "\\x1b[31ma (6)" in out


def test_a_recipe_without_prompts_shows_questions_alone(call, config):
    code, out, _ = call("data", config("lora", held_out={}), "--samples", 1, "--batches", 1)
    assert code == 0 and "the cloud reads" not in out
    assert out.count("the edge reads 5 tokens, the loss is on 2") == 1
    assert "nothing is held out: set data.held_out, or data.evaluate_on" in out


def test_the_world_is_shown_with_its_unseen_tasks(call):
    code, out, _ = call("data", "world", "--samples", 1, "--batches", 2)
    assert code == 0 and "the cloud reads" in out and "tokens, in 2 batches\n" in out
    assert cells(out, "sort")[:2] == ["154", "38"] and cells(out, "clock")[:2] == ["116", "28"]


def test_what_is_shown_is_the_batch_that_training_reads(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config()
    _, parsed = load_config("mine.yaml")
    preview = open_preview(parsed)
    batch = preview.batch(0)
    again = open_preview(parsed, load_model).batch(0)
    assert all((batch[name] == again[name]).all() for name in batch)
    read = list(read_batch(batch))
    assert [len(one.prompt) for one in read] == batch["prompt_lengths"].tolist()
    tokens = [ids for one in read for before, after in one.questions for ids in (*before, *after)]
    rows = [row[row != preview.edge.pad_id] for row in batch["tokens"]]
    assert tokens == [int(i) for row in rows if len(row) > 1 for i in row]
    assert survey(preview, 1).batches == 1


def test_a_reader_has_the_tokenizer_and_the_shape_of_its_model():
    reader, model = load_reader("world/edge"), load_model("world/edge")
    assert reader.is_abstract and reader.config == model.config
    assert reader.tokenizer_fingerprint == model.tokenizer_fingerprint
    assert (reader.bos, reader.stop_ids) == (model.bos, model.stop_ids)


@pytest.mark.parametrize(
    "words, message",
    [
        (("paper",), "no model directory at tinyllama_1b; give one, or a hub name"),
        (("world-edge",), "method pretrain makes its documents from the embedded world"),
        (("own-task",), "no config file own-task; did you mean own-tasks?"),
        (("own-tasks", "--data.sourcs", "x"), "did you mean --data.sources?"),
        (("own-tasks", "--samples", "-1"), "samples is -1"),
        (("own-tasks", "--data.sources", "none.jsonl"), "unknown source 'none.jsonl'"),
    ],
)
def test_bad_input_is_one_line(refused, words, message):
    assert message in refused("data", *words)


def test_an_unknown_key_of_the_data_has_the_nearest_name(refused, tmp_path):
    text = "method: lora_gen\ndata: {kind: mixture, sourcs: [x]}\n"
    (tmp_path / "own.yaml").write_text(text)
    assert refused("data", "own.yaml").startswith(
        "own.yaml: unknown key data.sourcs; did you mean data.sources?"
    )


def test_the_command_alone_is_its_help(call):
    code, out, _ = call("data")
    assert code == 0 and "look at it before you train" in out
    code, out, _ = call("data", "own-tasks", "--help")
    assert code == 0 and "--samples" in out and "--data.frame" in out


@pytest.mark.parametrize("command", ["data", "train"])
def test_a_world_config_with_models_that_lack_its_words_is_one_line(refused, tmp_path, command):
    edge = load_model("world/edge")
    words = [word for word in edge.tokenizer.get_vocab() if word not in ("gamma", *SPECIAL)]
    save_model(tmp_path / "other", dataclasses.replace(edge, tokenizer=word_level(words)))
    message = refused(command, "world", "--edge", tmp_path / "other", "--run.steps", 1)
    assert message == (
        "data.kind is world, but the edge model other lacks 1 of the world's 454 words (gamma, "
        "...); train world/cloud and world/edge on it, and other models on data.kind mixture\n"
    )
    assert not (tmp_path / "runs").exists()
