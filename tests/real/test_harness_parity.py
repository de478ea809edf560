"""Whole benchmarks beside lm-evaluation-harness: its own tasks, on the same files, with its own
backend on torch. Item by item the log-likelihoods are ours, and so are the accuracies.

ITEMS=200 in the environment takes that many of each benchmark.
"""

import os

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lorax-gen[harness]'")
pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
pytest.importorskip("accelerate", reason="needs torch: pip install -e '.[parity]'")

from lorax_gen import load_model, save_model
from lorax_gen.data.benchmarks import find_benchmark, load_questions
from lorax_gen.evaluation.answerers import System
from lorax_gen.evaluation.benchmark import evaluate_benchmark
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import load_tokenizer
from tests.real.harness_items import read_items, torch_harness, worst_difference, write_tasks

COUNT = int(os.environ.get("ITEMS", 10))
TRAIN = 300  # questions that shots are drawn from
LENGTH = 1024  # of the model: some items with five shots are longer
TASKS = ("arc_challenge", "boolq", "winogrande", "hellaswag")


@pytest.fixture(scope="module")
def files(shared_data, tmp_path_factory):
    """A folder of data in the columns of the hub, and of lm-eval's tasks that read them there."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, TASKS, shared_data, {"train": TRAIN, "test": COUNT})
    return folder


@pytest.fixture(scope="module")
def directory(llama2_directory, random_params, tmp_path_factory):
    """A small random LLaMA with the real tokenizer of LLaMA 2."""
    tokenizer = load_tokenizer(llama2_directory)
    config = DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=LENGTH,
    )
    path = tmp_path_factory.mktemp("models") / "llama"
    save_model(path, Model(config, random_params(config), tokenizer))
    return path


@pytest.fixture(scope="module")
def theirs(files, directory):
    """`theirs(name, shots)`: what lm-eval reports of a task, its samples too."""
    # As in lm-eval 0.4.3, which the paper used: no BOS before LLaMA's contexts.
    return torch_harness(directory, files, batch_size=2, add_bos_token=False)


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("name", TASKS)
def test_items_score_as_in_the_harness(name, shots, files, directory, theirs, tmp_path):
    expected, samples = theirs(name, shots)
    record, path = find_benchmark(name), tmp_path / "items.jsonl"
    questions = load_questions(record, "test", files)
    train = load_questions(record, "train", files)
    answerer = System(load_model(directory, bos=False)).answerer("icl")
    options = {"shots": shots, "train": train, "path": path}
    result = evaluate_benchmark(record, questions, answerer, **options)

    rows = read_items(path)
    assert len(rows) == len(samples) == len(questions) == COUNT
    worst = worst_difference(rows, samples)
    print(
        f"{name}, {shots} shots, {COUNT} items: log-likelihoods differ by {worst:.1e} at most, "
        f"acc {result.acc:.4f} and {expected['acc,none']:.4f}, {result.truncated} truncated"
    )
    assert worst < 1e-3
    assert result.acc == pytest.approx(expected["acc,none"])
    if "acc_norm,none" in expected:
        assert result.acc_norm == pytest.approx(expected["acc_norm,none"])
    if COUNT > 1:
        deviation = np.std([row["acc"] for row in rows], ddof=1) / COUNT**0.5
        assert result.acc_stderr == pytest.approx(deviation)
