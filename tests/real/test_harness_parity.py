"""Whole benchmarks beside lm-evaluation-harness: its own tasks, on the same files, with its own
backend on torch. Item by item the log-likelihoods are ours, and so are the accuracies.

ITEMS=200 in the environment takes that many of each benchmark.
"""

import functools
import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lorax-gen[harness]'")
pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
pytest.importorskip("accelerate", reason="needs torch: pip install -e '.[parity]'")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lorax_gen import load_model, save_model
from lorax_gen.data.benchmarks import find_benchmark, load_questions
from lorax_gen.evaluation.answerers import System
from lorax_gen.evaluation.benchmark import evaluate_benchmark
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import load_tokenizer

COUNT = int(os.environ.get("ITEMS", 10))
TRAIN = 300  # questions that shots are drawn from
LENGTH = 1024  # of the model: some items with five shots are longer
# Where lm-eval has them, below its folder of tasks.
TASKS = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}


def hub_row(name, question):
    """A question in the columns that the data set has on the hub."""
    if name == "arc_challenge":
        letters = list("ABCDE"[: len(question.choices)])
        return {
            "id": question.id,
            "question": question.question,
            "choices": {"text": list(question.choices), "label": letters},
            "answerKey": letters[question.answer],
        }
    if name == "boolq":
        row = {"question": question.question, "passage": question.passage}
        return row | {"idx": int(question.id.split("-")[-1]), "label": question.answer}
    if name == "winogrande":
        one, two = question.choices
        row = {"sentence": question.question, "option1": one, "option2": two}
        return row | {"answer": str(question.answer + 1)}
    activity, _, context = question.question.partition(": ")
    return {
        "ind": int(question.id.split("-")[-1]),
        "activity_label": activity,
        "ctx_a": context,
        "ctx_b": "",
        "endings": list(question.choices),
        "label": str(question.answer),
    }


@pytest.fixture(scope="module")
def files(shared_data, tmp_path_factory):
    """A folder of data in the columns of the hub, and of lm-eval's tasks that read them there."""
    folder = tmp_path_factory.mktemp("tasks")
    own = Path(find_spec("lm_eval").origin).parent / "tasks"
    for name, path in TASKS.items():
        record, data = find_benchmark(name), {}
        for split, count in (("train", TRAIN), ("test", COUNT)):
            questions = load_questions(record, split, shared_data)
            rows = [hub_row(name, q) for q in questions if record.complete(q)][:count]
            file = folder / f"{name}.{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            data[record.hub.splits[split]] = str(file)
        overrides = {
            "include": str(own / path),
            "task": f"local_{name}",
            "tag": [],
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": data, "cache_dir": str(folder / "cache")},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(overrides))
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

    @functools.cache
    def model():
        # As in lm-eval 0.4.3, which the paper used: no BOS in front of LLaMA's contexts.
        return HFLM(
            str(directory), device="cpu", dtype="float32", batch_size=2, add_bos_token=False
        )

    def evaluate(name, shots):
        found = simple_evaluate(
            model(),
            tasks=[f"local_{name}"],
            task_manager=TaskManager(include_path=str(files), include_defaults=False),
            num_fewshot=shots,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )
        samples = sorted(found["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
        return found["results"][f"local_{name}"], samples

    return evaluate


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

    rows = sorted(map(json.loads, path.read_text().splitlines()[1:]), key=lambda r: r["index"])
    assert len(rows) == len(samples) == len(questions) == COUNT
    worst = 0.0
    for row, sample in zip(rows, samples, strict=True):
        answers = sample["filtered_resps"]
        likelihoods = np.array([float(likelihood) for likelihood, _ in answers])
        worst = max(worst, np.abs(likelihoods - row["loglikelihoods"]).max())
        assert row["greedy"] == [str(greedy) == "True" for _, greedy in answers]
        assert row["acc"] == sample["acc"]
    print(
        f"{name}, {shots} shots, {COUNT} items: log-likelihoods differ by {worst:.1e} at most, "
        f"acc {result.acc:.4f} and {expected['acc,none']:.4f}, {result.truncated} truncated"
    )
    assert worst < 1e-3
    assert result.acc == pytest.approx(expected["acc,none"])
    if "acc_norm,none" in expected:
        assert result.acc_norm == pytest.approx(expected["acc_norm,none"])
        assert [row["acc_norm"] for row in rows] == [sample["acc_norm"] for sample in samples]
    if COUNT > 1:
        deviation = np.std([row["acc"] for row in rows], ddof=1) / COUNT**0.5
        assert result.acc_stderr == pytest.approx(deviation)
