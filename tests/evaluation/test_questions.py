"""A right answer is what greedy decoding writes, however questions are put into batches."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen import generate_text, specialize
from lorax_gen.data.batches import Encoder
from lorax_gen.evaluation.questions import (
    answers_right,
    in_batches,
    score_questions,
    score_specialised,
)
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
    whole = np.pad(tokens, ((0, 0), (0, words)))
    marked = np.zeros_like(whole, bool)
    for row, length in enumerate(lengths):
        whole[row, length : length + words] = answers[row]
        marked[row, length : length + words] = True
    right = answers_right(edge.params, edge.config, jnp.asarray(whole), jnp.asarray(marked))
    np.testing.assert_array_equal(right, (answers == written).all(1))
    np.testing.assert_array_equal(right, [False] * 6 + [True] * 6)


@pytest.mark.parametrize("rows, size", [(1, 4), (4, 4), (7, 3), (6, 3)])
def test_batches_are_of_one_size_and_their_padding_is_cut(rows, size):
    seen = []

    def score(part):
        seen.append(len(part["x"]))
        return part["x"] * part["y"][:, 0]

    x, y = np.arange(rows), np.arange(2 * rows).reshape(rows, 2)
    np.testing.assert_array_equal(in_batches(score, {"x": x, "y": y}, size), x * y[:, 0])
    assert seen == [size] * -(-rows // size)


def test_questions_are_scored_as_the_model_answers(system, questions):
    edge = system.edge
    answers = generate_text(edge, questions, max_new_tokens=3)
    assert all(len(answer.split()) == 1 for answer in answers)  # then the text ends
    asked = list(zip(questions, answers, strict=True))
    asked[1] = (asked[1][0], "apple" if answers[1] != "apple" else "bell")
    asked[3] = (asked[3][0], f"{answers[3]} {answers[3]}")  # goes on where the model ends
    encoder = Encoder(edge.tokenizer)
    right = score_questions(edge.params, edge.config, encoder, asked, 7, batch_size=4)
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
    right = score_specialised(
        generator.params,
        generator.stats,
        cloud,
        edge,
        generator.spec(cloud.config, edge.config),
        PROMPTS,
        asked,
        prompt_length=32,
        length=7,
        batch_size=8,
    )
    np.testing.assert_array_equal(right, expected)
