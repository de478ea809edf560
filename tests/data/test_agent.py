"""GPT4Tools: the tools for the cloud, the request for the edge, and nothing lost between them."""

import json

import numpy as np
import pytest

from lorax_gen.data.agent import AgentSource, full_prompt, load_agent, split_instruction
from lorax_gen.data.readers import read_rows
from lorax_gen.errors import UserError

RULES = "You can use tools.\nTOOLS:\n> Zoom: make it large.\n\nshould be one of [{}]"
TALK = "Previous conversation:\n\nHuman: Provide a.png.\nAI: Received.\n\nNew input: {}\nThink.\n"


def record(tools="Zoom", wish="Make it large.", **changes):
    instruction = f"{RULES.format(tools)}\n\n{TALK.format(wish)}"
    output = f"Thought: Yes\nAction: {tools}\nObservation:\n"
    return {"instruction": instruction, "input": "", "output": output} | changes


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def load(tmp_path, records):
    write(tmp_path / "gpt4tools_71k.json", records)
    return load_agent("train", tmp_path)


def test_an_instruction_is_cut_before_the_conversation_and_rejoined(tmp_path):
    (item,) = load(tmp_path, [record()])
    assert item.prompt == RULES.format("Zoom")
    assert item.request == TALK.format("Make it large.")
    assert full_prompt(item) == record()["instruction"]
    assert (item.id, item.tools) == ("0", "Zoom")


def test_only_the_first_conversation_cuts():
    text = f"rules\n\n{TALK.format('Say: Previous conversation:')}"
    assert split_instruction(text) == ("rules", TALK.format("Say: Previous conversation:"))


@pytest.mark.parametrize(("split", "count"), [("test", 652), ("tyshiwo1_annotations_261", 261)])
def test_every_real_record_splits_and_rejoins(shared_data, split, count):
    items = load_agent(split, shared_data)
    assert len(items) == count
    for item in items:
        assert "tools" in item.prompt
        assert "New input:" not in item.prompt
        assert item.request.startswith("Previous conversation:\n\n")
        assert item.request.count("\nNew input: ") == 1
        assert "use the following format" not in item.request
        assert "Let's think step by step.\n" in item.request
        assert split_instruction(full_prompt(item)) == (item.prompt, item.request)
    name = "gpt4tools_test_unseen_tools" if split == "test" else split
    (path,) = shared_data.rglob(f"{name}.*")
    assert [full_prompt(item) for item in items] == [
        row["instruction"] for _, row in read_rows(path)
    ]


def test_samples_ask_for_what_the_tools_of_the_prompt_can_do(tmp_path):
    items = load(tmp_path, [record(), record("Pan"), record(wish="Larger!"), record("Tilt")])
    source = AgentSource(items)
    assert (len(source), source.tasks, source.name) == (4, 3, "gpt4tools")
    episode = source.episode(0, np.random.default_rng(0), shots=5, queries=3)
    assert episode.prompt == items[0].prompt
    assert episode.questions == tuple((items[i].request, items[i].output) for i in (0, 2))
    alone = source.episode(1, np.random.default_rng(0), shots=0, queries=2)
    assert alone.questions == ((items[1].request, items[1].output),)
    assert alone.task != episode.task
    assert any("Larger!" in text for text in source.texts())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": "Make it large."}, "the instruction has no blank line and 'Previous"),
        ({"instruction": None}, "instruction should be a string"),
        ({"input": "more"}, "input should be empty"),
        ({"output": " "}, "the output is empty"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=r"gpt4tools_71k.json, item 2: ") as error:
        load(tmp_path, [record(), record(**change)])
    assert message in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no file gpt4tools_71k.json or gpt4_tools_71k.json"):
        load_agent("train", tmp_path)
    with pytest.raises(UserError, match="no such data directory"):
        load_agent("train", tmp_path / "nowhere")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "mine.json", [record()])
    with pytest.raises(UserError, match="several files are called mine"):
        load_agent("mine", tmp_path)
