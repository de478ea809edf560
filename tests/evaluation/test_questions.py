"""A right answer is what greedy decoding writes, however questions are put into batches."""

import numpy as np
import pytest

from lorax_gen import generate_text, specialize
from lorax_gen.data.tasks import behind_prompt
from lorax_gen.evaluation.greedy import right_answers, right_specialised
from lorax_gen.evaluation.system import System
from lorax_gen.evaluation.world import WorldQuiz
from lorax_gen.inference.choices import ChoiceItem, score_items
from lorax_gen.models.decoding import generate
from tests.tiny import PROMPTS, make_generator, one_word_edge


@pytest.fixture(scope="module")
def system(tiny_world_system):
    return tiny_world_system._replace(edge=one_word_edge(tiny_world_system))


@pytest.fixture(scope="module")
def questions(system):
    """Of any task: here they are asked of models that know none."""
    return [question for question, _ in system.world.tasks[0].questions[:5]]


def test_right_is_what_greedy_decoding_writes_word_by_word(tiny_world_system):
    edge, rng = tiny_world_system.edge, np.random.default_rng(0)
    rows, time, words = 12, 6, 3
    lengths = rng.integers(2, time + 1, rows).astype(np.int32)
    tokens = rng.integers(4, edge.config.vocab_size, (rows, time)).astype(np.int32)
    written = np.asarray(generate(edge.params, edge.config, tokens, lengths, max_new_tokens=words))
    answers = written.copy()
    for row in range(6):  # one other word, at any place of the answer
        answers[row, row % words] += 1
    items = [
        ChoiceItem(((tokens[row, :length].tolist(), answers[row].tolist()),))
        for row, length in enumerate(lengths)
    ]
    right = [score.greedy[0] for score in score_items(edge, items)]
    np.testing.assert_array_equal(right, (answers == written).all(1))
    np.testing.assert_array_equal(right, [False] * 6 + [True] * 6)


def test_questions_are_scored_as_the_model_answers(system, questions):
    edge = system.edge
    answers = generate_text(edge, questions, max_new_tokens=3)
    assert all(len(answer.split()) == 1 for answer in answers)  # then the text ends
    asked = list(zip(questions, answers, strict=True))
    asked[1] = (asked[1][0], "apple" if answers[1] != "apple" else "bell")
    asked[3] = (asked[3][0], f"{answers[3]} {answers[3]}")  # goes on where the model ends
    right = right_answers(edge, asked, tokens_per_batch=64)
    np.testing.assert_array_equal(right, [True, False, True, False, True])


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
    right = right_specialised(System(edge, cloud, generator), PROMPTS, asked)
    np.testing.assert_array_equal(right, expected)


def test_a_quiz_asks_every_task_and_counts_by_split_and_family(tiny_world_system):
    world, families = tiny_world_system.world, ("grade", "clock")
    quiz = WorldQuiz(world, families, per_task=3)
    asked = [
        task for split in ("seen", "unseen") for f in families for task in world.select(split, f)
    ]
    assert len(quiz.prompts) == len(asked) and len(quiz.questions) == 3 * len(asked)
    for (i, pair), (bare, prompted) in zip(
        quiz.questions, zip(quiz.bare, quiz.prompted, strict=True), strict=True
    ):
        assert pair == bare and pair in asked[i].questions
        assert prompted == (f"{quiz.prompts[i]} {behind_prompt(pair[0])}", pair[1])
    right = np.array([asked[i].family == "clock" for i, _ in quiz.questions])
    found = quiz.accuracy(right)
    assert found["accuracy/seen/clock"] == found["accuracy/unseen/clock"] == 1.0
    assert found["accuracy/seen/grade"] == 0.0 and found["accuracy/unseen"] == 0.5
