"""lm-evaluation-harness's own tasks on local files, its own backend on torch, and what to compare:
shared by the tests that hold our scores against its, item by item."""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import yaml

from lorax_gen.data.benchmarks import find_benchmark, load_questions
from lorax_gen.data.questions import Question

# Where lm-eval has them, below its folder of tasks.
TASKS = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
}


def hub_row(name: str, question: Question) -> dict:
    """A question in the columns that the data set has on the hub."""
    if name.startswith("arc"):
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
    if name == "piqa":
        one, two = question.choices
        return {"goal": question.question, "sol1": one, "sol2": two, "label": question.answer}
    activity, _, context = question.question.partition(": ")
    return {
        "ind": int(question.id.split("-")[-1]),
        "activity_label": activity,
        "ctx_a": context,
        "ctx_b": "",
        "endings": list(question.choices),
        "label": str(question.answer),
    }


def write_tasks(folder: Path, names: Iterable[str], source: Path, counts: dict[str, int]) -> None:
    """Files of data in the columns of the hub, and lm-eval's tasks `local_<name>` that read them.

    `counts` has the number of questions of each split, the first complete ones.
    """
    own = Path(find_spec("lm_eval").origin).parent / "tasks"
    for name in names:
        record, data = find_benchmark(name), {}
        for split, count in counts.items():
            questions = load_questions(record, split, source)
            rows = [hub_row(name, q) for q in questions if record.complete(q)][:count]
            file = folder / f"{name}.{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            data[record.hub.splits[split]] = str(file)
        overrides = {
            "include": str(own / TASKS[name]),
            "task": f"local_{name}",
            "tag": [],
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": data, "cache_dir": str(folder / "cache")},
        }
        for key, split in (("training_split", "train"), ("validation_split", "validation")):
            overrides |= {} if split in data else {key: None}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(overrides))


def torch_harness(directory: Path, tasks: Path, **options) -> Callable[[str, int], tuple]:
    """`evaluate(name, shots)`: what lm-eval reports of a task on its own backend, and its samples.

    `options` are those of `HFLM`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    @functools.cache
    def model():
        return HFLM(str(directory), device="cpu", dtype="float32", **options)

    def evaluate(name: str, shots: int) -> tuple[dict, list[dict]]:
        found = simple_evaluate(
            model(),
            tasks=[f"local_{name}"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            num_fewshot=shots,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )
        samples = sorted(found["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
        return found["results"][f"local_{name}"], samples

    return evaluate


def read_items(path: Path) -> list[dict]:
    """The rows of a file of single items, in the order of the questions."""
    return sorted(map(json.loads, path.read_text().splitlines()[1:]), key=lambda r: r["index"])


def worst_difference(rows: Sequence[dict], samples: Sequence[dict]) -> float:
    """Of all log-likelihoods of choices, ours to theirs, in nats; asserts equal picks."""
    worst = 0.0
    for row, sample in zip(rows, samples, strict=True):
        answers = sample["filtered_resps"]
        likelihoods = np.array([float(likelihood) for likelihood, _ in answers])
        worst = max(worst, np.abs(likelihoods - row["loglikelihoods"]).max())
        assert row["greedy"] == [str(greedy) == "True" for _, greedy in answers]
        assert row["pred"] == likelihoods.argmax()
        assert row["acc"] == sample["acc"]
        assert row["acc_norm"] == sample.get("acc_norm", row["acc_norm"])
    return worst
