"""Real questions, real tokenizer: through lm-eval's interface, our scores are those of its own
backend on torch, and the answers chosen are the same."""

import functools
import itertools
import logging
import os

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lorax-gen[harness]'")
pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
pytest.importorskip("accelerate", reason="needs torch: pip install -e '.[parity]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lorax_gen import save_model
from lorax_gen.data.benchmarks import BENCHMARKS, few_shot, harness_shots, load_questions
from lorax_gen.evaluation.harness_model import HarnessModel
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import load_tokenizer

COUNT = int(os.environ.get("ITEMS", 4))  # of each task; more by hand
TASKS = ("arc_challenge", "boolq", "winogrande", "hellaswag")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def directory(llama2_directory, random_params, tmp_path_factory):
    tokenizer = load_tokenizer(llama2_directory)
    config = DecoderConfig(vocab_size=len(tokenizer), **SMALL)
    path = tmp_path_factory.mktemp("models") / "small"
    save_model(path, Model(config, random_params(config), tokenizer))
    return str(path)


@pytest.fixture(scope="module")
def models(directory):
    """`models(bos)`: ours and theirs, with the tokenizer's own BOS (None) or with none (False)."""

    @functools.cache
    def make(bos):
        theirs = HFLM(directory, device="cpu", dtype="float32", add_bos_token=bos)
        return HarnessModel(directory, add_bos_token=bos), theirs

    return make


def requests_of(name, data, shots):
    """lm-eval's requests for the first items of a benchmark."""
    benchmark = BENCHMARKS[name]
    questions = load_questions(benchmark, "test", data)[:COUNT]
    train = load_questions(benchmark, "train", data) if shots else []
    drawn = harness_shots(benchmark, train, shots, questions)
    out = []
    for i, question in enumerate(questions):
        contexts = few_shot(benchmark, drawn[i], question)
        choices = benchmark.continuations(question)
        contexts = contexts * (len(choices) // len(contexts))
        for pair in zip(contexts, choices, strict=True):
            out.append(Instance("loglikelihood", {}, pair, 0, (name, i, 1)))
    return out


@pytest.mark.parametrize(
    "name, shots, bos",
    [*((name, shots, None) for name in TASKS for shots in (0, 5)), ("winogrande", 5, False)],
)
def test_answers_are_those_of_the_torch_backend(shared_data, models, name, shots, bos, caplog):
    asked = requests_of(name, shared_data, shots)
    with caplog.at_level(logging.ERROR):
        ours, theirs = (model.loglikelihood(asked, disable_tqdm=True) for model in models(bos))
    found, expected = (np.array([score for score, _ in each]) for each in (ours, theirs))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for _, group in itertools.groupby(range(len(asked)), key=lambda i: asked[i].doc_id):
        group = list(group)
        assert found[group].argmax() == expected[group].argmax()
