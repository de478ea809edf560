"""Every score is the value that follows from its definition, for each way to be wrong."""

import dataclasses
import gzip
import json
import math

import pytest

from lorax_gen.evaluation.agent_metrics import (
    Steps,
    ToolScores,
    arguments_alike,
    bleu_1,
    mean_scores,
    parse,
    score_answer,
)

THOUGHT = "Thought: Do I need to use a tool?"
REPLY = f"{THOUGHT} No\nAI: It is image/c.png.\n"
CHAT = f"{THOUGHT} No\nAI: Good morning.\n"


def call(tool="Cut Out", arguments="image/a.png, the left cat", thought="Yes"):
    return (
        f"{THOUGHT} {thought}\nAction: {tool}\nAction Input: {arguments}\nObservation:\nfound it\n"
    )


GOLD = call() + REPLY


def test_what_a_text_says_is_read_line_by_line():
    steps = parse(GOLD.replace("Cut Out", " Cut Out  "))
    assert steps == Steps(("Yes", "No"), ("Cut Out",), ("image/a.png, the left cat",), True)
    assert parse("Action:\nAI:\nThought: Do I need it? Yes") == Steps((), (), (), False)


WRITTEN = {
    "gold": (GOLD, (1, 1, 1, 1, 1)),
    "cut at the observation": (GOLD.split("Observation:")[0], (1, 1, 1, 1, 1)),
    "empty": ("", (0, 0, 0, 0, 0)),
    "no tool": (CHAT, (0, 0, 0, 0, 0)),
    "wrong tool": (call("Describe") + REPLY, (1, 0, 1, 0, 2 / 3)),
    "wrong case": (call("cut out") + REPLY, (1, 0, 1, 0, 2 / 3)),
    "wrong thought": (call(thought="Maybe") + REPLY, (0, 1, 1, 0, 2 / 3)),
    "extra action": (call() + call() + REPLY, (1 / 2, 1 / 2, 1 / 2, 0, 1)),
    "extra action first": (call("Describe", "") + GOLD, (1 / 2, 0, 0, 0, 1 / 3)),
    "too few arguments": (call(arguments="image/a.png") + REPLY, (1, 1, 0, 0, 2 / 3)),
    "too many arguments": (call(arguments="a.png, b, c") + REPLY, (1, 1, 0, 0, 2 / 3)),
    "no file": (call(arguments="image a, the left cat") + REPLY, (1, 1, 0, 0, 2 / 3)),
    "another file": (call(arguments="b.png, the left cat") + REPLY, (1, 1, 1, 1, 1)),
    "half right": (call(arguments="a.png, one dog") + REPLY, (1, 1, 1 / 2, 1, 5 / 6)),
    "nearly right": (
        call(arguments="a.png, the left dog") + REPLY,
        (1, 1, 5 / 6, 1, 17 / 18),
    ),
    "another thought at the end": (call() + f"{THOUGHT} Yes", (1 / 2, 1, 1, 0, 1)),
    "no thought": (GOLD.replace(f"{THOUGHT} Yes\n", ""), (0, 1, 1, 0, 2 / 3)),
}


@pytest.mark.parametrize("written, scores", WRITTEN.values(), ids=WRITTEN)
def test_with_a_tool(written, scores):
    assert dataclasses.astuple(score_answer(GOLD, written)) == pytest.approx(scores)


@pytest.mark.parametrize(
    "written, scores",
    [
        (CHAT, (1, 1, 1, 1, 1)),
        (f"{THOUGHT} No\nAI: Any other answer.", (1, 1, 1, 1, 1)),
        ("", (0, 0, 0, 0, 0)),
        (GOLD, (0, 0, 0, 0, 0)),
        (f"{THOUGHT} No\n", (0, 0, 0, 0, 1)),  # says nothing: right only in what IoU looks at
        (CHAT + GOLD, (1 / 3, 0, 0, 0, 1)),  # "No", and then more thoughts
    ],
)
def test_without_a_tool(written, scores):
    assert dataclasses.astuple(score_answer(CHAT, written)) == pytest.approx(scores)


def test_an_answer_of_several_calls_is_compared_call_by_call():
    gold = call("Find", "a.png, a cat") + call("Describe", "b.png") + REPLY
    swapped = call("Describe", "b.png") + call("Find", "a.png, a cat") + REPLY
    assert dataclasses.astuple(score_answer(gold, gold)) == (1, 1, 1, 1, 1)
    assert dataclasses.astuple(score_answer(gold, swapped)) == pytest.approx((1, 0, 0, 0, 1 / 3))
    first = dataclasses.astuple(score_answer(gold, call("Find", "a.png, a cat")))
    assert first == pytest.approx((1 / 2, 1 / 2, 1 / 2, 0, 1 / 2))


def test_words_are_compared_by_clipped_precision_and_brevity():
    assert bleu_1("the left cat", " cat  left the") == 1
    assert bleu_1("the cat", "the the the") == pytest.approx(1 / 3)
    assert bleu_1("the left black cat", "the cat") == pytest.approx(math.exp(1 - 4 / 2))
    assert bleu_1("a", "b") == bleu_1("a", "") == bleu_1("", "a") == bleu_1("", "") == 0


def test_arguments_are_compared_one_by_one():
    assert arguments_alike("a.png,a cat,a dog", "x.png, a cat, a cow") == pytest.approx(2.5 / 3)
    assert arguments_alike("a cat", "a.png") == 0
    assert arguments_alike("", "") == 0  # nothing said has no words in common with itself


def test_means_are_over_items_and_the_average_over_scores():
    mean = mean_scores([score_answer(GOLD, call("Describe")), score_answer(GOLD, "")])
    assert mean == ToolScores(*map(pytest.approx, (1 / 2, 0, 1 / 2, 0, 1 / 3)))
    assert mean.average == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 5)


def test_the_right_answers_of_the_test_set_score_what_they_do_in_the_original(shared_data):
    """Not 100 everywhere: three items have a call with an empty argument."""
    path = shared_data / "gpt4tools" / "gpt4tools_test_unseen_tools.json.gz"
    golds = [item["output"] for item in json.loads(gzip.decompress(path.read_bytes()))]
    assert len(golds) == 652
    for written in (golds, [gold.split("Observation:")[0] for gold in golds]):
        mean = mean_scores(map(score_answer, golds, written))
        shares = [round(100 * share, 2) for share in dataclasses.astuple(mean)]
        assert shares == [100, 100, 99.54, 99.54, 99.85]
    spoiled = mean_scores(score_answer(gold, gold.replace(".png", "")) for gold in golds)
    shares = [round(100 * share, 2) for share in dataclasses.astuple(spoiled)]
    assert shares == [100, 100, 18.4, 18.4, 72.8]
