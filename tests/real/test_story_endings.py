"""A real trained model knows how stories go on: a benchmark of true and of shuffled sentences."""

import lzma
import random

import pytest

from lorax_gen import load_model
from lorax_gen.data.benchmarks import Benchmark
from lorax_gen.data.hub_rows import HubData
from lorax_gen.data.questions import Question
from lorax_gen.evaluation.benchmark import Setting, System, evaluate_benchmark

COUNT = 40
ENDINGS = Benchmark(
    "endings",
    "Endings",
    "Go on with the story.",
    "{question}",
    HubData("endings", None, None, {"train": "train", "test": "test"}),
    columns=dict,
)


@pytest.fixture(scope="module")
def questions(shared_data):
    """Two sentences of a story, then the third, or its words in another order."""
    path = shared_data / "corpora/tinystories_cased_0.9MB.txt.xz"
    rng, found = random.Random(0), []
    for text in lzma.decompress(path.read_bytes()).decode().split("\n"):
        sentences = text.strip().split(". ")
        if len(sentences) < 4 or len(words := sentences[2].split()) < 6:
            continue
        wrong = rng.sample(words, len(words))
        choices = [f"{' '.join(order)}." for order in (words, wrong)]
        answer = rng.randrange(2)
        choices = tuple(choices if answer == 0 else choices[::-1])
        found.append(Question(str(len(found)), ". ".join(sentences[:2]) + ".", choices, answer))
        if len(found) == COUNT:
            return found
    raise AssertionError("too few stories")


def test_true_sentences_are_likelier_than_shuffled_ones(stories260k, questions):
    model = load_model(stories260k)
    setting = Setting("plain", bos=True)  # as it was trained
    result = evaluate_benchmark(ENDINGS, questions, setting, System(model))
    assert result.n == COUNT and result.truncated == 0
    assert result.acc > 0.9
