"""A training row with the prompt in context is the text that evaluation gives such a model."""

import json

import numpy as np
import pytest

from lorax_gen.data.agent import AgentSource, full_prompt, load_agent
from lorax_gen.data.benchmarks import BENCHMARKS, few_shot
from lorax_gen.data.mixture import Mixture
from lorax_gen.data.own_tasks import RowSource, load_row_tasks
from lorax_gen.data.questions import Question
from lorax_gen.data.sources import QuestionSource
from lorax_gen.data.tokens import Encoder
from lorax_gen.evaluation.rows import RowCases, ask_rows
from lorax_gen.frames import IO, PLAIN, Frame
from lorax_gen.tokenizers import word_level
from tests.data.test_agent import TALK, record

TURN = Frame("<user> {input} <bot>", "", turn=True)


@pytest.fixture
def tasks(tmp_path):
    rows = [
        {"task": "a", "instruction": "say it .", "input": f"word{i}", "output": f"out{i}"}
        for i in range(2)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_row_tasks(path)[0]


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("frame", [PLAIN, IO, TURN], ids=["plain", "io", "turn"])
def test_of_rows_in_any_frame(tasks, frame, shots):
    episode = RowSource(tasks, "own", frame).episode(0, np.random.default_rng(0), shots, 1)
    [(question, _)] = episode.questions
    cases = RowCases(ask_rows(tasks, others=1), frame, shots)
    asked = [case.item.input for case in cases.asked].index("word0")
    [expected] = cases.prompted()[asked]
    assert episode.join(episode, question) == expected
    assert expected.count("word1") == shots


@pytest.mark.parametrize("shots", [0, 1])
def test_of_a_benchmark(shots):
    arc = BENCHMARKS["arc_easy"]
    train = [Question(str(i), f"Which {i} ?", ("one", "two"), i) for i in range(2)]
    source = QuestionSource(arc, train)
    episode = source.episode(0, np.random.default_rng(0), shots, 1)
    [(question, _)] = episode.questions
    assert [episode.join(episode, question)] == list(few_shot(arc, train[1:][:shots], train[0]))


def test_of_gpt4tools(tmp_path):
    (tmp_path / "gpt4tools_71k.json").write_text(json.dumps([record()]))
    [item] = load_agent("train", tmp_path)
    episode = AgentSource([item]).episode(0, np.random.default_rng(0), 0, 1)
    assert episode.join(episode, episode.questions[0][0]) == full_prompt(item)
    assert TALK.format("Make it large.") in full_prompt(item)


# --- batches -------------------------------------------------------------------------------------


def mix(tasks, **changes):
    names = ["say", "it", ".", *(f"{kind}{i}" for kind in ("word", "out") for i in range(2))]
    encoder = Encoder(word_level(names))
    options = {"seed": 0, "prompts": 2, "queries": 1, "shots": 1, "prompt_length": 6,
               "question_length": 4, "in_context": True} | changes  # fmt: skip
    return encoder, Mixture([RowSource(tasks, "own", PLAIN)], [1], None, encoder, **options)


def words_of(encoder, ids):
    found = encoder.tokenizer.convert_ids_to_tokens(ids.tolist())
    return [word for word in found if not word.startswith("<")]


def test_a_batch_has_prompts_questions_and_a_loss_on_the_answers(tasks):
    encoder, mixture = mix(tasks)
    batch = mixture.batch(0)
    assert set(batch) == {"tokens", "answer"} and batch["tokens"].shape == (2, 10)
    for tokens, answer in zip(batch["tokens"], batch["answer"], strict=True):
        own = words_of(encoder, tokens[answer])
        other = {"out0": "1", "out1": "0"}[own[0]]
        expected = [f"word{other}", f"out{other}", f"word{own[0][-1]}", *own]
        assert words_of(encoder, tokens) == ["say", "it", ".", *expected]


def test_shots_are_left_out_of_rows_that_are_too_long(tasks):
    encoder, mixture = mix(tasks, prompt_length=4)
    tokens = mixture.batch(0)["tokens"]
    assert all(len(words_of(encoder, row)) == 5 for row in tokens)
    assert mixture.counts["shots_left_out"] == 2


@pytest.mark.parametrize("pattern, marked", [("own", True), ("a", True), ("b*", False)])
def test_rows_of_a_source_or_task_are_marked(tasks, pattern, marked):
    _, mixture = mix(tasks, groups=(pattern,))
    np.testing.assert_array_equal(mixture.batch(0)["group"], [marked] * 2)
