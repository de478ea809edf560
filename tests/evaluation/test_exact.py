"""A correct answer is what greedy decoding writes, however questions are put into batches."""

import numpy as np
import pytest

from lorax_gen import generate_text, specialize
from lorax_gen.evaluation.answerers import Answerer, System
from lorax_gen.evaluation.exact import correct_answers
from lorax_gen.evaluation.world import WorldCases
from lorax_gen.inference.choices import ChoiceItem, score_items
from lorax_gen.models.decoding import generate_tokens
from tests.tiny import PROMPTS, make_generator, one_word_edge


@pytest.fixture(scope="module")
def system(tiny_world_system):
    return tiny_world_system._replace(edge=one_word_edge(tiny_world_system))


@pytest.fixture(scope="module")
def questions(system):
    """Of any task: here they are asked of models that know none."""
    return [question for question, _ in system.world.tasks[0].questions[:5]]


def test_correct_is_what_greedy_decoding_writes_word_by_word(tiny_world_system):
    edge, rng = tiny_world_system.edge, np.random.default_rng(0)
    rows, time, words = 12, 6, 3
    lengths = rng.integers(2, time + 1, rows).astype(np.int32)
    tokens = rng.integers(4, edge.config.vocab_size, (rows, time)).astype(np.int32)
    written = np.asarray(
        generate_tokens(edge.params, edge.config, tokens, lengths, max_new_tokens=words)
    )
    answers = written.copy()
    for row in range(6):  # one other word, at any place of the answer
        answers[row, row % words] += 1
    items = [
        ChoiceItem(((tokens[row, :length].tolist(), answers[row].tolist()),))
        for row, length in enumerate(lengths)
    ]
    correct = [score.greedy[0] for score in score_items(edge, items)]
    np.testing.assert_array_equal(correct, (answers == written).all(1))
    np.testing.assert_array_equal(correct, [False] * 6 + [True] * 6)


def test_questions_are_scored_as_the_model_answers(system, questions):
    edge = system.edge
    answers = generate_text(edge, questions, max_new_tokens=3)
    assert all(len(answer.split()) == 1 for answer in answers)  # then the text ends
    asked = list(zip(questions, answers, strict=True))
    asked[1] = (asked[1][0], "apple" if answers[1] != "apple" else "bell")
    asked[3] = (asked[3][0], f"{answers[3]} {answers[3]}")  # goes on where the model ends
    cases = WorldCases([], [(0, pair) for pair in asked])
    found = correct_answers(Answerer("plain", "", edge), cases, cases.answers)
    np.testing.assert_array_equal(found, [True, False, True, False, True])


def test_specialised_scores_are_those_of_merged_edges(system, questions):
    """One batch for all tasks, gates per row, against one merged model for each task."""
    cloud, edge = system.cloud, system.edge
    generator = make_generator(system, edge_targets=("gate", "up"))
    cards = specialize(PROMPTS, cloud, edge, generator)
    answers = [
        generate_text(card.merge(edge, generator), questions, max_new_tokens=3) for card in cards
    ]
    # Each task is asked what its own model answers and what the next task's model answers.
    asked, expected = [], []
    for row, question in enumerate(questions):
        for task in range(len(PROMPTS)):
            for other in (task, (task + 1) % len(PROMPTS)):
                asked.append((task, (question, answers[other][row])))
                same = answers[task][row] == answers[other][row]
                ended = len(answers[task][row].split()) < 3  # or the model would have gone on
                expected.append(same and ended)
    assert 0 < np.sum(expected) < len(expected)
    assert sum(expected[1::2]) < len(expected) // 4  # prompts make models that answer differently
    cases = WorldCases(PROMPTS, asked)
    answerer = System(edge, cloud, generator).answerer("lora_gen")
    found = correct_answers(answerer, cases, cases.answers)
    np.testing.assert_array_equal(found, expected)
